"""Sparse and quantized linears that torch, cuSPARSELt, CUTLASS and torchao already offer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebert.bench.jobs import Missing
from sparsebert.bench.linear.cases import LIMITS, SHORT, Built, Call, Case, Peer, pad_rows, product
from sparsebert.formats import int8, nm

FP16, BF16 = torch.float16, torch.bfloat16
# Eight-bit floats multiply exactly, but the matrix units add them with fewer bits than float32.
_FP8_LIMIT = 2e-2


# 2:4 by cuSPARSELt and CUTLASS


def _cusparselt(case: Case, dtype: torch.dtype) -> Built:
    x, w, b = case.operands(dtype, pruned=True)
    padded = pad_rows(x, 8)
    weight_bytes = w.nbytes * 9 // 16
    variants = _cusparselt_variants(case, torch._cslt_compress(w), padded, bias=b)
    return Built(
        variants={name: [partial(_then, case, call) for call in calls] for name, calls in variants.items()},
        reference=lambda: case.activate(product(x, w, b)),
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, 2, 2, b),
        limit=LIMITS[dtype],
        operations=case.flops // 2,
        notes={"padded_tokens": padded.shape[0]},
    )


def _then(case: Case, call: Call) -> Tensor:
    return case.activate(call())


def _cusparselt_int8(case: Case) -> Built:
    shape = case.shape
    x = case.integers(case.tokens, shape.in_features)
    w = nm_project_int8(case.integers(shape.out_features, shape.in_features))
    scales = case.normal(shape.out_features, dtype=torch.float32).abs() * 1e-4 + 1e-5
    padded = pad_rows(x, 16)
    # 8-bit values and 2-bit positions for half of the weights: 10 bits for every 16 dense ones.
    weight_bytes = w.nbytes * 10 // 16
    return Built(
        # A scale for each feature goes in as alpha; per-token scales would need a kernel after this one.
        variants=_cusparselt_variants(case, torch._cslt_compress(w), padded, alpha=scales, out_dtype=BF16),
        reference=lambda: product(x, w) * scales.double(),
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, 1, 2, scales),
        limit=LIMITS[BF16],
        operations=case.flops // 2,
        notes={"padded_tokens": padded.shape[0]},
    )


def nm_project_int8(weight: Tensor) -> Tensor:
    """The 2:4 of int8 numbers with the largest magnitudes."""
    return weight * nm.magnitude_mask(weight.float(), 2, 4)


def _cusparselt_int8_scaled(case: Case) -> Built:
    """What a linear of BERT takes besides the product: scales a token, bias and activation, in kernels of their own."""
    x, w, b = case.operands(BF16, pruned=True)
    values, scales = int8.quantize_weight(w)
    q, s = int8.quantize_rows(x)
    padded, padded_s = pad_rows(q, 16), pad_rows(s[:, None], 16)
    compressed = torch._cslt_compress(values)
    products = _cusparselt_variants(case, compressed, padded, alpha=scales.float(), out_dtype=BF16)
    weight_bytes = values.nbytes * 10 // 16

    def finish(multiply: Call) -> Tensor:
        y = multiply()
        return case.activate(torch.addcmul(b, y, padded_s, out=y))

    return Built(
        variants={name: [partial(finish, multiply) for multiply in calls] for name, calls in products.items()},
        reference=lambda: case.activate(_scaled(q, values, s, scales, b)),
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, 1, 2, b),
        # Rounded to bfloat16 three times.
        limit=2 * LIMITS[BF16],
        operations=case.flops // 2,
        notes={"padded_tokens": padded.shape[0]},
    )


def _cusparselt_fp8(case: Case) -> Built:
    x, w, _ = _fp8_operands(case, pruned=True)
    padded = pad_rows(x, 16)
    weight_bytes = w.nbytes * 10 // 16
    return Built(
        variants=_cusparselt_variants(case, torch._cslt_compress(w), padded, out_dtype=BF16),
        reference=lambda: product(x, w),
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, 1, 2),
        limit=_FP8_LIMIT,
        operations=case.flops // 2,
        notes={"padded_tokens": padded.shape[0]},
    )


def _cusparselt_variants(
    case: Case,
    compressed: Tensor,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> dict[str, list[Call]]:
    """The library's default algorithm and the one its own search picks for this problem, if that differs.

    W is the left operand, so xᵀ goes in as a view, and ``transpose_result`` has y written as (tokens, out).
    """
    copies = case.rotate(compressed)
    columns = x.t()

    def calls(**algorithm: Any) -> list[Call]:
        return [
            partial(
                torch._cslt_sparse_mm,
                copy,
                columns,
                bias=bias,
                alpha=alpha,
                out_dtype=out_dtype,
                transpose_result=True,
                **algorithm,
            )
            for copy in copies
        ]

    variants = {"alg_id=0": calls()}
    try:
        found = search_cusparselt(compressed, columns, bias, alpha, out_dtype)
    except RuntimeError:
        # The default may serve what the search refuses; a broken device shows at the next call anyway.
        return variants
    if found["alg_id"] != 0 or found.get("split_k", 1) != 1:
        variants[" ".join(f"{key}={value}" for key, value in found.items())] = calls(**found)
    return variants


def search_cusparselt(
    compressed: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    alpha: Tensor | None,
    out_dtype: torch.dtype | None,
) -> dict[str, int]:
    """cuSPARSELt's algorithm search, as keyword arguments for ``torch._cslt_sparse_mm``."""
    # Only CUDA builds of torch have the submodule; it also reports the split of K, which the op leaves out.
    library: Any = getattr(torch._C, "_cusparselt", None)
    if hasattr(library, "mm_search"):
        alg_id, split_k, split_mode, _ = library.mm_search(compressed, columns, bias, alpha, out_dtype, True)
        found = {"alg_id": int(alg_id), "split_k": int(split_k)}
        if split_k != 1:
            # The argument changed its name and type between torch releases.
            names = schema_arguments("aten::_cslt_sparse_mm")
            if "split_k_mode" in names:
                found["split_k_mode"] = int(split_mode)
            elif "split_k_one_kernel" in names:
                found["split_k_one_kernel"] = bool(split_mode)
        return found
    alg_id = torch._cslt_sparse_mm_search(
        compressed, columns, bias=bias, alpha=alpha, out_dtype=out_dtype, transpose_result=True
    )
    return {"alg_id": int(alg_id)}


def schema_arguments(operator: str) -> set[str]:
    """Names of every argument that any overload of a torch operator takes; empty where torch lacks it."""
    schemas = torch._C._jit_get_schemas_for_operator(operator)
    return {argument.name for schema in schemas for argument in schema.arguments}


def _cutlass(case: Case, dtype: torch.dtype) -> Built:
    x, w, b = case.operands(dtype, pruned=True)
    weight_bytes = w.nbytes * 9 // 16
    copies = [
        torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(w) for _ in range(case.copies_for(weight_bytes))
    ]

    def call(copy: Tensor) -> Tensor:
        return case.activate(F.linear(x, copy, b))

    return Built(
        variants={"": [partial(call, copy) for copy in copies]},
        reference=lambda: case.activate(product(x, w, b)),
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, 2, 2, b),
        limit=LIMITS[dtype],
        operations=case.flops // 2,
        notes={"padded_tokens": case.tokens + -case.tokens % 8},
    )


# int8


def _int_mm(case: Case) -> Built:
    shape = case.shape
    x = case.integers(case.tokens, shape.in_features)
    w = case.integers(shape.out_features, shape.in_features)

    def call(copy: Tensor) -> Tensor:
        return torch._int_mm(x, copy.t())

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(w)]},
        reference=lambda: product(x, w),
        weight_bytes=w.nbytes,
        moved_bytes=case.moved(w.nbytes, 1, 4),
        limit=0.0,
    )


def _int_mm_scaled(case: Case, dtype: torch.dtype) -> Built:
    """torch's int8 product of rows that are int8 already, and what follows it by torch's own kernels."""
    x, w, b = case.operands(dtype)
    values, scales = int8.quantize_weight(w)
    q, s = int8.quantize_rows(x)
    column, wide = s[:, None], b.float()

    def call(copy: Tensor) -> Tensor:
        sums = torch._int_mm(q, copy.t())
        return case.activate(torch.addcmul(wide, sums * column, scales).to(dtype))

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(values)]},
        reference=lambda: case.activate(_scaled(q, values, s, scales, b)),
        weight_bytes=values.nbytes,
        moved_bytes=case.moved(values.nbytes, 1, 2, scales, b),
        limit=LIMITS[dtype],
    )


def _torchao_int8(case: Case, dtype: torch.dtype, **options: Any) -> Built:
    """torchao's dynamic int8 linear under torch.compile, as its documentation has it: scales a token and a feature."""
    try:
        # A peer, imported where it is measured and nowhere else.
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # noqa: TID251
    except ImportError as error:
        raise Missing(f"torchao does not import: {error}") from None

    x, w, b = case.operands(dtype)

    def quantized() -> Tensor:
        linear = torch.nn.Linear(case.shape.in_features, case.shape.out_features, device="meta", dtype=dtype)
        linear.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
        holder = torch.nn.Sequential(linear)
        quantize_(holder, Int8DynamicActivationInt8WeightConfig())
        found: Any = holder[0].weight
        return found

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return case.activate(F.linear(x, weight, bias))

    weight_bytes = w.numel()
    copies = [quantized() for _ in range(case.copies_for(weight_bytes))]
    torch.compiler.reset()
    # One graph for all copies: the weight is an input of it.
    compiled = torch.compile(layer, dynamic=False, fullgraph=True, **options)
    held: Any = copies[0]
    return Built(
        variants={"": [partial(compiled, x, copy, b) for copy in copies]},
        reference=lambda: case.activate(product(x, held.dequantize(), b)),
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, 2, 2, b) + 4 * case.shape.out_features,
        # How it rounds x is its own affair, so the reference does not. For normal rows of 768 to 4096 numbers, the
        # largest of them 3.2 to 3.7 deviations, an eighth bit is worth 0.7 to 0.9 % of y; and twice that is a fault.
        limit=1.5e-2,
    )


def _scaled(q: Tensor, values: Tensor, s: Tensor, scales: Tensor, b: Tensor) -> Tensor:
    """The int8 linear in float64, before an activation."""
    return product(q, values) * s.double()[:, None] * scales.double() + b.double()


# fp8


def _fp8_operands(case: Case, *, pruned: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, w, b = case.operands(BF16, pruned=pruned)
    # Weights of size in**-0.5 would fall among the subnormals of e4m3; scale them up as a quantizer would.
    w = w * case.shape.in_features**0.5
    return x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn), b


def _fp8(case: Case, *, rowwise: bool) -> Built:
    x, w, b = _fp8_operands(case)
    shape = case.shape
    if rowwise:
        scale_x = case.normal(case.tokens, 1, dtype=torch.float32).abs() + 0.1
        scale_w = case.normal(1, shape.out_features, dtype=torch.float32).abs() * 0.1 + 0.01
    else:
        scale_x = torch.full((), 0.5, device=case.device)
        scale_w = torch.full((), 0.125, device=case.device)

    def call(copy: Tensor) -> Tensor:
        y = torch._scaled_mm(
            x,
            copy.t(),
            scale_a=scale_x,
            scale_b=scale_w,
            bias=b,
            out_dtype=BF16,
            use_fast_accum=True,
        )
        return case.activate(y)

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(w)]},
        reference=lambda: case.activate(product(x, w) * scale_x.double() * scale_w.double() + b.double()),
        weight_bytes=w.nbytes,
        moved_bytes=case.moved(w.nbytes, 1, 2, b),
        limit=_FP8_LIMIT,
    )


# Low rank + sparse, as a sequence of torch's calls


def _low_rank_rows(case: Case, dtype: torch.dtype, rank: float, rows: float) -> Built:
    """y = (x vᵀ) uᵀ + b, and S x added to its rows: three products and an addition."""
    x, _, b = case.operands(dtype)
    shape = case.shape
    r, k = (max(1, int(part * shape.out_features)) for part in (rank, rows))
    u = case.normal(shape.out_features, r, dtype=dtype, scale=r**-0.5)
    v = case.normal(r, shape.in_features, dtype=dtype, scale=shape.in_features**-0.5)
    sparse = case.normal(k, shape.in_features, dtype=dtype, scale=shape.in_features**-0.5)
    kept = torch.randperm(shape.out_features, device=case.device, generator=case.generator)[:k].sort().values

    def call(copy: list[Tensor]) -> Tensor:
        u, v, sparse = copy
        y = F.linear(F.linear(x, v), u, b)
        return case.activate(y.index_add_(1, kept, F.linear(x, sparse)))

    def reference() -> Tensor:
        y = product(product(x, v), u, b)
        y[:, kept] += product(x, sparse)
        return case.activate(y)

    weight = [u, v, sparse]
    weight_bytes = sum(tensor.nbytes for tensor in weight)
    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate_all(weight)]},
        reference=reference,
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, x.itemsize, x.itemsize, b),
        limit=2 * LIMITS[dtype],
        operations=2 * case.tokens * sum(tensor.numel() for tensor in weight),
    )


def _low_rank_24(case: Case, dtype: torch.dtype, rank: int) -> Built:
    """y = S xᵀ + b by cuSPARSELt, then (x vᵀ) uᵀ added by cuBLAS."""
    x, w, b = case.operands(dtype, pruned=True)
    shape = case.shape
    u = case.normal(shape.out_features, rank, dtype=dtype, scale=rank**-0.5)
    v = case.normal(rank, shape.in_features, dtype=dtype, scale=shape.in_features**-0.5)
    padded = pad_rows(x, 8)
    products = _cusparselt_variants(case, torch._cslt_compress(w), padded, bias=b)

    def finish(multiply: Call) -> Tensor:
        y = multiply()
        return case.activate(torch.addmm(y, F.linear(padded, v), u.t(), out=y))

    weight_bytes = w.nbytes * 9 // 16 + u.nbytes + v.nbytes
    return Built(
        variants={name: [partial(finish, multiply) for multiply in calls] for name, calls in products.items()},
        reference=lambda: case.activate(product(x, w, b) + product(product(x, v), u)),
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, 2, 2, b),
        limit=2 * LIMITS[dtype],
        operations=case.flops // 2 + 2 * case.tokens * (u.numel() + v.numel()),
        notes={"padded_tokens": padded.shape[0]},
    )


def peers(*, dry: bool = False) -> tuple[Peer, ...]:
    """What a GPU has; a dry run walks the calls and compiles nothing."""
    options: dict[str, Any] = {"backend": "eager"} if dry else {"mode": "max-autotune-no-cudagraphs"}
    found = []
    for dtype in (FP16, BF16):
        short, name, rate = SHORT[dtype], str(dtype).removeprefix("torch."), f"matmul_{SHORT[dtype]}"
        apart = "bias; GELU (erf) as its own kernel"
        found += [
            Peer(
                f"cusparselt_{short}",
                "library",
                f"{name} 2:4",
                apart,
                partial(_cusparselt, dtype=dtype),
                rate,
                needs_cuda=True,
            ),
            Peer(
                f"cutlass_{short}",
                "library",
                f"{name} 2:4",
                apart,
                partial(_cutlass, dtype=dtype),
                rate,
                needs_cuda=True,
            ),
            Peer(
                f"int_mm_{short}",
                "library",
                f"int8 -> {name}",
                "scales per token and feature with bias, and GELU (erf), as kernels of their own",
                partial(_int_mm_scaled, dtype=dtype),
                "matmul_int8",
            ),
            Peer(
                f"torchao_int8_{short}",
                "library",
                f"{name} -> int8 -> {name}",
                "scales per token and feature, bias + GELU (erf)",
                partial(_torchao_int8, dtype=dtype, **options),
                "matmul_int8",
                compiled=True,
            ),
            Peer(
                f"low_rank_rows_{short}",
                "library",
                f"{name}, rank 5 % + 15 % of the rows",
                "bias; GELU (erf) as its own kernel",
                partial(_low_rank_rows, dtype=dtype, rank=0.05, rows=0.15),
                rate,
            ),
            Peer(
                f"low_rank32_cusparselt_{short}",
                "library",
                f"{name}, rank 32 + 2:4",
                "bias; GELU (erf) as its own kernel",
                partial(_low_rank_24, dtype=dtype, rank=32),
                rate,
                needs_cuda=True,
            ),
        ]
    nothing: dict[str, Any] = {"gelu": ()}
    return (
        *found,
        Peer("int_mm", "library", "int8 -> int32", "none: no scale, no bias", _int_mm, "matmul_int8", **nothing),
        Peer(
            "cusparselt_int8",
            "library",
            "int8 2:4 -> bfloat16",
            "scale per feature",
            _cusparselt_int8,
            "matmul_int8",
            needs_cuda=True,
            **nothing,
        ),
        Peer(
            "cusparselt_int8_scaled",
            "library",
            "int8 2:4 -> bfloat16",
            "scale per feature; scale per token with bias, and GELU (erf), as kernels of their own",
            _cusparselt_int8_scaled,
            "matmul_int8",
            gelu=("ffn_in", "ffn_out"),
            needs_cuda=True,
        ),
        Peer(
            "fp8_tensor",
            "library",
            "float8_e4m3fn -> bfloat16",
            "two scalar scales, bias; GELU (erf) as its own kernel",
            partial(_fp8, rowwise=False),
            "matmul_fp8",
        ),
        Peer(
            "fp8_row",
            "library",
            "float8_e4m3fn -> bfloat16",
            "scales per token and feature, bias; GELU (erf) as its own kernel",
            partial(_fp8, rowwise=True),
            "matmul_fp8",
        ),
        Peer(
            "cusparselt_fp8",
            "library",
            "float8_e4m3fn 2:4 -> bfloat16",
            "none",
            _cusparselt_fp8,
            "matmul_fp8",
            needs_cuda=True,
            **nothing,
        ),
    )


# What the peers and the timing core call, checked before any of it runs: operator -> arguments passed by name
# or place.
OPERATORS = {
    "aten::linear": ("input", "weight", "bias"),
    "aten::gelu": ("self", "approximate"),
    "aten::_addmm_activation": ("self", "mat1", "mat2", "use_gelu"),
    "aten::_int_mm": ("self", "mat2"),
    "aten::_scaled_mm": ("self", "mat2", "scale_a", "scale_b", "bias", "out_dtype", "use_fast_accum"),
    "aten::_cslt_compress": ("input",),
    "aten::_cslt_sparse_mm": (
        *("compressed_A", "dense_B", "bias", "alpha", "out_dtype", "transpose_result"),
        *("alg_id", "split_k"),
    ),
    "aten::_cslt_sparse_mm_search": (
        "compressed_A",
        "dense_B",
        "bias",
        "alpha",
        "out_dtype",
        "transpose_result",
    ),
    "aten::_sparse_semi_structured_addmm": ("input", "mat1", "mat1_meta", "mat2"),
}
ATTRIBUTES = (
    "torch._int_mm",
    "torch._scaled_mm",
    "torch._addmm_activation",
    "torch._cslt_compress",
    "torch._cslt_sparse_mm",
    "torch._cslt_sparse_mm_search",
    "torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense",
    "torch.backends.cusparselt.version",
    "torch.float8_e4m3fn",
    "torch.cuda.CUDAGraph.replay",
    "torch.cuda.graph",
    "torch.cuda.Event.elapsed_time",
    "torch.cuda.current_device",
    "torch.cuda.empty_cache",
    "torch.cuda.get_device_properties",
    "torch.cuda.mem_get_info",
    "torch.cuda.synchronize",
    "torch.cuda.max_memory_allocated",
    "torch.cuda.reset_peak_memory_stats",
    "torch.compiler.reset",
)


def missing_names() -> list[str]:
    """Names among :data:`OPERATORS` and :data:`ATTRIBUTES` that this torch lacks, one line each."""
    lines = []
    for operator, arguments in OPERATORS.items():
        found = schema_arguments(operator)
        if not found:
            lines.append(f"{operator}: no such operator")
        elif absent := [name for name in arguments if name not in found]:
            lines.append(f"{operator}: no argument named {', '.join(absent)}")
    for path in ATTRIBUTES:
        value: Any = torch
        for part in path.split(".")[1:]:
            value = getattr(value, part, None)
        if value is None:
            lines.append(f"{path}: no such name")
    return lines
