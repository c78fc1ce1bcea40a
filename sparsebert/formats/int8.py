"""The int8 format: symmetric quantization, weights per output channel, activations per token.

For a weight ``(out, in)`` the stored form is:

- ``values int8 (out, in)``: from -127 to 127, never -128;
- ``scales fp32 (out)``: W[i, j] is about ``values[i, j] * scales[i]``;
- ``input_scale fp32 ()``, where activations are quantized statically: x is about ``q * input_scale``.

The rounding is frozen, in fp32, the same to the bit on every backend. For a row with amax = max |x|::

    inv = 127 / amax        scale = amax / 127        q = clamp(rint(x * inv), -127, 127)

with IEEE divisions (not a product with a reciprocal) and rint to the nearest even. Where amax < 2**-118, zero
included, the row is zero: inv = 0, scale = 1, q = 0. Without that bound ``inv`` would overflow (below 127 / 3.4e38),
and ``scale`` and small x would be subnormal, which some backends flush to zero and others do not. At amax >= 2**-118
both quotients are normal numbers, and a subnormal x has |x * inv| < 2**-126 * 127 * 2**118 < 0.5: it rounds to 0,
flushed or not.

Static activations have one scale for all: ``inv = 1 / input_scale``, and what lies beyond 127 of its steps is clamped.

A row with NaN or an infinity has no quantized form: its scale comes out NaN or infinite (NaN where activations are
static), its values are undefined, and no other row is touched. Weights with either are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebert.formats.common import (
    DTYPES,
    check_matrix,
    check_one_device,
    check_tensor,
    dtype_name,
    no_autocast,
    refuse_minus_128,
    refuse_non_finite,
)

LIMIT = 127

# A row whose largest magnitude is below this is quantized as zero, see above.
TINY = 2.0**-118

# Static scales between these have a normal reciprocal, and a subnormal input rounds to 0 by it, see above.
INPUT_SCALES = (2.0**-125, 2.0**125)

# Partial sums of this many products of int8 are at most 1024 * 128 * 128 = 2**24.
_SLICE = 1024

# From here on a sum of products of int8 could leave int32.
_MAX_IN_FEATURES = 1 << 17


def scale_of(amax: Tensor) -> tuple[Tensor, Tensor]:
    """``max |x|`` of each row, any shape and float dtype -> ``(scale, inv)``, fp32, of the same shape.

    A NaN or infinite amax gives a NaN or infinite scale.
    """
    _check_float(amax, "scale_of: amax")
    amax = amax.detach().float()
    # Tensors on the device: on CUDA torch turns a division by or of a Python number into a product with a reciprocal.
    # Filled there and not copied, so that a CUDA graph can capture it.
    limit, zero, one = (amax.new_full((), number) for number in (float(LIMIT), 0.0, 1.0))
    tiny = amax < TINY
    return torch.where(tiny, one, torch.div(amax, limit)), torch.where(tiny, zero, torch.div(limit, amax))


def static_scale_of(amax: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """As ``scale_of``, with ``input_scale ()`` for each row: ``scale`` is NaN where ``amax`` is not finite, and ``inv``
    of one element."""
    scale = input_scale.detach().float()
    inv = torch.div(torch.ones_like(scale), scale).reshape((1,) * amax.dim())
    return torch.where(amax.isfinite(), scale, scale.new_full((), torch.nan)), inv


def quantize_rows(x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x (..., features)``, any float dtype -> ``(q int8 (..., features), scale fp32 (...))``, one scale a row; with
    ``input_scale ()`` that one for all.

    ``x`` is converted to fp32 first. A row with NaN or an infinity gets a NaN or infinite scale and undefined values.
    Trusts ``input_scale`` (see ``validate_input_scale``) except for its shape and dtype.
    """
    _check_float(x, "quantize_rows: x")
    if not x.dim():
        raise ValueError("quantize_rows: x has 0 dimensions, expected at least 1 (..., features)")
    if input_scale is not None:
        _check_input_scale(input_scale, "quantize_rows: input_scale")
    x = x.detach()
    # |x| and its maximum are exact in every dtype, so 16 bits need not be widened for them; what is in memory already
    # is used again for the product.
    magnitudes = x.abs() if x.dtype != torch.float64 else x.float().abs_()
    amax = magnitudes.amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale, inv = scale_of(amax) if input_scale is None else static_scale_of(amax, input_scale)
    inv = inv.unsqueeze(-1)
    scaled = torch.mul(x, inv, out=magnitudes) if x.dtype == torch.float32 else x.float().mul_(inv)
    # Without input_scale |x * inv| <= 127 (1 + 2**-24)**2 rounds to 127 at most: there the clamp has nothing to do.
    whole = scaled.round_()
    return _to_int8(whole if input_scale is None else whole.clamp_(-LIMIT, LIMIT)), scale


def quantize_weight(weight: Tensor, *, name: str = "weight") -> tuple[Tensor, Tensor]:
    """``weight (out, in)`` -> ``(values int8 (out, in), scales fp32 (out))``, one scale an output channel.

    ``name`` is the layer's path, for the error a weight with NaN, infinities or numbers above fp32 is refused with.
    """
    check_matrix(weight, DTYPES, name)
    weight = weight.detach()
    if not weight.is_meta:
        refuse_non_finite(weight, f"{name}: weight")
        if weight.dtype == torch.float64:
            refuse_non_finite(weight.float(), f"{name}: weight as float32")
    return quantize_rows(weight)


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``values int8 (..., features) * scales (...)``: the product in fp32, then rounded to ``dtype``.

    Trusts its input (see ``validate``) except for shapes.
    """
    if not values.dim() or scales.shape != values.shape[:-1]:
        raise ValueError(
            f"dequantize: values {tuple(values.shape)} and scales {tuple(scales.shape)}, expected (..., features) and "
            f"(...)"
        )
    return values.float().mul_(scales.detach().float().unsqueeze(-1)).to(dtype)


def validate(values: Tensor, scales: Tensor, out_features: int, in_features: int, *, name: str = "int8") -> None:
    """``ValueError`` naming ``name``, the tensor, expected and actual unless this can be a quantized weight.

    Checked: shapes, dtypes (scales: any float), one device, no -128, scales that are finite and above 0 in fp32. A row
    need not reach 127: other ways to choose a scale than max |w| are as valid.
    """
    check_tensor(values, (out_features, in_features), (torch.int8,), f"{name}: values")
    check_tensor(scales, (out_features,), DTYPES, f"{name}: scales")
    check_one_device(name, values=values, scales=scales)
    if values.is_meta:
        return
    wide = scales.detach().float()
    if len(bad := (torch.isfinite(wide) & (wide > 0)).logical_not().nonzero()):
        row = int(bad[0, 0])
        raise ValueError(f"{name}: scales holds {float(scales[row])} at {row}, expected finite float32 above 0")
    refuse_minus_128(values, f"{name}: values")


def validate_input_scale(input_scale: Tensor, *, name: str = "int8") -> None:
    """``ValueError`` naming ``name`` unless ``input_scale`` is a 0-d float from 2**-125 to 2**125.

    Between these it is finite and above 0, and so is its reciprocal, also where subnormal numbers are flushed.
    """
    _check_input_scale(input_scale, f"{name}: input_scale")
    if input_scale.is_meta:
        return
    low, high = INPUT_SCALES
    if not low <= (value := float(input_scale)) <= high:
        raise ValueError(f"{name}: input_scale is {value}, expected a finite number above 0, from 2**-125 to 2**125")


def accumulate(q: Tensor, values: Tensor) -> Tensor:
    """``q (..., in) @ values (out, in)ᵀ`` of int8, exact -> int32 ``(..., out)``, by fp32 products on any device.

    Why it is exact in any order of summation: int8 is exact in fp32 (and in TF32 and bf16, should a fast mode round the
    inputs), and over a slice of 1024 every partial sum of any of the products is a whole number of magnitude up to
    1024 * 128 * 128 = 2**24, all of which fp32 represents: no addition ever rounds. The slices are added up as int32,
    which has room for 131071 = 2**17 - 1 products; ``ValueError`` beyond.
    """
    if not q.dim() or values.dim() != 2 or q.shape[-1] != values.shape[1]:
        raise ValueError(
            f"accumulate: q {tuple(q.shape)} and values {tuple(values.shape)}, expected (..., in_features) and "
            f"(out_features, in_features)"
        )
    for label, tensor in (("q", q), ("values", values)):
        if tensor.dtype != torch.int8:
            raise TypeError(f"accumulate: {label} is {dtype_name(tensor.dtype)}, expected int8")
    in_features = q.shape[-1]
    if in_features >= _MAX_IN_FEATURES:
        raise ValueError(f"accumulate: in_features is {in_features}, expected at most {_MAX_IN_FEATURES - 1}")
    total = torch.zeros(*q.shape[:-1], len(values), dtype=torch.int32, device=q.device)
    if q.is_meta:
        return total
    # Under autocast the products would be 16-bit.
    with no_autocast(q.device):
        for start in range(0, in_features, _SLICE):
            part = slice(start, start + _SLICE)
            total += (q[..., part].float() @ values[:, part].float().t()).to(torch.int32)
    return total


def _to_int8(whole: Tensor) -> Tensor:
    # Row-major also where the input was a view that is not.
    return whole.to(torch.int8, memory_format=torch.contiguous_format)


def _check_float(tensor: Tensor, label: str) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{label} is {tensor.dtype}, expected a floating-point tensor of 16, 32 or 64 bits")


def _check_input_scale(input_scale: Tensor, label: str) -> None:
    check_tensor(input_scale, (), DTYPES, label)
