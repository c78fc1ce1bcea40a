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

from sparsebert.ops import layouts
from sparsebert.ops.activations import activate
from sparsebert.ops.layouts import Layout, Spec
from sparsebert.ops.select import Candidate, Problem, capability

_PATTERNS = {(2, 4), (1, 4), (1, 2)}
_DTYPES = (torch.float16, torch.bfloat16)
_TOKEN_MULTIPLE = 8


def _refusal(
    spec: Spec, dtype: torch.dtype, device: torch.device, row_multiple: int, column_multiple: int
) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if (spec.n, spec.m) not in _PATTERNS:
        return f"needs a 2:4 pattern, not {spec.n}:{spec.m}"
    if dtype not in _DTYPES:
        return f"needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if (found := capability(device)) is not None and found < (8, 0):
        return f"needs compute capability 8.0, found {found[0]}.{found[1]}"
    if spec.out_features % row_multiple or spec.in_features % column_multiple:
        return (
            f"needs out_features in multiples of {row_multiple} and in_features of {column_multiple}, "
            f"not {spec.out_features} x {spec.in_features}"
        )
    return None


def _cusparselt_refusal(spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
    if reason := _refusal(spec, dtype, device, 16, 16):
        return reason
    return None if torch.backends.cusparselt.is_available() else "this torch was built without cuSPARSELt"


def _cutlass_refusal(spec: Spec, dtype: torch.dtype, device: torch.device) -> str | None:
    if reason := _refusal(spec, dtype, device, 32, 64):
        return reason
    found = capability(device)
    # torch compiles these kernels for sm_80 and refuses other major versions when called.
    return (
        None if found is not None and found[0] == 8 else f"torch's kernels serve compute capability 8.x, found {found}"
    )


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


def _cusparselt_dense(weight: list[Tensor], spec: Spec) -> Tensor:
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


def _check_cusparselt(weight: list[Tensor], spec: Spec) -> None:
    layouts.check_count(weight, ("compressed",), "cusparselt")


def _check_cutlass(weight: list[Tensor], spec: Spec) -> None:
    layouts.check_count(weight, ("packed", "meta"), "cutlass")
    layouts.check_tensor(weight[0], "packed", (spec.out_features, spec.in_features // 2), spec)


def _supports(
    refusal: Callable[[Spec, torch.dtype, torch.device], str | None],
) -> Callable[[Problem], str | None]:
    def supports(problem: Problem) -> str | None:
        spec = Spec(problem.n, problem.m, problem.in_features, problem.out_features)
        return refusal(spec, problem.dtype, torch.device(problem.device_type))

    return supports


layouts.add(
    Layout(
        "cusparselt",
        tensors=("compressed",),
        castable=False,
        supports=_cusparselt_refusal,
        check=_check_cusparselt,
        from_dense=lambda dense, spec: [torch._cslt_compress(dense)],
        to_dense=_cusparselt_dense,
    )
)
layouts.add(
    Layout(
        "cutlass",
        tensors=("packed", "meta"),
        castable=False,
        supports=_cutlass_refusal,
        check=_check_cutlass,
        from_dense=lambda dense, spec: list(sparse_semi_structured_from_dense_cutlass(dense)),
        to_dense=lambda weight, spec: sparse_semi_structured_to_dense_cutlass(*weight),
    )
)

CANDIDATES = (
    Candidate(
        "nm_linear",
        "cusparselt",
        "torch",
        "cuSPARSELt through torch",
        _supports(_cusparselt_refusal),
        _cusparselt,
    ),
    Candidate("nm_linear", "cutlass", "torch", "CUTLASS through torch", _supports(_cutlass_refusal), _cutlass),
)
