"""What the calls of all CUDA kernels have in common: the numbers of ``csrc/common/elements.h``, addresses, and the
place of a launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsebert.ops import quantized, select
from sparsebert.ops.activations import ACTIVATIONS as _NAMES
from sparsebert.ops.layouts import NEUTRAL
from sparsebert.ops.specs import RowsSpec

# As `Element`, `Number` and `Activation` count them.
ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.int8: 2}
NUMBERS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.int8: 3}
ACTIVATIONS = {name: number for number, name in enumerate(_NAMES)}
FLOATS = (torch.float16, torch.bfloat16)


class Place(NamedTuple):
    """Where a call is launched, and whether a CUDA graph is being captured there."""

    device: int
    stream: int
    capturing: bool


def place_of(x: Tensor) -> Place:
    stream = torch.cuda.current_stream(x.device).cuda_stream
    if x.device.index == torch.cuda.current_device():
        return Place(x.device.index, stream, torch.cuda.is_current_stream_capturing())
    with torch.cuda.device(x.device):
        return Place(x.device.index, stream, torch.cuda.is_current_stream_capturing())


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def product(
    x: Tensor,
    values: Tensor,
    y: Tensor,
    place: Place,
    *,
    in_features: int,
    rank: int,
    t: Tensor | None,
    u: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    x_scale: Tensor | None,
    scales: Tensor | None,
    alpha: float,
) -> dict[str, Any]:
    """The keywords that the calls of all products have (`read_product` of ``csrc/common/fields.h``)."""
    return {
        "element": ELEMENTS[x.dtype],
        "tokens": len(x),
        "in_features": in_features,
        "out_features": y.shape[1],
        "rank": rank,
        "x": x.data_ptr(),
        # A single row is followed by none.
        "x_stride": x.stride(0) if len(x) > 1 else x.shape[1],
        "values": values.data_ptr(),
        "t": address(t),
        "u": address(u),
        "bias": address(bias),
        "bias_number": NUMBERS[torch.float32 if bias is None else bias.dtype],
        "residual": address(residual),
        "x_scale": address(x_scale),
        "scale": address(scales),
        "y": y.data_ptr(),
        "y_number": NUMBERS[y.dtype],
        "alpha": alpha,
        "device": place.device,
        "stream": place.stream,
    }


def unserved(dtype: torch.dtype, *, integer: bool) -> str | None:
    """None, or why x cannot be in ``dtype``, of an int8 layer or another."""
    served = (*FLOATS, torch.float32) if integer else FLOATS
    if dtype in served:
        return None
    names = [str(one).removeprefix("torch.") for one in (*served, dtype)]
    return f"needs {' or '.join(names[:-1])}, not {names[-1]}"


def rows_of(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def quantize(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """By whatever serves that here: the product alone can be forced to be this backend's."""
    problem = select.problem_of(RowsSpec(quantized.OP, x.shape[-1]), NEUTRAL, x, "none")
    return select.choose(problem, force=False).candidate.run(x, input_scale, problem)


def bias_of(bias: Tensor | None) -> Tensor | None:
    """The bias of an int8 layer, which may be any float, in one that the kernels read: all but float64."""
    return bias.float() if bias is not None and bias.dtype == torch.float64 else bias
