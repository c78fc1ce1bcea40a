"""How a total of kept weights is shared out among layers: exact totals, minimal sums, models left alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsebert as sb
from sparsebert.formats import bitmap
from sparsebert.methods import GradualMagnitude, Magnitude, allocation
from sparsebert.methods.allocation import share_out
from tiny_models import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

ROLES = ("query", "key", "value", "attention_output", "intermediate", "output")


def kept(model, configs):
    return {p: bitmap.keep_count(c.density, *model.get_submodule(p).weight.shape) for p, c in configs.items()}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4, bias=False))


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(5, 8, generator=generator)} for _ in range(count)]


def loss(outputs, inputs):
    return F.mse_loss(outputs, inputs["input"][:, :4])


# Uniform


def test_uniform_takes_all_encoder_layers_or_those_that_are_named():
    model = tiny_model()
    everywhere = allocation.uniform(model, 0.25)
    assert len(everywhere) == 12 and set(everywhere.values()) == {sb.BitmapConfig(0.25)}
    some = allocation.uniform(model, 0.25, layers=["query", "*.1.output.dense"], ignore=["*layer.0.*"])
    assert sorted(p.removeprefix("bert.encoder.layer.1.") for p in some) == ["attention.self.query", "output.dense"]


def test_uniform_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="density is 0"):
        allocation.uniform(tiny_model(), 0)
    with pytest.raises(ValueError, match="matches no linear layer"):
        allocation.uniform(tiny_model(), 0.5, layers=["nothing.*"])


# By score


def test_by_score_golden():
    """The five largest of all: 9, 8, 7, 6 and, of the equal 5s, that of the layer named first."""
    model = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(2, 2)})
    scores = {"a": torch.tensor([[9.0, 5.0, 7.0, 1.0]]), "b": torch.tensor([[8.0, 6.0], [5.0, 0.0]])}
    found = allocation.by_score(model, 5 / 8, scores)
    assert found == {"a": sb.BitmapConfig(3 / 4), "b": sb.BitmapConfig(2 / 4)}
    assert scores["a"].tolist() == [[9.0, 5.0, 7.0, 1.0]]


def test_no_layer_is_left_without_a_weight_and_the_total_is_exact():
    model = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(2, 2)})
    scores = {"a": torch.full((1, 4), 100.0), "b": torch.tensor([[-8.0, -6.0], [-5.0, -9.0]])}
    assert kept(model, allocation.by_score(model, 0.5, scores)) == {"a": 3, "b": 1}
    assert kept(model, allocation.by_score(model, 0.25, scores)) == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match=r"density 0.125 keeps 1 of 8 weights, but 2 layers take at least 2"):
        allocation.by_score(model, 0.125, scores)


@pytest.mark.parametrize("density", [0.013, 0.1, 1 / 3, 0.77, 1.0])
def test_magnitude_scores_give_global_magnitude_pruning(density):
    model = tiny_model()
    paths = list(allocation.uniform(model, density))
    scores = {p: model.get_submodule(p).weight.detach().abs() for p in paths}
    found = allocation.by_score(model, density, scores)
    assert sum(kept(model, found).values()) == round(density * 16384)
    expected = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    threshold = expected[round(density * 16384) - 1]
    assert kept(model, found) == {p: int((s >= threshold).sum()) for p, s in scores.items()}


@pytest.mark.parametrize(
    "scores, message",
    [
        ({"a": torch.ones(4, 1)}, r"a: scores have shape \(4, 1\), expected \(1, 4\)"),
        ({"a": torch.tensor([[1.0, math.nan, 1.0, 1.0]])}, "a: scores hold NaN"),
        ({"c": torch.ones(1, 4)}, "'c' matches no linear layer"),
        ({"*": torch.ones(1, 4)}, r"\*: is no path of a linear layer"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        allocation.by_score(nn.ModuleDict({"a": nn.Linear(4, 1)}), 0.5, scores)


# Sharing out


def test_share_out_golden():
    """Slopes: a -4, then -1; b's hull leaves its middle point, above the line from (2, 6) to (6, 2), and has slope -1;
    c rises and takes what nobody else wants. Among the equal slopes a is first."""
    curves = {"a": [(1, 9.0), (2, 5.0), (5, 2.0)], "b": [(2, 6.0), (3, 5.5), (6, 2.0)], "c": [(0, 0.0), (4, 2.0)]}
    assert share_out(curves, 3) == {"a": 1, "b": 2, "c": 0}
    assert share_out(curves, 4) == {"a": 2, "b": 2, "c": 0}
    assert share_out(curves, 6) == {"a": 4, "b": 2, "c": 0}
    assert share_out(curves, 9) == {"a": 5, "b": 4, "c": 0}
    assert share_out(curves, 13) == {"a": 5, "b": 6, "c": 2}
    assert share_out(curves, 15) == {"a": 5, "b": 6, "c": 4}


@pytest.mark.parametrize("total", [2, 16])
def test_totals_out_of_reach_are_refused(total):
    with pytest.raises(ValueError, match=f"total is {total}, expected 3 to 15"):
        share_out({"a": [(1, 9.0), (5, 2.0)], "b": [(2, 6.0), (10, 0.0)]}, total)


def hull_cost(points, count):
    """The lower convex hull at ``count``: the lowest chord over it."""
    return min(
        a[1] if a[0] == b[0] else a[1] + (b[1] - a[1]) * (count - a[0]) / (b[0] - a[0])
        for a in points
        for b in points
        if a[0] <= count <= b[0] and (a[0] < b[0] or a[0] == count)
    )


curve = st.lists(st.tuples(st.integers(0, 7), st.integers(-20, 20)), min_size=1, max_size=5, unique_by=lambda p: p[0])


@given(st.lists(curve.map(sorted), min_size=1, max_size=3), st.floats(0, 1))
def test_the_sum_is_minimal(points, fraction):
    """Against every way to share the total out."""
    curves = {str(i): [(x, float(y)) for x, y in part] for i, part in enumerate(points)}
    low, high = sum(part[0][0] for part in points), sum(part[-1][0] for part in points)
    total = low + round(fraction * (high - low))
    found = share_out(curves, total)
    assert sum(found.values()) == total
    best = min(
        sum(hull_cost(part, x) for part, x in zip(points, counts, strict=True))
        for counts in itertools.product(*(range(part[0][0], part[-1][0] + 1) for part in points))
        if sum(counts) == total
    )
    assert sum(hull_cost(curves[name], x) for name, x in found.items()) == pytest.approx(best, abs=1e-9)


# By sensitivity


def test_by_sensitivity_minimizes_what_it_measured():
    """The increases measured here by hand, one layer at a time, and shared out."""
    model, data, densities = net(), batches(), (0.1, 0.3, 0.6)
    found = allocation.by_sensitivity(model, data, 0.4, loss=loss, densities=densities, layers=["*"])
    curves = {}
    for path in ("0", "3"):
        curves[path] = []
        for d in densities:
            pruned = net().eval()
            sb.compress_(pruned, {path: sb.BitmapConfig(d)})
            with torch.no_grad():
                rise = sum(float(loss(pruned(**x), x)) - float(loss(net().eval()(**x), x)) for x in data)
            size = model.get_submodule(path).weight.shape
            curves[path].append((bitmap.keep_count(d, *size), rise))
        curves[path].append((size.numel(), 0.0))
    assert kept(model, found) == share_out(curves, round(0.4 * 72))


@pytest.mark.parametrize("density", [0.1, 0.33, 0.5, 0.9, 1.0])
def test_by_sensitivity_keeps_exactly_the_total(density):
    model = tiny_model()
    data = [{"input_ids": tokens(), "labels": torch.tensor([0, 1])}]
    found = allocation.by_sensitivity(model, data, density, densities=(0.05, 0.3), layers=["query", "output"])
    assert sum(kept(model, found).values()) == round(density * 2 * (1024 + 2048)) and len(found) == 4


def test_a_layer_that_does_not_matter_gets_the_least():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = model

        def forward(self, input):
            return self.used(input)

    whole = Net()
    found = allocation.by_sensitivity(whole, batches(1), 0.4, loss=lambda o, i: o.square().sum().neg(), layers=["*"])
    # 0.02 of 64 is one weight; round(0.4 * 128) = 51.
    assert kept(whole, found) == {"used": 50, "idle": 1}


def test_the_model_is_left_as_it_was():
    model, data = net(), batches()
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = allocation.by_sensitivity(model, iter(data), 0.5, loss=loss, layers=["*"])
    assert first == allocation.by_sensitivity(model, data, 0.5, loss=loss, layers=["*"])

    calls = 0

    def fails(outputs, inputs):
        nonlocal calls
        calls += 1
        if calls > 7:
            raise RuntimeError("stop")
        return loss(outputs, inputs)

    with pytest.raises(RuntimeError, match="stop"):
        allocation.by_sensitivity(model, data, 0.5, loss=fails, layers=["*"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True] and model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batches": []}, "no batches to measure"),
        ({"loss": None}, "the model's outputs have no loss; give it batches with labels"),
        ({"loss": lambda o, i: o.sum() * math.nan}, "the loss of the dense model is nan"),
        ({"densities": (1.0,)}, "no densities below 1"),
        (
            {"densities": (0.5, 0.7), "density": 0.3},
            "density 0.3 keeps 22 of 72 weights, but 2 layers take at least 36",
        ),
        ({"densities": (0.0,)}, "density is 0.0"),
        ({"density": 1.5}, "density is 1.5"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        allocation.by_sensitivity(
            net(), **{"batches": batches(), "density": 0.5, "loss": loss, "layers": ["*"], **options}
        )


def test_any_method_takes_an_allocation():
    model = tiny_model()
    scores = {p: model.get_submodule(p).weight.detach().abs() for p in allocation.uniform(model, 0.2)}
    found = allocation.by_score(model, 0.2, scores)
    before = tiny_model()
    assert Magnitude(found).prepare(model, total_steps=1).finalize().layers == found
    run = GradualMagnitude(found).prepare(before, total_steps=10)
    assert run.budget.kept == round(0.2 * 16384)
    sb.compress_(before, found)
