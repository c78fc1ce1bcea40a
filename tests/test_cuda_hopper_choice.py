"""Where the wgmma kernel runs, and that it waits for a measurement: by a module that only answers, on no GPU."""

from __future__ import annotations

from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert import tuning
from sparsebert.nn import PackedLinear
from sparsebert.ops import devices, linear_layer_norm, measurements, select
from sparsebert.ops.cuda import extension, wgmma
from sparsebert.ops.cuda.wgmma import Config
from sparsebert.ops.devices import Device
from sparsebert.ops.specs import (
    AddLayerNormSpec,
    BitmapSpec,
    DenseSpec,
    Int8Spec,
    LowRankSparseSpec,
    LowRankSpec,
    NMSpec,
)

H200 = Device("cuda", "NVIDIA H200", (9, 0), 132, 227 << 10)
NM = NMSpec(2, 4, 768, 3072)
BASE = select.Problem("neutral", H200, torch.float16, NM, 32, "none")
CONFIGS = (Config(0, 128, 64, 1, 4), Config(1, 128, 128, 2, 1))
WAITS = "not measured here, and no GPU has run it yet (sb.tune measures it)"
ESTIMATED = (
    "not measured here, and no GPU has run it yet: estimated at 0.71 of the dense kernel's time (sb.tune measures it)"
)
FACTORS = LowRankSparseSpec(32, "nm", 2, 4, 0, 768, 3072)
INT8, INT8_24 = Int8Spec("dynamic", 1, 1, 768, 3072), Int8Spec("static", 2, 4, 768, 3072)


class Fake(ModuleType):
    """``sparsebert._C`` whose clocks are ``clocks(pattern, tokens)``; ``asked`` are the sizes it was asked about."""

    def __init__(self) -> None:
        super().__init__("fake")
        self.archs = ("80", "90a", "120")
        self.asked: list[dict[str, int]] = []
        self.clocks = lambda pattern, tokens: 710.0 if pattern else 1000.0
        self.wgmma_linear = None

    def build_info(self):
        return {"archs": self.archs}

    def wgmma_solutions(self, *, element, pattern, tokens, in_features, out_features, rank, parts, sms):
        self.asked.append({name: value for name, value in locals().items() if name != "self"})
        clocks = self.clocks(pattern, tokens)
        return [(*config, clocks + i) for i, config in enumerate(CONFIGS)]


@pytest.fixture(autouse=True)
def c(monkeypatch, tmp_path):
    found = Fake()
    monkeypatch.setenv(measurements.ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(extension, "load", lambda: found)
    monkeypatch.setattr(extension, "missing", lambda: None)
    for cache in (extension._not_compiled_for, wgmma._of_sizes, select._choose, select._fused):
        cache.cache_clear()
    yield found
    for cache in (extension._not_compiled_for, wgmma._of_sizes, select._choose, select._fused):
        cache.cache_clear()


def cuda(problem):
    (found,) = (candidate for candidate in select.candidates(problem.op, problem.layout) if candidate.backend == "cuda")
    return found


def record(problem, backend, configuration=None, tokens=None):
    row = measurements.make_row(
        problem.spec,
        problem.layout,
        tokens or problem.tokens,
        problem.dtype,
        torch.device("cpu"),
        median_us=1.0,
        mad_us=0.0,
        backend=backend,
        configuration=None if configuration is None else configuration._asdict(),
    )
    measurements.record([measurements.Row(**{**vars(row), "device": problem.device.name})])


# Where it runs


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"dtype": torch.bfloat16},
        {"spec": NMSpec(2, 4, 16, 1)},
        {"layout": "dense", "spec": NMSpec(1, 4, 8, 70)},
        {"spec": DenseSpec(8, 1)},
        {"layout": "dense", "spec": DenseSpec(768, 3072)},
        {"layout": "dense", "spec": BitmapSpec(1000, 768, 70)},
        {"layout": "dense", "spec": LowRankSpec(5, 768, 70, 7)},
        {"layout": "dense", "spec": LowRankSparseSpec(5, "rows", 1, 1, 3, 768, 70)},
        {"spec": FACTORS},
        {"spec": FACTORS._replace(rank=8)},
        {"spec": FACTORS._replace(out_features=70)},
        {"spec": FACTORS._replace(out_features=2304, parts=3)},
        {"spec": INT8_24},
        {"spec": INT8_24, "dtype": torch.float32},
        {"spec": INT8._replace(in_features=16)},
        {"layout": "unpacked", "spec": Int8Spec("dynamic", 1, 4, 16, 70)},
    ],
    ids=str,
)
def test_where_it_runs(changed):
    problem = BASE._replace(**changed)
    assert cuda(problem).supports(problem) is None
    with sb.backend("cuda"):
        assert select.choose(problem).configuration == CONFIGS[0]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"device": H200._replace(capability=(8, 6))}, "needs compute capability 9.0, found 8.6"),
        ({"device": H200._replace(capability=(10, 0))}, "needs compute capability 9.0, found 10.0"),
        ({"device": Device("cpu")}, "needs a CUDA device, not cpu"),
        ({"dtype": torch.float32}, "needs float16 or bfloat16, not float32"),
        ({"spec": INT8, "dtype": torch.float64}, "needs float16 or bfloat16 or float32, not float64"),
        ({"spec": NMSpec(1, 4, 768, 768)}, "needs a 2:4 pattern, not 1:4"),
        ({"spec": NMSpec(1, 2, 768, 768)}, "needs a 2:4 pattern, not 1:2"),
        ({"spec": NMSpec(2, 8, 768, 768)}, "needs a 2:4 pattern, not 2:8"),
        ({"spec": Int8Spec("dynamic", 1, 4, 768, 768)}, "needs a 2:4 pattern, not 1:4"),
        ({"spec": NM._replace(in_features=776)}, "needs in_features in multiples of 16, not 776"),
        ({"spec": INT8_24._replace(in_features=784)}, "needs in_features in multiples of 32, not 784"),
        ({"spec": INT8._replace(in_features=776)}, "needs in_features in multiples of 16, not 776"),
        ({"spec": DenseSpec(772, 768)}, "needs in_features in multiples of 8, not 772"),
        (
            {"layout": "unpacked", "spec": INT8_24._replace(in_features=776)},
            "needs in_features in multiples of 16, not 776",
        ),
        ({"spec": LowRankSparseSpec(8, "rows", 1, 1, 3, 768, 768)}, "needs a sparse part at 2:4, not rows"),
        ({"spec": LowRankSparseSpec(8, "bitmap", 1, 1, 3, 768, 768)}, "needs a sparse part at 2:4, not bitmap"),
        ({"spec": FACTORS._replace(n=1)}, "needs a 2:4 pattern, not 1:4"),
        ({"spec": FACTORS._replace(rank=5)}, "needs a rank in multiples of 8, not 5"),
        ({"spec": FACTORS._replace(rank=40, parts=3)}, "needs a rank in multiples of 16, not 40"),
        (
            {"spec": FACTORS._replace(out_features=576, parts=3)},
            "needs parts with features in multiples of 128, not 192",
        ),
    ],
    ids=str,
)
def test_refusals_say_why(changed, text):
    problem = BASE._replace(**changed)
    assert cuda(problem).supports(problem) == text
    with sb.backend("cuda"), pytest.raises(RuntimeError, match=f"cuda: {text}"):
        select.choose(problem)


def test_a_module_that_lacks_it_is_named(c):
    c.archs = ("80", "90", "120")
    assert wgmma.refusal(BASE) == "needs sparsebert._C compiled for sm_90a, found sm_80, sm_90, sm_120"
    del c.wgmma_linear
    assert wgmma.refusal(BASE).startswith("sparsebert._C was built before it had this kernel; ")
    extension._not_compiled_for.cache_clear()
    c.archs = ("80", "120")
    assert wgmma.refusal(BASE) == "sparsebert._C is compiled for sm_80, sm_120, not for compute capability 9.0"


# What it is asked


@pytest.mark.parametrize(
    ("changed", "sizes"),
    [
        ({}, {}),
        ({"dtype": torch.bfloat16, "tokens": 0}, {"element": 1, "tokens": 1}),
        ({"layout": "dense"}, {"pattern": 0}),
        ({"spec": INT8}, {"element": 2, "pattern": 0}),
        ({"spec": INT8_24}, {"element": 2}),
        ({"layout": "unpacked", "spec": INT8_24}, {"element": 2, "pattern": 0}),
        ({"spec": FACTORS}, {"rank": 32}),
        ({"spec": FACTORS._replace(parts=3)}, {"rank": 32, "parts": 3}),
        ({"layout": "dense", "spec": FACTORS._replace(parts=3)}, {"pattern": 0}),
    ],
    ids=str,
)
def test_configurations_are_those_for_the_sizes(c, changed, sizes):
    problem = BASE._replace(**changed)
    assert tuple(cuda(problem).configurations(problem)) == CONFIGS
    expected = {"element": 0, "pattern": 1, "tokens": 32, "in_features": 768, "out_features": 3072}
    assert c.asked == [{**expected, "rank": 0, "parts": 1, "sms": 132, **sizes}]


def test_specs_that_are_equal_as_tuples_are_not_taken_for_each_other(c):
    """Four of rank 2 of 8 inputs, and 2:8 of 64."""
    pattern, factors = NMSpec(2, 8, 64, 128), LowRankSpec(2, 8, 64, 128)
    assert pattern == factors
    for spec in (pattern, factors):
        wgmma.configurations(BASE._replace(layout="dense", spec=spec))
    assert [(asked["in_features"], asked["out_features"]) for asked in c.asked] == [(64, 128), (8, 64)]


# It waits


@pytest.mark.parametrize(
    ("changed", "chosen", "text"),
    [
        ({}, "triton", ESTIMATED),
        ({"spec": FACTORS}, "triton", ESTIMATED),
        ({"spec": INT8_24}, "triton", ESTIMATED),
        ({"spec": INT8}, "triton", WAITS),
        ({"layout": "unpacked", "spec": INT8_24}, "triton", WAITS),
        ({"layout": "dense"}, "reference", WAITS),
        ({"spec": DenseSpec(768, 3072)}, "reference", WAITS),
        ({"spec": DenseSpec(768, 3072), "activation": "gelu"}, "triton", WAITS),
    ],
    ids=str,
)
def test_unmeasured_it_waits_and_says_so(changed, chosen, text):
    pytest.importorskip("triton")
    problem = BASE._replace(**changed)
    assert select.choose(problem).backend == chosen
    assert (cuda(problem), None) in select.review(problem)
    assert (cuda(problem), text) in select.reasons(problem)


def test_the_estimate_is_of_both_at_their_best(c):
    """Factors are part of the 2:4 product; the dense weight has them in it."""
    assert wgmma.estimated_ratio(BASE._replace(spec=FACTORS._replace(parts=3))) == 0.71
    assert [(asked["pattern"], asked["rank"], asked["parts"]) for asked in c.asked] == [(1, 32, 3), (0, 0, 1)]


def test_it_runs_where_it_is_forced():
    with sb.backend("cuda"):
        found = select.choose(BASE)
        assert found.backend == "cuda" and found.configuration == CONFIGS[0] and found.source == "estimated"
        assert dict((one.backend, reason) for one, reason in select.reasons(BASE))["cuda"] is None


def test_it_runs_where_it_was_measured_to_be_the_quickest():
    record(BASE, "cuda", CONFIGS[1])
    found = select.choose(BASE)
    assert found.backend == "cuda" and found.configuration == CONFIGS[1]
    assert found.description == (
        "CUDA: 2:4 on Hopper's sparse tensor cores by wgmma.sp, as it lies on disk; "
        "tile 1, features 128, tokens 128, sharing 2, splits 1: measured"
    )
    assert (cuda(BASE), None) in select.reasons(BASE)
    # Of another bucket of tokens, and on another device, nothing is known.
    for other in (BASE._replace(tokens=33), BASE._replace(device=H200._replace(name="NVIDIA H100"))):
        assert select.choose(other).backend != "cuda" and (cuda(other), ESTIMATED) in select.reasons(other)


def test_where_another_was_quicker_it_does_not_wait_any_more():
    record(BASE, "reference")
    assert select.choose(BASE).backend == "reference"
    assert (cuda(BASE), None) in select.reasons(BASE)


def test_only_what_may_wait_is_asked(monkeypatch):
    """A candidate without ``waits`` is taken as before, and the first that does not wait comes before any that does."""

    def candidate(backend, waits=None):
        return select.Candidate("nm_linear", "neutral", backend, backend, lambda problem: None, torch.add, waits=waits)

    monkeypatch.setattr(select, "_candidates", {})
    for backend, waits in (("cuda", lambda p: "later"), ("triton", lambda p: None), ("reference", None)):
        select.add_candidate(candidate(backend, waits))
    assert select.choose(BASE).backend == "triton"
    assert [reason for _, reason in select.reasons(BASE)] == ["later", None, None]


# What a user is told


# With the normalization after it

WITH_NORM = AddLayerNormSpec(NM._replace(out_features=768), False)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"dtype": torch.bfloat16},
        {"spec": AddLayerNormSpec(NMSpec(2, 4, 16, 128), True)},
        {"layout": "dense", "spec": AddLayerNormSpec(BitmapSpec(1000, 768, 384), True)},
        {"layout": "dense", "spec": AddLayerNormSpec(LowRankSpec(5, 768, 768, 3), False)},
        {"spec": AddLayerNormSpec(DenseSpec(3072, 1024), False)},
        {"spec": AddLayerNormSpec(FACTORS._replace(out_features=768), False)},
        {"spec": AddLayerNormSpec(INT8_24._replace(out_features=768), True)},
        {"layout": "unpacked", "spec": AddLayerNormSpec(Int8Spec("dynamic", 1, 4, 16, 768), True)},
    ],
    ids=str,
)
def test_where_it_runs_with_layer_norm(changed):
    problem = BASE._replace(spec=WITH_NORM)._replace(**changed)
    assert cuda(problem).supports(problem) is None
    assert cuda(problem).waits(problem) == WAITS
    # Unmeasured two kernels run.
    assert select.fused(problem) is None
    with sb.backend("cuda"):
        assert select.fused(problem).candidate is cuda(problem)
    with sb.backend("triton"):
        assert select.fused(problem) is None
    record(problem, "cuda")
    assert select.fused(problem).candidate is cuda(problem)
    assert select.fused(problem._replace(tokens=1000)) is None
    record(problem, linear_layer_norm.APART)
    assert select.fused(problem) is None


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"device": Device("cpu")}, "needs a CUDA device, not cpu"),
        ({"dtype": torch.float32}, "needs float16 or bfloat16, not float32"),
        (
            {"spec": AddLayerNormSpec(INT8, True), "dtype": torch.float32},
            "needs out_features in multiples of 128 up to",
        ),
        (
            {"spec": AddLayerNormSpec(INT8._replace(out_features=768), True), "dtype": torch.float32},
            "needs float16 or bfloat16, not float32",
        ),
        ({"spec": AddLayerNormSpec(NM, False)}, "needs out_features in multiples of 128 up to 1024, not 3072"),
        (
            {"spec": AddLayerNormSpec(NM._replace(out_features=320), False)},
            "needs out_features in multiples of 128 up to 1024, not 320",
        ),
        (
            {"spec": AddLayerNormSpec(FACTORS._replace(out_features=768, parts=3), False)},
            "needs factors in one part, not 3",
        ),
        ({"spec": AddLayerNormSpec(NMSpec(1, 4, 768, 768), False)}, "needs a 2:4 pattern, not 1:4"),
    ],
    ids=str,
)
def test_refusals_with_layer_norm_say_why(changed, text):
    problem = BASE._replace(spec=WITH_NORM)._replace(**changed)
    assert cuda(problem).supports(problem).startswith(text)
    with sb.backend("cuda"):
        assert select.fused(problem) is None and not linear_layer_norm.candidates(problem)


@pytest.fixture
def on_hopper(monkeypatch):
    """A model on a CPU looks as if it lay on an H200."""
    found = SimpleNamespace(
        name=H200.name, major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=227 << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(PackedLinear, "device", torch.device("cuda"))
    monkeypatch.setattr(PackedLinear, "dtype", torch.float16)
    devices.describe.cache_clear()
    yield
    devices.describe.cache_clear()


def test_explain_says_that_it_waits(on_hopper):
    model = nn.Sequential(nn.Linear(768, 3072)).half()
    sb.compress_(model, {"0": sb.NMConfig(2, 4)}, layout="neutral")
    said = str(sb.explain(model, tokens=32))
    assert f"  refused: cuda: {ESTIMATED}\n" in said
    record(BASE, "cuda", CONFIGS[1])
    said = str(sb.explain(model, tokens=32))
    assert "run by cuda (CUDA: 2:4 on Hopper's sparse tensor cores by wgmma.sp" in said and "no GPU" not in said


@pytest.fixture
def quick(monkeypatch):
    """A kernel of the 2:4 layouts of a CPU that waits, and keeps its first result; ``quick`` are the layouts it was run
    in. ``quick.wrong`` is by how much it is wrong."""
    ran = Ran()
    results = {}

    def run(reference, x, weight, bias, problem):
        ran.append(problem.layout)
        if problem.layout not in results:
            results[problem.layout] = reference.run(x, weight, bias, problem) * (1 + ran.wrong)
        return results[problem.layout]

    for layout in ("neutral", "dense"):
        before = list(select.candidates("nm_linear", layout))
        kernel = partial(run, before[-1])
        waiting = select.Candidate(
            "nm_linear", layout, "cuda", "quick", lambda problem: None, kernel, waits=lambda problem: "later"
        )
        monkeypatch.setitem(select._candidates, ("nm_linear", layout), [waiting, *before[1:]])
    select._choose.cache_clear()
    return ran


class Ran(list[str]):
    wrong = 0.0


def test_tune_measures_what_waits_and_it_runs_from_then_on(quick):
    model = nn.Sequential(nn.Linear(64, 48))
    sb.compress_(model, {"0": sb.NMConfig(2, 4)}, layout="neutral")
    problem = model[0].problem(4)
    assert select.choose(problem).backend == "reference"
    report = sb.tune(model, tokens=[4], budget_s=0.01)
    assert report.rows[0].kernels["neutral"] == "cuda: quick" and select.choose(problem).backend == "cuda"
    # Held dense, the module calls torch's linear itself: nothing else counts.
    assert set(quick) == {"neutral"} and report.rows[0].kernels["dense"].startswith("reference: ")


def test_tune_leaves_out_what_is_wrong(quick):
    model = nn.Sequential(nn.Linear(64, 48))
    sb.compress_(model, {"0": sb.NMConfig(2, 4)}, layout="neutral")
    for wrong in (0.05, float("nan")):
        quick.wrong = wrong
        with pytest.warns(
            RuntimeWarning, match=r"nm_linear in layout 'neutral' by cuda \(quick\) is wrong .* report it"
        ):
            report = sb.tune(model, tokens=[4], budget_s=0.01)
        assert report.rows[0].kernels["neutral"].startswith("reference: ")
        assert select.choose(model[0].problem(4)).backend == "reference"


def test_tune_of_a_forced_backend_measures_it_in_every_layout(quick):
    model = nn.Sequential(nn.Linear(64, 48))
    sb.compress_(model, {"0": sb.NMConfig(2, 4)}, layout="neutral")
    with sb.backend("cuda"):
        report = tuning.tune(model, tokens=[4], budget_s=0.01)
    assert set(report.rows[0].kernels.values()) == {"cuda: quick"} and set(quick) == {"neutral", "dense"}
