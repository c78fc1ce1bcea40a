"""Stand-ins, on a CPU, for the operators that torch has on CUDA only.

A dry run registers them for CPU tensors, so the very calls that will run on a GPU are parsed by torch's own
bindings and their results checked against float64 here. A stand-in "compressed" weight is simply the dense
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass


@contextmanager
def standing_in() -> Iterator[None]:
    """Register the stand-ins for the length of the block."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    cutlass = torch.sparse.SparseSemiStructuredTensorCUTLASS
    try:
        library.impl("_cslt_compress", _compress)
        library.impl("_cslt_sparse_mm", _sparse_mm)
        library.impl("_cslt_sparse_mm_search", _search)
        library.impl("_sparse_semi_structured_addmm", _cutlass_addmm)
        # It asks for a CUDA tensor before anything else.
        with mock.patch.object(cutlass, "_validate_device_dim_dtype_shape"):
            yield
    finally:
        library._destroy()


def _compress(dense: Tensor) -> Tensor:
    if (dense.reshape(-1, 4) != 0).sum(dim=1).max() > 2:
        raise RuntimeError("the weight to compress is not 2:4")
    return dense.clone()


def _sparse_mm(
    compressed: Tensor,
    columns: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transpose_result: bool = False,
    *algorithm: Any,
    **named: Any,
) -> Tensor:
    if columns.shape[1] % 8:
        raise RuntimeError(f"{columns.shape[1]} columns, expected a multiple of 8")
    y = compressed.double() @ columns.double()
    if alpha is not None:
        y = y * alpha.double()[:, None]
    if bias is not None:
        y = y + bias.double()[:, None]
    y = y.to(out_dtype or columns.dtype)
    return y.t().contiguous() if transpose_result else y


def _search(*arguments: Any, **named: Any) -> int:
    # Not the default, so that the searched variant is walked too.
    return 1


def _cutlass_addmm(bias: Tensor, packed: Tensor, meta: Tensor, columns: Tensor, **named: Any) -> Tensor:
    dense = sparse_semi_structured_to_dense_cutlass(packed, meta)
    return (dense.double() @ columns.double() + bias.double()[:, None]).to(columns.dtype)
