"""``sparsebert::int8_linear``: y = activation(s_x s_w (q_x Q_wᵀ) + b), 8-bit integers with exact int32 sums.

q_x and s_x come from x by the rounding of ``formats.int8``, per token (``dynamic``) or by one stored scale
(``static``); Q_w and s_w are the weight, one scale for each output channel. Sums of products are exact, the scales are
applied in fp32 in the order (sum * s_x) * s_w + b, and the result is rounded once to x's dtype, which may be any float
dtype. See ``ops.linear`` for the rest of the contract. Rounding has no useful derivative: the gradient for x goes
straight through it, dL/dx = dL/dy (s_w Q_w).

Layouts besides ``neutral``: ``unpacked`` (n:m weights) holds the int8 weight with its zeros, for int8 matmuls;
``float`` (CPU) holds the integers as fp32 numbers, the quickest exact way on a CPU without int8 instructions; ``dense``
holds s_w Q_w beside the neutral tensors and *does not quantize x*, which is quicker still there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.formats import int8, nm
from sparsebert.ops import layouts, reference, select
from sparsebert.ops.activations import activate
from sparsebert.ops.layouts import FLOAT, Held, Layout
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import Int8Spec

OP = "int8_linear"
UNPACKED, FLOATS = "unpacked", "float"

# fp32 holds every integer up to here, so a sum that stays below it is exact in any order.
_EXACT = 1 << 24
# torch._int_mm on CUDA wants more rows than this, and sizes in multiples of 8.
_CUDA_ROWS, _CUDA_MULTIPLE = 17, 8


def int8_linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, *, layout: str, **sizes: Any) -> Tensor:
    """y = activation(s_x s_w (q_x Q_wᵀ) + b); keywords ``activations, n, m, in_features, out_features, activation``.

    ``weight`` in layout ``neutral``: ``values`` int8, ``positions`` where m > 1, ``scales (out)`` in any float dtype,
    and ``input_scale ()`` where activations is ``static``. Errors as those of ``nm_linear``.
    """
    return torch.ops.sparsebert.int8_linear(x, weight, bias, layout=layout, **sizes)


def _scales(spec: Int8Spec) -> dict[str, Held]:
    found = {"scales": Held((spec.out_features,), FLOAT)}
    return found | {"input_scale": Held((), FLOAT)} if spec.activations == "static" else found


def _values(spec: Int8Spec) -> dict[str, Held]:
    if spec.activations not in ("dynamic", "static"):
        raise ValueError(f"{OP}: activations is {spec.activations!r}, expected dynamic or static")
    if spec.m == 1:
        return {"values": Held((spec.out_features, spec.in_features), torch.int8)}
    values, positions = nm.packed_shapes(spec.n, spec.m, spec.out_features, spec.in_features)
    return {"values": Held(values, torch.int8), "positions": Held(positions, torch.uint8)}


def tensors(spec: Int8Spec) -> dict[str, Held]:
    return _values(spec) | _scales(spec)


def split(weight: list[Tensor], spec: Int8Spec) -> tuple[Tensor, list[Tensor]]:
    """The neutral tensors as the int8 weight ``(out, in)`` and the scales."""
    if spec.m == 1:
        return weight[0], weight[1:]
    return nm.unpack(weight[0], weight[1], spec.n, spec.m, spec.in_features), weight[2:]


def pack(values: Tensor, spec: Int8Spec, *, name: str = "weight") -> list[Tensor]:
    """The int8 weight ``(out, in)`` as its neutral tensors, scales left out."""
    return [values] if spec.m == 1 else list(nm.pack(values, spec.n, spec.m, name=name))


def unpack(weight: list[Tensor], spec: Int8Spec, dtype: torch.dtype) -> Tensor:
    """s_w Q_w in ``dtype``."""
    values, scales = split(weight, spec)
    return int8.dequantize(values, scales[0], dtype)


def _parts(weight: list[Tensor], problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """What is multiplied, and the scales: s_w, and the input's where activations are static."""
    if problem.layout == layouts.NEUTRAL:
        return split(weight, problem.spec)
    if problem.layout == UNPACKED:
        return weight[0], weight[1:]
    return weight[0], weight[2:]


# Kernels


@dataclass(frozen=True)
class Kernels:
    """What a backend does on a layout: quantizes rows, multiplies them, quantizes the product again by a given scale.

    - ``multiply(q int8 (tokens, in), s fp32 (tokens), weight, bias, problem)``: activation((q Q_wᵀ) s s_w + b),
      ``(tokens, out)`` in the problem's dtype;
    - ``quantize(x (tokens, in), input_scale)``: q and s as ``formats.int8.quantize_rows`` gives them;

    ``requantizes``: ``multiply`` also takes ``output_scale ()``, gives the product as int8 by it, and writes its scales
    to ``y_scale fp32 (tokens)``.

    Called with floats, as every candidate is, they quantize and multiply; ``direct`` takes the place of both.
    """

    multiply: Callable[..., Tensor]
    quantize: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] = int8.quantize_rows
    requantizes: bool = False
    direct: Callable[..., Tensor] | None = None

    def __call__(
        self, x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, **options: Any
    ) -> Tensor:
        if self.direct is not None:
            return self.direct(x, weight, bias, problem, **options)
        static = weight[-1] if problem.spec.activations == "static" else None
        q, s = self.quantize(x.reshape(-1, x.shape[-1]), static)
        return self.multiply(q, s, weight, bias, problem, **options).view(*x.shape[:-1], problem.out_features)

    def again(
        self,
        q: Tensor,
        s: Tensor,
        weight: list[Tensor],
        bias: Tensor | None,
        output_scale: Tensor,
        problem: Problem,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """The product as int8: from fp32, not rounded in between."""
        if self.requantizes:
            y_scale = torch.empty_like(s)
            scales = {"output_scale": output_scale, "y_scale": y_scale}
            return self.multiply(q, s, weight, bias, problem, **scales, **options), y_scale
        y = self.multiply(q, s, weight, bias, problem._replace(dtype=torch.float32), **options)
        return int8.quantize_rows(y, output_scale)


def _sums(accumulate: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """By exact int32 sums ``accumulate(q (tokens, in), values (out, in))``."""

    def multiply(
        q: Tensor, s: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, **options: Any
    ) -> Tensor:
        values, (scales, *_) = _parts(weight, problem)
        sums = accumulate(q, values) if len(q) else q.new_empty((0, len(values)), dtype=torch.int32)
        return _finish(sums.float(), s, scales, bias, problem)

    return multiply


# The sums through fp32 products of slices, on any device.
multiply_exactly = _sums(int8.accumulate)


def _int_mm(q: Tensor, values: Tensor) -> Tensor:
    """Through torch's own int8 matmul."""
    tokens = q.shape[0]
    if q.is_cuda and tokens < _CUDA_ROWS:
        q = F.pad(q, (0, 0, 0, _CUDA_ROWS - tokens))
    return torch._int_mm(q, values.t())[:tokens]


def _int_mm_refusal(problem: Problem) -> str | None:
    if problem.device.type == "cpu":
        return None if cpu_has_int8() else "torch's int8 matmul is a plain loop on a CPU without VNNI or AMX"
    if problem.device.type != "cuda":
        return f"needs a CPU or a CUDA device, not {problem.device.type}"
    if problem.in_features % _CUDA_MULTIPLE or problem.out_features % _CUDA_MULTIPLE:
        return (
            f"needs out_features and in_features in multiples of {_CUDA_MULTIPLE}, "
            f"not {problem.out_features} x {problem.in_features}"
        )
    return None


@lru_cache(maxsize=1)
def cpu_has_int8() -> bool:
    """Whether this CPU has instructions for int8 products, which torch's int8 matmul then uses."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"))


def _quantize_to_floats(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``int8.quantize_rows`` with q as fp32 numbers: the same numbers, without converting there and back."""
    x = x.float()
    magnitudes = x.abs()
    amax = magnitudes.amax(-1)
    scale, inverse = int8.scale_of(amax) if input_scale is None else int8.static_scale_of(amax, input_scale)
    # In memory that is there already; without input_scale the clamp has nothing to do (see quantize_rows).
    q = torch.mul(x, inverse.unsqueeze(-1), out=magnitudes).round_()
    return q if input_scale is None else q.clamp_(-int8.LIMIT, int8.LIMIT), scale


def _multiply_floats(
    q: Tensor, s: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, **options: Any
) -> Tensor:
    """By fp32 products of slices, each exact."""
    values, ends, scales, *_ = weight
    q, bounds = q.float(), ends.tolist()
    if len(bounds) == 1:
        sums = F.linear(q, values)
    else:
        starts = [0, *bounds[:-1]]
        parts = [F.linear(q[:, a:b], values[:, a:b]) for a, b in zip(starts, bounds, strict=True)]
        # Each part is exact in fp32, their sum need not be.
        sums = sum(part.to(torch.int32) for part in parts).float()  # type: ignore[union-attr]
    return _finish(sums, s, scales, bias, problem)


def _multiply_dense(
    q: Tensor, s: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem, **options: Any
) -> Tensor:
    """By torch's linear on what q and the weight stand for."""
    dense = weight[0].to(problem.dtype)
    x = int8.dequantize(q, s, problem.dtype)
    return activate(F.linear(x, dense, None if bias is None else bias.to(problem.dtype)), problem.activation)


def _finish(sums: Tensor, s: Tensor, scales: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    y = sums.mul_(s.unsqueeze(-1))
    y = y.mul_(scales.float()) if bias is None else torch.addcmul(bias.float(), y, scales.float())
    return activate(y.to(problem.dtype), problem.activation)


def slice_ends(values: Tensor) -> list[int]:
    """Ends of the slices of ``in_features`` inside which fp32 sums are exact for every int8 x.

    A sum of q w over a slice, and each partial sum in any order, is at most 127 times the sum of a row's |w| there; the
    slices are as long as that stays within 2**24. One slice is enough for most layers of BERT.
    """
    limit = _EXACT // 127
    totals = values.abs().to(torch.int32).cumsum(1, dtype=torch.int64)
    ends: list[int] = []
    base = torch.zeros(values.shape[0], 1, dtype=torch.int64, device=values.device)
    while not ends or ends[-1] < values.shape[1]:
        largest = (totals - base).amax(0) if values.shape[0] else totals.new_zeros(values.shape[1])
        # Never falls along the columns, so the count of those within the limit is where the slice ends.
        ends.append(int((largest <= limit).sum()))
        base = totals[:, ends[-1] - 1 : ends[-1]]
    return ends


def _float_tensors(spec: Int8Spec) -> dict[str, Held]:
    values = Held((spec.out_features, spec.in_features), torch.float32)
    return {"values": values, "slice_ends": Held(None, torch.int64)} | _scales(spec)


def _to_floats(weight: list[Tensor], spec: Int8Spec, dtype: torch.dtype) -> list[Tensor]:
    values, scales = split(weight, spec)
    return [values.float(), torch.tensor(slice_ends(values)), *scales]


def _from_floats(weight: list[Tensor], spec: Int8Spec) -> list[Tensor]:
    return [*pack(weight[0].to(torch.int8), spec), *weight[2:]]


def _cpu_only(spec: Int8Spec, dtype: torch.dtype, device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"is for CPUs, not {device.type}"


def _patterned(spec: Int8Spec, dtype: torch.dtype, device: torch.device) -> str | None:
    return "is the neutral layout of a weight without a pattern" if spec.m == 1 else None


layouts.add(layouts.neutral(OP, tensors, unpack))
layouts.add(layouts.dense_and_neutral(OP))
layouts.add(
    Layout(
        OP,
        UNPACKED,
        lambda spec: {"values": Held((spec.out_features, spec.in_features), torch.int8)} | _scales(spec),
        _patterned,
        from_neutral=lambda weight, spec, dtype: [*(parts := split(weight, spec))[:1], *parts[1]],
        to_neutral=lambda weight, spec: [*pack(weight[0], spec), *weight[1:]],
        to_dense=lambda weight, spec, dtype: int8.dequantize(weight[0], weight[1], dtype),
    )
)
layouts.add(
    Layout(
        OP,
        FLOATS,
        _float_tensors,
        _cpu_only,
        from_neutral=_to_floats,
        to_neutral=_from_floats,
        to_dense=lambda weight, spec, dtype: (weight[0] * weight[2].float().unsqueeze(-1)).to(dtype),
    )
)

for _layout in (layouts.NEUTRAL, UNPACKED):
    select.add_candidate(
        Candidate(OP, _layout, "torch", "torch's int8 matmul", _int_mm_refusal, Kernels(_sums(_int_mm)))
    )
    select.add_candidate(
        Candidate(
            OP,
            _layout,
            "reference",
            "exact sums through fp32 matmuls of slices",
            reference.always,
            Kernels(multiply_exactly),
        )
    )
select.add_candidate(
    Candidate(
        OP,
        FLOATS,
        "reference",
        "exact sums through fp32 matmuls",
        reference.always,
        Kernels(_multiply_floats, _quantize_to_floats),
    )
)
_plain = reference.plain(OP, layouts.DENSE)
select.add_candidate(replace(_plain, run=Kernels(_multiply_dense, direct=_plain.run)))
