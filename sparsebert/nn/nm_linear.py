"""``NMLinear``: a linear layer whose n:m weight is held packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebert.configs import NMConfig
from sparsebert.formats import nm
from sparsebert.ops import layout_choice, layouts, nm_linear, select
from sparsebert.ops.activations import ACTIVATIONS, activate

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in nm.DTYPES}
# Far above any linear layer in use; keeps a hostile layer map from asking for absurd sizes.
_MAX_FEATURES = 1 << 20


class NMLinear(nn.Module):
    """y = x Wᵀ + b with W ``(out_features, in_features)`` at n:m; takes the place of an ``nn.Linear``.

    A new module is unfilled and in the layout ``neutral``: buffers ``values`` and ``positions`` as in
    ``sparsebert.formats.nm``. ``prepare_`` builds the layout a device computes with and lets go of the neutral tensors,
    so that exactly one layout is held; ``state_dict()`` rebuilds the neutral tensors bit for bit, loading a state dict
    and moving to another device or dtype go through them. ``bias`` is an ordinary Parameter and trains; the packed
    weight does not.

    On a CPU the layout ``auto`` is ``dense``: the weight is unpacked once and held so, which costs the memory of a
    dense layer (``memory_bytes`` says so) and the time of one. ``prepare_("neutral")`` holds the packed tensors and
    unpacks in every call instead.
    """

    values: Tensor
    positions: Tensor
    dense_dense: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        m: int,
        *,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = NMConfig(n, m)
        if activation not in ACTIVATIONS:
            raise ValueError(f"NMLinear: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation
        self.layout = "neutral"
        self.requested_layout = "auto"
        dtype = dtype or torch.get_default_dtype()
        values_shape, positions_shape = nm.packed_shapes(n, m, out_features, in_features)
        self.register_buffer("values", torch.empty(values_shape, dtype=dtype, device=device))
        self.register_buffer("positions", torch.empty(positions_shape, dtype=torch.uint8, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: NMConfig, *, name: str = "linear") -> NMLinear:
        """Packs ``linear``, whose weight must obey ``config`` (``ValueError`` naming ``name`` where it does not).

        The result is neutral and on the device of ``linear``, which is left as it was; the bias is shared with it.
        """
        weight = linear.weight.detach()
        module = cls(
            linear.in_features,
            linear.out_features,
            config.n,
            config.m,
            bias=linear.bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        module.values, module.positions = nm.pack(weight, config.n, config.m, name=name)
        module.bias = linear.bias
        return module.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense ``nn.Linear`` with the same weight; shares the bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(layouts.get(self.layout).to_dense(self._weight(), self.spec()))
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    @classmethod
    def from_entry(
        cls,
        entry: dict[str, Any],
        *,
        name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NMLinear:
        """See ``sparsebert.nn.module_from_entry``."""
        expected = {"in_features": int, "out_features": int, "n": int, "m": int, "bias": bool, "dtype": str}
        for key, kind in expected.items():
            value = entry.get(key)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise ValueError(f"{name}: layer map gives {key} as {value!r}, expected {kind.__name__}")
        for key in ("in_features", "out_features"):
            if not 1 <= entry[key] <= _MAX_FEATURES:
                raise ValueError(f"{name}: layer map gives {key} as {entry[key]}, expected 1 to {_MAX_FEATURES}")
        if entry["dtype"] not in _DTYPE_NAMES:
            raise ValueError(
                f"{name}: layer map gives dtype as {entry['dtype']!r}, expected one of {', '.join(_DTYPE_NAMES)}"
            )
        try:
            return cls(
                entry["in_features"],
                entry["out_features"],
                entry["n"],
                entry["m"],
                bias=entry["bias"],
                device=device,
                dtype=dtype or _DTYPE_NAMES[entry["dtype"]],
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def layer_entry(self) -> dict[str, Any]:
        """This layer in a checkpoint's layer map: every tensor shape follows from it."""
        return {
            "format": self.config.format,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bias": self.bias is not None,
            "n": self.config.n,
            "m": self.config.m,
        }

    @property
    def dtype(self) -> torch.dtype:
        return self._weight()[0].dtype

    @property
    def device(self) -> torch.device:
        return self._weight()[0].device

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)`` in the module's dtype."""
        activation = self.activation
        if self.layout == "dense" and not select.may_be_forced() and not self.dense_dense.requires_grad:
            # This layout is torch's own linear: called directly it costs no op overhead, and compilers can fuse it.
            return activate(F.linear(x, self.dense_dense, self.bias), activation)
        # The derivative of an activation needs its input, which the fused op does not keep.
        fused = activation == "none" or not torch.is_grad_enabled()
        y = nm_linear(
            x,
            self._weight(),
            self.bias,
            layout=self.layout,
            n=self.config.n,
            m=self.config.m,
            in_features=self.in_features,
            out_features=self.out_features,
            activation=activation if fused else "none",
        )
        return y if fused else activate(y, activation)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.config}, layout={self.layout}"
        )
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    # Layouts

    def neutral(self) -> tuple[Tensor, Tensor]:
        """``(values, positions)`` whatever layout is held."""
        if self.layout == "neutral":
            return self.values, self.positions
        dense = layouts.get(self.layout).to_dense(self._weight(), self.spec())
        return nm.pack(dense, self.config.n, self.config.m)

    @torch.no_grad()
    def prepare_(self, layout: str = "auto") -> NMLinear:
        """Holds the weight in ``layout``: ``auto`` (the best known for the device), or one of ``ops.layouts.names()``.

        ``ValueError`` with the reason where this device cannot hold it. The choice is kept when the module moves, where
        the new device allows it.
        """
        target = layout_choice.resolve(layout, self.spec(), self.dtype, self.device)
        self.requested_layout = layout
        if target != self.layout:
            self._to_neutral()
            if target != "neutral":
                dense = nm.unpack(self.values, self.positions, self.config.n, self.config.m, self.in_features)
                tensors = layouts.get(target).from_dense(dense, self.spec())
                self._replace("neutral", target, tensors)
        return self

    def layout_refusal(self, layout: str) -> str | None:
        """None, or why this device cannot hold ``layout``."""
        return layout_choice.refusal(layout, self.spec(), self.dtype, self.device)

    @torch.no_grad()
    def finish_loading(self, name: str) -> None:
        """Validates neutral tensors that came from outside, then builds the device's layout.

        ``ValueError`` naming the layer ``name`` and the tensor where they are not the packed form of a weight.
        """
        # Any other layout was built from tensors that were checked already.
        if self.layout == "neutral":
            self._validate(self.values, self.positions, name)
        self.prepare_(self.requested_layout)

    def memory_bytes(self) -> int:
        """Bytes of the tensors held now, bias included."""
        held = [*self._weight(), *([] if self.bias is None else [self.bias])]
        return sum(t.nbytes for t in held)

    def disk_bytes(self) -> int:
        """Bytes of the tensors a checkpoint stores, bias included."""
        values_shape, positions_shape = self._packed_shapes()
        item = self.dtype.itemsize
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return values_shape[0] * values_shape[1] * item + positions_shape[0] * positions_shape[1] + bias

    def dense_bytes(self) -> int:
        """Bytes of the ``nn.Linear`` this module stands for, bias included."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.in_features * self.out_features * self.dtype.itemsize + bias

    def spec(self) -> layouts.Spec:
        """Pattern and sizes, as ``ops.layouts`` takes them."""
        return layouts.Spec(self.config.n, self.config.m, self.in_features, self.out_features)

    def _packed_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return nm.packed_shapes(self.config.n, self.config.m, self.out_features, self.in_features)

    def _weight(self) -> list[Tensor]:
        buffers = self._buffers
        return [buffers[name] for name in _buffer_names(self.layout)]  # type: ignore[misc]

    def _to_neutral(self) -> None:
        if self.layout != "neutral":
            self._replace(self.layout, "neutral", list(self.neutral()))

    def _replace(self, old: str, new: str, tensors: list[Tensor]) -> None:
        for name in _buffer_names(old):
            delattr(self, name)
        for name, tensor in zip(_buffer_names(new), tensors, strict=True):
            self.register_buffer(name, tensor, persistent=new == "neutral")
        self.layout = new

    def _validate(self, values: Tensor, positions: Tensor, name: str) -> None:
        nm.validate(values, positions, self.config.n, self.config.m, self.out_features, self.in_features, name=name)

    # What nn.Module does with tensors, kept true for a module that holds something else than it saves

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NMLinear:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype == self.dtype and probe.device == self.device:
            return super()._apply(fn, recurse)
        with torch.no_grad():
            self._to_neutral()
            # What comes from meta is still to be filled, so no layout can be built from it.
            unfilled = self.values.is_meta
            if probe.dtype != self.dtype and not unfilled:
                self._cast(probe.dtype)
        super()._apply(fn, recurse)
        if not unfilled and probe.device.type != "meta":
            self.prepare_("auto" if self.layout_refusal(self.requested_layout) else self.requested_layout)
        return self

    def _cast(self, dtype: torch.dtype) -> None:
        """Another dtype may round weights to zero, which moves slots: so it goes through the dense weight."""
        dense = nm.unpack(self.values, self.positions, self.config.n, self.config.m, self.in_features)
        self.values, self.positions = nm.pack(dense.to(dtype), self.config.n, self.config.m, name="cast")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "neutral":
            with torch.no_grad():
                destination[prefix + "values"], destination[prefix + "positions"] = self.neutral()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = (prefix + "values", prefix + "positions")
        if all(name in state_dict for name in names):
            # Refuse before anything is overwritten: a bad index would be an out-of-bounds read in a kernel.
            self._validate(state_dict[names[0]], state_dict[names[1]], prefix.removesuffix(".") or "NMLinear")
        self._to_neutral()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.values.is_meta:
            self.prepare_(self.requested_layout)


def _buffer_names(layout: str) -> tuple[str, ...]:
    """Buffers a layout lies in: the neutral ones under their names in the file, others under names of their own."""
    tensors = layouts.get(layout).tensors
    return tensors if layout == "neutral" else tuple(f"{layout}_{tensor}" for tensor in tensors)
