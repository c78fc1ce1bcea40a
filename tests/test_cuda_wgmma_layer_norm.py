"""The kernel of ``csrc/wgmma/layer_norm.cuh``, its source as it is, run on the CPU by ``tests/simt``; and as nvcc
compiles it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

import sanitize_wgmma
import simt_build
from cuda_build import compile_for_hopper, expect, find_cuobjdump, read_log, sass
from sparsebert.formats import int8, nm
from sparsebert.ops import add_layer_norm, layouts, quantize_rows, select
from sparsebert.ops import int8 as int8_op
from sparsebert.ops.cuda import calls, extension
from sparsebert.ops.cuda.calls import Place
from sparsebert.ops.cuda.wgmma_layer_norm import MOST, MULTIPLE, linear_add_layer_norm
from sparsebert.ops.linear_layer_norm import Call, problem_of, run_apart
from sparsebert.ops.specs import DenseSpec, Int8Spec, LowRankSparseSpec, NMSpec

FLOATS = [torch.float16, torch.bfloat16]
PATTERNS = ["dense", "2:4"]
# Of BERT's families, with the counts of tokens that each is run with: a tile has 64.
FEATURES = {384: (1, 63, 64, 65, 130), 512: (1, 65), 768: (64, 130), 1024: (63, 65)}
EPS = 1e-12
FOLDER, CSRC = simt_build.ROOT / "tests" / "simt", simt_build.ROOT / "csrc" / "wgmma"
HOST = ("layer_norm_bind", "layer_norm_check", "check", "choose")
SOURCES = [FOLDER / "wgmma_layer_norm.cpp", *(CSRC / f"{name}.cpp" for name in HOST)]


@pytest.fixture(scope="module")
def machine():
    return simt_build.build("wgmma_layer_norm", SOURCES)


@pytest.fixture(autouse=True)
def on_the_cpu(machine, monkeypatch):
    """What launches on a GPU runs here instead, and what torch allocates begins as NaN, or as the largest integer."""
    monkeypatch.setattr(extension, "load", lambda: machine)
    monkeypatch.setattr(calls, "place_of", lambda x: Place(0, 0, False))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    machine.set_order(0)
    machine.set_sms(8)


class Problem:
    """A call's tensors; of int8 with scales that make numbers of about 1, and y in ``dtype``."""

    def __init__(self, tokens, out_features, dtype, pattern="dense", in_features=None, y_dtype=None):
        integer = dtype == torch.int8
        # Two stages of the loop, the second of them cut.
        in_features = in_features or (160 if integer else 80)
        self.dtype = y_dtype or (torch.float16 if integer else dtype)
        weight, x = torch.randn(out_features, in_features), torch.randn(tokens, in_features)
        weight = nm.project(weight, 2, 4) if pattern == "2:4" else weight
        if integer:
            self.dense, self.x = ((40 * one).round().clamp(-127, 127).to(torch.int8) for one in (weight, x))
            self.x_scale, self.scales = torch.rand(tokens) / 40 + 0.01, torch.rand(out_features) / 400 + 0.001
        else:
            self.dense, self.x = (weight / in_features**0.5).to(dtype), x.to(dtype)
            self.x_scale = self.scales = None
        self.packed = nm.pack(self.dense, 2, 4) if pattern == "2:4" else (self.dense, None)
        self.bias, self.residual = torch.randn(out_features).to(self.dtype), torch.randn(tokens, out_features)
        self.residual = self.residual.to(self.dtype)
        self.gamma, self.beta = (1 + torch.randn(out_features) / 4).to(self.dtype), torch.randn(out_features)

    def run(self, **options):
        scales = {"x_scale": self.x_scale, "scales": self.scales, "dtype": self.dtype}
        parameters = (self.bias, self.residual, self.gamma, self.beta)
        return linear_add_layer_norm(self.x, *self.packed, *parameters, EPS, **scales, **options)

    def product(self):
        """The linear's result in float64."""
        y = F.linear(self.x.double(), self.dense.double())
        if self.x_scale is not None:
            y = y * self.x_scale.double()[:, None] * self.scales.double()
        return y if self.bias is None else y + self.bias.double()

    def exact(self):
        z = self.product()
        z = z if self.residual is None else z + self.residual.double()
        return F.layer_norm(z, z.shape[-1:], self.gamma.double(), self.beta.double(), EPS)

    def unfused(self):
        """One op after the other, each of which rounds its result."""
        if self.x_scale is None:
            y = F.linear(self.x, self.dense, None if self.bias is None else self.bias.to(self.dtype))
        else:
            y = self.product().to(self.dtype)
        return add_layer_norm(y, self.residual, self.gamma, self.beta, EPS)

    def check(self, y, rows: Sequence[int] | slice = slice(None)):
        """At most twice the error of the ops that it stands for."""
        exact = self.exact()[rows]
        assert y.dtype == self.dtype and y.shape == self.residual.shape and y.is_contiguous()
        error = (self.unfused()[rows].double() - exact).abs().max()
        assert (y[rows].double() - exact).abs().max() <= 2 * error


def check_rows(y, q, scale, input_scale=None):
    """Those of y as it was written, to the bit; of a row that is not finite only that its scale shows it."""
    rows, scales = int8.quantize_rows(y, input_scale)
    finite = scales.isfinite()
    torch.testing.assert_close(scale, scales, rtol=0, atol=0, equal_nan=True)
    assert q.dtype == torch.int8 and torch.equal(q[finite], rows[finite])


# Every kernel there is


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_numbers(machine, dtype, pattern, features):
    """Quantized by its own scales, by a given one, and not at all. Multiprocessors are left over."""
    kinds = ({"quantize": True}, {"quantize": True, "input_scale": torch.tensor(0.02)}, {})
    for i, tokens in enumerate(FEATURES[features]):
        problem = Problem(tokens, features, dtype, pattern, y_dtype=FLOATS[i % 2] if dtype == torch.int8 else None)
        machine.set_sms((7, 17, 1)[i % 3])
        kind = kinds[i % 3]
        y, q, s = problem.run(**kind)
        problem.check(y)
        if kind:
            check_rows(y, q, s, kind.get("input_scale"))
        else:
            assert q is None and s is None
        if i == 0:
            assert torch.equal(problem.run()[0], y)


def test_what_compute_sanitizer_looks_at():
    """The same program that runs on a GPU: every kernel, with every kind of rows."""
    found = list(sanitize_wgmma.norm_cases())
    assert len({(case.dtype, case.pattern, case.quantized) for case in found}) == 3 * 2 * 3
    some = [case for case in found if case.features == 384]
    assert [str(case) for case in some if not sanitize_wgmma.run_norm(case, torch.device("cpu"))] == []


@pytest.mark.parametrize("features", [128, 256, 640, 896])
def test_other_clusters(machine, features):
    """Of 1, 2, 5 and 7 blocks; these load tokens together where they can divide them."""
    machine.set_sms(features // MULTIPLE)
    problem = Problem(65, features, torch.float16, "2:4")
    y, q, s = problem.run(quantize=True)
    problem.check(y)
    check_rows(y, q, s)


@pytest.mark.parametrize("quantize", [False, True])
def test_every_order_gives_the_same_bits(machine, quantize):
    """Of clusters, however many run at once: few take several tiles each, with more stages than there is room for."""
    problem = Problem(64 * 5 + 3, 384, torch.bfloat16, in_features=64 * 3)
    results = []
    for sms, order in ((3, 0), (7, -1), (11, 7), (100, 3)):
        machine.set_sms(sms)
        machine.set_order(order)
        results.append(problem.run(quantize=quantize))
    problem.check(results[0][0])
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True) if pair[0] is not None)


# What is added


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_without_bias_or_residual(dtype):
    problem = Problem(130, 384, dtype)
    problem.bias = None
    problem.check(problem.run()[0])
    without = Problem(130, 384, dtype)
    residual, without.residual = without.residual, None
    y = without.run(quantize=True)[0]
    exact = without.exact()
    assert y.shape == residual.shape
    assert (y.double() - exact).abs().max() <= torch.finfo(y.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sum_is_not_rounded_in_between(dtype):
    """What the residual and the product have in common is no number of 16 bits; and one that is large cancels."""
    large = 2.0 / torch.finfo(dtype).eps
    x, weight = torch.ones(70, 16).to(dtype), torch.zeros(384, 16).to(dtype)
    weight[::2, 0] = 1
    residual = torch.full((70, 384), large).to(dtype)
    ones, zeros = torch.ones(384), torch.zeros(384)
    y, _, _ = linear_add_layer_norm(x, weight, None, None, residual, ones, zeros, EPS)
    assert torch.equal(y, torch.tensor([1.0, -1.0]).to(dtype).repeat(70, 192))


@pytest.mark.parametrize("mean", [1000.0, -30000.0])
def test_a_large_mean_does_not_cancel(mean):
    """As near as fp32 has the numbers that are normalized: E[z²] - E[z]² would have no digit left."""
    problem = Problem(65, 768, torch.bfloat16)
    problem.bias, problem.gamma = mean + torch.randn(768), torch.ones(768)
    y, exact = problem.run()[0], problem.exact()
    rounding = torch.finfo(torch.bfloat16).eps / 2 * exact.abs()
    deviation = problem.product().std(-1, keepdim=True)
    assert ((y.double() - exact).abs() <= rounding + 8 * torch.finfo(torch.float32).eps * abs(mean) / deviation).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_factors(dtype):
    problem = Problem(65, 384, dtype, "2:4")
    t, u = torch.randn(65, 40).to(dtype), (torch.randn(384, 40) / 4).to(dtype)
    y, _, _ = problem.run(t=t, u=u, alpha=0.5)
    z = 0.5 * (problem.x.double() @ problem.dense.double().t() + t.double() @ u.double().t())
    z += problem.bias.double() + problem.residual.double()
    exact = F.layer_norm(z, z.shape[-1:], problem.gamma.double(), problem.beta.double(), EPS)
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float32, torch.float64], ids=str)
def test_parameters_may_have_another_type(dtype):
    problem = Problem(5, 128, torch.bfloat16)
    problem.gamma, problem.beta, problem.bias = problem.gamma.to(dtype), problem.beta.to(dtype), None
    problem.check(problem.run()[0])


def test_tensors_may_be_views():
    problem = Problem(9, 256, torch.float16, "2:4", in_features=96)
    expected = problem.run(quantize=True)
    rows, spread = torch.full((9, 112), torch.nan).half(), torch.empty(256, 9).half().t()
    rows[:, :96], spread[:] = problem.x, problem.residual
    problem.x, problem.residual, problem.gamma = rows[:, :96], spread, problem.gamma.repeat_interleave(2)[::2]
    assert all(torch.equal(*pair) for pair in zip(problem.run(quantize=True), expected, strict=True))


def test_nothing_to_normalize():
    y, q, s = Problem(0, 384, torch.float16).run(quantize=True)
    assert y.shape == q.shape == (0, 384) and s.shape == (0,)


# What is not finite


@pytest.mark.parametrize("input_scale", [None, torch.tensor(0.02)], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_what_is_not_finite_stays_with_its_row(machine, dtype, input_scale):
    """In x or in its scale, and in the residual, where other blocks of the cluster have other features."""
    machine.set_sms(3)
    problem = Problem(70, 384, dtype)
    wrong = [3, 5, 9, 66]
    (problem.x if problem.x_scale is None else problem.x_scale[:, None])[[3, 5], 0] = torch.tensor(
        [math.nan, math.inf], dtype=problem.dtype
    ).to(dtype if problem.x_scale is None else torch.float32)
    problem.residual[9, 380], problem.residual[66, 7] = -math.inf, math.nan
    y, q, s = problem.run(quantize=True, input_scale=input_scale)
    check_rows(y, q, s, input_scale)
    assert y[wrong].isnan().all() and not s[wrong].isfinite().any()
    problem.check(y, [row for row in range(70) if row not in wrong])


@pytest.mark.parametrize("input_scale", [None, torch.tensor(0.02)], ids=["dynamic", "static"])
def test_what_overflows_shows_in_the_scale(input_scale):
    """One feature that 16 bits do not hold: y is infinite there alone, and every block knows of it."""
    problem = Problem(65, 512, torch.float16)
    problem.gamma = problem.gamma.float()
    problem.gamma[300] = 1e9
    y, q, s = problem.run(quantize=True, input_scale=input_scale)
    assert y[:, 300].isinf().all() and y[:, :300].isfinite().all() and y[:, 301:].isfinite().all()
    check_rows(y, q, s, input_scale)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_equal_numbers(dtype):
    """Their mean is exact, however many blocks have them, and they are beta: which may be tiny, or zero."""
    problem = Problem(50, 768, dtype)
    problem.x, problem.bias = torch.zeros_like(problem.x), None
    problem.residual = problem.residual[:, :1].expand(50, 768)
    for beta in (0.0, 2.0**-130, 2.0**-118, 1.0):
        problem.beta = torch.full((768,), beta)
        y, q, s = problem.run(quantize=True)
        assert torch.equal(y, problem.beta.to(dtype).expand(50, 768))
        check_rows(y, q, s)


# As the op calls it


# A weight in each layout that the kernel reads; a second stage that is cut.
HELD = [
    ("nm_linear", "neutral", NMSpec(2, 4, 80, 384)),
    ("nm_linear", "dense", NMSpec(2, 4, 80, 384)),
    ("dense_linear", "neutral", DenseSpec(72, 384)),
    ("low_rank_sparse_linear", "neutral", LowRankSparseSpec(8, "nm", 2, 4, 0, 80, 384)),
    ("low_rank_sparse_linear", "padded", LowRankSparseSpec(5, "nm", 2, 4, 0, 80, 384)),
    ("int8_linear", "neutral", Int8Spec("dynamic", 1, 1, 144, 384)),
    ("int8_linear", "neutral", Int8Spec("static", 2, 4, 160, 384)),
    ("int8_linear", "unpacked", Int8Spec("dynamic", 2, 4, 160, 384)),
]


def neutral_of(spec):
    """The neutral tensors of some weight, in fp16 where it is not int8."""
    dense = torch.randn(spec.out_features, spec.in_features) / spec.in_features**0.5
    dense = nm.project(dense, 2, 4) if getattr(spec, "m", 1) == 4 else dense
    if isinstance(spec, Int8Spec):
        values, scales = int8.quantize_weight(dense)
        found = [*int8_op.pack(values, spec), scales]
        return [*found, torch.tensor(0.02)] if spec.activations == "static" else found
    if isinstance(spec, DenseSpec):
        return [dense.half()]
    factors = []
    if isinstance(spec, LowRankSparseSpec):
        factors = [torch.randn(spec.out_features, spec.rank) / 4, torch.randn(spec.rank, spec.in_features) / 9]
    return [one.half() for one in factors] + list(nm.pack(dense.half(), 2, 4))


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("op", "layout", "spec"), HELD, ids=lambda one: one if isinstance(one, str) else one.label)
def test_every_layout_by_the_candidate_of_the_op(op, layout, spec, quantize):
    """At most twice the error of the two ops that it stands for, which round in between."""
    weight = layouts.get(op, layout).from_neutral(neutral_of(spec), spec, torch.float16)
    x = torch.randn(70, spec.in_features).half()
    given = quantize_rows(x, torch.tensor(0.02)) if isinstance(spec, Int8Spec) else (x, None)
    bias, residual = torch.randn(384).half(), torch.randn(70, 384).half()
    scale = torch.tensor(0.03) if quantize else None
    call = Call(*given, weight, bias, residual, torch.randn(384), torch.randn(384).half(), EPS, scale)
    problem = problem_of(spec, layout, residual, quantize=quantize)
    (candidate,) = (c for c in select.candidates(problem.op, layout) if c.backend == "cuda")
    y, q, s = candidate.run(call, problem)
    with select.backend("reference"):
        exact = run_apart(
            call._replace(
                x=call.x if call.x_scale is not None else call.x.double(),
                weight=[one.double() if one.dtype == torch.float16 else one for one in weight],
                bias=bias.double(),
                residual=residual.double(),
            ),
            problem._replace(dtype=torch.float64),
        )[0]
        theirs = run_apart(call, problem)[0]
    assert y.dtype == torch.float16 and y.shape == residual.shape
    assert (y.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max()
    if quantize:
        check_rows(y, q, s, scale)
    else:
        assert q is s is None


# What is refused

HALF, BFLOAT16, INT8 = range(3)
# No one looks there.
NAMES = ("x", "values", "positions", "t", "u", "y", "x_scale", "scale", "gamma", "beta")
AT = {name: (i + 1) << 20 for i, name in enumerate(NAMES)}


def call(machine, **changes):
    """A call at 2:4 with ``changes``; ``shift``: by which addresses are off."""
    arguments = {
        **{"element": HALF, "pattern": 1, "tokens": 100, "in_features": 768, "out_features": 768, "x_stride": 768},
        **{"y_number": changes.get("element", HALF), "gamma_number": 2, "beta_number": 2, "eps": EPS},
        **{name: AT[name] for name in ("x", "values", "positions", "y", "gamma", "beta")},
        **{"device": 0, "stream": 0},
    }
    shift = changes.pop("shift", {})
    arguments |= changes
    for name, by in shift.items():
        arguments[name] = arguments.get(name, 1 << 30) + by
    machine.wgmma_layer_norm(**arguments)


INTEGER = {"element": INT8, "x_scale": AT["x_scale"], "scale": AT["scale"], "y_number": 0}
LOW_RANK = {"rank": 32, "t": AT["t"], "u": AT["u"]}
ROWS = {"q": 1 << 24, "q_scale": 1 << 25}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"element": 3}, "element is 3, expected 0 to 2"),
        ({"pattern": 2}, "pattern is 2, expected 0 to 1"),
        ({"tokens": 0}, "tokens is 0, expected 1 to 1073741824"),
        ({"in_features": 776}, "in_features is 776, expected a multiple of 16"),
        (INTEGER | {"in_features": 784}, "in_features is 784, expected a multiple of 32"),
        ({"out_features": 0}, "out_features is 0, expected 1 to 1024"),
        ({"out_features": 1152}, "out_features is 1152, expected 1 to 1024"),
        ({"out_features": 192}, "out_features is 192, expected a multiple of 128"),
        (INTEGER | LOW_RANK, "rank is 32, expected 0"),
        (LOW_RANK | {"rank": 36}, "rank is 36, expected a multiple of 8"),
        ({"y_number": 1}, "y_number is 1, expected 0"),
        (INTEGER | {"y_number": 2}, "y_number is 2, expected 0 to 1"),
        ({"bias_number": 3}, "bias_number is 3, expected 0 to 2"),
        ({"gamma_number": 3}, "gamma_number is 3, expected 0 to 2"),
        ({"beta_number": 3}, "beta_number is 3, expected 0 to 2"),
        ({"eps": -1.0}, "eps is -1.000000, expected a number of at least 0"),
        ({"eps": math.nan}, "eps is nan, expected a number of at least 0"),
        ({"pattern": 0}, "positions are given, expected none of a dense weight"),
        ({"input_scale": 4}, "input_scale is given, expected none where there is no q"),
        ({"x": 0}, "x is missing, expected a tensor on the device"),
        ({"shift": {"x": 8}}, "x begins 8 bytes past a multiple of 16, expected that multiple"),
        ({"x_stride": 760}, "stride of x is 760, expected 768 to 549755813887"),
        ({"x_stride": 772}, "stride of x in bytes is 1544, expected a multiple of 16"),
        ({"values": 0}, "values is missing, expected a tensor on the device"),
        ({"positions": 0}, "positions is missing, expected a tensor on the device"),
        (LOW_RANK | {"t": 0}, "t is missing, expected a tensor on the device"),
        (LOW_RANK | {"shift": {"u": 8}}, "u begins 8 bytes past a multiple of 16, expected that multiple"),
        ({"shift": {"bias": 2}}, "bias begins 2 bytes past a multiple of 4, expected that multiple"),
        ({"shift": {"residual": 8}}, "residual begins 8 bytes past a multiple of 16, expected that multiple"),
        (INTEGER | {"x_scale": 0}, "x_scale is missing, expected a tensor on the device"),
        (INTEGER | {"scale": 0}, "scale is missing, expected a tensor on the device"),
        ({"gamma": 0}, "gamma is missing, expected a tensor on the device"),
        ({"beta": 2}, "beta begins 2 bytes past a multiple of 4, expected that multiple"),
        ({"y": 8}, "y begins 8 bytes past a multiple of 16, expected that multiple"),
        (ROWS | {"q": 8}, "q begins 8 bytes past a multiple of 16, expected that multiple"),
        (ROWS | {"q_scale": 0}, "q_scale is missing, expected a tensor on the device"),
        (ROWS | {"input_scale": 2}, "input_scale begins 2 bytes past a multiple of 4, expected that multiple"),
    ],
    ids=str,
)
def test_a_call_that_does_not_fit(machine, changes, text):
    with pytest.raises(ValueError) as caught:
        call(machine, **changes)
    assert str(caught.value) == f"wgmma_layer_norm: {text}"


def test_what_the_caller_says_of_features(machine):
    with pytest.raises(ValueError, match=f"expected a multiple of {MULTIPLE}$"):
        Problem(5, MULTIPLE + 64, torch.float16).run()
    with pytest.raises(ValueError, match=f"expected 1 to {MOST}$"):
        Problem(5, MOST + MULTIPLE, torch.float16).run()


# As nvcc compiles it


@pytest.mark.slow
@pytest.mark.skipif(find_cuobjdump() is None, reason="cuobjdump is not installed")
def test_what_nvcc_makes_of_it(tmp_path):
    """No spills, no waits that ptxas put in, and in each of two copies of the loop the products of one stage."""
    made, log = compile_for_hopper(FOLDER / "wgmma_layer_norm_probe.cu", tmp_path)
    assert re.findall(r"\(C\d+\).*", log) == []
    kernels = read_log(log)
    assert len(kernels) == 3 and [fault for kernel in kernels for fault in kernel.faults()] == []
    code = sass(made, "90a")
    # Copies of tiles, also to several blocks; y and the residual transposed on their way; what blocks tell each other.
    moves = ["UTMALDG.2D.MULTICAST", "UTMASTG.2D", "STSM.16.MT88.4", "LDSM.16.MT88.4", "USETMAXREG.TRY_ALLOC.CTAPOOL"]
    exchange = ["SHFL.BFLY", "ST.E.128", "SYNCS.ARRIVE.TRANS64.RED", "SYNCS.PHASECHK.TRANS64.TRYWAIT"]
    products = {
        r"Element\)0, \(sparsebert::wgmma::Pattern\)0": ("HGMMA.64x64x16.F32", 2 * 4),
        r"Element\)1, \(sparsebert::wgmma::Pattern\)1": ("HGMMA.SP.64x64x32.F32.BF16", 2 * 2),
        r"Element\)2, \(sparsebert::wgmma::Pattern\)1": ("IGMMA.SP.64x64x64.S8.S8", 2 * 2),
    }
    for kernel, (product, count) in products.items():
        assert expect(kernel, "90a", [product, *moves, *exchange], ["LDL", "STL"]).faults(code) == []
        found = [line for name, lines in code.items() if re.search(kernel, name) for line in lines]
        assert sum(product in line for line in found) == count, kernel
