"""This package's linears: every format in every layout by every backend, and what only its kernels do."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsebert as sb
from sparsebert import ops
from sparsebert.bench.linear.cases import LIMITS, SHORT, Built, Call, Case, Peer, product
from sparsebert.configs import Int8Config, LowRankConfig, LowRankSparseConfig, parse_config
from sparsebert.formats import int8, mma_sp, nm, one_shot
from sparsebert.nn import MODULES, PackedLinear
from sparsebert.ops import layouts, linear_layer_norm, measurements, select
from sparsebert.ops.cuda import nm24, wgmma
from sparsebert.ops.cuda.mma_sp import MMA_SP
from sparsebert.ops.devices import Device
from sparsebert.ops.specs import DenseSpec, Int8Spec, LowRankSparseSpec, NMSpec

FP16, BF16 = torch.float16, torch.bfloat16

FORMATS = (
    "2:4",
    "int8+2:4",
    "int8",
    "low-rank:0.25",
    "low-rank:r32+2:4",
    "low-rank:0.05+rows:0.15",
    "bitmap:0.05",
    "1:4",
    "2:8",
    "2:4@0.5",
    "int8-static",
    "low-rank:0.05",
    "low-rank:0.5",
    "low-rank:0.25+2:4",
    "low-rank:0.05+bitmap:0.05",
    "bitmap:0.1",
)


@lru_cache(maxsize=64)
def layer(format: str, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> PackedLinear:
    """A random layer in ``format``, neutral; the same for the same arguments. Factors are random: to factorize a weight
    takes seconds, and no kernel's time depends on how good they are."""
    config = parse_config(format)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device, generator=generator) * scale).to(dtype)

    linear = nn.Linear(in_features, out_features, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(normal(out_features, in_features, scale=in_features**-0.5), requires_grad=False)
    linear.bias = nn.Parameter(normal(out_features), requires_grad=False)
    if isinstance(config, LowRankConfig | LowRankSparseConfig):
        rank = one_shot.rank_of(config, out_features, in_features)
        factors = {"u": normal(out_features, rank, scale=rank**-0.5)}
        factors["v"] = normal(rank, in_features, scale=in_features**-0.5)
        if isinstance(config, LowRankSparseConfig) and config.sparse is not None:
            factors["sparse"] = linear.weight.detach() * one_shot.magnitude_mask(linear.weight.detach(), config.sparse)
        return MODULES[config.format].from_linear(linear, config, factors=factors)
    model = nn.Sequential(linear)
    sb.compress_(model, {"0": config}, layout=layouts.NEUTRAL)
    if isinstance(config, Int8Config) and config.activations == "static":
        sb.calibrate(model, [normal(128, in_features)])
    module: Any = model[0]
    return module


def _build(case: Case, format: str, layout: str, backend: str, dtype: torch.dtype) -> Built:
    """One format in one layout by one backend, as its op runs it; every configuration is a variant, of Triton's the one
    that it estimates (each takes seconds to compile, and ``sb.tune`` tries them all)."""
    shape, device = case.shape, case.device
    module = layer(format, shape.out_features, shape.in_features, dtype, device)
    spec = module.spec
    held = layouts.get(spec.op, layout)
    if not case.dry and (reason := held.supports(spec, dtype, device)):
        raise RuntimeError(f"layout {layout}: {reason}")
    neutral, columns = list(module.neutral()), module.columns
    x = case.normal(case.tokens, shape.in_features, dtype=dtype)
    bias = module.bias
    problem = select.problem_of(spec, layout, x[:, : spec.in_features], case.activation)
    candidate = _candidate(problem, backend, case.dry)
    solutions = [select.Solution(candidate)] if case.dry else select.solutions(candidate, problem)
    if backend == "triton":
        solutions = solutions[:1]
    weight = held.from_neutral(neutral, spec, dtype)
    copies = case.rotate_all(weight)
    weight_bytes = sum(tensor.nbytes for tensor in weight)

    def reference() -> Tensor:
        rows = x if columns is None else x.index_select(1, columns)
        if isinstance(spec, Int8Spec) and layout != layouts.DENSE:
            # From the same integers, with the scales in full. A dense int8 layer does not quantize x.
            return case.activate(_int8_product(rows, neutral, spec, bias))
        dense = layouts.get(spec.op, layouts.NEUTRAL).to_dense(neutral, spec, dtype)
        if spec.op.startswith("low_rank") and layout != layouts.DENSE:
            return case.activate(_factored(rows, neutral, spec, bias))
        return case.activate(product(rows, dense, bias))

    return Built(
        variants={
            name_of(solution): [partial(solution.run, x, copy, bias, problem, columns) for copy in copies]
            for solution in solutions
        },
        reference=reference,
        weight_bytes=weight_bytes,
        # Of x the columns that the weight has.
        moved_bytes=case.moved(weight_bytes, 0, x.itemsize, *filter(torch.is_tensor, (bias, columns)))
        + case.tokens * spec.in_features * x.itemsize,
        limit=LIMITS[dtype] * (2 if spec.op.startswith("low_rank") else 1),
        operations=2 * case.tokens * _multiplied(spec),
        notes={
            "op": measurements.op_name(spec),
            # The packed weight's, which are not the layer's where columns are dropped.
            "op_out_features": spec.out_features,
            "op_in_features": spec.in_features,
            "kernel": candidate.description,
            "device": problem.device.name,
            "configurations": {
                name_of(solution): solution.configuration._asdict() if solution.configuration else {}
                for solution in solutions
            },
        },
    )


def _candidate(problem: select.Problem, backend: str, dry: bool = False) -> select.Candidate:
    found = {candidate.backend: candidate for candidate in select.candidates(problem.op, problem.layout)}
    if dry and "reference" in found:
        # On a CPU it stands in for every kernel of its layout.
        return found["reference"]
    if not dry and (reason := found[backend].supports(problem)):
        raise RuntimeError(reason)
    return found[backend]


def _int8_product(x: Tensor, neutral: list[Tensor], spec: Int8Spec, bias: Tensor | None) -> Tensor:
    values, rest = ops.int8.split(neutral, spec)
    static = rest[1] if spec.activations == "static" else None
    q, s = ops.quantize_rows(x, static)
    y = product(q, values) * s.double()[:, None] * rest[0].double()
    return y if bias is None else y + bias.double()


def _factored(x: Tensor, neutral: list[Tensor], spec: Any, bias: Tensor | None) -> Tensor:
    """From the factors as they are stored: their product in 16 bits would be rounded once more."""
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in neutral]
    dense = layouts.get(spec.op, layouts.NEUTRAL).to_dense(wide, spec, torch.float64)
    return product(x, dense, bias)


def _multiplied(spec: Any) -> int:
    """Weights that take part in a multiplication of one row."""
    full = spec.in_features * spec.out_features
    sparse = getattr(spec, "sparse", None)
    total = getattr(spec, "rank", 0) * (spec.in_features + spec.out_features)
    if spec.op in ("nm_linear", "int8_linear") or sparse == "nm":
        total += full * spec.n // spec.m
    elif spec.op == "bitmap_linear":
        total += spec.nnz
    elif sparse == "rows":
        total += spec.count * spec.in_features
    elif sparse == "bitmap":
        total += spec.count
    elif spec.op == "dense_linear":
        total += full
    return total


def name_of(solution: select.Solution) -> str:
    """A configuration in a line; nothing where there is none."""
    found = solution.configuration
    return " ".join(f"{name}={value}" for name, value in found._asdict().items()) if found else ""


def peers(dtype: torch.dtype, *, on_gpu: bool) -> tuple[Peer, ...]:
    """Every format in every layout by every backend, named ``format/layout/backend/dtype``; without those of GPUs
    where there is none. On a GPU also a dense weight by the kernel for Hopper: a path to beat."""
    found = [_dense_peer(dtype)] if on_gpu else []
    for format in FORMATS:
        # Small, and of the same op and pattern as any other size.
        spec = layer(format, 64, 64, torch.float32, torch.device("cpu")).spec
        for layout in layouts.names(spec.op):
            if not _holds(layout, spec) or (on_gpu and layout == ops.int8.FLOATS):
                continue
            backends = {candidate.backend for candidate in select.candidates(spec.op, layout)}
            if not _runs(layout, spec, dtype):
                backends.discard("cuda")
            if not on_gpu:
                backends &= set() if layout in _GPU_LAYOUTS else {"reference", "torch"}
            elif len(backends) > 1 and not spec.op.startswith("low_rank"):
                # It unpacks on every call; only of factors is it a way that somebody would take.
                backends.discard("reference")
            found += [_peer(format, layout, backend, dtype) for backend in select.BACKENDS if backend in backends]
    return tuple(found)


# Which device and weight a layout is for; ``Layout.supports`` says the same, of a device that is there.
_GPU_LAYOUTS = ("cusparselt", "cutlass", "mma_sp", "chunked", "grouped", "padded")


def _holds(layout: str, spec: Any) -> bool:
    """Whether ``layout`` can hold such a weight on any device."""
    if layout == MMA_SP:
        return (getattr(spec, "n", 1), getattr(spec, "m", 1)) in mma_sp.PATTERNS
    if layout == ops.int8.UNPACKED:
        return spec.m > 1
    rows = getattr(spec, "sparse", None) == "rows"
    return rows if layout in ("stacked", "grouped") else not (rows and layout == "padded")


def _runs(layout: str, spec: Any, dtype: torch.dtype) -> bool:
    """Whether a CUDA kernel is measured in ``layout``: not in ``dense``, where a module calls torch's linear itself."""
    if layout in (MMA_SP, layouts.DENSE):
        return layout == MMA_SP
    return wgmma.pattern_of(select.Problem(layout, Device("cuda"), dtype, spec, 1, "none")) is not None


def _peer(format: str, layout: str, backend: str, dtype: torch.dtype) -> Peer:
    short, name = SHORT[dtype], str(dtype).removeprefix("torch.")
    quantized = format.startswith("int8")
    return Peer(
        f"{format}/{layout}/{backend}/{short}",
        "own",
        f"{name} -> int8 -> {name}" if quantized else name,
        "scales, bias, GELU (erf)" if quantized else "bias, GELU (erf)",
        partial(_build, format=format, layout=layout, backend=backend, dtype=dtype),
        # A CPU has no int8 peak that is worth a name.
        "matmul_int8" if quantized and layout != layouts.DENSE and dtype.itemsize == 2 else f"matmul_{short}",
        needs_cuda=layout in ("cusparselt", "cutlass"),
        row={"format": format, "layout": layout, "backend": backend, "weight_dtype": name},
    )


# What has no counterpart as a layer alone: rows that are int8 already or stay so, a low-rank part whose x vᵀ is there,
# and the normalization after a layer.


def _triton(case: Case) -> str:
    return "triton" if case.device.type == "cuda" else "reference"


def _gelu_int8(case: Case) -> Built:
    """The layer after a GELU, which one kernel computes and quantizes."""
    h, w, b = case.operands(FP16)
    values, scales = int8.quantize_weight(w)
    sizes = {"activations": "dynamic", "n": 1, "m": 1}
    sizes |= {"in_features": case.shape.in_features, "out_features": case.shape.out_features}

    def call(copy: Tensor) -> Tensor:
        with sb.backend(_triton(case)):
            q, s = ops.quantize_rows(h, activation="gelu")
            return ops.int8_linear_from_int8(q, s, [copy, scales], b, dtype=h.dtype, layout="neutral", **sizes)

    def reference() -> Tensor:
        q, s = int8.quantize_rows(F.gelu(h.float()))
        return product(q, values) * s.double()[:, None] * scales.double() + b.double()

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(values)]},
        reference=reference,
        weight_bytes=values.nbytes,
        moved_bytes=case.moved(values.nbytes, 2, 2, b),
        limit=LIMITS[FP16],
    )


def _int8_to_int8(case: Case) -> Built:
    """The product of rows that are int8 already, with its activation, as int8 again."""
    x, w, b = case.operands(FP16)
    values, scales = int8.quantize_weight(w)
    with sb.backend(_triton(case)):
        q, s = ops.quantize_rows(x)
    sizes = {"activations": "dynamic", "n": 1, "m": 1, "activation": case.activation}
    sizes |= {"in_features": case.shape.in_features, "out_features": case.shape.out_features}

    def result() -> Tensor:
        return case.activate(product(q, values) * s.double()[:, None] * scales.double() + b.double())

    step = (result().abs().amax() / 127).float()

    def call(copy: Tensor) -> Tensor:
        with sb.backend(_triton(case)):
            return ops.int8_linear_to_int8(q, s, [copy, scales], b, step, layout="neutral", **sizes)[0]

    return Built(
        variants={"": [partial(call, copy) for copy in case.rotate(values)]},
        reference=lambda: (result() / step.double()).round(),
        weight_bytes=values.nbytes,
        moved_bytes=case.moved(values.nbytes, 1, 1, b),
        limit=LIMITS[FP16],
    )


def _configured(
    spec: Any, layout: str, x: Tensor, activation: str
) -> list[tuple[str, select.Solution, select.Problem]]:
    """Every way to run ``spec`` in ``layout`` by a CUDA kernel, named; on a CPU, the reference."""
    backend = "cuda" if x.is_cuda else "reference"
    problem = select.problem_of(spec, layout, x, activation)
    return [(name_of(found), found, problem) for found in select.solutions(_candidate(problem, backend), problem)]


def _dense_peer(dtype: torch.dtype) -> Peer:
    short, name = SHORT[dtype], str(dtype).removeprefix("torch.")
    build = partial(_dense, dtype=dtype)
    return Peer(f"dense/neutral/cuda/{short}", "dense", name, "bias + GELU (erf)", build, f"matmul_{short}")


def _dense(case: Case, dtype: torch.dtype) -> Built:
    """A dense weight by the kernel for Hopper, which its 2:4 has to be quicker than."""
    x, w, b = case.operands(dtype)
    copies = case.rotate(w)
    spec = DenseSpec(case.shape.in_features, case.shape.out_features)
    return Built(
        variants={
            name: [partial(solution.run, x, [copy], b, problem) for copy in copies]
            for name, solution, problem in _configured(spec, layouts.NEUTRAL, x, case.activation)
        },
        reference=lambda: case.activate(product(x, w, b)),
        weight_bytes=w.nbytes,
        moved_bytes=case.moved(w.nbytes, 2, 2, b),
        limit=LIMITS[dtype],
    )


def _tail(case: Case, dtype: torch.dtype, rank: int, layout: str) -> Built:
    """2:4 and a low-rank part in the same sums, where t = x vᵀ is there already and not part of the time."""
    x, w, b = case.operands(dtype, pruned=True)
    shape = case.shape
    u = case.normal(shape.out_features, rank, dtype=dtype, scale=rank**-0.5)
    v = case.normal(rank, shape.in_features, dtype=dtype, scale=shape.in_features**-0.5)
    spec = LowRankSparseSpec(rank, "nm", 2, 4, 0, shape.in_features, shape.out_features)
    weight = layouts.get(spec.op, layout).from_neutral([u, v, *nm.pack(w, 2, 4)], spec, dtype)
    copies = case.rotate_all(weight)
    weight_bytes = sum(tensor.nbytes for tensor in weight) - v.nbytes
    t = F.linear(x, v)
    linear: Callable[..., Tensor] = wgmma.linear
    if layout == MMA_SP:
        linear = partial(nm24.linear, in_features=shape.in_features, out_features=shape.out_features)

    def call(copy: list[Tensor], configuration: Any) -> Tensor:
        own_u, _, values, places = copy
        if configuration is None:
            return F.linear(t, u, b) + F.linear(x, w)
        return linear(x, values, places, b, config=configuration, t=t, u=own_u)

    return Built(
        variants={
            name: [partial(call, copy, solution.configuration) for copy in copies]
            for name, solution, _ in _configured(spec, layout, x, "none")
        },
        # From t as it is rounded.
        reference=lambda: product(x, w, b) + product(t, u),
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, 2, 2, b, t),
        limit=LIMITS[dtype],
        operations=case.flops // 2 + 2 * case.tokens * u.numel(),
    )


def _int8_rows(case: Case, dtype: torch.dtype, layout: str, *, again: bool = False, pruned: bool = True) -> Built:
    """int8, at 2:4 where ``pruned``, of rows that are int8 already; to ``dtype`` or, ``again``, int8 by one scale."""
    x, w, b = case.operands(dtype, pruned=pruned)
    values, scales = int8.quantize_weight(w)
    q, s = int8.quantize_rows(x)
    n, m = (2, 4) if pruned else (1, 1)
    spec = Int8Spec("dynamic", n, m, case.shape.in_features, case.shape.out_features)
    packed = nm.pack(values, n, m) if pruned else (values,)
    weight = layouts.get(spec.op, layout).from_neutral([*packed, scales], spec, dtype)
    copies = case.rotate_all(weight)
    weight_bytes = sum(tensor.nbytes for tensor in weight)

    def result() -> Tensor:
        return case.activate(product(q, values) * s.double()[:, None] * scales.double() + b.double())

    step = (result().abs().amax() / 127).float()

    def call(solution: select.Solution, copy: list[Tensor], problem: select.Problem) -> Call:
        kernels: Any = solution.candidate.run
        if again:
            return lambda: kernels.again(q, s, copy, b, step, problem, **solution.options)[0]
        return partial(kernels.multiply, q, s, copy, b, problem, **solution.options)

    return Built(
        variants={
            name: [call(solution, copy, problem) for copy in copies]
            for name, solution, problem in _configured(spec, layout, x, case.activation)
        },
        reference=lambda: (result() / step.double()).round() if again else result(),
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, 1, 1 if again else 2, b),
        limit=LIMITS[dtype],
        operations=case.flops // (2 if pruned else 1),
    )


def _with_layer_norm(case: Case, *, fused: bool) -> Built:
    """A 2:4 weight, a residual and LayerNorm: in one launch, or by the linear's kernel and that of ``add_layer_norm``,
    which other backends have."""
    x, w, b = case.operands(FP16, pruned=True)
    shape = case.shape
    residual = case.normal(case.tokens, shape.out_features, dtype=FP16)
    norm = (case.normal(shape.out_features, dtype=FP16), case.normal(shape.out_features, dtype=FP16), 1e-12)
    spec = NMSpec(2, 4, shape.in_features, shape.out_features)
    copies = case.rotate_all(list(nm.pack(w, 2, 4)))
    weight_bytes = sum(tensor.nbytes for tensor in copies[0])
    problem = linear_layer_norm.problem_of(spec, layouts.NEUTRAL, residual, quantize=False)
    # On a CPU, the reference.
    whole = None if case.dry or not fused else select.Solution(_candidate(problem, "cuda"))

    def at_once(copy: list[Tensor]) -> Tensor:
        call = linear_layer_norm.Call(x, None, copy, b, residual, *norm)
        if whole is None:
            return linear_layer_norm.run_apart(call, problem)[0]
        return linear_layer_norm.run_fused(whole, call, problem)[0]

    def apart(solution: select.Solution, of_linear: select.Problem, copy: list[Tensor]) -> Tensor:
        return ops.add_layer_norm(solution.run(x, copy, b, of_linear), residual, *norm)

    ways: dict[str, Callable[[list[Tensor]], Tensor]] = {"": at_once}
    if not fused:
        found = _configured(spec, layouts.NEUTRAL, x, "none")
        ways = {name: partial(apart, solution, of_linear) for name, solution, of_linear in found}

    def reference() -> Tensor:
        weight, bias, eps = norm
        z = product(x, w, b) + residual.double()
        return F.layer_norm(z, z.shape[-1:], weight.double(), bias.double(), eps)

    return Built(
        variants={name: [partial(way, copy) for copy in copies] for name, way in ways.items()},
        reference=reference,
        weight_bytes=weight_bytes,
        moved_bytes=case.moved(weight_bytes, 2, 2, b, residual),
        limit=LIMITS[FP16],
        operations=case.flops // 2,
    )


def _one(name: str, dtype: str, epilogue: str, build: Callable[[Case], Built], rate: str, **more: Any) -> Peer:
    return Peer(name, "own", dtype, epilogue, build, rate, **more)


CHAINED = (
    *(
        _one(
            f"int8+2:4_rows/{layout}/cuda/bf16",
            "int8 2:4 -> bfloat16",
            "scales per token and feature, bias, GELU (erf)",
            partial(_int8_rows, dtype=BF16, layout=layout),
            "matmul_int8",
            gelu=("ffn_in", "ffn_out"),
        )
        for layout in (MMA_SP, layouts.NEUTRAL)
    ),
    _one(
        "int8_rows/neutral/cuda/bf16",
        "int8 -> bfloat16",
        "scales per token and feature, bias, GELU (erf)",
        partial(_int8_rows, dtype=BF16, layout=layouts.NEUTRAL, pruned=False),
        "matmul_int8",
        gelu=("ffn_in", "ffn_out"),
    ),
    *(
        _one(
            f"int8+2:4_to_int8/{layout}/cuda/fp16",
            "int8 2:4 -> int8",
            "scales, bias, GELU (erf), one scale",
            partial(_int8_rows, dtype=FP16, layout=layout, again=True),
            "matmul_int8",
            plain=False,
        )
        for layout in (MMA_SP, layouts.NEUTRAL)
    ),
    *(
        _one(
            f"tail32+2:4/{layout}/cuda/fp16",
            "float16, rank 32 + 2:4, x vᵀ given",
            "bias",
            partial(_tail, dtype=FP16, rank=32, layout=layout),
            "matmul_fp16",
            gelu=(),
        )
        for layout in (MMA_SP, layouts.NEUTRAL)
    ),
    *(
        _one(
            f"2:4_{name}/neutral/cuda/fp16",
            "float16",
            f"bias, residual, LayerNorm, {launches}",
            partial(_with_layer_norm, fused=fused),
            "matmul_fp16",
            gelu=(),
        )
        for name, launches, fused in (
            ("layer_norm", "one launch", True),
            ("then_layer_norm", "two launches", False),
        )
    ),
    _one(
        "int8_to_int8/neutral/triton/fp16",
        "int8 -> int8",
        "scales, bias, GELU (erf), one scale",
        _int8_to_int8,
        "matmul_int8",
        plain=False,
    ),
    _one(
        "gelu_int8/neutral/triton/fp16",
        "float16 -> int8 -> float16",
        "GELU of x, scales, bias",
        _gelu_int8,
        "matmul_int8",
        plain=False,
        gelu=("ffn_out",),
    ),
)
