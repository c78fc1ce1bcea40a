"""The kernel of ``csrc/wgmma``, its source as it is, run on the CPU by ``tests/simt``; and as nvcc compiles it."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from torch import nn

import sanitize_wgmma
import simt_build
import sparsebert as sb
import tiny_models
from closeness import check
from cuda_build import compile_for_hopper, expect, find_cuobjdump, read_log, sass
from sparsebert.formats import bitmap, int8, nm
from sparsebert.nn import PackedLinear
from sparsebert.ops import dense_linear, layouts, select
from sparsebert.ops.activations import ACTIVATIONS
from sparsebert.ops.cuda import calls, extension, wgmma
from sparsebert.ops.cuda.calls import Place
from sparsebert.ops.cuda.wgmma import Config
from sparsebert.ops.devices import Device
from sparsebert.ops.low_rank import PADDED
from sparsebert.ops.specs import BitmapSpec, DenseSpec, Int8Spec, LowRankSparseSpec, LowRankSpec, NMSpec

FLOATS = [torch.float16, torch.bfloat16]
PATTERNS = ["dense", "2:4"]
TILES = range(5)
# Those of which several blocks may divide the inputs.
SMALL = (0, 1)
H200 = Device("cuda", "NVIDIA H200", (9, 0), 132, 227 << 10)
FOLDER = simt_build.ROOT / "tests" / "simt"
FOLDERS = {
    FOLDER: ("half", "bfloat16", "int8", "linear"),
    simt_build.ROOT / "csrc" / "wgmma": ("bind", "check", "choose"),
}
SOURCES = [
    folder / (f"wgmma_{name}.cpp" if folder == FOLDER else f"{name}.cpp")
    for folder, names in FOLDERS.items()
    for name in names
]


@pytest.fixture(scope="module")
def machine():
    return simt_build.build("wgmma_linear", SOURCES)


@pytest.fixture(autouse=True)
def on_the_cpu(machine, monkeypatch):
    """What launches on a GPU runs here instead, and what torch allocates begins as NaN, or as the largest integer."""
    monkeypatch.setattr(extension, "load", lambda: machine)
    monkeypatch.setattr(extension, "missing", lambda: None)
    monkeypatch.setattr(calls, "place_of", lambda x: Place(0, 0, False))
    for cache in (extension._not_compiled_for, wgmma._of_sizes, select._choose):
        cache.cache_clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    machine.set_order(0)
    machine.set_sms(8)
    for cache in (extension._not_compiled_for, wgmma._of_sizes, select._choose):
        cache.cache_clear()


def config(machine, tile, sharing=1, splits=1):
    return Config(tile, *machine.TILES[tile][:2], sharing, splits)


def weight_of(out_features, in_features, dtype, pattern):
    """The dense weight, what is kept of it row by row, and where that was; some groups have fewer than two."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(out_features, in_features, generator=generator)
    if pattern == "2:4":
        dense = nm.project(dense, 2, 4) * (torch.rand(dense.shape, generator=generator) > 0.1)
    dense = (dense * 40).round().clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else dense.to(dtype)
    return (dense, dense, None) if pattern == "dense" else (dense, *nm.pack(dense, 2, 4))


def x_of(tokens, in_features, dtype):
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(1))
    return (x * 50).round().clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else x.to(dtype)


def linear(machine, x, weight, bias=None, *, tile=0, sharing=1, splits=1, **options):
    _, values, positions = weight
    return wgmma.linear(x, values, positions, bias, config=config(machine, tile, sharing, splits), **options)


def sums_of(x, dense):
    return (x.long() @ dense.long().t()).float()


def exactly(machine, x, weight, **options):
    """The product of int8 as it is."""
    ones = {"x_scale": torch.ones(len(x)), "scales": torch.ones(len(weight[0])), "dtype": torch.float32}
    return linear(machine, x, weight, **ones, **options)


def cuda_of(op, layout):
    (found,) = (candidate for candidate in select.candidates(op, layout) if candidate.backend == "cuda")
    return found


def run(layout, spec, x, weight, bias=None, activation="none", which=0):
    """As the op runs it, in one of the configurations that it may choose."""
    problem = select.Problem(layout, H200, x.dtype, spec, x.numel() // x.shape[-1], activation)
    candidate = cuda_of(spec.op, layout)
    assert candidate.supports(problem) is None
    configuration = candidate.configurations(problem)[which]
    return candidate.run(x, weight, bias, problem, configuration=configuration)


# Every kernel there is


def test_these_are_all_tiles(machine):
    assert len(machine.TILES) == len(TILES)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats(machine, dtype, tile, pattern):
    features, width = machine.TILES[tile][:2]
    # The last tiles of features, tokens and inputs are cut; more stages than there is room for, and fewer. Rows of y
    # that begin at multiples of 16 bytes, which leave as tiles, and others; blocks with one tile, and with all.
    for tokens, in_features in ((width + 9, 64 * 9 + 16), (7, 48)):
        for out_features, sms in ((features + 72, 2), (features + 70, 1)):
            machine.set_sms(sms)
            weight = weight_of(out_features, in_features, dtype, pattern)
            bias, x = torch.randn(out_features).to(dtype), x_of(tokens, in_features, dtype)
            check(linear(machine, x, weight, bias, tile=tile), x, weight[0], bias)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tile", TILES)
def test_int8_sums_are_exact(machine, tile, pattern):
    features, width = machine.TILES[tile][:2]
    in_features = 128 * 5 + 32
    weight = weight_of(features + 70, in_features, torch.int8, pattern)
    x = x_of(width + 9, in_features, torch.int8)
    assert torch.equal(exactly(machine, x, weight, tile=tile), sums_of(x, weight[0]))


def test_what_compute_sanitizer_looks_at(machine):
    """Every kernel by itself and with two blocks of a cluster; a third of the cases here, by the same program that runs
    all of them on a GPU."""
    found = list(sanitize_wgmma.cases())
    assert sanitize_wgmma.every_tile() == [config(machine, tile) for tile in TILES]

    def kernels(some):
        return {(case.config.tile, case.dtype, case.pattern) for case in some}

    some = found[::3]
    assert len(kernels(found)) == len(TILES) * 3 * 2 and kernels(some) == kernels(found)
    assert {case.extra for case in some} == {"", "rank", "ragged", "again"}
    assert kernels(case for case in found if case.config.sharing == 2) == kernels(found)
    splits = kernels(case for case in found if case.config.splits == 2)
    assert splits == {kernel for kernel in kernels(found) if kernel[0] in SMALL}
    assert all(sanitize_wgmma.run(case, torch.device("cpu")) for case in some)


@pytest.mark.parametrize("tokens", [64 * 9 + 5, 64 * 8])
def test_every_tile_is_computed_once(machine, tokens):
    """More tiles of tokens than run side by side, or as many, several of features, and blocks that take several of them
    each, one, or none."""
    weight, x = weight_of(264, 64, torch.float16, "2:4"), x_of(tokens, 64, torch.float16)
    for sms in (1, 4, 30):
        machine.set_sms(sms)
        for solution in ({}, {"sharing": 2}, {"sharing": 4}, {"tile": 4}, {"tile": 4, "sharing": 2}):
            check(linear(machine, x, weight, **solution), x, weight[0], None)


def test_sizes_together(machine):
    """What is cut where, in all combinations, of the smallest tile."""
    for tokens, out_features, in_features in itertools.product((1, 64, 65), (8, 128, 136), (16, 64, 80)):
        weight = weight_of(out_features, in_features, torch.float16, "2:4")
        x = x_of(tokens, in_features, torch.float16)
        check(linear(machine, x, weight), x, weight[0], None)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_odd_sizes(machine, pattern, dtype):
    """The fewest inputs there may be, and features and tokens that no tile has, by clusters too."""
    in_features = {"dense": 16, "2:4": 32}[pattern] // (1 if dtype == torch.int8 else 2)
    for tile, out_features, tokens, sharing in itertools.product(TILES, (1, 70), (1, 9, 65), (1, 2)):
        weight, x = weight_of(out_features, in_features, dtype, pattern), x_of(tokens, in_features, dtype)
        if dtype == torch.int8:
            assert torch.equal(exactly(machine, x, weight, tile=tile, sharing=sharing), sums_of(x, weight[0]))
        else:
            check(linear(machine, x, weight, tile=tile, sharing=sharing), x, weight[0], None)


# Clusters


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("tile", SMALL)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_splits(machine, dtype, tile, splits, pattern):
    """In eight stages, the last of them cut; rows of y of both kinds."""
    features, width = machine.TILES[tile][:2]
    in_features = 128 * 7 + 32 if dtype == torch.int8 else 64 * 7 + 16
    for out_features, tokens in ((features + 70, 9), (72, width + 3)):
        weight, x = weight_of(out_features, in_features, dtype, pattern), x_of(tokens, in_features, dtype)
        if dtype == torch.int8:
            assert torch.equal(exactly(machine, x, weight, tile=tile, splits=splits), sums_of(x, weight[0]))
        else:
            check(linear(machine, x, weight, tile=tile, splits=splits), x, weight[0], None)


@pytest.mark.parametrize("solution", [{"splits": 4}, {"tile": 1, "splits": 2}, {"sharing": 2}, {"tile": 4}], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_same_bits_in_every_order_of_clusters(machine, dtype, solution):
    weight, x = weight_of(264, 256, dtype, "2:4"), x_of(65, 256, dtype)
    results = []
    for order in (0, -1, 7, 8):
        machine.set_order(order)
        results.append(linear(machine, x, weight, **solution))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sharing", [2, 4])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_sharing(machine, dtype, tile, sharing, pattern):
    """Clusters of which the last has blocks without features, and blocks that take several tiles."""
    features, width = machine.TILES[tile][:2]
    in_features = 128 + 32 if dtype == torch.int8 else 64 + 16
    weight = weight_of(features * (sharing + 1) + 8, in_features, dtype, pattern)
    x = x_of(width + 9, in_features, dtype)
    machine.set_sms(sharing)
    if dtype == torch.int8:
        assert torch.equal(exactly(machine, x, weight, tile=tile, sharing=sharing), sums_of(x, weight[0]))
    else:
        check(linear(machine, x, weight, tile=tile, sharing=sharing), x, weight[0], None)


# Low rank


def check_low_rank(machine, dtype, rank, parts, out_features, tokens, in_features=144, **solution):
    weight = weight_of(out_features, in_features, dtype, "2:4")
    x, bias = x_of(tokens, in_features, dtype), torch.randn(out_features).to(dtype)
    u, t = (torch.randn(out_features, rank) / 4).to(dtype), torch.randn(tokens, parts * rank).to(dtype)
    y = linear(machine, x, weight, bias, t=t, u=u, parts=parts, **solution)
    products = zip(t.double().chunk(parts, 1), u.double().chunk(parts), strict=True)
    exact = x.double() @ weight[0].double().t() + bias.double()
    exact += torch.cat([one @ other.t() for one, other in products], 1)
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("rank", [8, 32, 40, 72])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_low_rank(machine, dtype, tile, rank):
    features, width = machine.TILES[tile][:2]
    check_low_rank(machine, dtype, rank, 1, features + 6, 11, tile=tile)
    check_low_rank(machine, dtype, rank, 1, features + 8, width + 1, tile=tile, sharing=2)
    if tile in SMALL:
        check_low_rank(machine, dtype, rank, 1, features + 6, 11, tile=tile, splits=2)


@pytest.mark.parametrize(
    ("features", "solutions"),
    [
        (128, [*({"tile": tile} for tile in (0, 1, 3, 4)), *({"tile": tile, "splits": 2} for tile in SMALL)]),
        (256, [{"tile": 2}, *({"tile": tile, "sharing": 2} for tile in (0, 1, 3, 4))]),
    ],
    ids=["128", "256"],
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_each_part_has_ranks_of_its_own(machine, dtype, features, solutions):
    """Three layers one under the other: a cluster is of one, whatever lies beside its ranks in t."""
    for solution in solutions:
        check_low_rank(machine, dtype, 48 if solution == solutions[0] else 16, 3, 3 * features, 9, **solution)


# Numbers


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_all_pairs_of_places(machine, dtype):
    """Groups with each pair, with one weight at each place, and with none; negative zeros."""
    patterns = [p for p in range(16) if bin(p).count("1") <= 2]
    groups = torch.tensor([[float(i + 1) if p >> i & 1 else 0.0 for i in range(4)] for p in patterns])
    # 16 groups a row, so that rows are multiples of 64 inputs.
    dense = torch.stack([groups.roll(shift, 0).flatten() for shift in range(66)]).repeat(1, 2)[:, :64]
    dense = torch.where(dense == 0, -0.0, dense).to(dtype) if dtype != torch.int8 else dense.to(dtype)
    weight = (dense, *nm.pack(dense, 2, 4))
    x = torch.where(torch.rand(9, 64) < 0.2, -0.0, x_of(9, 64, dtype).float()).to(dtype)
    if dtype == torch.int8:
        assert torch.equal(exactly(machine, x, weight), sums_of(x, dense))
    else:
        check(linear(machine, x, weight), x, dense, None)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_stays_with_its_token(machine, dtype, pattern):
    weight = weight_of(64, 128, dtype, pattern)
    x = x_of(9, 128, dtype)
    kept = weight[0][0].nonzero().flatten()
    x[3, kept[0]], x[5, kept[1]] = math.nan, math.inf
    for solution in ({}, {"sharing": 2}, {"splits": 2}):
        y = linear(machine, x, weight, **solution)
        assert y[3, 0].isnan() and y[5, 0].isinf()
        finite = [token for token in range(9) if token not in (3, 5)]
        check(y[finite], x[finite], weight[0], None)


# The result


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_epilogue(machine, dtype, activation):
    act = ACTIVATIONS[activation]
    # Rows of y that leave as tiles, and others.
    for out_features, tile in ((72, 0), (70, 2), (136, 1), (72, 4)):
        weight = weight_of(out_features, 144, dtype, "2:4")
        x, bias = x_of(9, 144, dtype), torch.randn(out_features).to(dtype)
        residual = torch.randn(9, out_features).to(dtype)
        for b, r, alpha in ((None, None, 1.0), (bias, None, 0.5), (bias, residual, 1.0), (None, residual, -2.0)):
            exact = alpha * (x.double() @ weight[0].double().t())
            exact = act(exact if b is None else exact + b.double())
            exact = exact if r is None else exact + r.double()
            for splits in (1, 2) if tile in SMALL else (1,):
                y = linear(
                    machine, x, weight, b, tile=tile, splits=splits, activation=activation, alpha=alpha, residual=r
                )
                # One rounding of what is exact but for fp32.
                assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_a_bias_may_be_of_another_type(machine):
    weight, x = weight_of(72, 64, torch.bfloat16, "2:4"), x_of(9, 64, torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        bias = torch.randn(72).to(dtype)
        exact = x.double() @ weight[0].double().t() + bias.double()
        y = linear(machine, x, weight, bias)
        assert (y.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(machine, name):
    """Of exact sums, in fp32."""
    weight, x = weight_of(64, 64, torch.int8, "2:4"), x_of(5, 64, torch.int8)
    scales = {"x_scale": torch.ones(5), "scales": torch.full((64,), 2.0**-12), "dtype": torch.float32}
    plain = sums_of(x, weight[0]) * 2.0**-12
    y = linear(machine, x, weight, activation=name, **scales)
    torch.testing.assert_close(y, ACTIVATIONS[name](plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solution", [{}, {"sharing": 2}, {"splits": 2}, {"tile": 2}, {"tile": 4}], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float32, torch.int8], ids=str)
def test_int8_results(machine, dtype, solution):
    """Two roundings to float, and one to int8 by a scale, to the bit; rows of y that leave as tiles, and others."""
    for out_features in (72, 70):
        weight = weight_of(out_features, 160, torch.int8, "2:4")
        x = x_of(11, 160, torch.int8)
        x_scale, scales, bias = torch.rand(11) / 50, torch.rand(out_features) / 50, torch.randn(out_features)
        out = torch.tensor(0.05)
        more = {"output_scale": out, "y_scale": torch.empty(11)} if dtype == torch.int8 else {"dtype": dtype}
        y = linear(machine, x, weight, bias, x_scale=x_scale, scales=scales, **more, **solution)
        expected = sums_of(x, weight[0]) * x_scale[:, None] * scales + bias
        if dtype == torch.int8:
            expected = (expected * (1 / out)).round().clamp(-127, 127)
            assert torch.equal(more["y_scale"], out.expand(11))
        assert torch.equal(y, expected.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_residual_beside_int8(machine, dtype):
    weight, x = weight_of(72, 160, torch.int8, "2:4"), x_of(11, 160, torch.int8)
    residual = torch.randint(-9, 9, (11, 72)).to(dtype)
    scales = {"x_scale": torch.ones(11), "scales": torch.full((72,), 2.0**-6), "dtype": dtype}
    for splits in (1, 2):
        y = linear(machine, x, weight, residual=residual, activation="relu", splits=splits, **scales)
        assert torch.equal(y, (torch.relu(sums_of(x, weight[0]) * 2.0**-6) + residual.float()).to(dtype))


@pytest.mark.parametrize(
    "solution", [{"tile": 1}, {"splits": 2}, {"tile": 1, "splits": 4}, {"tile": 3}, {"tile": 4}], ids=str
)
def test_int8_again(machine, solution):
    """Scales that are not finite stay so, in every cluster."""
    weight, x = weight_of(70, 512, torch.int8, "2:4"), x_of(17, 512, torch.int8)
    s, scales, bias = torch.rand(17) + 0.1, torch.rand(70) + 0.1, torch.randn(70)
    s[4], s[6] = math.nan, math.inf
    output_scale, y_scale = torch.tensor(37.5), torch.full((17,), -1.0)
    options = {"x_scale": s, "scales": scales, "output_scale": output_scale, "y_scale": y_scale}
    y = linear(machine, x, weight, bias, **options, **solution)
    expected, expected_scale = int8.quantize_rows(sums_of(x, weight[0]) * s[:, None] * scales + bias, output_scale)
    finite = [token for token in range(17) if token not in (4, 6)]
    assert y.dtype == torch.int8 and torch.equal(y[finite], expected[finite])
    assert torch.equal(y_scale[finite], expected_scale[finite]) and y_scale[[4, 6]].isnan().all()


# What the tensors may be


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_rows_of_any_stride(machine, dtype, monkeypatch):
    """Where they begin at multiples of 16 bytes they are read as they lie, else from a copy."""
    weight = weight_of(64, 64, dtype, "2:4")
    wide, sixteen = x_of(9, 208, dtype), 16 // dtype.itemsize
    views = [(wide[:, start : start + 64], start % sixteen == 0) for start in (0, sixteen, 2 * sixteen, 1, 2, 4)]
    views += [
        (x_of(9, 204, dtype)[:, :64], 204 % sixteen == 0),
        (x_of(9, 204, dtype)[:1, :64], True),
        (wide[0, :64].expand(9, 64), False),
        (wide[0].as_strided((9, 64), (sixteen, 1)), False),
        (wide[:9, :9].repeat(64, 1)[:64].t()[:9], False),
    ]
    for x, as_it_is in views:
        assert (wgmma.copyable(x).data_ptr() == x.data_ptr()) is as_it_is
        if dtype == torch.int8:
            assert torch.equal(exactly(machine, x, weight), sums_of(x, weight[0]))
        else:
            check(linear(machine, x, weight), x, weight[0], None)


def test_weights_may_be_views(machine):
    """As those of an ``nn.Linear`` that shares its memory: what lies otherwise than the kernel reads it is copied."""
    dense, x = weight_of(70, 64, torch.float16, "dense")[0], x_of(9, 64, torch.float16)
    storage, spread = torch.zeros(70 * 64 + 3).half(), torch.zeros(70, 72).half()
    storage[3:], spread[:, :64] = dense.flatten(), dense
    bias = torch.randn(140).half()
    for weight in (storage[3:].view(70, 64), spread[:, :64], dense.t().contiguous().t()):
        check(linear(machine, x, (dense, weight, None), bias[::2]), x, dense, bias[::2].contiguous())


def test_nothing_to_compute(machine):
    y = linear(machine, x_of(0, 64, torch.float16), weight_of(64, 64, torch.float16, "2:4"))
    assert y.shape == (0, 64)


# Layouts


@pytest.mark.parametrize("layout", ["neutral", "dense"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nm_through_its_layouts(dtype, layout):
    dense, *neutral = weight_of(70, 80, dtype, "2:4")
    spec = NMSpec(2, 4, 80, 70)
    weight = layouts.get(spec.op, layout).from_neutral(neutral, spec, dtype)
    x, bias = x_of(10, 80, dtype).view(2, 5, 80), torch.randn(70).to(dtype)
    for which in range(3):
        check(run(layout, spec, x, weight, bias, "gelu", which), x, dense, bias, "gelu")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_held_dense_runs_whatever_it_was(dtype):
    dense, x, bias = weight_of(70, 80, dtype, "2:4")[0], x_of(9, 80, dtype), torch.randn(70).to(dtype)
    u, v = torch.zeros(70, 3, dtype=dtype), torch.zeros(3, 80, dtype=dtype)
    values = bitmap.pack(dense)
    for spec, neutral in (
        (DenseSpec(80, 70), [dense]),
        (BitmapSpec(len(values[0]), 80, 70), list(values)),
        (LowRankSparseSpec(3, "nm", 2, 4, 0, 80, 70), [u, v, *nm.pack(dense, 2, 4)]),
    ):
        weight = layouts.get(spec.op, "dense").from_neutral(neutral, spec, dtype)
        check(run("dense", spec, x, weight, bias, "relu"), x, dense, bias, "relu")
    factors = [torch.randn(70, 8).to(dtype), torch.randn(8, 80).to(dtype)]
    spec = LowRankSpec(8, 80, 70)
    weight = layouts.get(spec.op, "dense").from_neutral(factors, spec, dtype)
    check(run("dense", spec, x, weight, bias), x, weight[0], bias)
    check(run("neutral", DenseSpec(80, 70), x, [dense], bias, "gelu"), x, dense, bias, "gelu")


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(("m", "layout"), [(1, "neutral"), (4, "neutral"), (4, "unpacked")])
def test_int8_through_its_layouts(m, layout, activations):
    dense, *packed = weight_of(70, 160, torch.int8, "2:4" if m == 4 else "dense")
    spec = Int8Spec(activations, 2 if m == 4 else 1, m, 160, 70)
    neutral = [*filter(torch.is_tensor, packed), torch.rand(70) / 50 + 0.01]
    neutral += [torch.tensor(0.03)] if activations == "static" else []
    weight = layouts.get(spec.op, layout).from_neutral(neutral, spec, torch.float16)
    x, bias = torch.randn(3, 3, 160).half(), torch.randn(70).half()
    y = run(layout, spec, x, weight, bias)
    (reference,) = (c for c in select.candidates(spec.op, layout) if c.backend == "reference")
    problem = select.Problem(layout, H200, torch.float16, spec, 9, "none")
    # Equal sums; scales and bias in two roundings or one.
    torch.testing.assert_close(y, reference.run(x, weight, bias, problem), rtol=2**-10, atol=2**-12)


@pytest.mark.parametrize(("m", "layout"), [(1, "neutral"), (4, "neutral"), (4, "unpacked")])
def test_int8_in_and_out_through_its_layouts(m, layout):
    """As the op on int8 rows calls it, by powers of two: the integers and scales of the reference."""
    _, *packed = weight_of(70, 160, torch.int8, "2:4" if m == 4 else "dense")
    spec = Int8Spec("dynamic", 2 if m == 4 else 1, m, 160, 70)
    weight = layouts.get(spec.op, layout).from_neutral(
        [*filter(torch.is_tensor, packed), torch.ones(70).double()], spec, torch.float32
    )
    cuda = cuda_of(spec.op, layout)
    (reference,) = (c for c in select.candidates(spec.op, layout) if c.backend == "reference")
    q, s, step, bias = x_of(9, 160, torch.int8), torch.ones(9), torch.tensor(64.0), torch.ones(70).double()
    problem = select.Problem(layout, H200, torch.float32, spec, 9, "none")
    for configuration in cuda.configurations(problem)[:3]:
        y, scales = cuda.run.again(q, s, weight, bias, step, problem, configuration=configuration)
        expected, expected_scales = reference.run.again(q, s, weight, bias, step, problem)
        assert y.dtype == torch.int8 and torch.equal(y, expected) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize(("parts", "out_features"), [(1, 70), (3, 384)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_low_rank_through_its_layout(dtype, parts, out_features):
    dense, *packed = weight_of(out_features, 80, dtype, "2:4")
    rank = 8 if parts == 1 else 16
    u, v = (torch.randn(out_features, rank) / 4).to(dtype), (torch.randn(parts * rank, 80) / 4).to(dtype)
    spec = LowRankSparseSpec(rank, "nm", 2, 4, 0, 80, out_features, parts)
    x, bias = x_of(9, 80, dtype), torch.randn(out_features).to(dtype)
    (reference,) = (c for c in select.candidates(spec.op, "neutral") if c.backend == "reference")
    problem = select.Problem("neutral", H200, dtype, spec, 9, "relu")
    theirs = reference.run(x, [u, v, *packed], bias, problem).double()
    product = torch.cat(
        [one @ other for one, other in zip(u.double().chunk(parts), v.double().chunk(parts), strict=True)]
    )
    exact = torch.relu(x.double() @ (dense.double() + product).t() + bias.double())
    unit = torch.finfo(dtype).eps * exact.abs().max()
    for which in range(2):
        y = run("neutral", spec, x, [u, v, *packed], bias, "relu", which)
        assert (y.double() - exact).abs().max() <= 2 * (theirs - exact).abs().max() + unit


@pytest.mark.parametrize(("parts", "out_features"), [(1, 70), (3, 384)])
def test_padded_factors_are_those_that_are_not(parts, out_features):
    """The padded layout of a rank that no row of 16 bytes begins with."""
    _, *packed = weight_of(out_features, 80, torch.float16, "2:4")
    u, v = torch.randn(out_features, 19).half() / 4, torch.randn(parts * 19, 80).half() / 4
    spec = LowRankSparseSpec(19, "nm", 2, 4, 0, 80, out_features, parts)
    problem = select.Problem("neutral", H200, torch.float16, spec, 9, "none")
    assert wgmma.refusal(problem) == f"needs a rank in multiples of {8 if parts == 1 else 16}, not 19"
    weight = layouts.get(spec.op, PADDED).from_neutral([u, v, *packed], spec, torch.float16)
    x = x_of(9, 80, torch.float16)
    (reference,) = (c for c in select.candidates(spec.op, PADDED) if c.backend == "reference")
    expected = reference.run(x, weight, None, problem._replace(layout=PADDED))
    y = run(PADDED, spec, x, weight, None, "none", 0)
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=2**-4)


# The choice


def test_what_is_estimated():
    """At many tokens 2:4 is worth something, by sizes alone; and it is said to be an estimate."""
    problem = select.Problem("neutral", H200, torch.float16, NMSpec(2, 4, 768, 3072), 16384, "none")
    ratio = wgmma.estimated_ratio(problem)
    assert 0.4 < ratio < 1 and f"yet: estimated at {ratio:.2f} of the dense kernel's time" in wgmma.waits(problem)


# Modules


@pytest.fixture
def cpu_is_served(monkeypatch):
    """The kernel's backend takes CPU tensors, as the machine does."""
    monkeypatch.setattr(extension, "refusal", lambda device: None)


@pytest.mark.parametrize(
    "packed",
    [
        sb.NMConfig(2, 4),
        sb.NMConfig(2, 4, columns=0.5),
        sb.Int8Config("dynamic"),
        sb.Int8Config("dynamic", sb.NMConfig(2, 4)),
        sb.LowRankSparseConfig(rank=8, sparse=sb.NMConfig(2, 4)),
        sb.DenseConfig(),
    ],
    ids=str,
)
def test_a_model_runs_on_the_kernel_alone(cpu_is_served, packed):
    """Held as on disk: the numbers of the reference."""
    model = tiny_models.tiny_model().half().eval()
    sb.compress_(model, packed, layout="neutral")
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert layers and all(layer.layout == "neutral" for layer in layers)
    with torch.no_grad():
        with sb.backend("reference"):
            expected = tiny_models.outputs(model)
        with sb.backend("cuda"):
            y = tiny_models.outputs(model)
    # Another order of sums, through two layers with their norms.
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    assert not torch.equal(y, torch.zeros_like(y))


def test_an_activation_of_an_nn_linear_is_fused(cpu_is_served):
    """As the fused encoder calls the op, on a weight that is nobody's buffer."""
    layer, x = nn.Linear(80, 70).half(), x_of(9, 80, torch.float16)
    with torch.no_grad(), sb.backend("cuda"):
        sizes = {"in_features": 80, "out_features": 70}
        y = dense_linear(x, [layer.weight], layer.bias, layout="neutral", activation="gelu", **sizes)
    check(y, x, layer.weight.detach(), layer.bias.detach(), "gelu")


def test_columns_are_gathered_before(cpu_is_served):
    """The kernel copies whole tiles of x."""
    columns = torch.arange(3, 83, dtype=torch.int32)
    dense, *weight = weight_of(70, 80, torch.float16, "2:4")
    x = x_of(9, 100, torch.float16)
    problem = select.Problem("neutral", H200, torch.float16, NMSpec(2, 4, 80, 70), 9, "none")
    solution = select.solutions(cuda_of("nm_linear", "neutral"), problem)[0]
    assert not solution.candidate.gathers
    check(solution.run(x, weight, None, problem, columns), x[:, 3:83].contiguous(), dense, None)


def test_opcheck(cpu_is_served):
    _, *weight = weight_of(70, 80, torch.float16, "2:4")
    arguments = (x_of(5, 80, torch.float16), weight, torch.randn(70).half())
    # Its copies of the arguments begin poisoned as well.
    torch.use_deterministic_algorithms(False)
    with sb.backend("cuda"):
        sizes = NMSpec(2, 4, 80, 70)._asdict()
        torch.library.opcheck(torch.ops.sparsebert.nm_linear.default, arguments, {"layout": "neutral", **sizes})


def test_explain_names_tile_and_cluster(cpu_is_served):
    model = nn.Sequential(nn.Linear(768, 3072)).half()
    sb.compress_(model, {"0": sb.NMConfig(2, 4)}, layout="neutral")
    with sb.backend("cuda"):
        (layer,) = sb.explain(model).layers
    start = "cuda (CUDA: 2:4 on Hopper's sparse tensor cores by wgmma.sp, as it lies on disk; tile "
    assert layer.kernel.startswith(start) and layer.kernel.endswith(": estimated)")
    (layer,) = sb.explain(model).layers
    assert any(reason.startswith("cuda: not measured here, and no GPU has run it yet") for reason in layer.refused)


# As nvcc compiles it


@pytest.mark.slow
@pytest.mark.skipif(find_cuobjdump() is None, reason="cuobjdump is not installed")
def test_what_nvcc_makes_of_it(tmp_path):
    """No spills, no waits that ptxas put in, and in each of two copies of the loop the products of one stage."""
    made, log = compile_for_hopper(FOLDER / "wgmma_probe.cu", tmp_path)
    assert re.findall(r"\(C\d+\).*", log) == []
    kernels = read_log(log)
    assert len(kernels) == 3 and [fault for kernel in kernels for fault in kernel.faults()] == []
    code = sass(made, "90a")
    moves = ["UTMALDG.2D", "UTMASTG.2D", "STSM.16.MT88.4", "USETMAXREG.TRY_ALLOC.CTAPOOL"]
    products = {
        r"Element\)1, \(sparsebert::wgmma::Pattern\)0": ("HGMMA.64x256x16.F32.BF16", 2 * 4, 3),
        r"Element\)1, \(sparsebert::wgmma::Pattern\)1": ("HGMMA.SP.64x256x32.F32.BF16", 2 * 2, 4),
        r"Element\)2, \(sparsebert::wgmma::Pattern\)1": ("IGMMA.SP.64x128x64.S8.S8", 2 * 2 * 2, 3),
    }
    for kernel, (opcode, count, waits) in products.items():
        assert expect(kernel, "90a", [opcode, *moves], ["LDL", "STL"]).faults(code) == []
        found = [line for name, lines in code.items() if re.search(kernel, name) for line in lines]
        assert sum(opcode in line for line in found) == count, kernel
        # One wait a stage, of low rank too, that leaves the products of that stage running, and one for the end.
        assert sum("WARPGROUP.DEPBAR" in line for line in found) == waits, kernel
