"""The Triton kernels on a GPU: numbers against float64, odd sizes, compiled, captured. Needs a CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebert as sb
from closeness import check
from sparsebert.formats import bitmap, int8, nm
from sparsebert.ops import (
    bitmap_linear,
    dense_linear,
    int8_linear,
    layouts,
    low_rank_sparse,
    nm_linear,
    select,
)
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.specs import BitmapSpec, DenseSpec, Int8Spec, LowRankSparseSpec, LowRankSpec, NMSpec

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
            q, s = int8.quantize_rows(x, weight[-1] if activations == "static" else None)
            sums = q.double() @ values.double().t() * s.double()[:, None] * scales.double() + bias.double()
            for activation, act in ACTIVATIONS.items():
                poison(tokens, out_features, dtype)
                with sb.backend("triton"):
                    y = int8_linear(x, weight, bias, layout=layout, activation=activation, **sizes)
                exact = act(sums)
                # One rounding to the dtype, and fp32 before it.
                bound = torch.finfo(dtype).eps * exact.abs().max() + 4e-6 * exact.abs().max()
                assert (y.double() - exact).abs().max() <= bound, (tokens, activation)


@pytest.mark.parametrize("layout", ["neutral", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dense_linear_against_float64(dtype, layout):
    for out_features, in_features in (*SIZES, (37, 45), (130, 7)):
        weight = torch.randn(out_features, in_features, device="cuda", dtype=dtype)
        sizes = DenseSpec(in_features, out_features)._asdict()
        for bias in (torch.randn(out_features, device="cuda", dtype=dtype), None):
            for tokens in TOKENS:
                x = torch.randn(tokens, in_features, device="cuda", dtype=dtype)
                for activation in [name for name in ACTIVATIONS if name != "none"]:
                    poison(tokens, out_features, dtype)
                    with sb.backend("triton"):
                        y = dense_linear(x, [weight], bias, layout=layout, activation=activation, **sizes)
                    check(y, x, weight, bias, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_configuration_of_a_dense_product_against_float64(dtype):
    """With splits and without; the same bits every time. Rows of x and of the weight lie apart."""
    weight = torch.full((3072, 1024), torch.nan, device="cuda", dtype=dtype)[:, :768]
    weight.copy_(torch.randn(3072, 768))
    for tokens in (1, 33, 512):
        x = torch.full((tokens, 1000), torch.nan, device="cuda", dtype=dtype)[:, 8:776]
        x.copy_(torch.randn(tokens, 768))
        problem = select.problem_of(DenseSpec(768, 3072), "neutral", x, "gelu")
        assert select.choose(problem).backend == "triton"
        (candidate,) = (found for found in select.candidates("dense_linear", "neutral") if found.backend == "triton")
        for solution in select.solutions(candidate, problem):
            poison(tokens, 3072, dtype)
            y = solution.run(x, [weight], None, problem)
            check(y, x, weight, None, "gelu")
            assert torch.equal(solution.run(x, [weight], None, problem), y), solution


def test_a_dense_product_alone_stays_torchs():
    x = torch.randn(33, 768, device="cuda").half()
    linear = nn.Linear(768, 3072).half().cuda().requires_grad_(False)
    problem = select.problem_of(DenseSpec(768, 3072), "neutral", x, "none")
    assert select.choose(problem).backend == "reference"
    y = dense_linear(x, [linear.weight], linear.bias, layout="neutral", **DenseSpec(768, 3072)._asdict())
    assert torch.equal(y, linear(x))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [16, 512])
@pytest.mark.parametrize("how", ["compiled", "captured", "launched early"])
def test_a_dense_product_with_gelu_compiled_captured_and_launched_early(how, tokens, monkeypatch):
    """The same numbers, to the bit, split (few tokens) and not."""
    linear = nn.Linear(768, 3072).half().cuda().requires_grad_(False)
    layer = sb.nn.DenseLinear.from_linear(linear, sb.DenseConfig())
    layer.activation = "gelu"
    x = torch.randn(tokens, 768, device="cuda").half()
    assert select.choose(layer.problem(tokens)).backend == "triton"
    expected = layer(x)
    check(expected, x, linear.weight, linear.bias, "gelu")
    if how == "compiled":
        torch._dynamo.reset()
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)
        return
    if how == "launched early":
        monkeypatch.setenv("SPARSEBERT_PDL", "1")
        for _ in range(20):
            assert torch.equal(layer(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(5):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


def bitmap_weight(out_features, in_features, density, dtype, layout):
    """A dense weight, its tensors in ``layout``, and its sizes."""
    keep = torch.rand(out_features, in_features) < density
    dense = (torch.randn(out_features, in_features) * keep).to("cuda", dtype)
    neutral = list(bitmap.pack(dense))
    spec = BitmapSpec(len(neutral[0]), in_features, out_features)
    return dense, layouts.get(spec.op, layout).from_neutral(neutral, spec, dtype), spec


@pytest.mark.parametrize("layout", ["neutral", "chunked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_bitmap_linear_against_float64(density, dtype, layout):
    for out_features, in_features in (*SIZES, (1, 300), (100, 1300)):
        dense, weight, spec = bitmap_weight(out_features, in_features, density, dtype, layout)
        bias = torch.randn(out_features, device="cuda", dtype=dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features, device="cuda", dtype=dtype)
            for activation in ACTIVATIONS:
                poison(tokens, out_features, dtype)
                with sb.backend("triton"):
                    y = bitmap_linear(x, weight, bias, layout=layout, activation=activation, **spec._asdict())
                check(y, x, dense, bias, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_of_chunks_against_float64(dtype):
    """What ``sb.tune`` may choose, the splits included; the same bits every time."""
    dense, weight, spec = bitmap_weight(1024, 4096, 0.05, dtype, "chunked")
    for tokens in (1, 33, 512):
        x = torch.randn(tokens, 4096, device="cuda", dtype=dtype)
        problem = select.problem_of(spec, "chunked", x, "gelu")
        (candidate,) = (found for found in select.candidates(spec.op, "chunked") if found.backend == "triton")
        for solution in select.solutions(candidate, problem):
            poison(tokens, 1024, dtype)
            y = solution.run(x, weight, None, problem)
            check(y, x, dense, None, "gelu")
            assert torch.equal(solution.run(x, weight, None, problem), y), solution


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
@pytest.mark.parametrize("parts", [1, 3])
def test_low_rank_against_float64(kind, layout, dtype, parts):
    """At most twice the error of torch's sequence, u (v x) + S x + b, with t inside and outside."""
    for features, in_features in SIZES:
        out_features, rank = parts * features, max(1, in_features // 20)
        factor = torch.randn(out_features, rank, device="cuda", dtype=dtype)
        v = torch.randn(parts * rank, in_features, device="cuda", dtype=dtype)
        u = torch.block_diag(*factor.chunk(parts))
        s = torch.randn(out_features, in_features)
        if kind == "nm":
            s = nm.project(s, 2, 4)
        elif kind != "none":
            s = s * (torch.rand(out_features, 1 if kind == "rows" else in_features) < 0.15)
        s = s.to("cuda", dtype)
        if kind == "none":
            spec, neutral = LowRankSpec(rank, in_features, out_features, parts), [factor, v]
            s.zero_()
        else:
            count = {"rows": int(s.any(1).sum()), "bitmap": int(s.count_nonzero()), "nm": 0}[kind]
            n, m = (2, 4) if kind == "nm" else (1, 1)
            spec = LowRankSparseSpec(rank, kind, n, m, count, in_features, out_features, parts)
            neutral = [factor, v, *low_rank_sparse.pack_sparse(s, spec)]
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
                assert rank > 64 or tokens > 64 or parts > 1 or len(configs) == 2
                for config in configs.values():
                    poison(tokens, out_features, dtype)
                    y = kernel.run(x[:tokens], weight, bias, problem, configuration=config)
                    assert (y.double() - exact[:tokens]).abs().max() <= bound, config


FORMATS = {
    "2:4": (sb.NMConfig(2, 4), "neutral"),
    "bitmap": (sb.BitmapConfig(0.05), "chunked"),
    "low rank": (sb.LowRankConfig(rank=38), "padded"),
    "low rank + rows": (sb.LowRankSparseConfig(rank=38, sparse=sb.RowsConfig(0.15)), "grouped"),
    "low rank + 2:4": (sb.LowRankSparseConfig(rank=38, sparse=sb.NMConfig(2, 4)), "padded"),
    "int8": (sb.Int8Config(), "neutral"),
    "int8 2:4": (sb.Int8Config(weights=sb.NMConfig(2, 4)), "neutral"),
}


@pytest.mark.parametrize("tokens", [16, 512])
@pytest.mark.parametrize("how", ["compiled", "captured", "launched early"])
@pytest.mark.parametrize(("config", "layout"), FORMATS.values(), ids=FORMATS.keys())
def test_a_feed_forward_net_compiled_captured_and_launched_early(config, layout, how, tokens, monkeypatch):
    """The same numbers, to the bit, one kernel after the other."""
    net = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 768)).half().cuda().requires_grad_(False)
    sb.compress_(net, {"*": config})
    for module in net:
        module.prepare_(layout)
    x = torch.randn(tokens, 768, device="cuda").half()
    with sb.backend("triton"):
        expected = net(x)
        if how == "compiled":
            torch._dynamo.reset()
            assert torch.equal(torch.compile(net, fullgraph=True)(x), expected)
            return
        if how == "launched early":
            monkeypatch.setenv("SPARSEBERT_PDL", "1")
            for _ in range(20):
                assert torch.equal(net(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        for _ in range(5):
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, expected)


def test_tune_measures_configurations_and_they_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(768, 3072)).half().cuda().requires_grad_(False)
    sb.compress_(model, {"*": sb.BitmapConfig(0.05)})
    report = sb.tune(model, [16], budget_s=0.2)
    assert report.mode == "cuda-graph" and set(report.rows[0].median_us) == {"neutral", "chunked", "dense"}
    assert report.rows[0].kernels["chunked"].startswith("triton: ")
    model[0].prepare_("chunked")
    (layer,) = sb.explain(model, tokens=16).layers
    assert layer.kernel.endswith(": measured)")
    x, dense = torch.randn(16, 768, device="cuda").half(), model[0].dense_weight()
    check(model(x), x, dense, model[0].bias)
