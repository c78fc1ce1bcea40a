"""What every run gets from its base class: state, hooks, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.methods import Method
from sparsebert.methods.base import Kind, Run
from sparsebert.methods.straight_through import hide_, reveal_

CONFIG = {"layer": sb.NMConfig(2, 4)}


class CountingRun(Run):
    """Keeps a sum of gradients, a mask and a number a layer."""

    kinds = {"sum": Kind(), "mask": Kind(torch.bool), "rate": Kind(torch.float32, scalar=True)}

    def __init__(self, model, total_steps):
        super().__init__(model, CONFIG, total_steps)
        for kind in self.kinds:
            self.new_state(kind)

    def before_step(self, optimizer):
        self.state["sum"]["layer"] += self.weight("layer").grad

    def after_step(self):
        self.state["rate"]["layer"] += 0.5

    def finalize(self):
        self.detach()
        return sb.CompressionPlan({})


class Needy(CountingRun):
    needs_loss = True

    def added_loss(self, outputs, inputs):
        return outputs.sum() * 0 + 1.0


class Nothing(Method):
    def prepare(self, model, *, total_steps, teacher=None):
        self._refuse_teacher(teacher)
        return CountingRun(model, total_steps)


def one_layer(dtype=torch.float64):
    model = nn.Module()
    model.layer = nn.Linear(4, 2, bias=False, dtype=dtype)
    return model


def one_step(model, run, optimizer):
    outputs = model.layer(torch.ones(1, 4, dtype=model.layer.weight.dtype))
    (outputs.sum() + run.loss(outputs, {})).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(steps=2, total_steps=3, kind=CountingRun):
    model = one_layer()
    run = kind(model, total_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    for _ in range(steps):
        one_step(model, run, optimizer)
    return model, run, optimizer


def test_hooks_see_each_step_once():
    _, run, _ = trained(steps=2)
    assert run.step == 2
    assert run.state["sum"]["layer"].tolist() == [[2.0] * 4] * 2
    assert run.state["rate"]["layer"].item() == 1.0
    assert run.metrics() == {"sparsity": 0.0}


def test_state_is_a_copy_and_comes_back():
    _, run, _ = trained()
    saved = run.state_dict()
    assert set(saved) == {"method", "step", "total_steps", "sum.layer", "mask.layer", "rate.layer"}
    run.state["sum"]["layer"].zero_()
    other = CountingRun(one_layer(), 3)
    other.load_state_dict(saved)
    assert other.step == 2
    assert other.state["sum"]["layer"].tolist() == [[2.0] * 4] * 2
    saved["sum.layer"].zero_()
    assert other.state["sum"]["layer"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sum.layer": None}, "of other layers than the run, first layer"),
        ({"sum.other": torch.zeros(2, 4)}, "of other layers than the run, first other"),
        ({"stray.layer": torch.zeros(2, 4)}, "the state has stray, expected sum, mask, rate"),
        ({"sum.layer": torch.zeros(2, 4)}, r"layer: sum is torch.float32 \(2, 4\), expected torch.float64 \(2, 4\)"),
        ({"rate.layer": torch.zeros(1)}, r"layer: rate is torch.float32 \(1,\), expected torch.float32 \(\)"),
        ({"method": "Magnitude"}, "the state's method is 'Magnitude', expected 'Counting'"),
        ({"total_steps": 4}, "the state's total_steps is 4, expected 3"),
        ({"step": 4}, "the state's step is 4, expected 0 to 3"),
        ({"step": None}, "the state's step is None"),
    ],
)
def test_states_that_do_not_fit_change_nothing(change, message):
    _, run, _ = trained()
    saved = {**run.state_dict(), **change}
    saved = {name: value for name, value in saved.items() if value is not None or name == "step"}
    other = CountingRun(one_layer(), 3)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert other.step == 0 and not other.state["sum"]["layer"].any()


def test_a_loss_that_is_forgotten_is_an_error():
    model, run, optimizer = trained(steps=1, kind=Needy)
    model.layer(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    before = model.layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="Needy: the method.s loss was not part of this step"):
        optimizer.step()
    assert torch.equal(model.layer.weight, before)
    one_step(model, run, optimizer)
    assert run.step == 2


def test_a_detached_run_sees_nothing():
    model, run, optimizer = trained(steps=1)
    run.finalize()
    one_step(model, run, optimizer)
    assert run.step == 1


def test_teachers_are_refused_where_they_have_no_use():
    with pytest.raises(ValueError, match="Nothing: takes no teacher"):
        Nothing(CONFIG).prepare(one_layer(), total_steps=1, teacher=one_layer())


def test_what_a_mask_hides_comes_back_exactly():
    weight = torch.tensor([[1e30, -1e-30, 0.1, -0.0]])
    mask = torch.tensor([[True, False, True, False]])
    dense, hidden = weight.clone(), torch.empty_like(weight)
    hide_(weight, mask, hidden)
    assert torch.equal(weight, dense.where(mask, torch.zeros(())))
    reveal_(weight, hidden)
    assert torch.equal(weight, dense)
