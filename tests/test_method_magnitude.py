"""The method contract on its simplest method, in a plain loop."""

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.formats import nm
from sparsebert.methods import Magnitude
from tiny_models import tiny_model, tokens

CONFIG = sb.NMConfig(2, 4)


def train(model, run, steps, optimizer=None, seed=0):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    run.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        labels = torch.randint(0, 2, (2,), generator=generator)
        inputs = {"input_ids": tokens(), "labels": labels}
        output = model(**inputs)
        (output.loss + run.loss(output, inputs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_golden_masks():
    model = nn.Module()
    model.layer = nn.Linear(8, 1, bias=False)
    model.layer.weight.data = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, -1.0, 1.0, 1.0]])
    Magnitude({"layer": CONFIG}).prepare(model, total_steps=1)
    assert model.layer.weight.tolist() == [[0.0, -3.0, 2.0, 0.0, 0.0, -1.0, 1.0, 0.0]]


def test_golden_step():
    """SGD with momentum and decay on a masked weight: the kept entry moves by hand-computed steps, the rest stays 0."""
    model = nn.Module()
    model.layer = nn.Linear(4, 1, bias=False)
    model.layer.weight.data = torch.tensor([[4.0, 1.0, 2.0, 8.0]])
    run = Magnitude({"layer": CONFIG}).prepare(model, total_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5, weight_decay=0.25)
    run.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model.layer(torch.tensor([[1.0, 1.0, 1.0, 1.0]])).sum().backward()
        optimizer.step()
    # step 1: g = 1 + 0.25 w = (2, 3), w = (3, 6.5); step 2: g = (1.75, 2.625), buffer = (2.75, 4.125)
    assert model.layer.weight.tolist() == [[1.625, 0.0, 0.0, 4.4375]]
    assert run.step == 2


def test_the_mask_holds_and_the_rest_trains():
    model = tiny_model()
    run = Magnitude(CONFIG).prepare(model, total_steps=5)
    masks = {path: mask.clone() for path, mask in run.masks.items()}
    start = {path: run.weight(path).detach().clone() for path in masks}
    train(model, run, 5)
    for path, mask in masks.items():
        weight = run.weight(path)
        assert not weight[~mask].any() and not torch.equal(weight, start[path])
        assert torch.equal(run.masks[path], mask)
    assert run.step == 5
    plan = run.finalize()
    assert len(plan.layers) == 12
    expected = {path: run.weight(path).detach().clone() for path in masks}
    sb.compress_(model, plan)
    for path, weight in expected.items():
        assert torch.equal(model.get_submodule(path).to_linear().weight, weight)


def test_same_seed_same_masks():
    runs = [Magnitude(CONFIG).prepare(tiny_model(seed=3), total_steps=1) for _ in range(2)]
    assert all(torch.equal(runs[0].masks[path], runs[1].masks[path]) for path in runs[0].masks)


def test_resumes_with_identical_masks():
    model = tiny_model()
    run = Magnitude(CONFIG).prepare(model, total_steps=6)
    train(model, run, 3)
    saved, weights = run.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    run.detach()

    other = tiny_model(seed=9)
    resumed = Magnitude(CONFIG).prepare(other, total_steps=6)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert resumed.step == 3
    assert all(torch.equal(resumed.masks[path], run.masks[path]) for path in run.masks)
    train(other, resumed, 3)
    resumed.finalize().verify(other)


def test_masks_are_no_part_of_the_model():
    model = tiny_model()
    names = set(model.state_dict())
    Magnitude(CONFIG).prepare(model, total_steps=1)
    assert set(model.state_dict()) == names


def test_states_that_do_not_fit_are_refused():
    run = Magnitude(CONFIG).prepare(tiny_model(), total_steps=1)
    with pytest.raises(ValueError, match="of other layers than the run, first bert"):
        run.load_state_dict({"step": 1})
    state = run.state_dict()
    path = next(iter(run.masks))
    state[f"mask.{path}"] = torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"{path}: mask is torch.bool \(2, 2\), expected torch.bool \(32, 32\)"):
        run.load_state_dict(state)


def test_attach_checks_the_optimizer():
    model = tiny_model()
    run = Magnitude(CONFIG).prepare(model, total_steps=1)
    with pytest.raises(ValueError, match="weight requires grad but is not in the optimizer"):
        run.attach(torch.optim.SGD(tiny_model().parameters(), lr=0.1))
    run.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="already attached"):
        run.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def test_hooks_go_with_finalize():
    model = tiny_model()
    run = Magnitude(CONFIG).prepare(model, total_steps=1)
    optimizer = train(model, run, 1)
    run.finalize()
    weight = run.weight(next(iter(run.masks)))
    model(input_ids=tokens(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert nm.find_violation(weight, 2, 4) is not None


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_total_steps_must_be_positive(steps):
    with pytest.raises(ValueError, match="total_steps is"):
        Magnitude(CONFIG).prepare(tiny_model(), total_steps=steps)


def test_nan_leaves_the_model_as_it_was():
    model = tiny_model()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    before = model.bert.encoder.layer[0].output.dense.weight.clone()
    with pytest.raises(ValueError, match="layer.1.output.dense: weight holds NaN"):
        Magnitude(CONFIG).prepare(model, total_steps=1)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, before)


def test_a_teacher_is_refused():
    with pytest.raises(ValueError, match="takes no teacher"):
        Magnitude(CONFIG).prepare(tiny_model(), total_steps=1, teacher=tiny_model())


def one_layer():
    model = nn.Module()
    model.layer = nn.Linear(4, 1, bias=False)
    model.layer.weight.data = torch.tensor([[4.0, 1.0, 2.0, 8.0]])
    return model


def step(model, optimizer):
    optimizer.zero_grad()
    model.layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def test_moments_of_dropped_weights_stay_zero():
    """Else they would move a weight as soon as a later phase changes the mask."""
    model = one_layer()
    run = Magnitude({"layer": CONFIG}).prepare(model, total_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run.attach(optimizer)
    step(model, optimizer)
    for name in ("exp_avg", "exp_avg_sq"):
        moments = optimizer.state[model.layer.weight][name]
        assert moments[0, [1, 2]].tolist() == [0.0, 0.0] and moments[0, [0, 3]].all()


def test_moments_from_before_do_not_bring_a_weight_back():
    model = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    run = Magnitude({"layer": CONFIG}).prepare(model, total_steps=1)
    run.attach(optimizer)
    step(model, optimizer)
    assert model.layer.weight[0, [1, 2]].tolist() == [0.0, 0.0]
