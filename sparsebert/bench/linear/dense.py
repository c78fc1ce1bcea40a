"""The dense paths: what a compressed layer has to beat."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsebert as sb
from sparsebert import ops
from sparsebert.bench.linear.cases import LIMITS, SHORT, Built, Case, Peer, product


def _linear(case: Case, dtype: torch.dtype) -> Built:
    x, w, b = case.operands(dtype)

    def call(copy: Tensor) -> Tensor:
        return case.activate(F.linear(x, copy, b))

    return _built(case, x, w, b, call)


def _fused(case: Case, dtype: torch.dtype) -> Built:
    """GELU in cuBLASLt's epilogue."""
    x, w, b = case.operands(dtype)
    # On CUDA the epilogue is the tanh form; torch's CPU kernel of the same op uses the error function.
    form = "tanh" if case.device.type == "cuda" else "none"

    def call(copy: Tensor) -> Tensor:
        return torch._addmm_activation(b, x, copy.t(), use_gelu=True)

    return _built(case, x, w, b, call, gelu=form)


def _own(case: Case, dtype: torch.dtype) -> Built:
    """GELU in the epilogue of this package's kernel for dense weights."""
    x, w, b = case.operands(dtype)
    backend = "triton" if case.device.type == "cuda" else "reference"
    sizes = {"in_features": case.shape.in_features, "out_features": case.shape.out_features}

    def call(copy: Tensor) -> Tensor:
        with sb.backend(backend):
            return ops.dense_linear(x, [copy], b, layout="neutral", activation=case.activation, **sizes)

    return _built(case, x, w, b, call)


def _compiled(case: Case, dtype: torch.dtype, **options: Any) -> Built:
    """By torch.compile, which may pick any of its own kernels or torch's and fuses what follows the product."""
    x, w, b = case.operands(dtype)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return case.activate(F.linear(x, weight, bias))

    torch.compiler.reset()
    compiled = torch.compile(layer, dynamic=False, fullgraph=True, **options)
    return _built(case, x, w, b, lambda copy: compiled(x, copy, b))


def _built(case: Case, x: Tensor, w: Tensor, b: Tensor, call: Any, gelu: str = "none") -> Built:
    def reference() -> Tensor:
        y = product(x, w, b)
        return F.gelu(y, approximate=gelu) if case.activation == "gelu" else y

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(w)]},
        reference=reference,
        weight_bytes=w.nbytes,
        moved_bytes=case.moved(w.nbytes, x.itemsize, x.itemsize, b),
        limit=LIMITS[x.dtype],
        notes={"gelu": gelu} if gelu == "tanh" else {},
    )


def peers(dtype: torch.dtype, *, dry: bool = False) -> tuple[Peer, ...]:
    """torch's linear (cuBLAS on a GPU), with GELU in its epilogue, what torch.compile makes of both, and this package's
    kernel in 16 bits."""
    short, name = SHORT[dtype], str(dtype).removeprefix("torch.")
    library = "torch" if dtype == torch.float32 else "cublas"
    # A dry run walks the calls and compiles nothing.
    options: dict[str, Any] = {"backend": "eager"} if dry else {"mode": "max-autotune-no-cudagraphs"}
    # The int8 kernel is held against bf16 with GELU on both feed-forward layers.
    gelu = ("ffn_in", "ffn_out") if dtype == torch.bfloat16 else ("ffn_in",)
    rate = f"matmul_{short}"
    own = Peer(
        f"dense/neutral/triton/{short}",
        "dense",
        name,
        "bias + GELU (erf)",
        partial(_own, dtype=dtype),
        rate,
        plain=False,
        gelu=gelu,
    )
    return (
        Peer(
            f"{library}_{short}",
            "dense",
            name,
            "bias; GELU (erf) as its own kernel",
            partial(_linear, dtype=dtype),
            rate,
            gelu=gelu,
        ),
        Peer(
            f"{library}_{short}_fused",
            "dense",
            name,
            "bias + GELU (tanh)",
            partial(_fused, dtype=dtype),
            rate,
            plain=False,
        ),
        Peer(
            f"compiled_{short}",
            "dense",
            name,
            "bias + GELU (erf)",
            partial(_compiled, dtype=dtype, **options),
            rate,
            compiled=True,
        ),
        *([own] if dtype.itemsize == 2 else []),
    )
