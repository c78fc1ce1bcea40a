"""The dense and 2:4 kernels that torch already offers for y = x Wᵀ + b, which the kernels of this package must
beat, and these kernels.

A :class:`Peer` builds, for one :class:`Case` (a shape and a token count), a list of calls that differ only in
the copy of the weight they read, a reference in float64 computed from the *same* pruned or quantised
operands, and the bytes that such an operator must move at least. So an error here is a kernel's error, never
that of pruning or quantising.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsebert as sb
from sparsebert import ops
from sparsebert.configs import parse_config
from sparsebert.formats import int8, nm
from sparsebert.ops import layouts, select
from sparsebert.ops.cuda import nm24
from sparsebert.ops.cuda.mma_sp import MMA_SP
from sparsebert.ops.specs import Int8Spec, LowRankSparseSpec, NMSpec

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """One linear layer of an encoder: ``role`` names it, the weight is (out_features, in_features)."""

    role: str
    out_features: int
    in_features: int


# The feed-forward layers hold two thirds of the weights, so they come first; then fused QKV and single
# projections.
FEED_FORWARD = (
    Shape("base.ffn_in", 3072, 768),
    Shape("base.ffn_out", 768, 3072),
    Shape("large.ffn_in", 4096, 1024),
    Shape("large.ffn_out", 1024, 4096),
)
ATTENTION = (
    Shape("base.qkv", 2304, 768),
    Shape("large.qkv", 3072, 1024),
    Shape("base.projection", 768, 768),
    Shape("large.projection", 1024, 1024),
)
TELLING_TOKENS = (2048, 8192, 128)
# Where packed weights pay by their bytes.
FEW_TOKENS = (32,)
# From here on the int8 kernel is to win.
MIDDLE_TOKENS = (512,)
OTHER_TOKENS = (16384, 16, 1)

DRY_SHAPES = (Shape("dry.ffn_in", 128, 64), Shape("dry.ffn_out", 64, 128))
DRY_TOKENS = (1, 16, 32)


@dataclass
class Case:
    """One shape at one token count on one device. ``rotate`` copies a weight often enough to outgrow the
    cache."""

    shape: Shape
    tokens: int
    device: torch.device
    generator: torch.Generator
    copies_for: Callable[[int], int]

    def normal(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, device=self.device, generator=self.generator)
        return (values * scale).to(dtype)

    def integers(self, *size: int) -> Tensor:
        return torch.randint(-127, 128, size, device=self.device, generator=self.generator, dtype=torch.int8)

    def operands(self, dtype: torch.dtype, *, pruned: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """x (tokens, in), W (out, in) and b (out) of ordinary size; ``pruned``: W keeps 2 of every 4."""
        shape = self.shape
        x = self.normal(self.tokens, shape.in_features, dtype=dtype)
        w = self.normal(shape.out_features, shape.in_features, dtype=dtype, scale=shape.in_features**-0.5)
        b = self.normal(shape.out_features, dtype=dtype)
        return x, prune_2_4(w) if pruned else w, b

    def rotate(self, weight: Tensor) -> list[Tensor]:
        count = self.copies_for(weight.numel() * weight.element_size())
        return [weight, *(weight.clone(memory_format=torch.preserve_format) for _ in range(count - 1))]


@dataclass
class Built:
    """Calls ready to run and what to judge them by.

    ``variants`` maps an algorithm's name to its calls, one for each copy of the weight. ``limit`` bounds ||y
    - reference|| / ||reference||; 0 asks for equality. ``rows`` is how many rows of y count (padding
    follows).
    """

    variants: dict[str, list[Call]]
    reference: Callable[[], Tensor]
    weight_bytes: int
    moved_bytes: int
    limit: float
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """``needs_cuda``: torch has these kernels for CUDA only. ``roles``: a suffix the shape's role must end in, or
    several of which it must end in one."""

    name: str
    dtype: str
    epilogue: str
    build: Callable[[Case], Built]
    needs_cuda: bool = False
    roles: str | tuple[str, ...] = ""

    def serves(self, shape: Shape) -> bool:
        return shape.role.endswith(self.roles)


def prune_2_4(weight: Tensor) -> Tensor:
    """Zero the two smallest magnitudes of every four weights in a row."""
    groups = weight.reshape(-1, 4)
    dropped = groups.abs().float().argsort(dim=1)[:, :2]
    return groups.scatter(1, dropped, 0).view_as(weight)


def relative_error(y: Tensor, reference: Tensor) -> float:
    """||y - reference|| / ||reference|| in float64; NaN or an infinity anywhere gives infinity."""
    y = y.double()
    if not torch.isfinite(y).all():
        return float("inf")
    return float((y - reference).norm() / reference.norm())


def linear_flops(case: Case) -> int:
    """Multiplications and additions of the dense product, whatever is skipped."""
    return 2 * case.tokens * case.shape.out_features * case.shape.in_features


def _product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    y = x.double() @ w.double().T
    return y if b is None else y + b.double()


def _moved(case: Case, weight_bytes: int, in_bytes: int, out_bytes: int, bias: Tensor | None = None) -> int:
    """x and the weight read once, the bias read once, y written once."""
    shape = case.shape
    total = case.tokens * (shape.in_features * in_bytes + shape.out_features * out_bytes) + weight_bytes
    return total + (0 if bias is None else bias.numel() * bias.element_size())


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_LIMITS = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
# Eight-bit floats multiply exactly, but the matrix units add them with fewer bits than float32.
_FP8_LIMIT = 2e-2


def _dense(case: Case, dtype: torch.dtype) -> Built:
    x, w, b = case.operands(dtype)
    return Built(
        variants={"": [partial(F.linear, x, copy, b) for copy in case.rotate(w)]},
        reference=lambda: _product(x, w, b),
        weight_bytes=_nbytes(w),
        moved_bytes=_moved(case, _nbytes(w), 2, 2, b),
        limit=_LIMITS[dtype],
    )


def _dense_gelu(case: Case, dtype: torch.dtype) -> Built:
    x, w, b = case.operands(dtype)

    def call(copy: Tensor) -> Tensor:
        return F.gelu(F.linear(x, copy, b))

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(w)]},
        reference=lambda: F.gelu(_product(x, w, b)),
        weight_bytes=_nbytes(w),
        moved_bytes=_moved(case, _nbytes(w), 2, 2, b),
        limit=_LIMITS[dtype],
    )


def _dense_gelu_fused(case: Case, dtype: torch.dtype) -> Built:
    x, w, b = case.operands(dtype)
    # On CUDA the epilogue is the tanh form; torch's CPU kernel of the same op uses the error function.
    form = "tanh" if case.device.type == "cuda" else "none"

    def call(copy: Tensor) -> Tensor:
        return torch._addmm_activation(b, x, copy.t(), use_gelu=True)

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(w)]},
        reference=lambda: F.gelu(_product(x, w, b), approximate=form),
        weight_bytes=_nbytes(w),
        moved_bytes=_moved(case, _nbytes(w), 2, 2, b),
        limit=_LIMITS[dtype],
        notes={"gelu": form},
    )


def _cusparselt(case: Case, dtype: torch.dtype) -> Built:
    x, w, b = case.operands(dtype, pruned=True)
    padded = _pad_rows(x, 8)
    compressed = torch._cslt_compress(w)
    return Built(
        variants=_cusparselt_variants(case, compressed, padded, bias=b),
        reference=lambda: _product(x, w, b),
        weight_bytes=_nbytes(w) * 9 // 16,
        moved_bytes=_moved(case, _nbytes(w) * 9 // 16, 2, 2, b),
        limit=_LIMITS[dtype],
        notes={"padded_tokens": padded.shape[0]},
    )


def _cusparselt_int8(case: Case) -> Built:
    shape = case.shape
    x = case.integers(case.tokens, shape.in_features)
    w = prune_2_4(case.integers(shape.out_features, shape.in_features))
    scales = case.normal(shape.out_features, dtype=torch.float32).abs() * 1e-4 + 1e-5
    padded = _pad_rows(x, 16)
    compressed = torch._cslt_compress(w)
    # 8-bit values and 2-bit positions for half of the weights: 10 bits for every 16 dense ones.
    weight_bytes = _nbytes(w) * 10 // 16
    return Built(
        # A scale for each feature goes in as alpha; per-token scales would need a kernel after this one.
        variants=_cusparselt_variants(case, compressed, padded, alpha=scales, out_dtype=torch.bfloat16),
        reference=lambda: _product(x, w) * scales.double(),
        weight_bytes=weight_bytes,
        moved_bytes=_moved(case, weight_bytes, 1, 2, scales),
        limit=_LIMITS[torch.bfloat16],
        notes={"padded_tokens": padded.shape[0]},
    )


def _cusparselt_int8_gelu(case: Case) -> Built:
    """What a linear of BERT takes besides the product: scales a token, bias and GELU, in two kernels more."""
    x, w, b = case.operands(torch.bfloat16, pruned=True)
    values, scales = int8.quantize_weight(w)
    q, s = int8.quantize_rows(x)
    padded, padded_s = _pad_rows(q, 16), _pad_rows(s[:, None], 16)
    compressed = torch._cslt_compress(values)
    products = _cusparselt_variants(case, compressed, padded, alpha=scales.float(), out_dtype=torch.bfloat16)
    weight_bytes = _nbytes(values) * 10 // 16

    def finish(product: Call) -> Tensor:
        y = product()
        return F.gelu(torch.addcmul(b, y, padded_s, out=y))

    return Built(
        variants={name: [partial(finish, product) for product in calls] for name, calls in products.items()},
        reference=lambda: F.gelu(_product(q, values) * s.double()[:, None] * scales.double() + b.double()),
        weight_bytes=weight_bytes,
        moved_bytes=_moved(case, weight_bytes, 1, 2, b),
        # Rounded to bfloat16 three times.
        limit=2 * _LIMITS[torch.bfloat16],
        notes={"padded_tokens": padded.shape[0]},
    )


def _cusparselt_fp8(case: Case) -> Built:
    x, w, _ = _fp8_operands(case, pruned=True)
    padded = _pad_rows(x, 16)
    compressed = torch._cslt_compress(w)
    weight_bytes = _nbytes(w) * 10 // 16
    return Built(
        variants=_cusparselt_variants(case, compressed, padded, out_dtype=torch.bfloat16),
        reference=lambda: _product(x, w),
        weight_bytes=weight_bytes,
        moved_bytes=_moved(case, weight_bytes, 1, 2),
        limit=_FP8_LIMIT,
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
    build = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense
    count = case.copies_for(_nbytes(w) * 9 // 16)
    copies = [build(w) for _ in range(count)]
    return Built(
        variants={"": [partial(F.linear, x, copy, b) for copy in copies]},
        reference=lambda: _product(x, w, b),
        weight_bytes=_nbytes(w) * 9 // 16,
        moved_bytes=_moved(case, _nbytes(w) * 9 // 16, 2, 2, b),
        limit=_LIMITS[dtype],
        notes={"padded_tokens": case.tokens + -case.tokens % 8},
    )


def _int_mm(case: Case) -> Built:
    shape = case.shape
    x = case.integers(case.tokens, shape.in_features)
    w = case.integers(shape.out_features, shape.in_features)

    def call(copy: Tensor) -> Tensor:
        return torch._int_mm(x, copy.t())

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(w)]},
        reference=lambda: _product(x, w),
        weight_bytes=_nbytes(w),
        moved_bytes=_moved(case, _nbytes(w), 1, 4),
        limit=0.0,
    )


# What a CPU holds in place of a layout that only GPUs have.
_ON_A_CPU = {"grouped": "stacked", "chunked": "neutral"}


def _triton(case: Case, config: str, layout: str = "neutral") -> Built:
    """This package's Triton kernel for the format ``config``, through its op; on a CPU, its reference."""
    on_gpu = case.device.type == "cuda"
    x, w, b = case.operands(torch.float16)
    linear = torch.nn.Linear(case.shape.in_features, case.shape.out_features, device=case.device, dtype=x.dtype)
    with torch.no_grad():
        linear.weight.copy_(w)
        linear.bias.copy_(b)
    model = torch.nn.Sequential(linear)
    sb.compress_(model, {"0": parse_config(config)})
    module: Any = model[0].prepare_(layout if on_gpu else _ON_A_CPU.get(layout, layout))
    weight_bytes = sum(_nbytes(tensor) for tensor in module.buffers())
    copies = [module, *(deepcopy(module) for _ in range(case.copies_for(weight_bytes) - 1))]

    def call(module: torch.nn.Module) -> Tensor:
        with sb.backend("triton" if on_gpu else "reference"), torch.no_grad():
            return module(x)

    def reference() -> Tensor:
        dense = module.dense_weight()
        if not config.startswith("int8"):
            return _product(x, dense, b)
        # From the same integers, with the scales in full.
        q, scale = ops.quantize_rows(x)
        values, scales = module.neutral()[:2]
        return q.double() @ values.double().t() * scale.double()[:, None] * scales.double() + b.double()

    return Built(
        variants={"": [partial(call, each) for each in copies]},
        reference=reference,
        weight_bytes=weight_bytes,
        moved_bytes=_moved(case, weight_bytes, 2, 2, b),
        limit=_LIMITS[torch.float16],
        notes={"layout": module.layout},
    )


def _gelu_int8(case: Case) -> Built:
    """The layer after a GELU, which one kernel computes and quantizes."""
    h, w, b = case.operands(torch.float16)
    values, scales = int8.quantize_weight(w)
    backend = "triton" if case.device.type == "cuda" else "reference"
    sizes = {"activations": "dynamic", "n": 1, "m": 1}
    sizes |= {"in_features": case.shape.in_features, "out_features": case.shape.out_features}

    def call(copy: Tensor) -> Tensor:
        with sb.backend(backend):
            q, s = ops.quantize_rows(h, activation="gelu")
            return ops.int8_linear_from_int8(q, s, [copy, scales], b, dtype=h.dtype, layout="neutral", **sizes)

    def reference() -> Tensor:
        q, s = int8.quantize_rows(F.gelu(h.float()))
        return q.double() @ values.double().t() * s.double()[:, None] * scales.double() + b.double()

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(values)]},
        reference=reference,
        weight_bytes=_nbytes(values),
        moved_bytes=_moved(case, _nbytes(values), 2, 2, b),
        limit=_LIMITS[torch.float16],
    )


def _int8_to_int8(case: Case) -> Built:
    """The product of rows that are int8 already, with GELU, as int8 again."""
    x, w, b = case.operands(torch.float16)
    values, scales = int8.quantize_weight(w)
    backend = "triton" if case.device.type == "cuda" else "reference"
    with sb.backend(backend):
        q, s = ops.quantize_rows(x)
    sizes = {"activations": "dynamic", "n": 1, "m": 1, "activation": "gelu"}
    sizes |= {"in_features": case.shape.in_features, "out_features": case.shape.out_features}

    def product() -> Tensor:
        sums = q.double() @ values.double().t() * s.double()[:, None] * scales.double()
        return F.gelu(sums + b.double())

    step = (product().abs().amax() / 127).float()

    def call(copy: Tensor) -> Tensor:
        with sb.backend(backend):
            return ops.int8_linear_to_int8(q, s, [copy, scales], b, step, layout="neutral", **sizes)[0]

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(values)]},
        reference=lambda: (product() / step.double()).round(),
        weight_bytes=_nbytes(values),
        moved_bytes=_moved(case, _nbytes(values), 1, 1, b),
        limit=_LIMITS[torch.float16],
    )


# The 2:4 kernel of csrc/nm24. Each of its configurations is a variant, and the fastest stands for it.


def _configured(spec: Any, x: Tensor, activation: str = "none") -> list[tuple[str, select.Solution, select.Problem]]:
    """Every way to run ``spec`` in the layout ``mma_sp``, named; on a CPU, the reference."""
    backend = "cuda" if x.is_cuda else "reference"
    problem = select.problem_of(spec, MMA_SP, x, activation)
    (candidate,) = (found for found in select.candidates(spec.op, MMA_SP) if found.backend == backend)
    if reason := candidate.supports(problem):
        raise RuntimeError(reason)
    return [(_name_of(found.configuration), found, problem) for found in select.solutions(candidate, problem)]


def _name_of(configuration: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in configuration._asdict().items()) if configuration else ""


def _copies(case: Case, weight: list[Tensor]) -> list[list[Tensor]]:
    """All tensors of a packed weight, as often as it takes to outgrow the cache."""
    count = case.copies_for(sum(_nbytes(tensor) for tensor in weight))
    return [weight, *([tensor.clone() for tensor in weight] for _ in range(count - 1))]


def _cuda_nm24(case: Case, dtype: torch.dtype) -> Built:
    x, w, b = case.operands(dtype, pruned=True)
    spec = NMSpec(2, 4, case.shape.in_features, case.shape.out_features)
    weight = layouts.get(spec.op, MMA_SP).from_neutral(list(nm.pack(w, 2, 4)), spec, dtype)
    copies = _copies(case, weight)
    weight_bytes = sum(map(_nbytes, weight))
    return Built(
        variants={
            name: [partial(solution.run, x, copy, b, problem) for copy in copies]
            for name, solution, problem in _configured(spec, x)
        },
        reference=lambda: _product(x, w, b),
        weight_bytes=weight_bytes,
        moved_bytes=_moved(case, weight_bytes, 2, 2, b),
        limit=_LIMITS[dtype],
    )


def _cuda_low_rank(case: Case, dtype: torch.dtype, rank: int, *, tail_alone: bool) -> Built:
    """2:4 and a low-rank part in the same sums. ``tail_alone``: t = x vᵀ is there already, and not part of the time."""
    x, w, b = case.operands(dtype, pruned=True)
    shape = case.shape
    u = case.normal(shape.out_features, rank, dtype=dtype, scale=rank**-0.5)
    v = case.normal(rank, shape.in_features, dtype=dtype, scale=shape.in_features**-0.5)
    spec = LowRankSparseSpec(rank, "nm", 2, 4, 0, shape.in_features, shape.out_features)
    weight = layouts.get(spec.op, MMA_SP).from_neutral([u, v, *nm.pack(w, 2, 4)], spec, dtype)
    copies = _copies(case, weight)
    weight_bytes = sum(map(_nbytes, weight))
    t = F.linear(x, v)
    sizes = {"in_features": shape.in_features, "out_features": shape.out_features}

    def tail(copy: list[Tensor], configuration: Any) -> Tensor:
        packed, _, values, metadata = copy
        if configuration is None:
            return F.linear(t, u, b) + F.linear(x, w)
        return nm24.linear(x, values, metadata, b, **sizes, config=configuration, t=t, u=packed)

    def call(solution: select.Solution, copy: list[Tensor], problem: select.Problem) -> Call:
        if tail_alone:
            return partial(tail, copy, solution.configuration)
        return partial(solution.run, x, copy, b, problem)

    return Built(
        variants={
            name: [call(solution, copy, problem) for copy in copies] for name, solution, problem in _configured(spec, x)
        },
        # From t as it is rounded, where it is given.
        reference=lambda: _product(x, w, b) + _product(t if tail_alone else _product(x, v), u),
        weight_bytes=weight_bytes,
        moved_bytes=_moved(case, weight_bytes, 2, 2, b),
        limit=_LIMITS[dtype],
    )


def _cuda_int8(case: Case, dtype: torch.dtype, kind: str) -> Built:
    """int8 2:4 of three kinds: ``rows``, from int8 rows with GELU to ``dtype``; ``quantized``, rows of ``dtype`` that
    are quantized first; ``again``, from int8 rows with GELU to int8."""
    x, w, b = case.operands(dtype, pruned=True)
    values, scales = int8.quantize_weight(w)
    q, s = int8.quantize_rows(x)
    spec = Int8Spec("dynamic", 2, 4, case.shape.in_features, case.shape.out_features)
    weight = layouts.get(spec.op, MMA_SP).from_neutral([*nm.pack(values, 2, 4), scales], spec, dtype)
    copies = _copies(case, weight)
    weight_bytes = sum(map(_nbytes, weight))
    activation = "none" if kind == "quantized" else "gelu"

    def product() -> Tensor:
        y = q.double() @ values.double().t() * s.double()[:, None] * scales.double() + b.double()
        return y if kind == "quantized" else F.gelu(y)

    step = (product().abs().amax() / 127).float()

    def call(solution: select.Solution, copy: list[Tensor], problem: select.Problem) -> Call:
        kernels: Any = solution.candidate.run
        if kind == "quantized":
            return partial(solution.run, x, copy, b, problem)
        if kind == "rows":
            return partial(kernels.multiply, q, s, copy, b, problem, **solution.options)
        return lambda: kernels.again(q, s, copy, b, step, problem, **solution.options)[0]

    return Built(
        variants={
            name: [call(solution, copy, problem) for copy in copies]
            for name, solution, problem in _configured(spec, x, activation)
        },
        reference=lambda: (product() / step.double()).round() if kind == "again" else product(),
        weight_bytes=weight_bytes,
        moved_bytes=_moved(case, weight_bytes, 2 if kind == "quantized" else 1, 1 if kind == "again" else 2, b),
        limit=_LIMITS[dtype],
    )


def _fp8_operands(case: Case, *, pruned: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    x, w, b = case.operands(torch.bfloat16, pruned=pruned)
    # Weights of size in**-0.5 would fall among the subnormals of e4m3; scale them up as a quantiser would.
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
        return torch._scaled_mm(
            x,
            copy.t(),
            scale_a=scale_x,
            scale_b=scale_w,
            bias=b,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(w)]},
        reference=lambda: _product(x, w) * scale_x.double() * scale_w.double() + b.double(),
        weight_bytes=_nbytes(w),
        moved_bytes=_moved(case, _nbytes(w), 1, 2, b),
        limit=_FP8_LIMIT,
    )


def _pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Rows of zeros up to a multiple, which the caller of a sparse library must supply (not part of the
    time)."""
    short = -x.shape[0] % multiple
    return torch.cat([x, x.new_zeros(short, x.shape[1])]) if short else x


FP16, BF16 = torch.float16, torch.bfloat16
PRIMARY = (
    Peer("cublas_fp16", "float16", "bias", partial(_dense, dtype=FP16)),
    Peer("cusparselt_fp16", "float16 2:4", "bias", partial(_cusparselt, dtype=FP16), needs_cuda=True),
)
CUDA = (
    Peer("cuda_nm24_fp16", "float16 2:4", "bias", partial(_cuda_nm24, dtype=FP16)),
    Peer("cuda_nm24_bf16", "bfloat16 2:4", "bias", partial(_cuda_nm24, dtype=BF16)),
    Peer(
        "cuda_int8_nm24_gelu",
        "int8 2:4 -> bfloat16",
        "scales per token and feature, bias, GELU (erf)",
        partial(_cuda_int8, dtype=BF16, kind="rows"),
    ),
    Peer(
        "cuda_int8_nm24",
        "bfloat16 -> int8 2:4 -> bfloat16",
        "scales per token and feature, bias",
        partial(_cuda_int8, dtype=BF16, kind="quantized"),
    ),
    Peer(
        "cuda_int8_nm24_to_int8",
        "int8 2:4 -> int8",
        "scales, bias, GELU (erf), one scale",
        partial(_cuda_int8, dtype=FP16, kind="again"),
    ),
    Peer(
        "cuda_low_rank32_nm24_fp16",
        "float16, rank 32 + 2:4",
        "bias",
        partial(_cuda_low_rank, dtype=FP16, rank=32, tail_alone=False),
    ),
    Peer(
        "cuda_tail32_nm24_fp16",
        "float16, rank 32 + 2:4, x vᵀ given",
        "bias",
        partial(_cuda_low_rank, dtype=FP16, rank=32, tail_alone=True),
    ),
)
TRITON = (
    Peer("triton_nm24_fp16", "float16 2:4", "bias", partial(_triton, config="2:4")),
    Peer("triton_nm14_fp16", "float16 1:4", "bias", partial(_triton, config="1:4")),
    Peer("triton_nm28_fp16", "float16 2:8", "bias", partial(_triton, config="2:8")),
    Peer("triton_bitmap05_fp16", "float16, 5 % kept", "bias", partial(_triton, config="bitmap:0.05", layout="chunked")),
    Peer(
        "triton_low_rank_rows_fp16",
        "float16, rank 5 % + 15 % of the rows",
        "bias",
        partial(_triton, config="low-rank:0.05+rows:0.15", layout="grouped"),
    ),
    Peer(
        "triton_int8_fp16",
        "float16 -> int8 -> float16",
        "scales per token and feature, bias",
        partial(_triton, config="int8"),
    ),
    Peer(
        "triton_low_rank_fp16",
        "float16, rank 5 %",
        "bias",
        partial(_triton, config="low-rank:0.05", layout="auto"),
    ),
    Peer("triton_int8_to_int8", "int8 -> int8", "scales, bias, GELU (erf), one scale", _int8_to_int8),
    Peer("triton_gelu_int8", "float16 -> int8 -> float16", "GELU of x, scales, bias", _gelu_int8, roles="ffn_out"),
)
OWN = CUDA + TRITON
# What the int8 2:4 kernel is held against: the same work by torch's kernels.
RIVALS = (
    Peer(
        "cublas_bf16_gelu",
        "bfloat16",
        "bias, GELU (erf) as its own kernel",
        partial(_dense_gelu, dtype=BF16),
        roles=("ffn_in", "ffn_out"),
    ),
    Peer(
        "cusparselt_int8_gelu",
        "int8 2:4 -> bfloat16",
        "scale per feature; scale per token with bias, and GELU (erf), as kernels of their own",
        _cusparselt_int8_gelu,
        needs_cuda=True,
        roles=("ffn_in", "ffn_out"),
    ),
)
SECONDARY = (
    Peer(
        "cublas_fp16_gelu",
        "float16",
        "bias, GELU (erf) as its own kernel",
        partial(_dense_gelu, dtype=FP16),
        roles="ffn_in",
    ),
    Peer(
        "cublas_fp16_gelu_fused",
        "float16",
        "bias + GELU (tanh)",
        partial(_dense_gelu_fused, dtype=FP16),
        roles="ffn_in",
    ),
    Peer("cusparselt_int8", "int8 2:4 -> bfloat16", "scale per feature", _cusparselt_int8, needs_cuda=True),
    Peer("int_mm", "int8 -> int32", "none: no scale, no bias", _int_mm),
    Peer("fp8_tensor", "float8_e4m3fn -> bfloat16", "two scalar scales, bias", partial(_fp8, rowwise=False)),
    Peer("cublas_bf16", "bfloat16", "bias", partial(_dense, dtype=BF16)),
    Peer("cusparselt_bf16", "bfloat16 2:4", "bias", partial(_cusparselt, dtype=BF16), needs_cuda=True),
    Peer("cutlass_fp16", "float16 2:4", "bias", partial(_cutlass, dtype=FP16), needs_cuda=True),
    Peer("cusparselt_fp8", "float8_e4m3fn 2:4 -> bfloat16", "none", _cusparselt_fp8, needs_cuda=True),
    Peer(
        "fp8_row",
        "float8_e4m3fn -> bfloat16",
        "scales per token and feature, bias",
        partial(_fp8, rowwise=True),
    ),
)


def jobs(dry: bool) -> list[tuple[Shape, int, Peer]]:
    """Every (shape, tokens, peer), most telling first: dense against 2:4 in fp16 on the feed-forward layers
    at the token counts where the answer changes; then this package's kernels, first where tokens are few, the CUDA
    kernel before Triton's and with what it is held against; then the other peers; then the attention shapes; then
    the rest."""
    blocks: list[tuple[tuple[Shape, ...], tuple[int, ...], tuple[Peer, ...]]]
    if dry:
        blocks = [(DRY_SHAPES, DRY_TOKENS, peers) for peers in (PRIMARY, OWN, RIVALS, SECONDARY)]
    else:
        blocks = [
            (FEED_FORWARD, TELLING_TOKENS, PRIMARY),
            (FEED_FORWARD, FEW_TOKENS, PRIMARY + OWN),
            (FEED_FORWARD, TELLING_TOKENS, CUDA + RIVALS),
            (FEED_FORWARD, MIDDLE_TOKENS, PRIMARY + CUDA + RIVALS),
            (FEED_FORWARD, TELLING_TOKENS, TRITON),
            (FEED_FORWARD, TELLING_TOKENS, SECONDARY),
            (FEED_FORWARD, OTHER_TOKENS, PRIMARY + CUDA + RIVALS),
            (ATTENTION, TELLING_TOKENS, PRIMARY + CUDA),
            (ATTENTION, MIDDLE_TOKENS + OTHER_TOKENS, PRIMARY),
            (ATTENTION, FEW_TOKENS + MIDDLE_TOKENS + OTHER_TOKENS, CUDA),
            (ATTENTION, TELLING_TOKENS, SECONDARY),
            (FEED_FORWARD + ATTENTION, MIDDLE_TOKENS + OTHER_TOKENS, SECONDARY),
        ]
    return [
        (shape, count, peer)
        for shapes, tokens, peers in blocks
        for count in tokens
        for shape in shapes
        for peer in peers
        if peer.serves(shape)
    ]


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
