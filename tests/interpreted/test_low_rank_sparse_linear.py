"""``low_rank_linear`` and ``low_rank_sparse_linear`` in Triton's interpreter: every kind of S against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsebert as sb
from sparsebert.formats import nm
from sparsebert.ops import layouts, low_rank_linear, low_rank_sparse, low_rank_sparse_linear
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.specs import LowRankSparseSpec, LowRankSpec

SIZES = [(100, 80, 7, 19), (8, 144, 5, 33), (1, 16, 1, 1), (136, 208, 40, 65)]
DTYPES = [torch.float16, torch.float32]


def close(y, x, u, v, s, bias, activation):
    """At most twice the error of torch's sequence, u (v x) + S x + b in the dtype, against float64 from the same t:
    what the kernel is given."""
    act = ACTIVATIONS[activation]
    t = F.linear(x, v)
    sums = t.double() @ u.double().t() + bias.double()
    theirs = F.linear(t, u, bias)
    if s is not None:
        sums, theirs = sums + x.double() @ s.double().t(), theirs + F.linear(x, s)
    exact = act(sums)
    error = (act(theirs).double() - exact).abs().max()
    assert y.shape == exact.shape and y.dtype == x.dtype and y.is_contiguous()
    assert (y.double() - exact).abs().max() <= 2 * error + torch.finfo(x.dtype).eps * exact.abs().max()


def factors(out_features, in_features, rank, dtype):
    return torch.randn(out_features, rank).to(dtype), torch.randn(rank, in_features).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_factors_alone(activation, dtype):
    for out_features, in_features, rank, tokens in SIZES:
        u, v = factors(out_features, in_features, rank, dtype)
        x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)
        sizes = LowRankSpec(rank, in_features, out_features)._asdict()
        with sb.backend("triton"):
            y = low_rank_linear(x, [u, v], bias, layout="neutral", activation=activation, **sizes)
        close(y, x, u, v, None, bias, activation)


def sparse_part(kind, out_features, in_features, dtype):
    """S and its spec without the rank."""
    s = torch.randn(out_features, in_features)
    if kind == "nm":
        return nm.project(s, 2, 4).to(dtype), {"n": 2, "m": 4, "count": 0}
    keep = torch.rand(out_features, 1 if kind == "rows" else in_features) < 0.3
    keep.view(-1)[0] = True
    count = int(keep.sum())
    return (s * keep).to(dtype), {"n": 1, "m": 1, "count": count}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "layout"), [("rows", "grouped"), ("nm", "neutral"), ("bitmap", "neutral")], ids=str)
def test_with_a_sparse_part(kind, layout, dtype):
    for out_features, in_features, rank, tokens in SIZES:
        u, v = factors(out_features, in_features, rank, dtype)
        s, numbers = sparse_part(kind, out_features, in_features, dtype)
        spec = LowRankSparseSpec(rank, kind, in_features=in_features, out_features=out_features, **numbers)
        neutral = [u, v, *low_rank_sparse.pack_sparse(s, spec)]
        weight = layouts.get(low_rank_sparse.OP, layout).from_neutral(neutral, spec, dtype)
        x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)
        for activation in ("none", "gelu"):
            with sb.backend("triton"):
                y = low_rank_sparse_linear(x, weight, bias, layout=layout, activation=activation, **spec._asdict())
            close(y, x, u, v, s, bias, activation)


@pytest.mark.parametrize("count", [0, 1, 64, 65, 136])
def test_rows_that_fill_tiles_or_do_not(count):
    """None, one, a whole tile, one more, all: and the layout gives the rows back."""
    u, v = factors(136, 48, 6, torch.float32)
    s = torch.zeros(136, 48)
    s[torch.randperm(136)[:count]] = 1.5
    spec = LowRankSparseSpec(6, "rows", 1, 1, count, 48, 136)
    neutral = [u, v, *low_rank_sparse.pack_sparse(s, spec)]
    layout = layouts.get(low_rank_sparse.OP, "grouped")
    weight = layout.from_neutral(neutral, spec, torch.float32)
    assert weight[2].sort().values.tolist() == list(range(136))
    assert all(map(torch.equal, layout.to_neutral(weight, spec), neutral))
    x = torch.randn(9, 48)
    found = {}
    for backend in ("triton", "reference"):
        with sb.backend(backend):
            found[backend] = low_rank_sparse_linear(x, weight, None, layout="grouped", **spec._asdict())
    close(found["triton"], x, u, v, s, torch.zeros(136), "none")
    torch.testing.assert_close(found["reference"], found["triton"], rtol=1e-4, atol=1e-4)
