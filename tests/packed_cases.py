"""One weight of every packed kind, small and of odd sizes: what the tests of ops and modules run over."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sparsebert as sb
from sparsebert.formats import bitmap, int8, nm, one_shot
from sparsebert.nn import MODULES, PackedLinear
from sparsebert.ops import int8 as int8_op
from sparsebert.ops import layouts, low_rank_sparse
from sparsebert.ops.specs import BitmapSpec, DenseSpec, Int8Spec, LowRankSparseSpec, LowRankSpec, NMSpec, Spec

CPU = torch.device("cpu")
OUT, RANK, INPUT_SCALE = 37, 5, 0.02

KINDS: dict[str, Any] = {
    "nm-2:4": sb.NMConfig(2, 4),
    "nm-1:4": sb.NMConfig(1, 4),
    "nm-3:8": sb.NMConfig(3, 8),
    "bitmap-half": sb.BitmapConfig(0.5),
    "bitmap-5%": sb.BitmapConfig(0.05),
    "bitmap-empty-rows": sb.BitmapConfig(0.3),
    "bitmap-nothing": sb.BitmapConfig(0.1),
    "low-rank": sb.LowRankConfig(RANK),
    "rows": sb.LowRankSparseConfig(RANK, sparse=sb.RowsConfig(0.1)),
    "rows-0": sb.LowRankSparseConfig(RANK, sparse=sb.RowsConfig(0.01)),
    "factors+2:4": sb.LowRankSparseConfig(RANK, sparse=sb.NMConfig(2, 4)),
    "factors+bitmap": sb.LowRankSparseConfig(RANK, sparse=sb.BitmapConfig(0.1)),
    "int8": sb.Int8Config(),
    "int8-static": sb.Int8Config("static"),
    "int8+2:4": sb.Int8Config(weights=sb.NMConfig(2, 4)),
    "int8-static+1:4": sb.Int8Config("static", sb.NMConfig(1, 4)),
    "dense": sb.DenseConfig(),
}
# One kind of every structure, for what costs seconds and does not look at numbers.
LEAD = (
    "nm-2:4",
    "bitmap-half",
    "low-rank",
    "rows",
    "factors+2:4",
    "factors+bitmap",
    "int8",
    "int8-static+1:4",
    "dense",
)

# What a whole model is compressed to, by the text of the config.
CONFIGS = {
    str(config): config
    for config in (
        sb.NMConfig(2, 4),
        sb.NMConfig(1, 4),
        sb.NMConfig(2, 4, columns=0.5),
        sb.BitmapConfig(0.1),
        sb.LowRankConfig(ratio=0.25),
        sb.LowRankSparseConfig(ratio=0.2, sparse=sb.RowsConfig(0.1)),
        sb.LowRankSparseConfig(ratio=0.2, sparse=sb.NMConfig(1, 4)),
        sb.LowRankSparseConfig(ratio=0.2, sparse=sb.BitmapConfig(0.05)),
        sb.Int8Config(),
        sb.Int8Config("static"),
        sb.Int8Config("dynamic", sb.NMConfig(2, 4)),
        sb.Int8Config("static", sb.NMConfig(1, 4)),
        sb.DenseConfig(),
    )
}

TRITON_LAYOUTS = {
    "low-rank": "padded",
    "factors+2:4": "padded",
    "factors+bitmap": "padded",
    "rows": "grouped",
    "rows-0": "grouped",
}


class Made(NamedTuple):
    """A weight ``(out, in)`` that obeys ``config``, its factors, its neutral tensors, and ``exact``, in float64 the
    weight that these stand for."""

    config: Any
    weight: Tensor
    factors: dict[str, Tensor]
    spec: Spec
    neutral: list[Tensor]
    exact: Tensor
    bias: Tensor


def in_features_of(kind: str) -> int:
    """A multiple of m and, where that allows it, not of 8."""
    return 56 if kind.endswith(":8") else 52 if ":" in kind else 45


def make(kind: str, dtype: torch.dtype = torch.float32, *, out: int = OUT, seed: int = 0) -> Made:
    config, columns = KINDS[kind], in_features_of(kind)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(out, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "bitmap-empty-rows":
        weight[[0, 5, -1]] = 0
    if kind == "bitmap-nothing":
        weight.zero_()
    weight, factors = one_shot.approximate(weight, config)
    sizes = (columns, out)
    spec: Spec
    if isinstance(config, sb.NMConfig):
        spec, neutral = NMSpec(config.n, config.m, *sizes), [*nm.pack(weight, config.n, config.m)]
        exact = weight.double()
    elif isinstance(config, sb.BitmapConfig):
        neutral = [*bitmap.pack(weight)]
        spec, exact = BitmapSpec(len(neutral[0]), *sizes), weight.double()
    elif isinstance(config, sb.Int8Config):
        n, m = (config.weights.n, config.weights.m) if config.weights else (1, 1)
        spec = Int8Spec(config.activations, n, m, *sizes)
        values, scales = int8.quantize_weight(weight)
        neutral = [*int8_op.pack(values, spec), scales]
        if config.activations == "static":
            neutral.append(torch.tensor(INPUT_SCALE))
        exact = values.double() * scales.double().unsqueeze(1)
    elif isinstance(config, sb.DenseConfig):
        spec, neutral, exact = DenseSpec(*sizes), [weight.clone()], weight.double()
    else:
        u, v = factors["u"], factors["v"]
        spec, neutral, exact = LowRankSpec(RANK, *sizes), [u, v], u.double() @ v.double()
        if isinstance(config, sb.LowRankSparseConfig):
            sparse, part = factors["sparse"], config.sparse
            n, m = (part.n, part.m) if isinstance(part, sb.NMConfig) else (1, 1)
            used = sparse != 0
            count = {"rows": int(used.any(1).sum()), "bitmap": int(used.sum()), "nm": 0}[part.format]
            spec = LowRankSparseSpec(RANK, part.format, n, m, count, *sizes)
            neutral += low_rank_sparse.pack_sparse(sparse, spec)
            exact = exact + sparse.double()
    return Made(config, weight, factors, spec, neutral, exact, bias)


def layouts_of(kind: str) -> list[str]:
    """The layouts that a CPU can hold, neutral first."""
    spec = make(kind).spec
    return [x for x in layouts.names(spec.op) if layouts.get(spec.op, x).supports(spec, torch.float32, CPU) is None]


def pairs(*kinds: str, without: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    return [(kind, layout) for kind in kinds for layout in layouts_of(kind) if layout not in without]


def computed_pairs(*kinds: str, without: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """``pairs`` and those with a layout of Triton's, which a CPU is refused and computes in for tests alone."""
    more = [(kind, TRITON_LAYOUTS[kind]) for kind in kinds if kind in TRITON_LAYOUTS]
    return list(dict.fromkeys(pairs(*kinds, without=without) + more))


def held(made: Made, layout: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The tensors of ``layout``."""
    return layouts.get(made.spec.op, layout).from_neutral(list(made.neutral), made.spec, dtype)


def linear_of(made: Made, *, bias: bool = True) -> nn.Linear:
    """The dense layer to pack."""
    out, columns = made.weight.shape
    linear = nn.Linear(columns, out, bias=bias, dtype=made.weight.dtype)
    linear.weight.data = made.weight.clone()
    if bias:
        linear.bias.data = made.bias.clone()
    return linear


def packed(kind: str, layout: str = "neutral", dtype: torch.dtype = torch.float32, **options: Any) -> PackedLinear:
    """A module of this kind, calibrated where that is needed; options: ``bias`` and ``seed``."""
    made = make(kind, dtype, seed=options.get("seed", 0))
    kind_of_module = MODULES[made.config.format]
    linear = linear_of(made, bias=options.get("bias", True))
    module = kind_of_module.from_linear(linear, made.config, name="layer", factors=made.factors)
    if "static" in kind:
        module.set_input_scale_(INPUT_SCALE)  # type: ignore[operator]
    return module.prepare_(layout)
