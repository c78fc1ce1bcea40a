"""torch's own kernels for 2:4 weights on NVIDIA GPUs, cuSPARSELt and CUTLASS, as layouts and candidates.

Both put the sparse weight on the left, W xᵀ, so tokens are the columns of the dense operand; they want token counts in
multiples of 8, which ``_padded`` supplies. 1:4 and 1:2 weights are 2:4 weights too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparsebert.ops import layouts, nm, select
from sparsebert.ops.activations import activate
from sparsebert.ops.devices import Device, describe
from sparsebert.ops.layouts import COMPUTE, Held, Layout
from sparsebert.ops.select import Candidate, Problem
from sparsebert.ops.specs import NMSpec

_PATTERNS = {(2, 4), (1, 4), (1, 2)}
_DTYPES = (torch.float16, torch.bfloat16)
_TOKEN_MULTIPLE = 8


def _refusal(spec: NMSpec, dtype: torch.dtype, device: Device, rows: int, columns: int) -> str | None:
    """None, or why kernels that want multiples of ``rows`` and ``columns`` cannot serve on ``device``."""
    found = device.capability
    if device.type != "cuda" or found is None:
        return f"needs a CUDA device, not {device.type}"
    if (spec.n, spec.m) not in _PATTERNS:
        return f"needs a 2:4 pattern, not {spec.n}:{spec.m}"
    if dtype not in _DTYPES:
        return f"needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if found < (8, 0):
        return f"needs compute capability 8.0, found {found[0]}.{found[1]}"
    if spec.out_features % rows or spec.in_features % columns:
        return (
            f"needs out_features in multiples of {rows} and in_features of {columns}, "
            f"not {spec.out_features} x {spec.in_features}"
        )
    return None


def _cusparselt_refusal(spec: NMSpec, dtype: torch.dtype, device: Device) -> str | None:
    if reason := _refusal(spec, dtype, device, 16, 16):
        return reason
    return None if torch.backends.cusparselt.is_available() else "this torch was built without cuSPARSELt"


def _cutlass_refusal(spec: NMSpec, dtype: torch.dtype, device: Device) -> str | None:
    if reason := _refusal(spec, dtype, device, 32, 64):
        return reason
    # torch compiles these kernels for sm_80 and refuses other major versions when called.
    found = device.capability
    if found is not None and found[0] != 8:
        return f"torch's kernels serve compute capability 8.x, found {found[0]}.{found[1]}"
    return None


def _padded(x: Tensor) -> tuple[Tensor, int]:
    """x as ``(tokens, in)`` with tokens padded to the multiple the kernels want, and the unpadded count."""
    rows = x.reshape(-1, x.shape[-1])
    tokens = rows.shape[0]
    return F.pad(rows, (0, 0, 0, -tokens % _TOKEN_MULTIPLE)), tokens


def _finish(y: Tensor, x: Tensor, tokens: int, activation: str) -> Tensor:
    return activate(y[:tokens].reshape(*x.shape[:-1], y.shape[-1]), activation)


def _cusparselt(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    rows, tokens = _padded(x)
    if not tokens:
        return x.new_empty((*x.shape[:-1], problem.out_features))
    # transpose_result stores (tokens, out) row-major: y without another pass.
    y = torch._cslt_sparse_mm(weight[0], rows.t(), bias=bias, transpose_result=True)
    return _finish(y, x, tokens, problem.activation)


def _cusparselt_dense(weight: list[Tensor], spec: NMSpec) -> Tensor:
    # The compressed blob is opaque; W times the identity is exact, each sum having one non-zero term.
    identity = torch.eye(spec.in_features, dtype=weight[0].dtype, device=weight[0].device)
    return torch._cslt_sparse_mm(weight[0], identity)


def _cutlass(x: Tensor, weight: list[Tensor], bias: Tensor | None, problem: Problem) -> Tensor:
    rows, tokens = _padded(x)
    if not tokens:
        return x.new_empty((*x.shape[:-1], problem.out_features))
    packed, meta = weight
    if bias is None:
        y = torch._sparse_semi_structured_mm(packed, meta, rows.t())
    else:
        y = torch._sparse_semi_structured_addmm(bias, packed, meta, rows.t())
    return _finish(y.t(), x, tokens, problem.activation)


Refusal = Callable[[NMSpec, torch.dtype, Device], str | None]


def _serves(refusal: Refusal) -> Callable[[Problem], str | None]:
    """``refusal`` of a call: by the call's own device, whichever device is the current one."""
    return lambda problem: refusal(problem.spec, problem.dtype, problem.device)


def _holds(refusal: Refusal) -> Callable[[NMSpec, torch.dtype, torch.device], str | None]:
    """``refusal`` of a device that is to hold a layout."""
    return lambda spec, dtype, device: refusal(spec, dtype, describe(device))


def _layout(
    name: str,
    tensors: Callable[[NMSpec], dict[str, Held]],
    refusal: Refusal,
    from_dense: Callable[[Tensor], list[Tensor]],
    to_dense: Callable[[list[Tensor], NMSpec], Tensor],
) -> Layout:
    """A layout that is made of the dense weight and gives it back exactly."""
    return Layout(
        nm.OP,
        name,
        tensors,
        _holds(refusal),
        from_neutral=lambda weight, spec, dtype: from_dense(nm.unpack(weight, spec)),
        to_neutral=lambda weight, spec: nm.pack(to_dense(weight, spec), spec),
        to_dense=lambda weight, spec, dtype: to_dense(weight, spec),
        castable=False,
    )


layouts.add(
    _layout(
        "cusparselt",
        lambda spec: {"compressed": Held(None, COMPUTE)},
        _cusparselt_refusal,
        lambda dense: [torch._cslt_compress(dense)],
        _cusparselt_dense,
    )
)
layouts.add(
    _layout(
        "cutlass",
        lambda spec: {
            "packed": Held((spec.out_features, spec.in_features // 2), COMPUTE),
            "meta": Held(None, torch.int16),
        },
        _cutlass_refusal,
        lambda dense: list(sparse_semi_structured_from_dense_cutlass(dense)),
        lambda weight, spec: sparse_semi_structured_to_dense_cutlass(*weight),
    )
)

for _name, _text, _refused, _run in (
    ("cusparselt", "cuSPARSELt through torch", _cusparselt_refusal, _cusparselt),
    ("cutlass", "CUTLASS through torch", _cutlass_refusal, _cutlass),
):
    select.add_candidate(Candidate(nm.OP, _name, "torch", _text, _serves(_refused), _run))
