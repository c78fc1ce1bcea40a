"""The 2:4 kernel of ``csrc/nm24``, its source as it is, run on the CPU by ``tests/simt``: numbers, and every access."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sanitize_cuda
import simt_build
import sparsebert as sb
import tiny_models
from closeness import check
from sparsebert.formats import int8, mma_sp, nm
from sparsebert.nn import PackedLinear
from sparsebert.ops import layouts, select
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.cuda import calls, extension, nm24
from sparsebert.ops.cuda.calls import Place
from sparsebert.ops.cuda.mma_sp import MMA_SP
from sparsebert.ops.cuda.nm24 import Config
from sparsebert.ops.devices import Device
from sparsebert.ops.specs import Int8Spec, LowRankSparseSpec, NMSpec

FLOATS = [torch.float16, torch.bfloat16]
TOKENS = [1, 7, 8, 9, 33]
H200 = Device("cuda", "NVIDIA H200", (9, 0), 132, 227 << 10)
FOLDERS = {"tests/simt": ("half", "bfloat16", "int8", "linear"), "csrc/nm24": ("bind", "check", "choose")}
SOURCES = [
    simt_build.ROOT / folder / (f"nm24_{name}.cpp" if folder == "tests/simt" else f"{name}.cpp")
    for folder, names in FOLDERS.items()
    for name in names
]


@pytest.fixture(scope="module")
def machine():
    return simt_build.build("nm24_linear", SOURCES)


@pytest.fixture(autouse=True)
def on_the_cpu(machine, monkeypatch):
    """What launches on a GPU runs here instead, and every buffer begins as NaN."""
    monkeypatch.setattr(extension, "load", lambda: machine)
    monkeypatch.setattr(extension, "missing", lambda: None)
    monkeypatch.setattr(calls, "place_of", lambda x: Place(0, 0, False))
    extension._not_compiled_for.cache_clear()
    nm24.configurations.cache_clear()
    yield
    machine.set_order(0)
    assert not any(counters._zeros.any() for counters in nm24._counters.values())
    nm24.configurations.cache_clear()


def config(machine, tile, splits=1):
    features, tokens, _, _ = machine.TILES[tile]
    return Config(tile, features, tokens, splits)


def weight_of(out_features, in_features, dtype, n=2, m=4, seed=0):
    """A weight at n:m and its tensors in ``mma_sp``; some groups have fewer weights, some none."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(out_features, in_features, generator=generator)
    dense = nm.project(dense, n, m) * (torch.rand(dense.shape, generator=generator) > 0.1)
    dense = (dense * 40).round().clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else dense.to(dtype)
    return dense, mma_sp.pack(*nm.pack(dense, n, m), n, m, in_features)


def x_of(tokens, in_features, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_features, generator=generator)
    return (x * 50).round().clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else x.to(dtype)


def sums_of(x, dense):
    return (x.long() @ dense.long().t()).int()


def tiles():
    return range(7)


def test_these_are_all_tiles(machine):
    assert len(machine.TILES) == len(tiles())
    for features, tokens, _, shared in machine.TILES:
        assert features % 64 == 0 and tokens % 8 == 0 and shared <= 99 << 10


# Every kernel there is: an element, a tile, and rows of x that are wide or not.


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("tile", tiles())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats(machine, dtype, tile, wide):
    features, width, warps_k, _ = machine.TILES[tile]
    # The last tile of features and of inputs is cut; narrow rows begin at multiples of 8 bytes, or of 4.
    in_features = 64 * warps_k * 2 + (72 if wide else 76)
    dense, (values, metadata) = weight_of(features + 70, in_features, dtype)
    bias = torch.randn(features + 70).to(dtype)
    sizes = {"in_features": in_features, "out_features": features + 70}
    for tokens, splits in itertools.product({*TOKENS, width + 1}, (1, 3)):
        x = x_of(tokens, in_features, dtype)
        y = nm24.linear(x, values, metadata, bias, **sizes, config=config(machine, tile, splits))
        check(y, x, dense, bias)


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("tile", tiles())
def test_int8_sums_are_exact(machine, tile, wide):
    features, width, warps_k, _ = machine.TILES[tile]
    in_features = 128 * warps_k * 2 + (144 if wide else 148)
    dense, (values, metadata) = weight_of(features + 70, in_features, torch.int8)
    ones = torch.ones(features + 70)
    sizes = {"in_features": in_features, "out_features": features + 70, "dtype": torch.float32}
    for tokens, splits in itertools.product({*TOKENS, width + 1}, (1, 3)):
        x = x_of(tokens, in_features, torch.int8)
        scales = {"x_scale": torch.ones(tokens), "scales": ones}
        y = nm24.linear(x, values, metadata, None, **sizes, **scales, config=config(machine, tile, splits))
        assert torch.equal(y, sums_of(x, dense).float())


def test_what_compute_sanitizer_looks_at(machine):
    """Every kernel, each with one split and two, and the same program that runs on a GPU."""
    found = list(sanitize_cuda.cases())
    assert sanitize_cuda.every_tile() == [config(machine, tile) for tile in tiles()]
    kernels = {(case.config.tile, case.dtype, case.wide, case.config.splits) for case in found}
    assert len(kernels) == len(tiles()) * 3 * 2 * 2 and {case.extra for case in found} == {"", "rank", "columns"}
    assert all(sanitize_cuda.run(case, torch.device("cpu")) for case in found)


@pytest.mark.parametrize("splits", [1, 2])
def test_every_tile_is_computed_once(machine, splits):
    """More tiles of tokens than run side by side, and several of features: outputs may be written once only."""
    dense, (values, metadata) = weight_of(200, 256, torch.float16)
    x = x_of(150, 256, torch.float16)
    y = nm24.linear(x, values, metadata, None, in_features=256, out_features=200, config=config(machine, 0, splits))
    check(y, x, dense, None)


# Patterns and numbers


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_all_pairs_of_places(machine, dtype):
    """Groups with each pair, with one weight at each place, and with none; negative zeros."""
    patterns = [p for p in range(16) if bin(p).count("1") <= 2]
    groups = torch.tensor([[float(i + 1) if p >> i & 1 else 0.0 for i in range(4)] for p in patterns])
    dense = torch.stack([groups.roll(shift, 0).flatten() for shift in range(64)])
    dense = torch.where(dense == 0, -0.0, dense).to(dtype) if dtype != torch.int8 else dense.to(dtype)
    values, metadata = mma_sp.pack(*nm.pack(dense, 2, 4), 2, 4, 44)
    x = torch.where(torch.rand(9, 44) < 0.2, -0.0, x_of(9, 44, dtype).float()).to(dtype)
    scales = {"x_scale": torch.ones(9), "scales": torch.ones(64), "dtype": torch.float32} if dtype == torch.int8 else {}
    sizes = {"in_features": 44, "out_features": 64}
    y = nm24.linear(x, values, metadata, None, **sizes, **scales, config=config(machine, 0))
    assert torch.equal(y, sums_of(x, dense).float()) if dtype == torch.int8 else check(y, x, dense, None) is None


@pytest.mark.parametrize(("n", "m"), mma_sp.PATTERNS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_patterns_through_their_layout(machine, n, m, dtype):
    dense, _ = weight_of(100, 84, dtype, n, m)
    spec = NMSpec(n, m, 84, 100)
    weight = layouts.get("nm_linear", MMA_SP).from_neutral(list(nm.pack(dense, n, m)), spec, dtype)
    (candidate, _) = select.candidates("nm_linear", MMA_SP)
    x, bias = x_of(10, 84, dtype).view(2, 5, 84), torch.randn(100).to(dtype)
    problem = select.Problem(MMA_SP, H200, dtype, spec, 10, "gelu")
    assert candidate.backend == "cuda" and candidate.supports(problem) is None
    for configuration in candidate.configurations(problem)[:3]:
        check(candidate.run(x, weight, bias, problem, configuration=configuration), x, dense, bias, "gelu")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_stays_with_its_token(machine, dtype):
    dense, (values, metadata) = weight_of(64, 128, dtype)
    x = x_of(9, 128, dtype)
    kept = dense[0].nonzero().flatten()
    x[3, kept[0]], x[5, kept[1]] = math.nan, math.inf
    y = nm24.linear(x, values, metadata, None, in_features=128, out_features=64, config=config(machine, 0))
    assert y[3, 0].isnan() and y[5, 0].isinf()
    finite = [token for token in range(9) if token not in (3, 5)]
    check(y[finite], x[finite], dense, None)


# The result


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_epilogue(machine, dtype, activation):
    dense, (values, metadata) = weight_of(72, 64, dtype)
    x, bias, residual = x_of(9, 64, dtype), torch.randn(72).to(dtype), torch.randn(9, 72).to(dtype)
    sizes = {"in_features": 64, "out_features": 72, "activation": activation, "config": config(machine, 1)}
    act = ACTIVATIONS[activation]
    for b, r, alpha in ((None, None, 1.0), (bias, None, 0.5), (bias, residual, 1.0), (None, residual, -2.0)):
        y = nm24.linear(x, values, metadata, b, **sizes, alpha=alpha, residual=r)
        exact = alpha * (x.double() @ dense.double().t())
        exact = act(exact if b is None else exact + b.double())
        exact = exact if r is None else exact + r.double()
        # One rounding of what is exact but for fp32.
        assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float32], ids=str)
def test_int8_scales(machine, dtype, activation):
    dense, (values, metadata) = weight_of(75, 128, torch.int8)
    x, s, scales = x_of(9, 128, torch.int8), torch.rand(9) + 0.1, torch.rand(75) + 0.1
    bias = torch.randn(75).to(dtype)
    options = {"in_features": 128, "out_features": 75, "activation": activation, "x_scale": s, "scales": scales}
    y = nm24.linear(x, values, metadata, bias, **options, dtype=dtype, config=config(machine, 0, 1))
    expected = sums_of(x, dense).float() * s[:, None] * scales + bias.float()
    assert torch.equal(y, ACTIVATIONS[activation](expected).to(dtype))


def test_int8_again(machine):
    dense, (values, metadata) = weight_of(70, 128, torch.int8)
    x, s, scales, bias = x_of(17, 128, torch.int8), torch.rand(17) + 0.1, torch.rand(70) + 0.1, torch.randn(70)
    s[4], s[6] = math.nan, math.inf
    output_scale, y_scale = torch.tensor(37.5), torch.full((17,), -1.0)
    options = {"in_features": 128, "out_features": 70, "x_scale": s, "scales": scales, "config": config(machine, 1)}
    y = nm24.linear(x, values, metadata, bias, **options, output_scale=output_scale, y_scale=y_scale)
    expected, expected_scale = int8.quantize_rows(sums_of(x, dense).float() * s[:, None] * scales + bias, output_scale)
    finite = [token for token in range(17) if token not in (4, 6)]
    assert y.dtype == torch.int8 and torch.equal(y[finite], expected[finite])
    assert torch.equal(y_scale[finite], expected_scale[finite]) and y_scale[[4, 6]].isnan().all()


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(("n", "m"), mma_sp.PATTERNS)
def test_int8_through_its_layout(machine, n, m, activations):
    dense, _ = weight_of(70, 144, torch.int8, n, m)
    scales = torch.rand(70) / 50 + 0.01
    spec = Int8Spec(activations, n, m, 144, 70)
    neutral = [*nm.pack(dense, n, m), scales, *([torch.tensor(0.03)] if activations == "static" else [])]
    weight = layouts.get("int8_linear", MMA_SP).from_neutral(neutral, spec, torch.float16)
    cuda, reference = select.candidates("int8_linear", MMA_SP)
    x, bias = torch.randn(3, 3, 144).half(), torch.randn(70).half()
    problem = select.Problem(MMA_SP, H200, torch.float16, spec, 9, "none")
    y = cuda.run(x, weight, bias, problem, configuration=cuda.configurations(problem)[0])
    # Equal sums; scales and bias in two roundings or one.
    torch.testing.assert_close(y, reference.run(x, weight, bias, problem), rtol=2**-10, atol=2**-12)


def test_int8_in_and_out_through_its_layout(machine):
    """As the op on int8 rows calls it, by powers of two: the integers and scales of the reference."""
    dense, _ = weight_of(70, 144, torch.int8)
    spec = Int8Spec("dynamic", 2, 4, 144, 70)
    neutral = [*nm.pack(dense, 2, 4), torch.ones(70)]
    weight = layouts.get("int8_linear", MMA_SP).from_neutral(neutral, spec, torch.float32)
    cuda, reference = select.candidates("int8_linear", MMA_SP)
    q, s, step = x_of(9, 144, torch.int8), torch.ones(9), torch.tensor(64.0)
    problem = select.Problem(MMA_SP, H200, torch.float32, spec, 9, "none")
    y, scales = cuda.run.again(q, s, weight, None, step, problem, configuration=cuda.configurations(problem)[0])
    expected, expected_scales = reference.run.again(q, s, weight, None, step, problem)
    assert y.dtype == torch.int8 and torch.equal(y, expected) and torch.equal(scales, expected_scales)


# Splits


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_a_split_product_is_the_same_in_every_order_of_blocks(machine, dtype):
    in_features = 64 * 4 * 5
    dense, (values, metadata) = weight_of(130, in_features, dtype)
    x = x_of(19, in_features, dtype)
    scales = (
        {"x_scale": torch.ones(19), "scales": torch.ones(130), "dtype": torch.float32} if dtype == torch.int8 else {}
    )
    sizes = {"in_features": in_features, "out_features": 130}
    # The second in two parts of its features.
    for configuration in (config(machine, 1, 4), config(machine, 6, 4)):
        results = []
        for order in (0, -1, 7, 8):
            machine.set_order(order)
            results.append(nm24.linear(x, values, metadata, None, **sizes, **scales, config=configuration))
        assert all(torch.equal(result, results[0]) for result in results)


def test_counters_are_shared_by_a_stream_and_owned_by_each_captured_call():
    counters = nm24._Counters(torch.device("cpu"))
    first, second = Place(0, 1, False), Place(0, 2, False)
    captured = first._replace(capturing=True)

    def begins(place, count):
        return counters.of(place, count).data_ptr()

    assert begins(first, 10) == begins(first, 1000) != begins(second, 10)
    assert begins(first, 5000) not in {begins(second, 10), begins(captured, 10)}
    assert begins(captured, 10) != begins(captured, 10)
    # None is left: a tensor of its own, and zeros all the same.
    counters.of(captured, counters.SIZE - counters._used)
    spare = counters.of(captured, 7)
    assert len(spare) == 7 and not spare.any() and spare.untyped_storage().nbytes() == 7 * 4
    assert not counters._zeros.any()


def test_a_capture_before_anything_was_packed_makes_no_counters_for_others(machine, monkeypatch):
    monkeypatch.setattr(nm24, "_counters", {})
    monkeypatch.setattr(calls, "place_of", lambda x: Place(0, 0, True))
    dense, (values, metadata) = weight_of(64, 512, torch.float16)
    x = x_of(9, 512, torch.float16)
    y = nm24.linear(x, values, metadata, None, in_features=512, out_features=64, config=config(machine, 0, 2))
    check(y, x, dense, None)
    assert not nm24._counters


def test_more_splits_than_inputs(machine):
    dense, (values, metadata) = weight_of(64, 64, torch.float16)
    x = x_of(9, 64, torch.float16)
    y = nm24.linear(x, values, metadata, None, in_features=64, out_features=64, config=config(machine, 0, 16))
    check(y, x, dense, None)


# Low rank


@pytest.mark.parametrize("rank", [16, 32, 48, 80, 272])
@pytest.mark.parametrize(("tile", "splits"), [(0, 1), (1, 2), (3, 1), (4, 3), (5, 1), (6, 2)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_low_rank(machine, dtype, tile, splits, rank):
    out_features, in_features = machine.TILES[tile][0] + 6, 200
    dense, (values, metadata) = weight_of(out_features, in_features, dtype)
    u, v = (torch.randn(out_features, rank) / 8).to(dtype), (torch.randn(rank, in_features) / 8).to(dtype)
    x, bias = x_of(11, in_features, dtype), torch.randn(out_features).to(dtype)
    t = x @ v.t()
    sizes = {"in_features": in_features, "out_features": out_features, "config": config(machine, tile, splits)}
    y = nm24.linear(x, values, metadata, bias, **sizes, t=t, u=mma_sp.pack_factor(u))
    exact = x.double() @ dense.double().t() + t.double() @ u.double().t() + bias.double()
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("rank", [5, 16, 40])
def test_low_rank_through_its_layout(machine, rank):
    dtype = torch.float16
    dense, _ = weight_of(100, 84, dtype)
    u, v = (torch.randn(100, rank) / 4).to(dtype), (torch.randn(rank, 84) / 4).to(dtype)
    spec = LowRankSparseSpec(rank, "nm", 2, 4, 0, 84, 100)
    layout = layouts.get("low_rank_sparse_linear", MMA_SP)
    neutral = [u, v, *nm.pack(dense, 2, 4)]
    weight = layout.from_neutral(neutral, spec, dtype)
    assert [tuple(part.shape) for part in weight] == [held.shape for held in layout.tensors(spec).values()]
    assert all(map(torch.equal, layout.to_neutral(weight, spec), neutral))
    cuda, reference = select.candidates("low_rank_sparse_linear", MMA_SP)
    x, bias = x_of(9, 84, dtype), torch.randn(100).to(dtype)
    problem = select.Problem(MMA_SP, H200, dtype, spec, 9, "relu")
    y = cuda.run(x, weight, bias, problem, configuration=cuda.configurations(problem)[0])
    exact = torch.relu(x.double() @ (dense.double() + u.double() @ v.double()).t() + bias.double())
    theirs = reference.run(x, weight, bias, problem)
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert (y.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max() + unit


# What x may be


@pytest.mark.parametrize("tile", tiles())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_columns_are_gathered(machine, dtype, tile):
    kept, wide = 96, 301
    columns = torch.sort(torch.randperm(wide)[:kept]).values
    dense, (values, metadata) = weight_of(70, kept, dtype)
    x = x_of(9, wide, dtype)
    sizes = {"in_features": kept, "out_features": 70, "config": config(machine, tile, 2)}
    y = nm24.linear(x, values, metadata, None, **sizes, columns=columns.to(torch.int32))
    check(y, x[:, columns].contiguous(), dense, None)


def test_a_solution_hands_columns_to_the_kernel_alone_where_it_gathers(machine):
    columns = torch.arange(3, 99, dtype=torch.int32)
    dense, weight = weight_of(70, 96, torch.float16)
    x = x_of(9, 100, torch.float16)
    problem = select.Problem(MMA_SP, H200, torch.float16, NMSpec(2, 4, 96, 70), 9, "none")
    cuda, reference = (select.solutions(found, problem)[0] for found in select.candidates("nm_linear", MMA_SP))
    assert cuda.candidate.gathers and not reference.candidate.gathers
    for solution in (cuda, reference):
        check(solution.run(x, list(weight), None, problem, columns), x[:, 3:99].contiguous(), dense, None)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_rows_that_are_not_contiguous(machine, dtype):
    dense, (values, metadata) = weight_of(64, 64, dtype)
    wide = x_of(9, 200, dtype)
    scales = {"x_scale": torch.ones(9), "scales": torch.ones(64), "dtype": torch.float32} if dtype == torch.int8 else {}
    sizes = {"in_features": 64, "out_features": 64, "config": config(machine, 0)}
    views = [wide[:, start : start + 64] for start in (0, 1, 2, 4, 8)] + [
        wide[0, :64].expand(9, 64),
        wide[:9, :9].repeat(64, 1)[:64].t()[:9],
    ]
    for x in views:
        y = nm24.linear(x, values, metadata, None, **sizes, **scales)
        if dtype == torch.int8:
            assert torch.equal(y, sums_of(x, dense).float())
        else:
            check(y, x, dense, None)


def test_nothing_to_compute(machine):
    dense, (values, metadata) = weight_of(64, 64, torch.float16)
    y = nm24.linear(
        x_of(0, 64, torch.float16), values, metadata, None, in_features=64, out_features=64, config=config(machine, 0)
    )
    assert y.shape == (0, 64)


# What is refused


def call_of(machine, **changes):
    dense, (values, metadata) = weight_of(64, 64, torch.float16)
    x, y = x_of(9, 64, torch.float16), torch.empty(9, 64).half()
    call = {
        **{"element": 0, "tokens": 9, "in_features": 64, "out_features": 64, "tile": 0, "splits": 1, "x_stride": 64},
        **{"x": x.data_ptr(), "values": values.data_ptr(), "metadata": metadata.data_ptr(), "y": y.data_ptr()},
        **{"y_number": 0, "device": 0, "stream": 0},
    }
    shifted = {name: call[name] + by for name, by in changes.pop("shift", {}).items()}
    machine.nm24_linear(**call | changes | shifted)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"in_features": 66}, "in_features is 66, expected a multiple of 4"),
        ({"tokens": 0}, "tokens is 0, expected 1 to"),
        ({"rank": 8}, "rank is 8, expected a multiple of 16"),
        ({"rank": 16}, "t is missing, expected a tensor"),
        ({"tile": 7}, "tile is 7, expected 0 to 6"),
        ({"splits": 17}, "splits is 17, expected 1 to 16"),
        ({"splits": 2}, "partial is missing"),
        ({"activation": 4}, "activation is 4, expected 0 to 3"),
        ({"x_stride": 65}, "stride of x in bytes is 130, expected a multiple of 4"),
        ({"shift": {"x": 2}}, "x begins 2 bytes past a multiple of 4, expected that multiple"),
        ({"shift": {"values": 8}}, "values begins 8 bytes past a multiple of 16"),
        ({"values": 0}, "values is missing"),
        ({"y_number": 3}, "y is int8, expected a float"),
        ({"element": 2}, "x_scale is missing"),
    ],
    ids=str,
)
def test_a_call_that_does_not_fit(machine, changes, text):
    with pytest.raises(ValueError, match=f"^nm24_linear: {text}"):
        call_of(machine, **changes)


@pytest.mark.parametrize(
    ("spec", "dtype", "device", "text"),
    [
        (NMSpec(2, 8, 64, 64), torch.float16, H200, "needs a 2:4 pattern, not 2:8"),
        (NMSpec(1, 2, 66, 64), torch.float16, H200, "needs in_features in multiples of 4, not 66"),
        (NMSpec(2, 4, 64, 64), torch.float32, H200, "needs float16 or bfloat16, not float32"),
        (Int8Spec("dynamic", 1, 1, 64, 64), torch.float16, H200, "needs a 2:4 pattern, not 1:1"),
        (LowRankSparseSpec(4, "rows", 1, 1, 3, 64, 64), torch.float16, H200, "needs a sparse part at n:m, not rows"),
        (
            LowRankSparseSpec(4, "nm", 2, 4, 0, 64, 96, 3),
            torch.float16,
            H200,
            "needs one product of factors, not 3",
        ),
        (NMSpec(2, 4, 64, 64), torch.float16, Device("cpu"), "needs a CUDA device, not cpu"),
        (
            NMSpec(2, 4, 64, 64),
            torch.float16,
            H200._replace(capability=(7, 5)),
            "needs compute capability 8.0, found 7.5",
        ),
        (
            NMSpec(2, 4, 64, 64),
            torch.float16,
            H200._replace(capability=(10, 0)),
            "sparsebert._C is compiled for sm_80, sm_90a, sm_120, not for compute capability 10.0",
        ),
    ],
    ids=str,
)
def test_refusals_say_why(machine, spec, dtype, device, text):
    assert nm24.refusal(spec, dtype, device) == text


def test_where_it_runs(machine):
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)):
        assert nm24.refusal(NMSpec(2, 4, 64, 64), torch.float16, H200._replace(capability=capability)) is None


# The choice


@settings(max_examples=200, deadline=None)
@given(
    element=st.integers(0, 2),
    tokens=st.integers(1, 20000),
    fours=st.integers(1, 2000),
    out_features=st.integers(1, 8192),
    shared=st.sampled_from([48 << 10, 99 << 10, 227 << 10]),
    sms=st.sampled_from([0, 20, 58, 108, 132]),
)
def test_solutions_fit_their_device(element, tokens, fours, out_features, shared, sms):
    module = simt_build.build("nm24_linear", SOURCES)
    found = module.nm24_solutions(element, tokens, 4 * fours, out_features, 0, sms, shared)
    assert found and len(found) == len(set(found)) and len(found) <= 12
    for tile, features, width, splits in found:
        assert module.TILES[tile][:2] == (features, width) and module.TILES[tile][3] <= shared
        stage = (128 if element == 2 else 64) * module.TILES[tile][2]
        assert 1 <= splits <= min(16, -(-4 * fours // stage))
        size, counters = module.nm24_workspace(tokens, out_features, tile, splits)
        blocks = -(-out_features // features) * -(-tokens // width)
        parts = -(-features // 128)
        assert (size, counters) == ((0, 0) if splits == 1 else (4 * blocks * splits * features * width, blocks * parts))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m.nm24_solutions(3, 1, 64, 64, 0, 132, 0), "element is 3, expected 0 to 2"),
        (lambda m: m.nm24_solutions(0, 0, 64, 64, 0, 132, 0), "tokens is 0, expected 1 to"),
        (lambda m: m.nm24_solutions(0, 1, 63, 64, 0, 132, 0), "in_features is 63, expected a multiple of 4"),
        (lambda m: m.nm24_workspace(1, 64, 7, 1), "tile is 7, expected 0 to 6"),
        (lambda m: m.nm24_workspace(1, 64, 0, 0), "splits is 0, expected 1 to 16"),
    ],
)
def test_sizes_that_cannot_be(machine, call, text):
    with pytest.raises(ValueError, match=f"^nm24_linear: {text}"):
        call(machine)


def test_the_estimate_wastes_little(machine):
    """Few tokens take a narrow tile and splits, many the widest tile and none."""
    tile, _, width, splits = machine.nm24_solutions(0, 1, 3072, 768, 0, 132, 227 << 10)[0]
    assert width == 8 and splits > 1
    tile, _, width, splits = machine.nm24_solutions(0, 16384, 768, 3072, 0, 132, 227 << 10)[0]
    assert width == 128 and splits == 1


# Modules


@pytest.fixture
def cpu_is_served(monkeypatch):
    """The kernel's backend takes CPU tensors, as the machine does."""
    monkeypatch.setattr(extension, "refusal", lambda device: None)


@pytest.mark.parametrize(
    "packed",
    [
        sb.NMConfig(2, 4),
        sb.NMConfig(1, 4),
        sb.NMConfig(2, 4, columns=0.5),
        sb.Int8Config("dynamic", sb.NMConfig(2, 4)),
        sb.LowRankSparseConfig(rank=3, sparse=sb.NMConfig(2, 4)),
    ],
    ids=str,
)
def test_a_model_runs_on_the_kernel_alone(cpu_is_served, packed):
    """Held in ``mma_sp``: the numbers of the reference, and the neutral tensors to the bit."""
    model = tiny_models.tiny_model().half().eval()
    sb.compress_(model, packed)
    layers = [
        module for module in model.modules() if isinstance(module, PackedLinear) and module.spec.op != "dense_linear"
    ]
    for layer in layers:
        layer.prepare_("neutral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = tiny_models.outputs(model)
        for layer in layers:
            layer.prepare_(MMA_SP)
            assert layer.layout == MMA_SP
        with sb.backend("cuda"):
            y = tiny_models.outputs(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    # Another order of sums, through two layers with their norms.
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    assert not torch.equal(y, torch.zeros_like(y))


def test_opcheck(cpu_is_served):
    for columns in (None, torch.arange(2, 86, dtype=torch.int32)):
        dense, weight = weight_of(70, 84, torch.float16)
        x = x_of(5, 84 if columns is None else 90, torch.float16)
        arguments = (x, list(weight), torch.randn(70).half(), columns)
        spec = NMSpec(2, 4, 84, 70)
        with sb.backend("cuda"):
            torch.library.opcheck(
                torch.ops.sparsebert.nm_linear.default, arguments, {"layout": MMA_SP, **spec._asdict()}
            )


def test_explain_names_tile_and_splits(cpu_is_served):
    model = nn.Sequential(nn.Linear(768, 3072)).half()
    sb.compress_(model, {"0": sb.NMConfig(2, 4)})
    model[0].prepare_(MMA_SP)
    (layer,) = sb.explain(model).layers
    assert layer.layout == MMA_SP and layer.kernel.startswith(
        "cuda (CUDA: 2:4 on the sparse tensor cores by mma.sp; tile "
    )
    assert layer.kernel.endswith(": estimated)")
