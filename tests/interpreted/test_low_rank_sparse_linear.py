"""``low_rank_linear`` and ``low_rank_sparse_linear`` in Triton's interpreter: every kind of S, with t = x vᵀ computed
inside the kernel and outside, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsebert as sb
from sparsebert.formats import nm
from sparsebert.ops import layouts, low_rank_linear, low_rank_sparse, low_rank_sparse_linear, select
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.specs import LowRankSparseSpec, LowRankSpec

# (out_features, in_features, rank): no side a multiple of a tile's, but for one.
SIZES = [(100, 80, 5), (8, 144, 16), (1, 16, 1), (136, 208, 48), (65, 72, 24)]
TOKENS = (1, 7, 33, 127)
DTYPES = [torch.float16, torch.float32]
KINDS = ("none", "rows", "nm", "bitmap")
# (parts, features of each, in_features, rank): tiles that meet two parts, three, all of five, and one alone.
PARTED = [(3, 37, 80, 5), (2, 65, 72, 24), (5, 5, 48, 3), (3, 128, 64, 48)]


def made(kind, out_features, in_features, rank, dtype, parts=1):
    """A spec, its neutral tensors, and S or None."""
    u, v = torch.randn(out_features, rank).to(dtype), torch.randn(parts * rank, in_features).to(dtype)
    if kind == "none":
        return LowRankSpec(rank, in_features, out_features, parts), [u, v], None
    s = torch.randn(out_features, in_features)
    n, m, count = 1, 1, 0
    if kind == "nm":
        n, m = 2, 4
        s = nm.project(s, n, m).to(dtype)
    else:
        keep = torch.rand(out_features, 1 if kind == "rows" else in_features) < 0.3
        keep.view(-1)[0] = True
        s, count = (s * keep).to(dtype), int(keep.sum())
    spec = LowRankSparseSpec(rank, kind, n, m, count, in_features, out_features, parts)
    return spec, [u, v, *low_rank_sparse.pack_sparse(s, spec)], s


def layouts_of(spec, dtype):
    """Those that Triton serves."""
    names = [name for name in ("neutral", "padded", "grouped") if name in layouts.names(spec.op)]
    cpu = torch.device("cpu")
    held = [name for name in names if layouts.get(spec.op, name).supports(spec, dtype, cpu) is None]
    return [name for name in held if (name == "grouped") == ("grouped" in held)]


class Expected:
    """y of any first rows of x, and what torch's sequence u (v x) + S x + b in the dtype is off by."""

    def __init__(self, x, u, v, s, bias, activation):
        act = ACTIVATIONS[activation]

        def sequence(*tensors):
            x, u, v, s, bias = tensors
            y = F.linear(F.linear(x, v), u, bias)
            return act(y if s is None else y + F.linear(x, s))

        tensors = (x, u, v, s, bias)
        self.exact = sequence(*(None if t is None else t.double() for t in tensors))
        error = (sequence(*tensors).double() - self.exact).abs().max()
        self.allowed = 2 * error + torch.finfo(x.dtype).eps * self.exact.abs().max()

    def check(self, y, dtype):
        exact = self.exact[: len(y)]
        assert y.shape == exact.shape and y.dtype == dtype and y.is_contiguous()
        assert (y.double() - exact).abs().max() <= self.allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_against_float64(kind, inside, dtype):
    # Every other size in fp32, whose smaller tiles take the interpreter longer.
    for out_features, in_features, rank in SIZES if dtype == torch.float16 else SIZES[::2]:
        spec, neutral, s = made(kind, out_features, in_features, rank, dtype)
        x = torch.randn(max(TOKENS), in_features).to(dtype)
        bias = torch.randn(out_features).to(dtype)
        for b in (bias, None):
            expected = Expected(x, *neutral[:2], s, b, "none")
            for place, layout in enumerate(layouts_of(spec, dtype)):
                weight = layouts.get(spec.op, layout).from_neutral(neutral, spec, dtype)
                (kernel,) = (c for c in select.candidates(spec.op, layout) if c.backend == "triton")
                for tokens in TOKENS[2:3] if b is None or place else TOKENS:
                    problem = select.problem_of(spec, layout, x[:tokens], "none")
                    config = next(c for c in kernel.configurations(problem) if c.inside is inside)
                    expected.check(kernel.run(x[:tokens], weight, b, problem, configuration=config), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_against_float64(kind, dtype):
    """Each part's rows of u with its own ranks of t, as the product with a u of blocks; t is inside where each tile is
    of one part."""
    for parts, features, in_features, rank in PARTED:
        spec, neutral, s = made(kind, parts * features, in_features, rank, dtype, parts)
        x, bias = torch.randn(33, in_features).to(dtype), torch.randn(parts * features).to(dtype)
        blocks = torch.block_diag(*neutral[0].chunk(parts))
        expected = Expected(x, blocks, neutral[1], s, bias, "none")
        for layout in layouts_of(spec, dtype):
            weight = layouts.get(spec.op, layout).from_neutral(neutral, spec, dtype)
            (kernel,) = (c for c in select.candidates(spec.op, layout) if c.backend == "triton")
            problem = select.problem_of(spec, layout, x, "none")
            configs = {c.inside: c for c in reversed(kernel.configurations(problem))}
            inside = kind != "rows" and features == 128
            assert set(configs) == ({False, True} if inside else {False})
            for config in configs.values():
                assert not config.inside or features % config.block_m == 0
                expected.check(kernel.run(x, weight, bias, problem, configuration=config), dtype)


@pytest.mark.parametrize("layout", ["neutral", "padded"])
def test_a_part_sees_nothing_of_the_others(layout):
    """NaN in one part's factors stays in its features."""
    parts, features, rank = 3, 37, 16 if layout == "neutral" else 5
    spec, neutral, _ = made("none", parts * features, 48, rank, torch.float32, parts)
    x = torch.randn(9, 48)
    known = layouts.get(spec.op, layout)
    (kernel,) = (c for c in select.candidates(spec.op, layout) if c.backend == "triton")
    problem = select.problem_of(spec, layout, x, "none")
    (config, *_) = kernel.configurations(problem)
    clean = kernel.run(x, known.from_neutral(neutral, spec, torch.float32), None, problem, configuration=config)
    for part in range(parts):
        own = torch.arange(parts * features) // features == part
        for poisoned in (0, 1):
            tensors = [t.clone() for t in neutral]
            tensors[poisoned].chunk(parts)[part].fill_(torch.nan)
            weight = known.from_neutral(tensors, spec, torch.float32)
            y = kernel.run(x, weight, None, problem, configuration=config)
            assert y[:, own].isnan().all() and torch.equal(y[:, ~own], clean[:, ~own])


@pytest.mark.parametrize("kind", KINDS)
def test_the_op_with_each_activation(kind):
    spec, neutral, s = made(kind, 100, 80, 5, torch.float16)
    (layout, *_) = layouts_of(spec, torch.float16)
    weight = layouts.get(spec.op, layout).from_neutral(neutral, spec, torch.float16)
    x, bias = torch.randn(70, 80).half(), torch.randn(100).half()
    op = low_rank_linear if kind == "none" else low_rank_sparse_linear
    for activation in ACTIVATIONS:
        expected = Expected(x, *neutral[:2], s, bias, activation)
        # Few tokens, whose estimate is inside, and more.
        for rows in (x[:19], x, x[:, None].expand(70, 2, 80)[:, 1]):
            with sb.backend("triton"):
                y = op(rows, weight, bias, layout=layout, activation=activation, **spec._asdict())
            expected.check(y, torch.float16)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("count", [0, 1, 64, 65, 136])
def test_rows_that_fill_tiles_or_do_not(count, inside):
    """None, one, a whole tile, one more, all: and the layout gives the rows back."""
    u, v = torch.randn(136, 6), torch.randn(6, 48)
    s = torch.zeros(136, 48)
    s[torch.randperm(136)[:count]] = 1.5
    spec = LowRankSparseSpec(6, "rows", 1, 1, count, 48, 136)
    neutral = [u, v, *low_rank_sparse.pack_sparse(s, spec)]
    layout = layouts.get(low_rank_sparse.OP, "grouped")
    weight = layout.from_neutral(neutral, spec, torch.float32)
    assert weight[2].sort().values.tolist() == list(range(136))
    assert all(map(torch.equal, layout.to_neutral(weight, spec), neutral))
    x = torch.randn(9, 48)
    expected = Expected(x, u, v, s, None, "none")
    problem = select.problem_of(spec, "grouped", x, "none")
    for kernel in select.candidates(low_rank_sparse.OP, "grouped"):
        configs = [c for c in kernel.configurations(problem) if c.inside is inside] if kernel.configurations else []
        options = {"configuration": configs[0]} if configs else {}
        expected.check(kernel.run(x, weight, None, problem, **options), torch.float32)
