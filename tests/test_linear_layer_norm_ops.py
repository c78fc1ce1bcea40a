"""A linear layer, its residual and LayerNorm as one op: in every layout what the ops apart give, and which kernel does
all of it when."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebert as sb
from packed_cases import INPUT_SCALE, LEAD, OUT, held, make, pairs
from sparsebert.formats import int8
from sparsebert.nn.fused_encoder_layer import held_by, normalized
from sparsebert.ops import add_layer_norm, linear_layer_norm, measurements, quantize_rows, select
from sparsebert.ops.linear import OVERLOADS
from sparsebert.ops.linear_layer_norm import APART, Call, linear_add_layer_norm, problem_of, run_apart
from sparsebert.ops.select import Candidate
from sparsebert.ops.specs import DenseSpec
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = 1e-5
SCALE = torch.tensor(0.05)
# A layout that does not quantize x has no op on int8 rows in a fused layer.
COMPUTED = [(kind, layout) for kind, layout in pairs(*LEAD) if not (kind.startswith("int8") and layout == "dense")]


def case(kind, layout, *shape, dtype=torch.float32, output_scale=None):
    """The tensors of a call, its spec, and the float x."""
    made = make(kind, dtype)
    x = torch.randn(*shape, made.spec.in_features).to(dtype)
    integer = kind.startswith("int8")
    static = torch.tensor(INPUT_SCALE) if "static" in kind else None
    given = quantize_rows(x, static) if integer else (x, None)
    norm = (1 + torch.randn(OUT) / 4, torch.randn(OUT))
    residual = torch.randn(*shape, OUT).to(dtype)
    weight = held(made, layout, dtype)
    return Call(*given, weight, made.bias, residual, *norm, EPS, output_scale), made.spec, x


@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), ()], ids=str)
@pytest.mark.parametrize(("kind", "layout"), COMPUTED)
def test_it_is_the_ops_apart(kind, layout, shape):
    call, spec, x = case(kind, layout, *shape)
    for b in (call.bias, None):
        y, q, s = linear_add_layer_norm(call._replace(bias=b), spec, layout, quantize=False)
        product = OVERLOADS[spec.op](x, call.weight, b, layout=layout, **spec._asdict())
        assert torch.equal(y, add_layer_norm(product, call.residual, *call[5:8])) and q is s is None
        for scale in (None, SCALE):
            rows = call._replace(bias=b, output_scale=scale)
            found, q, s = linear_add_layer_norm(rows, spec, layout, quantize=True)
            assert torch.equal(found, y)
            for ours, expected in zip((q, s), int8.quantize_rows(y, scale), strict=True):
                assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["nm-2:4", "int8", "dense"])
def test_in_other_dtypes_against_float64(kind, dtype):
    call, spec, x = case(kind, "neutral", 7, dtype=dtype)
    y, _, _ = linear_add_layer_norm(call, spec, "neutral", quantize=False)
    product = int8.dequantize(call.x, call.x_scale).double() if kind == "int8" else x.double()
    z = F.linear(product, make(kind, dtype).exact, call.bias.double()) + call.residual.double()
    exact = F.layer_norm(z, (OUT,), call.norm_weight.double(), call.norm_bias.double(), EPS)
    assert y.dtype == dtype
    # Two roundings to the dtype, of which LayerNorm may enlarge the first.
    assert (y.double() - exact).abs().max() <= 4 * max(torch.finfo(dtype).eps, 1e-6) * exact.abs().max()


def test_rows_that_lie_apart():
    call, spec, _ = case("nm-2:4", "neutral", 6)
    expected = linear_add_layer_norm(call, spec, "neutral", quantize=False)[0]
    x, residual = (
        torch.full((6, 2 * t.shape[1]), torch.nan)[:, : t.shape[1]].copy_(t) for t in (call.x, call.residual)
    )
    found = linear_add_layer_norm(call._replace(x=x, residual=residual), spec, "neutral", quantize=False)[0]
    assert torch.equal(found, expected) and found.is_contiguous()


WRONG = [
    ({"residual": torch.ones(3, OUT)}, ValueError, rf"residual has shape \(3, {OUT}\), expected \(2, {OUT}\) as the"),
    ({"residual": torch.ones(2, OUT).half()}, TypeError, r"residual is torch\.float16, expected torch\.float32 as x"),
    ({"residual": torch.ones(2, OUT, device="meta")}, ValueError, "residual is on meta, expected cpu as x"),
    ({"x": torch.ones(2, 5)}, ValueError, r"x has shape \(2, 5\), expected \(\.\.\., 52\)"),
    ({"x_scale": torch.ones(2)}, ValueError, "x_scale is given, expected None, as the weight is not int8"),
    ({"norm_weight": torch.ones(3)}, ValueError, rf"weight has shape \(3,\), expected \({OUT},\) as residual"),
    ({"eps": -1.0}, ValueError, r"eps is -1\.0, expected a number of at least 0"),
    ({"output_scale": torch.ones(1)}, ValueError, r"output_scale has shape \(1,\), expected \(\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[next(iter(change)) for change, *_ in WRONG])
def test_what_does_not_fit_is_named(change, error, message):
    call, spec, _ = case("nm-2:4", "neutral", 2)
    with pytest.raises(error, match=f"^nm_linear_add_layer_norm_quantize: {message}"):
        linear_add_layer_norm(call._replace(**change), spec, "neutral", quantize=True)


def test_int8_rows_need_their_scales():
    call, spec, x = case("int8", "neutral", 2)
    for change, error, message in (
        ({"x_scale": None}, ValueError, "x_scale is None, expected the scales of x"),
        ({"x_scale": torch.ones(3)}, ValueError, r"x_scale has shape \(3,\), expected \(2,\)"),
        ({"x": x}, TypeError, r"x is torch\.float32, expected torch\.int8"),
        ({"residual": call.residual.int()}, TypeError, r"residual is torch\.int32, expected a floating-point"),
    ):
        with pytest.raises(error, match=f"^int8_linear_add_layer_norm: {message}"):
            linear_add_layer_norm(call._replace(**change), spec, "neutral", quantize=False)


def test_a_gradient_is_refused():
    call, spec, _ = case("nm-2:4", "neutral", 2)
    with pytest.raises(RuntimeError, match="^nm_linear_add_layer_norm: residual requires grad, but the op has no"):
        linear_add_layer_norm(call._replace(residual=call.residual.requires_grad_()), spec, "neutral", quantize=False)


@pytest.mark.parametrize("kind", ["nm-2:4", "int8-static+1:4", "factors+2:4"])
def test_opcheck(kind):
    call, spec, _ = case(kind, "neutral", 2, 3)
    *given, scale = call
    options = {"layout": "neutral", **spec._asdict()}
    ops = torch.ops.sparsebert
    torch.library.opcheck(getattr(ops, f"{spec.op}_add_layer_norm").default, tuple(given), options)
    torch.library.opcheck(getattr(ops, f"{spec.op}_add_layer_norm_quantize").default, (*given, scale), options)


# Which kernels run


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """A kernel of a CPU that does all of it, for dense and 2:4 weights, and says where it ran."""
    ran: list[tuple[str, int]] = []

    def run(call, problem):
        ran.append((problem.op, len(call.x)))
        with sb.backend("reference"):
            return run_apart(call, problem)

    def supports(problem):
        return "needs 64 features at most" if problem.out_features > 64 else None

    monkeypatch.setenv(measurements.ENVIRONMENT_VARIABLE, str(tmp_path))
    # What decides this looks for a GPU first.
    monkeypatch.setattr(
        linear_layer_norm,
        "fusable",
        lambda spec, layout, residual, *, quantize: bool(
            linear_layer_norm.candidates(problem_of(spec, layout, residual, quantize=quantize))
        ),
    )
    ops, suffixes = ("nm_linear", "dense_linear", "int8_linear"), ("", "_quantize")
    for op, layout, suffix in itertools.product(ops, ("neutral", "dense"), suffixes):
        name = f"{op}_add_layer_norm{suffix}"
        kernel = Candidate(name, layout, "cuda", "whole", supports, run, waits=lambda problem: "later")
        monkeypatch.setitem(select._candidates, (name, layout), [kernel])
    select._fused.cache_clear()
    yield ran
    select._fused.cache_clear()


def measure(problem, backend):
    measurements.record(
        [
            measurements.make_row(
                problem.spec,
                problem.layout,
                problem.tokens,
                problem.dtype,
                torch.device("cpu"),
                median_us=1.0,
                mad_us=0.0,
                backend=backend,
            )
        ]
    )


def test_one_kernel_runs_where_it_was_measured_to_be_quicker(whole):
    call, spec, _ = case("nm-2:4", "neutral", 5)
    problem = problem_of(spec, "neutral", call.residual, quantize=False)
    for backend, runs in ((None, 0), ("cuda", 1), (APART, 0)):
        if backend is not None:
            measure(problem, backend)
        whole.clear()
        linear_add_layer_norm(call, spec, "neutral", quantize=False)
        # Of the op that quantizes nothing was measured, nor of more tokens.
        linear_add_layer_norm(call, spec, "neutral", quantize=True)
        linear_add_layer_norm(case("nm-2:4", "neutral", 9)[0], spec, "neutral", quantize=False)
        assert len(whole) == runs


def test_one_kernel_runs_where_it_is_forced(whole):
    call, spec, _ = case("nm-2:4", "neutral", 2, 3)
    expected = linear_add_layer_norm(call, spec, "neutral", quantize=False)[0]
    with sb.backend("cuda"):
        assert torch.equal(linear_add_layer_norm(call, spec, "neutral", quantize=False)[0], expected)
    assert whole == [("nm_linear_add_layer_norm", 6)]
    with sb.backend("reference"):
        assert torch.equal(linear_add_layer_norm(call, spec, "neutral", quantize=False)[0], expected)
    assert len(whole) == 1


def test_where_it_cannot_run_a_forced_backend_is_that_of_the_linear(whole):
    spec = DenseSpec(16, 128)
    call = Call(torch.randn(3, 16), None, [torch.randn(128, 16)], None, torch.randn(3, 128), *torch.randn(2, 128), EPS)
    # A layer left dense is torch's own whatever is forced.
    for backend in ("cuda", "reference"):
        with sb.backend(backend):
            y, _, _ = linear_add_layer_norm(call, spec, "neutral", quantize=False)
        assert y.shape == (3, 128) and not whole
    call, spec, _ = case("low-rank", "neutral", 3)
    with sb.backend("cuda"), pytest.raises(RuntimeError, match="^low_rank_linear: no forced backend serves"):
        linear_add_layer_norm(call, spec, "neutral", quantize=False)


# In a fused encoder


def fused(config):
    """A tiny model, fused, and inputs of it."""
    model = tiny_model()
    if config is not None:
        sb.compress_(model, config, layout="neutral")
    sb.fuse_(model)
    return model, {"input_ids": torch.randint(3, 100, (2, 7))}


def outputs(model, inputs):
    with torch.inference_mode():
        return model.base_model(**inputs).last_hidden_state


MIXED = {"intermediate": sb.Int8Config(), "attention_output": sb.NMConfig(2, 4), "query": sb.Int8Config("dynamic")}


@pytest.mark.parametrize(
    ("config", "ops"),
    [
        (None, ["dense_linear_add_layer_norm"] * 4),
        (sb.NMConfig(2, 4), ["nm_linear_add_layer_norm"] * 4),
        # What reads the last layer's result wants no int8.
        (sb.Int8Config(), ["int8_linear_add_layer_norm_quantize"] * 3 + ["int8_linear_add_layer_norm"]),
        (MIXED, ["nm_linear_add_layer_norm_quantize", "dense_linear_add_layer_norm"] * 2),
    ],
    ids=["dense", "2:4", "int8", "mixed"],
)
def test_a_fused_encoder_takes_it(whole, config, ops):
    model, inputs = fused(config)
    expected = outputs(model, inputs)
    assert not whole
    measure_all(model, 14)
    assert torch.equal(outputs(model, inputs), expected)
    assert whole == [(op, 14) for op in ops]
    # With a gradient, or under autocast, torch's own functions compute.
    whole.clear()
    model.base_model(**inputs).last_hidden_state.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        outputs(model, inputs)
    assert not whole


@torch.no_grad()
def measure_all(model, tokens):
    """The one kernel is the quickest for all layers of a fused model."""
    for layer in normalized(model):
        spec, layout, _ = held_by(layer.linear)
        residual = torch.empty(tokens, spec.out_features)
        measure(problem_of(spec, layout, residual, quantize=layer.quantize), "cuda")


@pytest.mark.parametrize("config", [sb.NMConfig(2, 4), sb.Int8Config()], ids=str)
def test_a_fused_encoder_that_takes_it_is_one_graph(monkeypatch, config):
    """As torch.compile traces it on a GPU, where it asks no kernel."""
    model, inputs = fused(config)
    expected = outputs(model, inputs)
    monkeypatch.setattr(linear_layer_norm, "fusable", lambda *_, **__: True)
    names = []

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if "add_layer_norm" in str(node.target))
        return graph

    torch._dynamo.reset()
    encoder = torch.compile(model.base_model, backend=backend, fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(encoder(**inputs).last_hidden_state, expected)
    assert len(names) == 4 and all("linear_add_layer_norm" in name for name in names)


def test_what_a_layer_adds_of_its_own_is_not_left_out():
    """Columns of x that a call takes, and int8 weights in a layout that does not quantize x."""
    linear = nn.Linear(64, 32)
    weight = nn.Parameter(sb.formats.nm.project(linear.weight.detach(), 2, 4))
    linear.weight = weight
    with torch.no_grad():
        assert held_by(linear).spec == DenseSpec(64, 32) and held_by(linear).tensors == [weight]
        packed = sb.nn.NMLinear.from_linear(linear, sb.NMConfig(2, 4))
        assert held_by(packed).tensors == packed.held_tensors
        weight[:, 32:] = 0
        assert held_by(sb.nn.NMLinear.from_linear(linear, sb.NMConfig(2, 4, columns=0.5))) is None
        quantized = sb.nn.Int8Linear.from_linear(linear, sb.Int8Config())
        assert held_by(quantized) is not None and held_by(quantized.prepare_("dense")) is None
        assert held_by(nn.Bilinear(2, 2, 2)) is None
    assert held_by(linear) is None


def test_tune_compares_one_kernel_with_two(whole):
    model, inputs = fused({"output": sb.NMConfig(2, 4)})
    expected = outputs(model, inputs)
    calls = []
    report = sb.tune(model, [14, 100], budget_s=0.01, progress=lambda *given: calls.append(given))
    rows = [row for row in report.rows if "add_layer_norm" in row.op]
    assert {(row.op, row.tokens) for row in rows} == {
        (f"{op}_linear_add_layer_norm {label}", tokens)
        for op, label in (("nm", "2:4"), ("dense", "dense"))
        for tokens in (16, 128)
    }
    for row in rows:
        assert row.kernels == {"apart": "two kernels", "fused": "cuda: whole"} and all(row.median_us.values())
        (kept,) = (one for one in measurements.load() if (one.op, one.tokens) == (row.op, row.tokens))
        quicker = row.median_us["fused"] < row.median_us["apart"]
        assert kept.backend == ("cuda" if quicker else APART)
    assert [done for done, _, _ in calls] == list(range(len(calls))) and calls[-1][1] == len(calls)
    assert "and LayerNorm" in calls[-1][2] and "fused" in str(report)
    assert torch.equal(outputs(model, inputs), expected)


def test_explain_says_whether_one_kernel_runs(whole):
    model, _ = fused({"output": sb.NMConfig(2, 4)})
    found = sb.explain(model, tokens=14)
    assert [(layer.path.rpartition("layer.")[2], layer.config) for layer in found.normalized] == [
        (f"{i}.{name}", f"{label} with LayerNorm")
        for i in range(2)
        for name, label in (("attention_output", "dense"), ("output", "2:4"))
    ]
    assert {(one.kernel, one.basis, *one.refused) for one in found.normalized} == {
        ("two kernels", "not measured here", "cuda: later")
    }
    measure_all(model, 14)
    found = sb.explain(model, tokens=14)
    assert {(one.kernel, one.basis, *one.refused) for one in found.normalized} == {
        ("cuda (whole)", "measured at 16 tokens")
    }
    assert "2:4 with LayerNorm held as neutral, run by cuda (whole); measured at 16 tokens" in str(found)
    # Their kernels are not those of the layers alone.
    assert len(found.layers) == 2 and {layer.kernel.partition(" ")[0] for layer in found.layers} == {"reference"}


def test_tune_leaves_out_a_kernel_that_is_wrong(whole, monkeypatch):
    model, _ = fused(sb.NMConfig(2, 4))
    wrong = [
        Candidate(c.op, c.layout, c.backend, "wrong", c.supports, lambda call, problem: (call.residual, None, None))
        for layout in ("neutral", "dense")
        for c in select.candidates("nm_linear_add_layer_norm", layout)
    ]
    for one in wrong:
        monkeypatch.setitem(select._candidates, (one.op, one.layout), [one])
    with pytest.warns(RuntimeWarning, match=r"nm_linear_add_layer_norm in layout '.*' by cuda \(wrong\) is wrong"):
        report = sb.tune(model, [14], budget_s=0.01)
    assert not [row for row in report.rows if "add_layer_norm" in row.op]
