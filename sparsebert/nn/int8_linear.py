"""``Int8Linear``: a linear layer in 8-bit integers, with or without an n:m pattern in its weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.configs import ACTIVATION_MODES, Int8Config, NMConfig
from sparsebert.formats import int8, nm
from sparsebert.nn.packed_linear import PackedLinear, read_int
from sparsebert.ops import int8 as op
from sparsebert.ops import int8_linear_from_int8, int8_linear_to_int8, layout_choice
from sparsebert.ops.activations import activate
from sparsebert.ops.layouts import DENSE
from sparsebert.ops.specs import Int8Spec, Spec


class Int8Linear(PackedLinear):
    """y = s_x s_w (q_x Q_wᵀ) + b: buffers ``values`` int8, ``positions`` where the weight has a pattern, ``scales``
    fp32 ``(out)``, and ``input_scale`` fp32 ``()`` where ``activations`` is ``static`` (``sparsebert.formats.int8``).

    A static layer is made without an input scale, and refuses to compute until ``sparsebert.calibrate`` has measured
    one or a state dict has brought one. Scales stay in fp32 whatever the module is cast to.

    The layout ``dense`` computes with s_w Q_w and *does not quantize x*. It is what ``auto`` means on a CPU without
    int8 instructions, where exact int8 sums take longer than a dense matmul; ``quantizing`` holds another for a while.
    """

    format = Int8Config.format
    spec: Int8Spec

    # While it is calibrated, a static layer quantizes as a dynamic one does.
    calibrating = False
    # Kept beside the tensor, since looking into that in every call would wait for the device. A module made of a layer
    # map is to be filled with a checkpoint's tensors, this one among them.
    has_input_scale = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activations: str = "dynamic",
        n: int = 1,
        m: int = 1,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = Int8Spec(activations, n, m, in_features, out_features)
        super().__init__(spec, bias=bias, activation=activation, device=device, dtype=dtype)
        self.has_input_scale = activations == "dynamic"

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features) -> (..., out_features)`` in x's dtype, any float one.

        ``RuntimeError`` where the layer is static and has no input scale yet.
        """
        if self.calibrating:
            return self._forward_dynamic(x)
        if not self.has_input_scale:
            raise RuntimeError(
                f"Int8Linear ({self.out_features} x {self.in_features}): static activations have no input_scale yet; "
                f"call sparsebert.calibrate(model, batches) first"
            )
        return super().forward(x)

    def set_input_scale_(self, scale: float) -> None:
        """Sets the step of a static layer's activations, q_x = rint(x / scale); ``ValueError`` where it has none."""
        if self.spec.activations != "static":
            raise ValueError("Int8Linear: activations are dynamic, expected a static layer to set input_scale of")
        value = torch.tensor(scale, dtype=torch.float32)
        int8.validate_input_scale(value, name="Int8Linear")
        for name in self._names:
            if name.endswith("input_scale"):
                self._tensor(name).fill_(value)
        self.has_input_scale = True

    # For a fused encoder layer, where what comes before writes the integers.

    @property
    def quantizes(self) -> bool:
        """Whether a call rounds the x that it gets to int8: not where the layout is ``dense``, nor before columns of x
        are taken."""
        return self.layout != DENSE and not self.gathers

    @property
    def static_scale(self) -> Tensor | None:
        """The step of static activations, fp32 ``()``; None where they are dynamic."""
        return self._weight()[-1] if self.spec.activations == "static" else None

    def from_int8(self, q: Tensor, s: Tensor, *, activation: str, dtype: torch.dtype) -> Tensor:
        """``activation`` of the product in ``dtype``, of x as ``ops.quantize_rows(x, input_scale)`` gives it."""
        weight, keywords = self._weight(), self._keywords
        return int8_linear_from_int8(q, s, weight, self.bias, dtype=dtype, activation=activation, **keywords)

    def to_int8(self, q: Tensor, s: Tensor, output_scale: Tensor, *, activation: str) -> tuple[Tensor, Tensor]:
        """The same as int8 rows by the step ``output_scale``, and their scales."""
        weight, keywords = self._weight(), self._keywords
        return int8_linear_to_int8(q, s, weight, self.bias, output_scale, activation=activation, **keywords)

    def _forward_dynamic(self, x: Tensor) -> Tensor:
        spec = self.spec._replace(activations="dynamic")
        weight = list(self.neutral())[:-1]
        return activate(op.int8_linear(x, weight, self.bias, layout="neutral", **spec._asdict()), self.activation)

    @classmethod
    def _pack(
        cls, weight: Tensor, config: Int8Config, name: str, factors: Mapping[str, Tensor]
    ) -> tuple[Int8Spec, Sequence[Tensor]]:
        out_features, in_features = weight.shape
        n, m = (1, 1) if config.weights is None else (config.weights.n, config.weights.m)
        spec = Int8Spec(config.activations, n, m, in_features, out_features)
        if config.weights is not None and (bad := nm.find_violation(weight, n, m)) is not None:
            row, column, count = bad
            raise ValueError(
                f"{name}: weight does not obey {n}:{m}: row {row}, columns {column} to {column + m - 1} hold {count} "
                f"non-zeros, expected at most {n}"
            )
        values, scales = int8.quantize_weight(weight, name=name)
        tensors = [*op.pack(values, spec, name=name), scales]
        if config.activations == "static":
            tensors.append(torch.zeros((), dtype=torch.float32, device=weight.device))
        return spec, tensors

    @classmethod
    def from_linear(cls, linear: Any, config: Int8Config, **options: Any) -> Int8Linear:
        module = super().from_linear(linear, config, **options)
        module.has_input_scale = config.activations == "dynamic"
        return module

    @classmethod
    def _spec_from_entry(cls, entry: Mapping[str, Any], in_features: int, out_features: int, name: str) -> Int8Spec:
        activations = entry.get("activations")
        if not isinstance(activations, str) or activations not in ACTIVATION_MODES:
            raise ValueError(
                f"{name}: layer map gives activations as {activations!r}, expected one of {', '.join(ACTIVATION_MODES)}"
            )
        n = m = 1
        if "n" in entry or "m" in entry:
            n, m = (read_int(entry, key, name, -(1 << 31), 1 << 31) for key in ("n", "m"))
            NMConfig(n, m)
        return Int8Spec(activations, n, m, in_features, out_features)

    def _entry(self) -> dict[str, Any]:
        pattern = {} if self.spec.m == 1 else {"n": self.spec.n, "m": self.spec.m}
        return {"activations": self.spec.activations, **pattern}

    def _validate(self, tensors: Sequence[Tensor], name: str) -> None:
        spec = self.spec
        values, *others = tensors
        shape = (spec.out_features, spec.in_features)
        if spec.m == 1:
            int8.validate(values, others[0], *shape, name=name)
        else:
            packed, _ = nm.packed_shapes(spec.n, spec.m, *shape)
            int8.validate(values, others[1], *packed, name=name)
            nm.validate(values, others[0], spec.n, spec.m, *shape, name=name)
        if spec.activations == "static":
            int8.validate_input_scale(others[-1], name=name)

    @classmethod
    def _stack_refusal(cls, parts: Sequence[Int8Linear]) -> str | None:
        if parts[0].spec.activations == "dynamic":
            return None
        for place, part in enumerate(parts):
            if not part.has_input_scale:
                return f"part {place} has no input_scale yet; call sparsebert.calibrate(model, batches) first"
        first, *others = (part.neutral()[-1] for part in parts)
        for place, scale in enumerate(others, 1):
            if not torch.equal(scale, first):
                return f"part {place} has input_scale {float(scale):g}, expected {float(first):g} as part 0"
        return None

    @classmethod
    def _stack(cls, specs: Sequence[Any], tensors: Sequence[Sequence[Tensor]]) -> tuple[Any, Sequence[Tensor]]:
        if specs[0].activations == "dynamic":
            return super()._stack(specs, tensors)
        # One scale for all of x, which the parts have alike.
        spec, rows = super()._stack(specs, [own[:-1] for own in tensors])
        return spec, [*rows, tensors[0][-1].clone()]

    @classmethod
    def _split(cls, spec: Any, tensors: Sequence[Tensor], counts: list[int]) -> list[tuple[Any, Sequence[Tensor]]]:
        if spec.activations == "dynamic":
            return super()._split(spec, tensors, counts)
        found = super()._split(spec, tensors[:-1], counts)
        return [(own, [*rows, tensors[-1].clone()]) for own, rows in found]

    def _like(self, spec: Spec, tensors: Sequence[Tensor], bias: nn.Parameter | None) -> Int8Linear:
        module = super()._like(spec, tensors, bias)
        module.has_input_scale = self.has_input_scale
        return module

    def finish_loading(self, name: str) -> None:
        super().finish_loading(name)
        self.has_input_scale = True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # On meta only names and shapes are asked for.
        if not self.has_input_scale and self.device.type != "meta":
            raise ValueError(
                f"{prefix.removesuffix('.') or 'Int8Linear'}: static activations have no input_scale yet; call "
                f"sparsebert.calibrate(model, batches) before saving"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}input_scale" in state_dict:
            self.has_input_scale = True

    def _recast(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Int8Spec, Sequence[Tensor]]:
        # Integers and scales do not follow the model's dtype; x may come in any.
        return self.spec, tensors


@contextmanager
def quantizing(model: nn.Module) -> Iterator[list[str]]:
    """Inside, the int8 layers of ``model`` that are held ``dense`` are held in a layout that quantizes x, so that the
    model computes what it does on a device with int8 instructions; afterwards as they were asked for before.

    Gives the paths of these layers. For measuring quality: in time such a layout loses where ``auto`` is ``dense``.
    """
    found = [
        (path, module, module.requested_layout)
        for path, module in model.named_modules()
        if isinstance(module, Int8Linear) and module.layout == DENSE
    ]
    try:
        for _, module, _ in found:
            module.prepare_(layout_choice.quantizing(module.spec, module.dtype, module.device))
        yield [path for path, _, _ in found]
    finally:
        for _, module, requested in found:
            module.prepare_(requested)
