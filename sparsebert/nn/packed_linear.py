"""``PackedLinear``: what every packed module shares: one layout held, neutral tensors saved, the place of an
``nn.Linear`` taken."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebert.formats import nm
from sparsebert.formats.common import check_indices
from sparsebert.ops import layout_choice, layouts, select
from sparsebert.ops.activations import ACTIVATIONS, activate
from sparsebert.ops.devices import describe
from sparsebert.ops.layouts import COMPUTE, DENSE, FLOAT, NEUTRAL, Held
from sparsebert.ops.linear import OVERLOADS
from sparsebert.ops.specs import Spec

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in nm.DTYPES}
# Far above any linear layer in use; keeps a hostile layer map from asking for absurd sizes.
MAX_FEATURES = 1 << 20


class PackedLinear(nn.Module, ABC):
    """y = x Wᵀ + b with a packed W; takes the place of an ``nn.Linear`` of ``dense_out_features x dense_in_features``.

    A new module is unfilled and in the layout ``neutral``: buffers as the format's module in ``sparsebert.formats``
    describes them. ``prepare_`` builds the layout a device computes with and lets go of the neutral tensors, so that
    exactly one layout is held; ``state_dict()`` rebuilds the neutral tensors bit for bit, loading a state dict and
    moving to another device or dtype go through them. ``bias`` is an ordinary Parameter and trains; the packed weight
    does not.

    **Compaction.** ``columns``, an int32 buffer, names the input columns that W is made of; the others are zero. x is
    gathered by it, unless ``compact_input`` says that the layer before gives those columns only. ``kept_rows`` names
    the outputs that are left where the layer after reads no others, which the bias follows.
    ``in_features`` and ``out_features`` are those of x and y as they come and go.

    A format's class gives the classmethods ``_pack`` and ``_spec_from_entry``, and ``_validate``, ``_recast`` and
    ``_entry``.
    """

    format: ClassVar[str]
    # Layouts whose first tensor is the dense weight, for which torch's own linear is all there is to run.
    plain_layouts: ClassVar[tuple[str, ...]] = (DENSE,)
    # Whether a kernel for those layouts applies the activation, where there is one: then there is more to run.
    fuses_activations: ClassVar[bool] = False
    # Fields of the spec in which the parts of a stack may differ (nn.stacking).
    may_differ: ClassVar[tuple[str, ...]] = ("out_features",)

    bias: nn.Parameter | None
    columns: Tensor | None
    kept_rows: Tensor | None

    def __init__(
        self,
        spec: Spec,
        *,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dense_in_features: int | None = None,
        dense_out_features: int | None = None,
        compact_input: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{type(self).__name__}: activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
            )
        self._set_layout(NEUTRAL, spec)
        self.dense_in_features = spec.in_features if dense_in_features is None else dense_in_features
        self.dense_out_features = spec.out_features if dense_out_features is None else dense_out_features
        self.compact_input = compact_input
        self.in_features = spec.in_features if compact_input else self.dense_in_features
        self.out_features = spec.out_features
        self.activation = activation
        self.requested_layout = "auto"
        self._dtype = dtype or torch.get_default_dtype()
        for name, held in layouts.tensors(spec, NEUTRAL).items():
            self._hold(
                name, torch.empty(held.shape or (), dtype=_dtype_of(held, self._dtype), device=device), persistent=True
            )
        for name, count, dense in (
            ("columns", spec.in_features, self.dense_in_features),
            ("kept_rows", spec.out_features, self.dense_out_features),
        ):
            if count == dense:
                # Not a buffer of None: torch.export counts those among its inputs.
                setattr(self, name, None)
            else:
                self.register_buffer(name, torch.empty(count, dtype=torch.int32, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(spec.out_features, dtype=self._dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self.register_load_state_dict_post_hook(_after_loading)

    # From and to an nn.Linear

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: Any,
        *,
        name: str = "linear",
        factors: Mapping[str, Tensor] | None = None,
        columns: Tensor | None = None,
        kept_rows: Tensor | None = None,
        compact_input: bool = False,
    ) -> Self:
        """Packs ``linear``, whose weight must obey ``config`` (``ValueError`` naming ``name`` where it does not).

        ``factors``: what the weight is made of, for formats that store factors. ``columns``: int32, the columns to
        keep, where the config drops some and they are not to be told from the weight. ``kept_rows``: int32, the
        outputs to keep. ``compact_input``: x comes with the kept columns only. The result is neutral and on the device
        of ``linear``, which is left as it was; the bias is shared with it unless rows are dropped.
        """
        weight, bias, factors = linear.weight.detach(), linear.bias, factors or {}
        if kept_rows is not None:
            rows = kept_rows.long()
            weight = weight[rows]
            factors = {key: factor if key == "v" else factor[rows] for key, factor in factors.items()}
            bias = None if bias is None else nn.Parameter(bias.detach()[rows], bias.requires_grad)
        if (fraction := getattr(config, "columns", None)) is not None:
            count = nm.column_count(weight.shape[1], fraction, config.m)
            columns = nm.kept_columns(weight, count, name=name) if columns is None else columns
            weight = weight[:, columns.long()]
        spec, tensors = cls._pack(weight.contiguous(), config, name, factors)
        module = cls._of(
            spec,
            bias=bias is not None,
            device="meta",
            dtype=weight.dtype,
            dense_in_features=linear.in_features,
            dense_out_features=linear.out_features,
            compact_input=compact_input and columns is not None and len(columns) < linear.in_features,
        )
        for key, tensor in zip(layouts.tensors(spec, NEUTRAL), tensors, strict=True):
            module._hold(key, tensor, persistent=True)
        if module.columns is not None:
            module.columns = columns
        if module.kept_rows is not None and kept_rows is not None:
            module.kept_rows = kept_rows.to(torch.int32)
        module.bias = bias
        return module.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense ``nn.Linear`` of the full size with the same weight; shares the bias unless rows were dropped."""
        weight = self.dense_weight()
        bias = self.bias
        if self.columns is not None:
            weight = nm.expand_columns(weight, self.columns, self.dense_in_features)
        if self.kept_rows is not None:
            places = self.kept_rows.long()
            weight = weight.new_zeros(self.dense_out_features, weight.shape[1]).index_copy_(0, places, weight)
            if bias is not None:
                full = bias.new_zeros(self.dense_out_features)
                bias = nn.Parameter(full.detach().index_copy_(0, places, bias.detach()), bias.requires_grad)
        linear = nn.Linear(self.dense_in_features, self.dense_out_features, bias=False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", bias)
        return linear.train(self.training)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The unpacked weight ``(out_features, columns)`` of what is held."""
        return layouts.get(self.spec.op, self.layout).to_dense(self._weight(), self.spec, self.dtype)

    # From and to a checkpoint's layer map

    @classmethod
    def from_entry(
        cls,
        entry: Mapping[str, Any],
        *,
        name: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """See ``sparsebert.nn.module_from_entry``."""
        dense_in, dense_out = (read_int(entry, key, name, 1, MAX_FEATURES) for key in ("in_features", "out_features"))
        for key, kind in (("bias", bool), ("dtype", str)):
            if not isinstance(entry.get(key), kind):
                raise ValueError(f"{name}: layer map gives {key} as {entry.get(key)!r}, expected {kind.__name__}")
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{name}: layer map gives dtype as {entry['dtype']!r}, expected one of {', '.join(DTYPES)}"
            )
        columns = read_int(entry, "columns", name, 1, dense_in - 1) if "columns" in entry else dense_in
        kept_rows = read_int(entry, "kept_rows", name, 1, dense_out - 1) if "kept_rows" in entry else dense_out
        compact_input = entry.get("compact_input", False)
        if not isinstance(compact_input, bool) or (compact_input and "columns" not in entry):
            raise ValueError(
                f"{name}: layer map gives compact_input as {compact_input!r}, expected true or false, with columns"
            )
        try:
            spec = cls._spec_from_entry(entry, columns, kept_rows, name)
            # The formats' own checks of sizes, before anything is made of them.
            layouts.tensors(spec, NEUTRAL)
        except (ValueError, TypeError) as error:
            text = str(error)
            raise ValueError(text if text.startswith(f"{name}: ") else f"{name}: {text}") from error
        return cls._of(
            spec,
            bias=entry["bias"],
            device=device,
            dtype=dtype or DTYPES[entry["dtype"]],
            dense_in_features=dense_in,
            dense_out_features=dense_out,
            compact_input=compact_input,
        )

    def layer_entry(self) -> dict[str, Any]:
        """This layer in a checkpoint's layer map: every tensor shape follows from it.

        ``in_features`` and ``out_features`` are those of the dense layer; ``columns``, ``kept_rows`` and
        ``compact_input`` say what compaction left of it. ``ValueError`` for a stack of factors, which no map describes.
        """
        if getattr(self.spec, "parts", 1) > 1:
            raise ValueError(
                f"{type(self).__name__}: a stack of {self.spec.label} has no entry in a layer map, expected the layers "
                f"that nn.split makes of it"
            )
        entry = {
            "format": self.format,
            "in_features": self.dense_in_features,
            "out_features": self.dense_out_features,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bias": self.bias is not None,
            **self._entry(),
        }
        if self.columns is not None:
            entry["columns"] = self.spec.in_features
        if self.kept_rows is not None:
            entry["kept_rows"] = self.spec.out_features
        if self.compact_input:
            entry["compact_input"] = True
        return entry

    # What a format gives

    @classmethod
    def _of(cls, spec: Spec, **options: Any) -> Self:
        """An unfilled module of ``spec``, whatever the class's own constructor takes."""
        module = cls.__new__(cls)
        PackedLinear.__init__(module, spec, **options)
        return module

    @classmethod
    @abstractmethod
    def _pack(
        cls, weight: Tensor, config: Any, name: str, factors: Mapping[str, Tensor]
    ) -> tuple[Spec, Sequence[Tensor]]:
        """Spec and neutral tensors of ``weight``, which obeys ``config``."""

    @classmethod
    @abstractmethod
    def _spec_from_entry(cls, entry: Mapping[str, Any], in_features: int, out_features: int, name: str) -> Spec:
        """The spec that an untrusted entry describes; ``ValueError`` naming ``name`` where it describes none."""

    @abstractmethod
    def _entry(self) -> dict[str, Any]:
        """What the format adds to the layer map."""

    @abstractmethod
    def _validate(self, tensors: Sequence[Tensor], name: str) -> None:
        """``ValueError`` naming ``name`` and the tensor unless these are the neutral tensors of some weight."""

    @abstractmethod
    def _recast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Spec, Sequence[Tensor]]:
        """Spec and neutral tensors in another dtype; ``ValueError`` where it cannot hold a weight."""

    # From and to a stack

    @classmethod
    def _stack_refusal(cls, parts: Sequence[Self]) -> str | None:
        """None, or what else keeps modules of this class, alike in all that every module has, from being a stack."""
        return None

    @classmethod
    def _stack(cls, specs: Sequence[Any], tensors: Sequence[Sequence[Tensor]]) -> tuple[Any, Sequence[Tensor]]:
        """Spec and neutral tensors of weights, one under the other. Here each tensor has a row for each output."""
        spec = specs[0]._replace(out_features=sum(spec.out_features for spec in specs))
        return spec, [torch.cat(one) for one in zip(*tensors, strict=True)]

    @classmethod
    def _split(cls, spec: Any, tensors: Sequence[Tensor], counts: list[int]) -> list[tuple[Any, Sequence[Tensor]]]:
        """The inverse of ``_stack``: specs and new tensors of the next ``counts`` outputs each."""
        parts = zip(*([rows.clone() for rows in tensor.split(counts)] for tensor in tensors), strict=True)
        return [(spec._replace(out_features=count), part) for count, part in zip(counts, parts, strict=True)]

    def _like(self, spec: Spec, tensors: Sequence[Tensor], bias: nn.Parameter | None) -> Self:
        """A module with another weight and bias that takes x as this one does, neutral."""
        module = self._of(
            spec,
            bias=bias is not None,
            activation=self.activation,
            device="meta",
            dtype=self.dtype,
            dense_in_features=self.dense_in_features,
            compact_input=self.compact_input,
        )
        module._hold_neutral(spec, tensors)
        if self.columns is not None:
            module.columns = self.columns.clone()
        module.bias = bias
        return module.train(self.training)

    @property
    def description(self) -> str:
        """The pattern as tables show it."""
        text = self.spec.label
        if self.columns is not None:
            text += f" in {self.spec.in_features} of {self.dense_in_features} columns"
        if self.kept_rows is not None:
            text += f", {self.spec.out_features} of {self.dense_out_features} rows"
        return text

    # Computing

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype the layer was made for: that of x, of the bias and of what is not stored otherwise."""
        for tensor, held in zip(self._weight(), layouts.tensors(self.spec, self.layout).values(), strict=True):
            if held.dtype == COMPUTE:
                return tensor.dtype
        return self._dtype if self.bias is None else self.bias.dtype

    @property
    def device(self) -> torch.device:
        return self._weight()[0].device

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)`` in the module's dtype."""
        activation = self.activation
        # Found at once, where self.bias and self.columns are looked for elsewhere first. A replica of DataParallel has
        # no parameters, but attributes in their place.
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias
        columns = None if self.compact_input else self._buffers.get("columns")
        if columns is not None and x.shape[-1:] != (self.in_features,):
            # Where a kernel takes the columns, nothing else would see that they are not there.
            raise ValueError(f"{self.spec.op}: x has shape {tuple(x.shape)}, expected (..., {self.in_features})")
        more = self.fuses_activations and activation != "none"
        if self.layout in self.plain_layouts and not more and not select.may_be_forced():
            # Called directly, torch's own linear costs no op overhead, and compilers can fuse it.
            weight = self._tensor(self._names[0])
            if not weight.requires_grad:
                x = x if columns is None else x.index_select(-1, columns)
                return activate(F.linear(x, weight, bias), activation)
        # The derivative of an activation needs its input, which the fused op does not keep.
        fused = activation == "none" or not torch.is_grad_enabled()
        run, keywords = OVERLOADS[self.spec.op], self._keywords
        y = run(x, self._weight(), bias, columns, activation=activation if fused else "none", **keywords)
        return y if fused else activate(y, activation)

    @property
    def gathers(self) -> bool:
        """Whether a call takes some columns of x."""
        return self.columns is not None and not self.compact_input

    @property
    def held_tensors(self) -> list[Tensor]:
        """The tensors of the layout that is held, in its order."""
        return self._weight()

    def problem(self, tokens: int) -> select.Problem:
        """What a call with ``tokens`` rows of x asks of the kernels."""
        return select.Problem(self.layout, describe(self.device), self.dtype, self.spec, tokens, self.activation)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.description}, layout={self.layout}"
        )
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    # Layouts

    def neutral(self) -> tuple[Tensor, ...]:
        """The neutral tensors, in the format's order, whatever layout is held."""
        return tuple(layouts.get(self.spec.op, self.layout).to_neutral(self._weight(), self.spec))

    @torch.no_grad()
    def prepare_(self, layout: str = "auto") -> Self:
        """Holds the weight in ``layout``: ``auto`` (the best known for the device), or one of ``ops.layouts.names()``.

        ``ValueError`` with the reason where this device cannot hold it. The choice is kept when the module moves, where
        the new device allows it.
        """
        target = layout_choice.resolve(layout, self.spec, self.dtype, self.device)
        self.requested_layout = layout
        if target != self.layout:
            self._to_neutral()
            if target != NEUTRAL:
                held = layouts.get(self.spec.op, target)
                self._replace(target, held.from_neutral(self._weight(), self.spec, self.dtype))
        return self

    def layout_refusal(self, layout: str) -> str | None:
        """None, or why this device cannot hold ``layout``."""
        return layout_choice.refusal(layout, self.spec, self.dtype, self.device)

    @torch.no_grad()
    def finish_loading(self, name: str) -> None:
        """Validates neutral tensors that came from outside, then builds the device's layout.

        ``ValueError`` naming the layer ``name`` and the tensor where they are not the packed form of a weight.
        """
        # Any other layout was built from tensors that were checked already.
        if self.layout == NEUTRAL:
            self._validate(self._weight(), name)
            self._validate_compaction(self.columns, self.kept_rows, name)
            for key, held in layouts.tensors(self.spec, NEUTRAL).items():
                if held.dtype == FLOAT:
                    self._hold(key, self._tensor(key).float(), persistent=True)
        self.prepare_(self.requested_layout)

    def memory_bytes(self) -> int:
        """Bytes of the tensors held now, bias included."""
        return sum(t.nbytes for t in (*self._weight(), *self._own_tensors()))

    def disk_bytes(self) -> int:
        """Bytes of the tensors a checkpoint stores, bias included."""
        return sum(t.nbytes for t in self._own_tensors()) + self._neutral_bytes()

    def dense_bytes(self) -> int:
        """Bytes of the ``nn.Linear`` this module stands for, bias included."""
        bias = 0 if self.bias is None else self.dense_out_features * self.bias.element_size()
        return self.dense_in_features * self.dense_out_features * self.dtype.itemsize + bias

    def _neutral_bytes(self) -> int:
        total = 0
        for held in layouts.tensors(self.spec, NEUTRAL).values():
            total += math.prod(held.shape or ()) * _dtype_of(held, self.dtype).itemsize
        return total

    def _own_tensors(self) -> list[Tensor]:
        """Tensors that every layout keeps."""
        return [t for t in (self.bias, self.columns, self.kept_rows) if t is not None]

    def _set_layout(self, layout: str, spec: Spec) -> None:
        """Names the buffers a layout lies in: the neutral ones as in the file, others with names of their own."""
        names = layouts.tensors(spec, layout)
        self.spec, self.layout, self._keywords = spec, layout, {"layout": layout, **spec._asdict()}
        self._names = list(names) if layout == NEUTRAL else [f"{layout}_{name.replace('.', '_')}" for name in names]
        self._places = [_place(name) for name in self._names]

    def _weight(self) -> list[Tensor]:
        # Every call of the layer comes here: no function for each tensor, no name taken apart.
        own, parts = self._buffers, self._modules
        held: list[Any] = [(parts[part]._buffers if part else own)[tail] for part, tail in self._places]  # type: ignore
        return held

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that the buffer ``name`` lies in, and its name there."""
        part, tail = _place(name)
        return (self._modules[part] if part else self), tail  # type: ignore[return-value]

    def _tensor(self, name: str) -> Tensor:
        owner, tail = self._owner(name)
        return owner._buffers[tail]  # type: ignore[return-value]

    def _hold(self, name: str, tensor: Tensor, *, persistent: bool) -> None:
        part = name.rpartition(".")[0]
        if part and part not in self._modules:
            self.add_module(part, nn.Module())
        owner, tail = self._owner(name)
        owner.register_buffer(tail, tensor, persistent=persistent)

    def _to_neutral(self) -> None:
        if self.layout != NEUTRAL:
            self._replace(NEUTRAL, list(self.neutral()))

    def _replace(self, layout: str, tensors: Sequence[Tensor]) -> None:
        for name in self._names:
            owner, tail = self._owner(name)
            delattr(owner, tail)
        self._set_layout(layout, self.spec)
        for name, tensor in zip(self._names, tensors, strict=True):
            self._hold(name, tensor, persistent=layout == NEUTRAL)

    def _hold_neutral(self, spec: Spec, tensors: Sequence[Tensor]) -> None:
        """Other neutral tensors in the place of those held."""
        self._set_layout(NEUTRAL, spec)
        for name, tensor in zip(layouts.tensors(spec, NEUTRAL), tensors, strict=True):
            self._hold(name, tensor, persistent=True)

    def _validate_compaction(self, columns: Tensor | None, kept_rows: Tensor | None, name: str) -> None:
        for label, places, count, features in (
            ("columns", columns, self.spec.in_features, self.dense_in_features),
            ("kept_rows", kept_rows, self.spec.out_features, self.dense_out_features),
        ):
            if places is not None:
                check_indices(places, count, features, f"{name}: {label}")

    # What nn.Module does with tensors, kept true for a module that holds something else than it saves

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtype, device = self.dtype, self.device
        probe = fn(torch.empty(0, dtype=dtype, device=device))
        scale = fn(torch.empty(0, dtype=torch.float32, device=device))
        if (probe.dtype, scale.dtype, probe.device) == (dtype, torch.float32, device):
            return super()._apply(fn, recurse)
        with torch.no_grad():
            # What comes from meta is still to be filled, so no layout can be built from it.
            unfilled = device.type == "meta"
            if probe.dtype != dtype and not unfilled:
                # First of all, since this may refuse.
                recast = self._recast(self.neutral(), probe.dtype)
                self._to_neutral()
                self._hold_neutral(*recast)
            else:
                self._to_neutral()
            exact = {
                name: self._tensor(name)
                for name, held in layouts.tensors(self.spec, NEUTRAL).items()
                if held.dtype == FLOAT
            }
        super()._apply(fn, recurse)
        self._dtype = probe.dtype
        for name, tensor in exact.items():
            # A scale stays in fp32, whatever the model is cast to.
            moved = self._tensor(name)
            if moved.dtype != tensor.dtype:
                value = torch.empty_like(tensor, device=moved.device) if tensor.is_meta else tensor.to(moved.device)
                self._hold(name, value, persistent=True)
        if not unfilled and probe.device.type != "meta":
            self.prepare_("auto" if self.layout_refusal(self.requested_layout) else self.requested_layout)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != NEUTRAL:
            with torch.no_grad():
                for name, tensor in zip(layouts.tensors(self.spec, NEUTRAL), self.neutral(), strict=True):
                    destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = prefix.removesuffix(".") or type(self).__name__
        names = [prefix + key for key in layouts.tensors(self.spec, NEUTRAL)]
        missing = [key for key in names if key not in state_dict]
        # Refuse before anything is overwritten: a bad index would be an out-of-bounds read in a kernel.
        if missing and len(missing) < len(names):
            raise ValueError(f"{name}: state dict has no {missing[0]}, expected all or none of {', '.join(names)}")
        self._validate_compaction(state_dict.get(f"{prefix}columns"), state_dict.get(f"{prefix}kept_rows"), name)
        if not missing:
            tensors = [state_dict[key] for key in names]
            self._validate(tensors, name)
            assign = bool(args and args[0].get("assign_to_params_buffers", False))
            # Children take theirs from the same dict, a copy of torch's own.
            state_dict.update(zip(names, self._as_held(tensors, name, keep_dtype=assign), strict=True))
        self._to_neutral()
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def _as_held(self, tensors: Sequence[Tensor], name: str, *, keep_dtype: bool) -> Sequence[Tensor]:
        """Valid neutral tensors to load: scales in fp32, and in this module's dtype unless it is to take theirs.

        Plain copying would leave what rounds to zero, or overflows, in places that the format does not allow.
        """
        kinds = [held.dtype for held in layouts.tensors(self.spec, NEUTRAL).values()]
        tensors = [t.float() if kind == FLOAT else t for t, kind in zip(tensors, kinds, strict=True)]
        found = {t.dtype for t, kind in zip(tensors, kinds, strict=True) if kind == COMPUTE}
        if keep_dtype or found <= {self.dtype} or tensors[0].is_meta:
            return tensors
        try:
            spec, tensors = self._recast(tensors, self.dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if spec != self.spec:
            device = self.device
            self._to_neutral()
            self._hold_neutral(spec, [torch.empty_like(tensor, device=device) for tensor in tensors])
        return tensors


def _place(name: str) -> tuple[str, str]:
    """The child that a buffer lies in, empty where it is none, and its name there: ``sparse.rows`` in ``sparse``."""
    part, _, tail = name.rpartition(".")
    return part, tail


def _dtype_of(held: Held, compute: torch.dtype) -> torch.dtype:
    """The dtype that a module holds a tensor in: scales in fp32, whatever they are accepted in."""
    if isinstance(held.dtype, torch.dtype):
        return held.dtype
    return compute if held.dtype == COMPUTE else torch.float32


def _after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    """A state dict went in, that of the children included: the layout is built anew."""
    if isinstance(module, PackedLinear) and module.device.type != "meta":
        module.prepare_(module.requested_layout)


def read_int(entry: Mapping[str, Any], key: str, name: str, low: int, high: int) -> int:
    """A bounded int of an untrusted layer map entry; ``ValueError`` naming the layer ``name``."""
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}: layer map gives {key} as {value!r}, expected int")
    if not low <= value <= high:
        raise ValueError(f"{name}: layer map gives {key} as {value}, expected {low} to {high}")
    return value
