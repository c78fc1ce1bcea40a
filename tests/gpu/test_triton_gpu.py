"""The Triton kernels on a GPU: numbers against float64, odd sizes, compiled, captured. Needs a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsebert as sb
from closeness import check
from sparsebert.formats import bitmap, int8, nm
from sparsebert.ops import (
    bitmap_linear,
    int8_linear,
    layouts,
    low_rank_sparse,
    nm_linear,
    select,
)
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.specs import BitmapSpec, Int8Spec, LowRankSparseSpec, LowRankSpec, NMSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIZES = [(3072, 768), (768, 3072), (100, 80), (8, 144)]
TOKENS = [1, 7, 33, 127, 512]


def poison(tokens, features, dtype):
    """Freed memory full of NaN: an element that a kernel leaves unwritten shows."""
    held = torch.full((8, tokens, features), float("nan"), device="cuda", dtype=dtype)
    del held


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (2, 8), (4, 8), (1, 16), (7, 16)], ids=str)
def test_nm_linear_against_float64(n, m, dtype):
    for out_features, in_features in SIZES:
        dense = nm.project(torch.randn(out_features, in_features), n, m).to("cuda", dtype)
        weight = list(nm.pack(dense, n, m))
        bias = torch.randn(out_features, device="cuda", dtype=dtype)
        sizes = NMSpec(n, m, in_features, out_features)._asdict()
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features, device="cuda", dtype=dtype)
            for activation in ACTIVATIONS:
                poison(tokens, out_features, dtype)
                with sb.backend("triton"):
                    y = nm_linear(x, weight, bias, layout="neutral", activation=activation, **sizes)
                check(y, x, dense, bias, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(("n", "m", "layout"), [(1, 1, "neutral"), (2, 4, "neutral"), (2, 4, "unpacked")], ids=str)
def test_int8_linear_against_float64(n, m, layout, activations, dtype):
    for out_features, in_features in SIZES:
        dense = torch.randn(out_features, in_features)
        values, scales = (t.cuda() for t in int8.quantize_weight(dense if m == 1 else nm.project(dense, n, m)))
        packed = [values] if m == 1 or layout == "unpacked" else list(nm.pack(values, n, m))
        weight = [*packed, scales, *([torch.tensor(0.02, device="cuda")] if activations == "static" else [])]
        bias = torch.randn(out_features, device="cuda", dtype=dtype)
        sizes = Int8Spec(activations, n, m, in_features, out_features)._asdict()
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features, device="cuda", dtype=dtype)
            if activations == "static":
                q, s = int8.quantize_static(x, weight[-1]), weight[-1]
            else:
                q, s = int8.quantize_rows(x)
                s = s[:, None]
            sums = q.double() @ values.double().t() * s.double() * scales.double() + bias.double()
            for activation, act in ACTIVATIONS.items():
                poison(tokens, out_features, dtype)
                with sb.backend("triton"):
                    y = int8_linear(x, weight, bias, layout=layout, activation=activation, **sizes)
                exact = act(sums)
                # One rounding to the dtype, and fp32 before it.
                bound = torch.finfo(dtype).eps * exact.abs().max() + 4e-6 * exact.abs().max()
                assert (y.double() - exact).abs().max() <= bound, (tokens, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_bitmap_linear_against_float64(density, dtype):
    for out_features, in_features in SIZES:
        keep = torch.rand(out_features, in_features) < density
        dense = (torch.randn(out_features, in_features) * keep).to("cuda", dtype)
        weight = list(bitmap.pack(dense))
        bias = torch.randn(out_features, device="cuda", dtype=dtype)
        sizes = BitmapSpec(len(weight[0]), in_features, out_features)._asdict()
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features, device="cuda", dtype=dtype)
            for activation in ACTIVATIONS:
                poison(tokens, out_features, dtype)
                with sb.backend("triton"):
                    y = bitmap_linear(x, weight, bias, layout="neutral", activation=activation, **sizes)
                check(y, x, dense, bias, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("none", "neutral"),
        ("none", "padded"),
        ("rows", "grouped"),
        ("nm", "neutral"),
        ("nm", "padded"),
        ("bitmap", "neutral"),
        ("bitmap", "padded"),
    ],
    ids=str,
)
def test_low_rank_against_float64(kind, layout, dtype):
    """At most twice the error of torch's sequence, u (v x) + S x + b, with t inside and outside."""
    for out_features, in_features in SIZES:
        rank = max(1, in_features // 20)
        u = torch.randn(out_features, rank, device="cuda", dtype=dtype)
        v = torch.randn(rank, in_features, device="cuda", dtype=dtype)
        s = torch.randn(out_features, in_features)
        if kind == "nm":
            s = nm.project(s, 2, 4)
        elif kind != "none":
            s = s * (torch.rand(out_features, 1 if kind == "rows" else in_features) < 0.15)
        s = s.to("cuda", dtype)
        if kind == "none":
            spec, neutral = LowRankSpec(rank, in_features, out_features), [u, v]
            s.zero_()
        else:
            count = {"rows": int(s.any(1).sum()), "bitmap": int(s.count_nonzero()), "nm": 0}[kind]
            n, m = (2, 4) if kind == "nm" else (1, 1)
            spec = LowRankSparseSpec(rank, kind, n, m, count, in_features, out_features)
            neutral = [u, v, *low_rank_sparse.pack_sparse(s, spec)]
        weight = layouts.get(spec.op, layout).from_neutral(neutral, spec, dtype)
        (kernel,) = (found for found in select.candidates(spec.op, layout) if found.backend == "triton")
        bias = torch.randn(out_features, device="cuda", dtype=dtype)
        x = torch.randn(max(TOKENS), in_features, device="cuda", dtype=dtype)
        for activation, act in ACTIVATIONS.items():
            exact = act(x.double() @ v.double().t() @ u.double().t() + x.double() @ s.double().t() + bias.double())
            theirs = act(F.linear(F.linear(x, v), u, bias) + F.linear(x, s)).double()
            bound = 2 * (theirs - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
            for tokens in TOKENS:
                problem = select.problem_of(spec, layout, x[:tokens], activation)
                # The best with t inside, where rank and shared memory allow it, and the best without.
                configs = {config.inside: config for config in reversed(kernel.configurations(problem))}
                assert rank > 64 or tokens > 64 or len(configs) == 2
                for config in configs.values():
                    poison(tokens, out_features, dtype)
                    y = kernel.run(x[:tokens], weight, bias, problem, configuration=config)
                    assert (y.double() - exact[:tokens]).abs().max() <= bound, config


@pytest.mark.parametrize("features", [1, 7, 768, 3072, 9000])
def test_rounding_is_the_definition_to_the_bit(features):
    from sparsebert.kernels.quantize_rows import quantize_rows

    for dtype in DTYPES:
        x = torch.randn(64, features, device="cuda", dtype=dtype) * torch.logspace(-6, 4, 64, device="cuda")[:, None]
        x = x.to(dtype)
        x[0] = 0
        for ours, theirs in zip(quantize_rows(x), int8.quantize_rows(x.cpu()), strict=True):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("how", ["compiled", "captured"])
def test_compiled_and_captured_calls_give_the_same(how):
    dense = nm.project(torch.randn(768, 768), 2, 4).cuda().half()
    weight, sizes = list(nm.pack(dense, 2, 4)), NMSpec(2, 4, 768, 768)._asdict()
    x = torch.randn(16, 768, device="cuda").half()

    def call(x):
        return nm_linear(x, weight, None, layout="neutral", activation="gelu", **sizes)

    with sb.backend("triton"):
        expected = call(x)
        if how == "compiled":
            assert torch.equal(torch.compile(call, fullgraph=True)(x), expected)
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
