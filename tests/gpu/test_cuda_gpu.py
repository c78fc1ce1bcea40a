"""The CUDA kernels on a GPU: numbers against float64, exact int8 sums, every configuration that may be chosen,
splits on several streams and in graphs, modules. Needs a CUDA device and ``sparsebert._C``; what is of the wgmma kernel
needs compute capability 9.0."""

from __future__ import annotations

import copy
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import sanitize_wgmma
import sparsebert as sb
from closeness import check
from sparsebert.formats import int8, mma_sp, nm
from sparsebert.nn.fused_encoder_layer import held_by, normalized
from sparsebert.ops import (
    add_layer_norm,
    int8_linear,
    int8_linear_from_int8,
    int8_linear_to_int8,
    layouts,
    measurements,
    nm_linear,
    select,
)
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.cuda import extension, nm24
from sparsebert.ops.cuda.mma_sp import MMA_SP
from sparsebert.ops.cuda.wgmma_layer_norm import linear_add_layer_norm
from sparsebert.ops.devices import describe
from sparsebert.ops.linear_layer_norm import problem_of
from sparsebert.ops.specs import DenseSpec, Int8Spec, LowRankSparseSpec, NMSpec

DEVICE = torch.device("cuda")


def unable() -> str | None:
    """None, or why nothing here can run."""
    return extension.refusal(describe(DEVICE)) if torch.cuda.is_available() else "needs a CUDA device"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(unable() is not None, reason=str(unable()))]
FLOATS = [torch.float16, torch.bfloat16]
# BERT-base's feed-forward layers, one of BERT-large's, and two that end within a tile of features or of inputs.
SIZES = [(3072, 768), (768, 3072), (4096, 1024), (100, 84), (72, 768)]
TOKENS = [1, 7, 8, 9, 33, 127, 512, 4096]
OUTPUT_SCALE = 0.05


def poison(tokens, features, dtype):
    """Freed memory full of what no result has: an element that a kernel leaves unwritten shows."""
    value = float("nan") if dtype.is_floating_point else -128
    held = torch.full((8, tokens, features), value, device=DEVICE, dtype=dtype)
    del held


def nm_weight(out_features, in_features, dtype, n=2, m=4):
    """A dense weight at n:m with some groups that hold less, its tensors in ``mma_sp``, and its spec."""
    dense = nm.project(torch.randn(out_features, in_features), n, m)
    dense = (dense * (torch.rand(dense.shape) > 0.1)).to(DEVICE, dtype)
    spec = NMSpec(n, m, in_features, out_features)
    return dense, layouts.get(spec.op, MMA_SP).from_neutral(list(nm.pack(dense, n, m)), spec, dtype), spec


def int8_weight(out_features, in_features, n=2, m=4, activations="dynamic"):
    """An int8 weight at n:m, its scales, its tensors in ``mma_sp``, and its spec."""
    dense = nm.project(torch.randn(out_features, in_features) * in_features**-0.5, n, m)
    values, scales = (tensor.to(DEVICE) for tensor in int8.quantize_weight(dense))
    spec = Int8Spec(activations, n, m, in_features, out_features)
    given = [torch.tensor(0.02, device=DEVICE)] if activations == "static" else []
    neutral = [*nm.pack(values, n, m), scales, *given]
    return values, scales, layouts.get(spec.op, MMA_SP).from_neutral(neutral, spec, torch.float16), spec


def x_of(tokens, in_features, dtype=torch.float16):
    return torch.randn(tokens, in_features, device=DEVICE).to(dtype)


def sums_of(q, values):
    """Exact: integers far below 2**53."""
    return q.double() @ values.double().t()


def solve(spec, x, activation="none", layout=MMA_SP):
    """The candidate, the problem, and every configuration that may be chosen for it."""
    problem = select.problem_of(spec, layout, x, activation)
    (candidate,) = (found for found in select.candidates(spec.op, layout) if found.backend == "cuda")
    assert candidate.supports(problem) is None
    return candidate, problem, candidate.configurations(problem)


def split_case(dtype=torch.float16, tokens=9, out_features=768, in_features=3072):
    """A call whose inputs are divided among several blocks: ``(call of x, x, dense weight)``."""
    dense, weight, spec = nm_weight(out_features, in_features, dtype)
    x = x_of(tokens, in_features, dtype)
    candidate, problem, found = solve(spec, x)
    configuration = max(found, key=lambda config: config.splits)
    assert configuration.splits > 2

    def call(x):
        return candidate.run(x, weight, None, problem, configuration=configuration)

    return call, x, dense


# Packing


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize(("n", "m"), mma_sp.PATTERNS, ids=str)
def test_packing_is_that_of_the_cpu_to_the_bit(n, m, dtype):
    for out_features, in_features in (*SIZES[:2], (100, 84), (1, 4)):
        dense = nm.project(torch.randn(out_features, in_features), n, m)
        dense = (dense * (torch.rand(dense.shape) > 0.1) * 40).clamp(-127, 127).to(dtype)
        neutral = nm.pack(dense, n, m)
        here = mma_sp.pack(*(part.to(DEVICE) for part in neutral), n, m, in_features)
        there = mma_sp.pack(*neutral, n, m, in_features)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(here, there, strict=True))
        back = mma_sp.unpack(*here, n, m, out_features, in_features)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(back, neutral, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_factors_are_packed_as_on_the_cpu(dtype):
    u = torch.randn(100, 48).to(dtype)
    packed = mma_sp.pack_factor(u.to(DEVICE))
    assert torch.equal(packed.cpu(), mma_sp.pack_factor(u))
    assert torch.equal(mma_sp.unpack_factor(packed, 100).cpu(), u)


# Numbers


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_configuration_against_float64(size, dtype):
    """All that ``sb.tune`` may choose, activations in turn."""
    dense, weight, spec = nm_weight(*size, dtype)
    bias = torch.randn(size[0], device=DEVICE, dtype=dtype)
    activations = cycle(ACTIVATIONS)
    for tokens in TOKENS:
        x = x_of(tokens, size[1], dtype)
        for configuration in solve(spec, x)[2]:
            activation = next(activations)
            candidate, problem, _ = solve(spec, x, activation)
            b = None if activation == "relu" else bias
            poison(tokens, size[0], dtype)
            check(candidate.run(x, weight, b, problem, configuration=configuration), x, dense, b, activation)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "m"), mma_sp.PATTERNS, ids=str)
def test_nm_linear_against_float64(n, m, dtype):
    """Through the op, with every activation."""
    for out_features, in_features in ((768, 3072), (100, 84)):
        dense, weight, spec = nm_weight(out_features, in_features, dtype, n, m)
        bias = torch.randn(out_features, device=DEVICE, dtype=dtype)
        for tokens in (1, 9, 127, 512):
            x = x_of(tokens, in_features, dtype)
            for activation in ACTIVATIONS:
                poison(tokens, out_features, dtype)
                with sb.backend("cuda"):
                    y = nm_linear(x, weight, bias, layout=MMA_SP, activation=activation, **spec._asdict())
                check(y, x, dense, bias, activation)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_sums_are_exact_in_every_configuration(size):
    values, _, weight, spec = int8_weight(*size)
    weight = [*weight[:2], torch.ones(size[0], device=DEVICE)]
    for tokens in TOKENS:
        q = torch.randint(-127, 128, (tokens, size[1]), device=DEVICE, dtype=torch.int8)
        ones, sums = torch.ones(tokens, device=DEVICE), sums_of(q, values)
        # So fp32 holds each of them.
        assert sums.abs().max() < 2**24
        candidate, problem, found = solve(spec, q.half())
        for configuration in found:
            poison(tokens, size[0], torch.float32)
            y = candidate.run.multiply(
                q, ones, weight, None, problem._replace(dtype=torch.float32), configuration=configuration
            )
            assert torch.equal(y.double(), sums), configuration


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float32], ids=str)
@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(("n", "m"), mma_sp.PATTERNS, ids=str)
def test_int8_linear_against_float64(n, m, activations, dtype):
    for out_features, in_features in ((768, 3072), (100, 84)):
        values, scales, weight, spec = int8_weight(out_features, in_features, n, m, activations)
        bias = torch.randn(out_features, device=DEVICE, dtype=dtype)
        for tokens in (1, 9, 127, 512):
            x = x_of(tokens, in_features, dtype)
            q, s = int8.quantize_rows(x, weight[-1] if activations == "static" else None)
            sums = sums_of(q, values) * s.double()[:, None] * scales.double() + bias.double()
            for activation, act in ACTIVATIONS.items():
                options = {"layout": MMA_SP, "activation": activation, **spec._asdict()}
                poison(tokens, out_features, dtype)
                with sb.backend("cuda"):
                    y = int8_linear(x, weight, bias, **options)
                    assert torch.equal(int8_linear_from_int8(q, s, weight, bias, dtype=dtype, **options), y)
                exact = act(sums)
                # One rounding to the dtype, and fp32 before it.
                bound = (torch.finfo(dtype).eps + 4e-6) * exact.abs().max()
                assert y.dtype == dtype and (y.double() - exact).abs().max() <= bound, (tokens, activation)


def test_int8_in_and_out():
    output_scale = torch.tensor(OUTPUT_SCALE, device=DEVICE)
    for out_features, in_features in ((3072, 768), (768, 3072), (100, 84)):
        values, scales, weight, spec = int8_weight(out_features, in_features)
        bias = torch.randn(out_features, device=DEVICE).half()
        for tokens in (1, 33, 512):
            q, s = int8.quantize_rows(x_of(tokens, in_features))
            sums = sums_of(q, values) * s.double()[:, None] * scales.double() + bias.double()
            for activation, act in ACTIVATIONS.items():
                options = {"layout": MMA_SP, "activation": activation, **spec._asdict()}
                poison(tokens, out_features, torch.int8)
                with sb.backend("cuda"):
                    found, found_scales = int8_linear_to_int8(q, s, weight, bias, output_scale, **options)
                assert torch.equal(found_scales, output_scale.expand(tokens))
                assert (found - (act(sums) / OUTPUT_SCALE).clamp(-127, 127)).abs().max() <= 0.5 + 1e-3


def low_rank_weight(out_features, in_features, rank, dtype):
    """u, v, S, the tensors of the three in ``mma_sp``, and their spec."""
    u = torch.randn(out_features, rank, device=DEVICE).to(dtype)
    v = torch.randn(rank, in_features, device=DEVICE).to(dtype)
    s = nm.project(torch.randn(out_features, in_features), 2, 4).to(DEVICE, dtype)
    spec = LowRankSparseSpec(rank, "nm", 2, 4, 0, in_features, out_features)
    return u, v, s, layouts.get(spec.op, MMA_SP).from_neutral([u, v, *nm.pack(s, 2, 4)], spec, dtype), spec


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [5, 32, 80])
def test_low_rank_against_float64(rank, dtype):
    """At most twice the error of torch's sequence, u (v x) + S x + b, in every configuration."""
    for out_features, in_features in ((3072, 768), (768, 3072), (100, 84)):
        u, v, s, weight, spec = low_rank_weight(out_features, in_features, rank, dtype)
        bias = torch.randn(out_features, device=DEVICE, dtype=dtype)
        activations = cycle(ACTIVATIONS)
        for tokens in (1, 9, 127, 512):
            x = x_of(tokens, in_features, dtype)
            sums = x.double() @ v.double().t() @ u.double().t() + x.double() @ s.double().t() + bias.double()
            theirs = F.linear(F.linear(x, v), u, bias) + F.linear(x, s)
            for configuration in solve(spec, x)[2]:
                activation = next(activations)
                act = ACTIVATIONS[activation]
                candidate, problem, _ = solve(spec, x, activation)
                poison(tokens, out_features, dtype)
                y = candidate.run(x, weight, bias, problem, configuration=configuration)
                bound = 2 * (act(theirs).double() - act(sums)).abs().max() + torch.finfo(dtype).eps * sums.abs().max()
                assert (y.double() - act(sums)).abs().max() <= bound, configuration


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_columns_are_gathered_and_a_residual_is_added(dtype):
    """Of the kernel itself: no op asks for a residual yet."""
    kept, wide = 768, 1001
    columns = torch.sort(torch.randperm(wide)[:kept]).values
    dense, (values, metadata), spec = nm_weight(200, kept, dtype)
    for tokens in (1, 33, 127):
        x, residual = x_of(tokens, wide, dtype), x_of(tokens, 200, dtype)
        rows = x[:, columns.to(DEVICE)]
        for configuration in solve(spec, rows)[2]:
            poison(tokens, 200, dtype)
            y = nm24.linear(
                x,
                values,
                metadata,
                None,
                in_features=kept,
                out_features=200,
                config=configuration,
                columns=columns.to(DEVICE, torch.int32),
                residual=residual,
                alpha=0.5,
            )
            exact = 0.5 * (rows.double() @ dense.double().t()) + residual.double()
            assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_stays_with_its_token(dtype):
    dense, weight, spec = nm_weight(768, 3072, dtype)
    x = x_of(33, 3072, dtype)
    kept = dense[0].nonzero().flatten()
    x[3, kept[0]], x[30, kept[1]] = torch.nan, torch.inf
    finite = [token for token in range(33) if token not in (3, 30)]
    candidate, problem, found = solve(spec, x)
    for configuration in found:
        y = candidate.run(x, weight, None, problem, configuration=configuration)
        assert y[3, 0].isnan() and not y[30, 0].isfinite()
        check(y[finite], x[finite], dense, None)


def test_int8_rows_that_are_not_finite_stay_so():
    _, _, weight, spec = int8_weight(100, 84)
    x = x_of(9, 84)
    x[2, 5], x[6, 7] = torch.nan, torch.inf
    bad = [token in (2, 6) for token in range(9)]
    options = {"layout": MMA_SP, **spec._asdict()}
    with sb.backend("cuda"):
        y = int8_linear(x, weight, None, **options)
        q, s = int8.quantize_rows(x)
        _, scales = int8_linear_to_int8(q, s, weight, None, torch.tensor(OUTPUT_SCALE, device=DEVICE), **options)
    assert (~y.isfinite()).any(1).tolist() == bad and (~scales.isfinite()).tolist() == bad


def test_more_results_than_32_bits_count():
    tokens, out_features, in_features = 720_000, 3072, 64
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    dense, weight, spec = nm_weight(out_features, in_features, torch.float16)
    x = x_of(tokens, in_features)
    with sb.backend("cuda"):
        y = nm_linear(x, weight, None, layout=MMA_SP, **spec._asdict())
    assert y.numel() > 2**31
    for part in (slice(0, 64), slice(tokens - 64, tokens)):
        check(y[part], x[part], dense, None)


# What x may be


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_any_shape_and_stride(dtype):
    dense, weight, spec = nm_weight(96, 128, dtype)
    wide = x_of(33, 300, dtype)
    views = [
        # Rows 600 bytes apart, whose beginnings are multiples of 16, 8, 4 and 2.
        *(wide[:, start : start + 128] for start in (0, 8, 4, 2, 1, 3)),
        # The same with rows that are all multiples of 16 apart, and an odd storage offset.
        x_of(33, 320, dtype)[:, 64:192],
        x_of(1, 1 + 33 * 128, dtype)[0, 1:].view(33, 128),
        wide[:1, :128].expand(33, 128),
        x_of(128, 33, dtype).t(),
        x_of(2 * 5, 128, dtype).view(2, 5, 128),
        x_of(2 * 128, 5, dtype).view(2, 128, 5).transpose(1, 2),
        x_of(1, 128, dtype)[0],
        x_of(0, 128, dtype),
        x_of(0, 128, dtype).view(2, 0, 128),
    ]
    with sb.backend("cuda"):
        for x in views:
            check(nm_linear(x, weight, None, layout=MMA_SP, **spec._asdict()), x, dense, None)


def test_int8_rows_of_any_stride():
    values, _, weight, spec = int8_weight(96, 128)
    weight = [*weight[:2], torch.ones(96, device=DEVICE)]
    wide = torch.randint(-127, 128, (33, 300), device=DEVICE, dtype=torch.int8)
    with sb.backend("cuda"):
        for start in (0, 1, 2, 4, 8, 16):
            q = wide[:, start : start + 128]
            ones = torch.ones(33, device=DEVICE)
            y = int8_linear_from_int8(q, ones, weight, None, dtype=torch.float32, layout=MMA_SP, **spec._asdict())
            assert torch.equal(y.double(), sums_of(q, values))


def test_the_tensors_of_a_call_may_lie_on_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    dense, weight, spec = nm_weight(768, 3072, torch.float16)
    there = [tensor.to("cuda:1") for tensor in weight]
    x = x_of(9, 3072).to("cuda:1")
    with sb.backend("cuda"):
        y = nm_linear(x, there, None, layout=MMA_SP, **spec._asdict())
        assert y.device == x.device and torch.cuda.current_device() == 0
        check(y, x, dense.to("cuda:1"), None)


# Splits, streams and graphs


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_split_product_is_the_same_twenty_times(dtype):
    for tokens in (1, 33):
        call, x, dense = split_case(dtype, tokens)
        first = call(x)
        check(first, x, dense, None)
        assert all(torch.equal(call(x), first) for _ in range(20))


def test_split_products_on_several_streams_at_once():
    call, x, _ = split_case()
    xs = [x, *(torch.randn_like(x) for _ in range(3))]
    expected = [call(each) for each in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found = [[] for _ in xs]
    for _ in range(50):
        for stream, each, results in zip(streams, xs, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(each))
    torch.cuda.synchronize()
    for one, results in zip(expected, found, strict=True):
        assert all(torch.equal(result, one) for result in results)


def captured(call, x):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    return graph, y


def test_a_split_product_in_a_graph():
    call, x, _ = split_case()
    call(x)
    graph, y = captured(call, x)
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, call(x))


def test_the_first_split_product_of_a_process_may_be_captured(monkeypatch):
    """No counters yet, as where the packed tensors came from elsewhere and nothing ran before the capture."""
    call, x, dense = split_case()
    monkeypatch.setattr(nm24, "_counters", {})
    graph, y = captured(call, x)
    assert not nm24._counters
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        check(y, x, dense, None)


def test_graphs_with_split_products_on_two_streams_at_once():
    """Beside calls on a third stream; one of the graphs is replayed on the stream of the other, too."""
    call, x, _ = split_case()
    xs = [x, torch.randn_like(x)]
    expected = [call(each) for each in xs]
    graphs = [captured(call, each) for each in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    for turn in range(30):
        for _, y in graphs:
            y.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams[:: -1 if turn % 2 else 1], graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        beside = call(x)
        torch.cuda.synchronize()
        assert torch.equal(beside, expected[0])
        assert all(torch.equal(y, one) for (_, y), one in zip(graphs, expected, strict=True)), turn


# Modules


FORMATS = {
    "2:4": sb.NMConfig(2, 4),
    "1:4": sb.NMConfig(1, 4),
    "int8 2:4": sb.Int8Config(weights=sb.NMConfig(2, 4)),
    "low rank + 2:4": sb.LowRankSparseConfig(rank=38, sparse=sb.NMConfig(2, 4)),
}


def packed_net(config, dtype=torch.float16, layout=MMA_SP):
    """Two layers of BERT-base's sizes, held in ``layout``."""
    net = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 768)).to(DEVICE, dtype).requires_grad_(False)
    sb.compress_(net, {"*": config})
    for module in net:
        module.prepare_(layout)
    return net


@pytest.mark.parametrize("tokens", [4, 512])
@pytest.mark.parametrize("how", ["compiled", "compiled into graphs", "captured"])
@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS.keys())
def test_a_feed_forward_net_compiled_and_captured(config, how, tokens, monkeypatch):
    """The same numbers, to the bit."""
    # The counters of splits must not be made where a graph's own memory is used again.
    monkeypatch.setattr(nm24, "_counters", {})
    net, x = packed_net(config), x_of(tokens, 768)
    with sb.backend("cuda"), torch.no_grad():
        if how == "captured":
            expected = net(x)
            graph, y = captured(net, x)
            for _ in range(5):
                y.fill_(float("nan"))
                graph.replay()
                assert torch.equal(y, expected)
            return
        torch._dynamo.reset()
        mode = None if how == "compiled" else "reduce-overhead"
        compiled = torch.compile(net, fullgraph=True, mode=mode)
        found = [compiled(x).clone() for _ in range(4)]
        assert all(torch.equal(y, net(x)) for y in found)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS.keys())
def test_a_module_moves_and_saves_the_same_bytes(config, dtype):
    net = packed_net(config, dtype)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    other = packed_net(config, dtype)
    other.load_state_dict(before)
    x = x_of(9, 768, dtype)
    with sb.backend("cuda"):
        assert torch.equal(other(x), net(x))
    assert all(module.layout == MMA_SP for module in (*net, *other))
    on_cpu = copy.deepcopy(net).cpu()
    assert all(module.layout != MMA_SP for module in on_cpu)
    for model in (net, other, on_cpu, on_cpu.cuda()):
        state = model.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name].cpu(), before[name].cpu()) for name in before)
    assert all(module.layout == MMA_SP for module in on_cpu)


def test_opcheck_and_gradient():
    dense, weight, spec = nm_weight(64, 128, torch.float16)
    x = x_of(8, 128).requires_grad_()
    bias = torch.randn(64, device=DEVICE).half()
    kwargs = {"layout": MMA_SP, "activation": "none", **spec._asdict()}
    torch.library.opcheck(torch.ops.sparsebert.nm_linear.default, (x.detach(), weight, bias), kwargs)
    nm_linear(x, weight, None, **kwargs).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x[:, :64]) @ dense, rtol=1e-2, atol=1e-2)


def test_tune_measures_the_configurations_and_they_are_used(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(768, 3072)).half().to(DEVICE).requires_grad_(False)
    sb.compress_(model, {"*": sb.NMConfig(2, 4)})
    report = sb.tune(model, [16], budget_s=0.5)
    assert MMA_SP in report.rows[0].median_us and report.rows[0].kernels[MMA_SP].startswith("cuda: ")
    model[0].prepare_(MMA_SP)
    (layer,) = sb.explain(model, tokens=16).layers
    assert layer.kernel.endswith(": measured)")
    x = x_of(16, 768)
    check(model(x), x, model[0].dense_weight(), model[0].bias)


# What is refused


def test_what_cannot_be_held_or_run_says_why():
    device = DEVICE
    for spec, dtype, text in (
        (NMSpec(2, 8, 64, 64), torch.float16, "needs a 2:4 pattern, not 2:8"),
        (NMSpec(1, 2, 66, 64), torch.float16, "needs in_features in multiples of 4, not 66"),
        (NMSpec(2, 4, 64, 64), torch.float32, "needs float16 or bfloat16, not float32"),
    ):
        assert layouts.get(spec.op, MMA_SP).supports(spec, dtype, device) == text
    _, weight, spec = nm_weight(64, 128, torch.float16)
    with sb.backend("triton"), pytest.raises(RuntimeError, match="triton: has no kernel for this layout"):
        nm_linear(x_of(8, 128), weight, None, layout=MMA_SP, **spec._asdict())
    with sb.backend("cuda"):
        with pytest.raises(TypeError, match="x is torch.bfloat16, expected torch.float16 as weight_values"):
            nm_linear(x_of(8, 128, torch.bfloat16), weight, None, layout=MMA_SP, **spec._asdict())
        with pytest.raises(ValueError, match=r"weight_metadata has shape \(1, 1, 128\)"):
            short = [weight[0], weight[1][:, :1].contiguous()]
            nm_linear(x_of(8, 128), short, None, layout=MMA_SP, **spec._asdict())


def test_a_call_that_does_not_fit_is_refused_before_it_is_launched():
    _, (values, metadata), _ = nm_weight(64, 64, torch.float16)
    x, y = x_of(9, 64), x_of(9, 64)
    call = {
        **{"element": 0, "tokens": 9, "in_features": 64, "out_features": 64, "tile": 0, "splits": 1, "x_stride": 64},
        **{"x": x.data_ptr(), "values": values.data_ptr(), "metadata": metadata.data_ptr(), "y": y.data_ptr()},
        **{"y_number": 0, "device": 0, "stream": 0},
    }
    linear = extension.load().nm24_linear
    for changes, text in (
        ({"in_features": 66}, "in_features is 66, expected a multiple of 4"),
        ({"tile": 99}, "tile is 99, expected 0 to"),
        ({"splits": 2}, "partial is missing"),
        ({"x": x.data_ptr() + 2}, "x begins 2 bytes past a multiple of 4"),
        ({"values": 0}, "values is missing"),
    ):
        with pytest.raises(ValueError, match=f"^nm24_linear: {text}"):
            linear(**call | changes)
    with pytest.raises(RuntimeError, match="nm24_linear"):
        linear(**call | {"device": 10_000})
    linear(**call)
    torch.cuda.synchronize()


# On Hopper: the wgmma kernel, from the layouts that are there


def no_wgmma() -> str | None:
    """None, or why the wgmma kernel cannot run here."""
    return unable() or sanitize_wgmma.refusal(DEVICE)


on_hopper = pytest.mark.skipif(no_wgmma() is not None, reason=f"wgmma: {no_wgmma()}")
# As SIZES, with the inputs that whole rows need.
WGMMA_SIZES = [*SIZES[:3], (100, 96), (72, 768)]
# Pattern and layout, of floats and of int8.
HELD = [((2, 4), "neutral"), ((2, 4), "dense"), ((1, 4), "dense")]
INT8_HELD = [((2, 4), "neutral"), ((2, 4), "unpacked"), ((1, 4), "unpacked"), ((1, 1), "neutral")]


def held(size, dtype, pattern, layout):
    """A dense weight at n:m, its tensors in ``layout``, and its spec."""
    dense = nm.project(torch.randn(size), *pattern)
    dense = (dense * (torch.rand(dense.shape) > 0.1)).to(DEVICE, dtype)
    spec = NMSpec(*pattern, size[1], size[0])
    return dense, layouts.get(spec.op, layout).from_neutral(list(nm.pack(dense, *pattern)), spec, dtype), spec


def int8_held(size, pattern, layout, activations="dynamic"):
    """An int8 weight, its scales, its tensors in ``layout``, and its spec."""
    dense = torch.randn(size) * size[1] ** -0.5
    values, scales = int8.quantize_weight(nm.project(dense, *pattern) if pattern[1] > 1 else dense)
    values, scales = values.to(DEVICE), scales.to(DEVICE)
    packed = list(nm.pack(values, *pattern)) if pattern[1] > 1 else [values]
    given = [torch.tensor(0.02, device=DEVICE)] if activations == "static" else []
    spec = Int8Spec(activations, *pattern, size[1], size[0])
    return values, scales, layouts.get(spec.op, layout).from_neutral([*packed, scales, *given], spec, torch.half), spec


@on_hopper
def test_every_wgmma_kernel():
    """What compute-sanitizer looks at, without it."""
    assert [str(case) for case in sanitize_wgmma.cases() if not sanitize_wgmma.run(case, DEVICE)] == []
    assert [str(case) for case in sanitize_wgmma.norm_cases() if not sanitize_wgmma.run_norm(case, DEVICE)] == []


@on_hopper
@pytest.mark.parametrize("tokens", [1, 64, 1000, 20_000])
@pytest.mark.parametrize(("features", "in_features"), [(384, 1536), (768, 768), (768, 3072), (1024, 4096)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_wgmma_with_layer_norm_against_float64(dtype, features, in_features, tokens):
    """In one launch, a cluster with one tile of tokens or several; and the same bits again."""
    dense = (nm.project(torch.randn(features, in_features), 2, 4) / in_features**0.5).to(DEVICE, dtype)
    x, bias = x_of(tokens, in_features, dtype), torch.randn(features, device=DEVICE, dtype=dtype)
    residual = x_of(tokens, features, dtype)
    gamma, beta = torch.rand(features).to(DEVICE), torch.rand(features).to(DEVICE)
    z = F.linear(x.double(), dense.double(), bias.double()) + residual.double()
    exact = F.layer_norm(z, z.shape[-1:], gamma.double(), beta.double(), 1e-12)

    def run():
        return linear_add_layer_norm(x, *nm.pack(dense, 2, 4), bias, residual, gamma, beta, 1e-12, quantize=True)

    y, q, scale = run()
    theirs = add_layer_norm(F.linear(x, dense, bias), residual, gamma, beta, 1e-12)
    assert (y.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max()
    expected = int8.quantize_rows(y)
    assert torch.equal(q, expected[0]) and torch.equal(scale, expected[1])
    assert all(torch.equal(one, other) for one, other in zip(run(), (y, q, scale), strict=True))


@on_hopper
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("pattern", "layout"), HELD, ids=str)
@pytest.mark.parametrize("size", WGMMA_SIZES, ids=str)
def test_every_wgmma_configuration_against_float64(size, pattern, layout, dtype):
    """All that ``sb.tune`` may choose, activations in turn."""
    dense, weight, spec = held(size, dtype, pattern, layout)
    bias = torch.randn(size[0], device=DEVICE, dtype=dtype)
    activations = cycle(ACTIVATIONS)
    for tokens in TOKENS:
        x = x_of(tokens, size[1], dtype)
        for configuration in solve(spec, x, layout=layout)[2]:
            activation = next(activations)
            candidate, problem, _ = solve(spec, x, activation, layout)
            b = None if activation == "relu" else bias
            poison(tokens, size[0], dtype)
            check(candidate.run(x, weight, b, problem, configuration=configuration), x, dense, b, activation)


@on_hopper
@pytest.mark.parametrize(("pattern", "layout"), INT8_HELD, ids=str)
@pytest.mark.parametrize("size", WGMMA_SIZES, ids=str)
def test_int8_sums_of_wgmma_are_exact_in_every_configuration(size, pattern, layout):
    values, _, weight, spec = int8_held(size, pattern, layout)
    weight = [torch.ones_like(part) if part.dtype == torch.float32 else part for part in weight]
    for tokens in TOKENS:
        q = torch.randint(-127, 128, (tokens, size[1]), device=DEVICE, dtype=torch.int8)
        ones, sums = torch.ones(tokens, device=DEVICE), sums_of(q, values)
        # So fp32 holds each of them.
        assert sums.abs().max() < 2**24
        candidate, problem, found = solve(spec, q.half(), layout=layout)
        problem = problem._replace(dtype=torch.float32)
        for configuration in found:
            poison(tokens, size[0], torch.float32)
            y = candidate.run.multiply(q, ones, weight, None, problem, configuration=configuration)
            assert torch.equal(y.double(), sums), configuration


@on_hopper
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float32], ids=str)
@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(("pattern", "layout"), INT8_HELD, ids=str)
def test_int8_linear_by_wgmma_against_float64(pattern, layout, activations, dtype):
    output_scale = torch.tensor(OUTPUT_SCALE, device=DEVICE)
    for size in ((768, 3072), (100, 96)):
        values, scales, weight, spec = int8_held(size, pattern, layout, activations)
        bias = torch.randn(size[0], device=DEVICE, dtype=dtype)
        for tokens in (1, 9, 127, 512):
            x = x_of(tokens, size[1], dtype)
            q, s = int8.quantize_rows(x, weight[-1] if activations == "static" else None)
            sums = sums_of(q, values) * s.double()[:, None] * scales.double() + bias.double()
            for activation, act in ACTIVATIONS.items():
                options = {"layout": layout, "activation": activation, **spec._asdict()}
                poison(tokens, size[0], dtype)
                with sb.backend("cuda"):
                    y = int8_linear(x, weight, bias, **options)
                    again, again_scales = int8_linear_to_int8(q, s, weight, bias, output_scale, **options)
                exact = act(sums)
                # One rounding to the dtype, and fp32 before it.
                bound = (torch.finfo(dtype).eps + 4e-6) * exact.abs().max()
                assert y.dtype == dtype and (y.double() - exact).abs().max() <= bound, (tokens, activation)
                assert torch.equal(again_scales, output_scale.expand(tokens))
                assert (again - (exact / OUTPUT_SCALE).clamp(-127, 127)).abs().max() <= 0.5 + 1e-3


@on_hopper
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rank", "parts"), [(8, 1), (32, 1), (40, 1), (128, 1), (32, 3)])
def test_low_rank_by_wgmma_against_float64(rank, parts, dtype):
    """At most twice the error of torch's sequence, in every configuration."""
    for out_features, in_features in ((2304, 768), (768, 3072), (384 if parts > 1 else 100, 96)):
        u = torch.randn(out_features, rank, device=DEVICE).to(dtype)
        v = torch.randn(parts * rank, in_features, device=DEVICE).to(dtype)
        s = nm.project(torch.randn(out_features, in_features), 2, 4).to(DEVICE, dtype)
        weight, bias = [u, v, *nm.pack(s, 2, 4)], torch.randn(out_features, device=DEVICE, dtype=dtype)
        spec = LowRankSparseSpec(rank, "nm", 2, 4, 0, in_features, out_features, parts)
        (reference,) = (c for c in select.candidates(spec.op, "neutral") if c.backend == "reference")
        both = [one @ other for one, other in zip(u.double().chunk(parts), v.double().chunk(parts), strict=True)]
        activations = cycle(ACTIVATIONS)
        for tokens in (1, 9, 127, 512):
            x = x_of(tokens, in_features, dtype)
            sums = x.double() @ (torch.cat(both) + s.double()).t() + bias.double()
            for configuration in solve(spec, x, layout="neutral")[2]:
                activation = next(activations)
                candidate, problem, _ = solve(spec, x, activation, "neutral")
                exact = ACTIVATIONS[activation](sums)
                theirs = reference.run(x, weight, bias, problem).double()
                poison(tokens, out_features, dtype)
                y = candidate.run(x, weight, bias, problem, configuration=configuration)
                bound = 2 * (theirs - exact).abs().max() + torch.finfo(dtype).eps * sums.abs().max()
                assert (y.double() - exact).abs().max() <= bound, configuration


@on_hopper
@pytest.mark.parametrize(("pattern", "layout"), HELD[:2], ids=str)
def test_what_wgmma_reads_may_lie_anywhere(pattern, layout):
    dense, weight, spec = held((96, 128), torch.float16, pattern, layout)
    wide = x_of(33, 304)
    views = [
        # Rows 608 bytes apart, whose beginnings are multiples of 16, 8, 4 and 2.
        *(wide[:, start : start + 128] for start in (0, 8, 4, 2, 1, 3)),
        x_of(33, 300)[:, :128],
        wide[:1, :128].expand(33, 128),
        x_of(128, 33).t(),
        x_of(2 * 5, 128).view(2, 5, 128),
        x_of(1, 128)[0],
        x_of(0, 128).view(2, 0, 128),
    ]
    with sb.backend("cuda"):
        for x in views:
            check(nm_linear(x, weight, None, layout=layout, **spec._asdict()), x, dense, None)
    storage = torch.zeros(96 * 128 + 1, device=DEVICE, dtype=torch.float16)
    storage[1:] = dense.flatten()
    candidate, problem, found = solve(DenseSpec(128, 96), wide[:, :128], "gelu", "neutral")
    y = candidate.run(wide[:, :128], [storage[1:].view(96, 128)], None, problem, configuration=found[0])
    check(y, wide[:, :128], dense, None, "gelu")


@on_hopper
@pytest.mark.parametrize(("pattern", "layout"), HELD[:2], ids=str)
def test_more_results_of_wgmma_than_32_bits_count(pattern, layout):
    tokens, size = 720_000, (3072, 64)
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    dense, weight, spec = held(size, torch.float16, pattern, layout)
    x = x_of(tokens, size[1])
    with sb.backend("cuda"):
        y = nm_linear(x, weight, None, layout=layout, **spec._asdict())
    assert y.numel() > 2**31
    for part in (slice(0, 64), slice(tokens - 64, tokens)):
        check(y[part], x[part], dense, None)


@on_hopper
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_wgmma_configuration_is_the_same_again_and_in_a_graph(dtype):
    dense, weight, spec = held((768, 3072), dtype, (2, 4), "neutral")
    for tokens in (1, 33, 2048):
        x = x_of(tokens, 3072, dtype)
        candidate, problem, found = solve(spec, x, layout="neutral")
        for configuration in found:

            def call(x, configuration=configuration, candidate=candidate, problem=problem):
                return candidate.run(x, weight, None, problem, configuration=configuration)

            first = call(x)
            check(first, x, dense, None)
            assert all(torch.equal(call(x), first) for _ in range(20)), configuration
            graph, y = captured(call, x)
            for _ in range(3):
                y.fill_(float("nan"))
                graph.replay()
                assert torch.equal(y, first), configuration


WGMMA_FORMATS = {
    "2:4": sb.NMConfig(2, 4),
    "int8": sb.Int8Config(),
    "int8 2:4": sb.Int8Config(weights=sb.NMConfig(2, 4)),
    "low rank + 2:4": sb.LowRankSparseConfig(rank=40, sparse=sb.NMConfig(2, 4)),
}


@on_hopper
@pytest.mark.parametrize("tokens", [4, 512])
@pytest.mark.parametrize("config", WGMMA_FORMATS.values(), ids=WGMMA_FORMATS.keys())
def test_a_neutral_feed_forward_net_compiled_and_captured(config, tokens):
    """The same numbers, to the bit."""
    net, x = packed_net(config, layout="neutral"), x_of(tokens, 768)
    with sb.backend("cuda"), torch.no_grad():
        expected = net(x)
        graph, y = captured(net, x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(net, fullgraph=True)(x), expected)


@on_hopper
def test_tune_measures_wgmma_which_waits_until_then(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(768, 3072)).half().to(DEVICE).requires_grad_(False)
    sb.compress_(model, {"*": sb.NMConfig(2, 4)}, layout="neutral")
    waiting = "cuda: not measured here, and no GPU has run it yet: estimated at "
    (layer,) = sb.explain(model, tokens=512).layers
    assert not layer.kernel.startswith("cuda") and any(reason.startswith(waiting) for reason in layer.refused)
    assert "neutral" in sb.tune(model, [512], budget_s=0.5).rows[0].median_us
    model[0].prepare_("neutral")
    (layer,) = sb.explain(model, tokens=512).layers
    assert layer.kernel.endswith(": measured)") and not any(reason.startswith(waiting) for reason in layer.refused)
    x = x_of(512, 768)
    check(model(x), x, model[0].dense_weight(), model[0].bias)


def small_encoder(config):
    """A fused encoder of a size that the kernel with LayerNorm takes, and inputs without padding."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=1000, **sizes)).eval()
    if config is not None:
        sb.compress_(model, config, layout="neutral")
    exact = copy.deepcopy(model).double()
    model.half().to(DEVICE).requires_grad_(False)
    sb.prepare_(model, "auto" if config is None else "neutral")
    sb.fuse_(model)
    return model, exact, torch.randint(0, 1000, (8, 64))


@on_hopper
@pytest.mark.parametrize("config", [None, sb.NMConfig(2, 4), sb.Int8Config(weights=sb.NMConfig(2, 4))], ids=str)
def test_a_fused_encoder_by_one_kernel_a_normalization(config, tmp_path, monkeypatch):
    """Within twice the error of two kernels, eager and from a graph."""
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    model, exact, ids = small_encoder(config)
    with torch.inference_mode():
        expected = exact(input_ids=ids).last_hidden_state
        apart = model(input_ids=ids.to(DEVICE)).last_hidden_state.cpu().double()
        for layer in normalized(model):
            spec, layout, _ = held_by(layer.linear)
            residual = torch.empty(ids.numel(), spec.out_features, dtype=torch.half, device=DEVICE)
            problem = problem_of(spec, layout, residual, quantize=layer.quantize)
            times = {"median_us": 1.0, "mad_us": 0.0, "backend": "cuda"}
            row = measurements.make_row(problem.spec, layout, problem.tokens, problem.dtype, DEVICE, **times)
            measurements.record([row])
            assert select.fused(problem) is not None
        fused = model(input_ids=ids.to(DEVICE)).last_hidden_state
        replayed = sb.Runner(model)(input_ids=ids.to(DEVICE)).last_hidden_state
    assert torch.equal(fused, replayed)
    assert (fused.cpu().double() - expected).abs().max() <= 2 * (apart - expected).abs().max()


@on_hopper
def test_tune_compares_one_kernel_with_two(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    model, _, ids = small_encoder(sb.NMConfig(2, 4))
    rows = [row for row in sb.tune(model, [512], budget_s=0.2).rows if "add_layer_norm" in row.op]
    assert {(row.out_features, row.in_features) for row in rows} == {(256, 256), (256, 1024)}
    for row in rows:
        assert row.median_us.keys() == {"apart", "fused"} and row.kernels["fused"].startswith("cuda")
    quicker = {row.median_us["fused"] < row.median_us["apart"] for row in rows}
    kernels = {layer.kernel.partition(" ")[0] for layer in sb.explain(model, tokens=512).normalized}
    assert kernels == {"cuda" if one else "two" for one in quicker}
    with torch.inference_mode():
        assert model(input_ids=ids.to(DEVICE)).last_hidden_state.isfinite().all()


@on_hopper
def test_a_wgmma_call_that_does_not_fit_is_refused_before_it_is_launched():
    _, (values, positions), _ = held((64, 64), torch.float16, (2, 4), "neutral")
    x, y = x_of(9, 64), x_of(9, 64)
    call = {
        **{"element": 0, "pattern": 1, "tokens": 9, "in_features": 64, "out_features": 64, "x_stride": 64},
        **{"tile": 0, "sharing": 1, "splits": 1, "x": x.data_ptr(), "values": values.data_ptr()},
        **{"positions": positions.data_ptr(), "y": y.data_ptr(), "y_number": 0, "device": 0, "stream": 0},
    }
    linear = extension.load().wgmma_linear
    for changes, text in (
        ({"in_features": 72}, "in_features is 72, expected a multiple of 16"),
        ({"tile": 99}, "tile is 99, expected 0 to"),
        ({"splits": 2}, "splits is 2, expected a stage of inputs for each"),
        ({"x": x.data_ptr() + 2}, "x begins 2 bytes past a multiple of 16"),
        ({"values": 0}, "values is missing"),
    ):
        with pytest.raises(ValueError, match=f"^wgmma_linear: {text}"):
            linear(**call | changes)
    with pytest.raises(RuntimeError, match="wgmma_linear"):
        linear(**call | {"device": 10_000})
    linear(**call)
    torch.cuda.synchronize()
