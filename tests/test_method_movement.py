"""Movement pruning: golden steps, autograd's own version of the rule, masks that come and go, resume, targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.formats import nm
from sparsebert.formats.bitmap import keep_count
from sparsebert.methods import Movement
from sparsebert.methods.maths.adam import adam_step_
from sparsebert.methods.maths.schedules import Cubic
from tiny_models import tiny_model, tokens

HALF = sb.BitmapConfig(0.5)


def one_layer(dtype=torch.float32):
    model = nn.Module()
    model.layer = nn.Linear(4, 1, bias=False, dtype=dtype)
    model.layer.weight.data = torch.tensor([[4.0, 1.0, 2.0, 8.0]], dtype=dtype)
    return model


def step(model, optimizer, gradient):
    optimizer.zero_grad()
    model.layer(torch.tensor([gradient], dtype=model.layer.weight.dtype)).sum().backward()
    optimizer.step()


def train(model, run, steps, optimizer=None, first=0, scheduler=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    run.attach(optimizer)
    model.eval()  # without dropout, which a resumed training would draw anew
    for i in range(first, first + steps):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(3, 100, (4, 7), generator=generator)
        labels = torch.randint(0, 2, (4,), generator=generator)
        output = model(input_ids=ids, labels=labels)
        (output.loss + run.loss(output, {})).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return optimizer


def test_golden_steps():
    """Two SGD steps with the same gradient, then one after which the masked weights have had none."""
    model = one_layer()
    run = Movement({"layer": HALF}, start=1, end=1, every=1).prepare(model, total_steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run.attach(optimizer)
    gradient = [1.0, -1.0, 1.0, -1.0]

    # g * w = (4, -1, 2, -8); the first step of Adam is -0.01 times its sign. w - 0.5 g = (3.5, 1.5, 1.5, 8.5).
    step(model, optimizer, gradient)
    torch.testing.assert_close(run.state["score"]["layer"], torch.tensor([[-0.01, 0.01, -0.01, 0.01]]))
    assert model.layer.weight.tolist() == [[3.5, 1.5, 1.5, 8.5]]
    assert run.masks["layer"].all()

    # g * w = (3.5, -1.5, 1.5, -8.5). First entry: mean = 0.9 * 0.4 + 0.1 * 3.5 = 0.71, over 1 - 0.81: 3.736842;
    # square = 0.999 * 0.016 + 0.001 * 12.25 = 0.028234, over 1 - 0.998001: 14.124062, root 3.758200;
    # score = -0.01 - 0.01 * 3.736842 / 3.758200 = -0.0199432. The others alike.
    step(model, optimizer, gradient)
    expected = torch.tensor([[-0.0199432, 0.0199081, -0.0198258, 0.0200112]])
    torch.testing.assert_close(run.state["score"]["layer"], expected, rtol=0, atol=2e-7)
    # Two of four at the end of the descent: the larger scores, not the larger weights.
    assert run.masks["layer"].tolist() == [[False, True, False, True]]
    assert model.layer.weight.tolist() == [[0.0, 2.0, 0.0, 9.0]]
    assert run.state["hidden"]["layer"].tolist() == [[3.0, 0.0, 1.0, 0.0]]

    # The dense weight (3, 2, 1, 9) scores: g * w = (3, -2, 1, -9), but only what was in moves. First entry:
    # mean = 0.9 * 0.71 + 0.3 = 0.939, over 1 - 0.729: 3.464945; square = 0.999 * 0.028234 + 0.009 = 0.0372058,
    # over 1 - 0.997002999: 12.414325, root 3.523397; score = -0.0199432 - 0.00983410 = -0.0297773.
    step(model, optimizer, gradient)
    assert run.state["score"]["layer"][0, 0].item() == pytest.approx(-0.0297773, abs=2e-7)
    assert model.layer.weight.tolist() == [[0.0, 2.5, 0.0, 9.5]]
    assert model.layer.weight.grad.tolist() == [[0.0, -1.0, 0.0, -1.0]]
    assert run.state["hidden"]["layer"].tolist() == [[3.0, 0.0, 1.0, 0.0]]
    assert run.finalize().layers == {"layer": HALF}


def test_a_weight_returns_with_the_value_it_left_with():
    model = one_layer()
    run = Movement({"layer": HALF}, start=1, end=38, every=1).prepare(model, total_steps=40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run.attach(optimizer)
    step(model, optimizer, [1.0, -1.0, 1.0, -1.0])
    step(model, optimizer, [1.0, -1.0, 1.0, -1.0])
    assert run.masks["layer"].tolist() == [[False, True, False, True]]
    left = run.state["hidden"]["layer"][0, 0].item()
    assert left == pytest.approx(3.98)
    returned = []
    for _ in range(38):
        step(model, optimizer, [-1.0, 1.0, 1.0, -1.0])
        returned.append(run.masks["layer"][0, 0].item())
        if returned[-1] and not any(returned[:-1]):
            assert model.layer.weight[0, 0].item() == left
    assert not returned[0] and returned[-1]
    assert run.masks["layer"].tolist() == [[True, False, False, True]]


def test_signed_scores():
    """The most negative score is the first to go, not the last, though its absolute value is the largest."""
    model = one_layer()
    run = Movement({"layer": sb.BitmapConfig(0.25)}, start=1, end=1, every=1).prepare(model, total_steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run.attach(optimizer)
    run.state["score"]["layer"].copy_(torch.tensor([[-9.0, -1.0, 0.5, -2.0]]))
    step(model, optimizer, [0.0] * 4)
    step(model, optimizer, [0.0] * 4)
    assert run.masks["layer"].tolist() == [[False, False, True, False]]


class KeepLargest(torch.autograd.Function):
    """The published rule, written as autograd has it: M * W forward, G * M and G * W backward."""

    @staticmethod
    def forward(ctx, weight, scores, count):
        mask = torch.zeros_like(weight)
        mask.view(-1)[scores.flatten().argsort(descending=True, stable=True)[:count]] = 1.0
        ctx.save_for_backward(weight, mask)
        return mask * weight

    @staticmethod
    def backward(ctx, gradient):
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


def test_equals_autograd_through_the_mask():
    """Against a plain re-implementation in float64: one AdamW for weights and scores, both under one warm-up."""
    torch.manual_seed(0)
    total, density = 12, 0.3
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    weights = {path: model.get_submodule(path).weight.detach().clone().requires_grad_() for path in ("0", "2")}
    biases = {path: model.get_submodule(path).bias.detach().clone().requires_grad_() for path in ("0", "2")}
    scores = {path: torch.zeros_like(w).requires_grad_() for path, w in weights.items()}

    run = Movement({"0": sb.BitmapConfig(density), "2": sb.BitmapConfig(density)}, start=2, end=3, every=1).prepare(
        model, total_steps=total
    )
    ours = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    theirs = torch.optim.AdamW(
        [
            {"params": [*weights.values(), *biases.values()], "lr": 1e-2},
            {"params": list(scores.values()), "lr": 1e-2},
        ],
        weight_decay=0.0,
    )
    run.attach(ours)
    rate = lambda t: min(1.0, (t + 1) / 4) * (1 - t / total)  # noqa: E731
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in (ours, theirs)]
    schedule = Cubic(density, total, start=2, end=3)
    changed = 0
    before = {path: mask.clone() for path, mask in run.masks.items()}
    for t in range(total):
        x, y = torch.randn(32, 8, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
        nn.functional.mse_loss(model(x), y).backward()
        hidden = x
        for path in ("0", "2"):
            count = keep_count(schedule.remaining(t), *weights[path].shape)
            masked = KeepLargest.apply(weights[path], scores[path], count)
            hidden = nn.functional.linear(hidden, masked, biases[path])
            hidden = hidden.tanh() if path == "0" else hidden
        nn.functional.mse_loss(hidden, y).backward()
        for optimizer, scheduler in zip((ours, theirs), schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        for path, weight in weights.items():
            held = model.get_submodule(path).weight
            torch.testing.assert_close(run.state["score"][path], scores[path].detach(), rtol=1e-9, atol=1e-13)
            torch.testing.assert_close(
                (held + run.state["hidden"][path]).detach(), weight.detach(), rtol=1e-9, atol=1e-12
            )
            assert int(run.masks[path].sum()) == keep_count(schedule.remaining(t + 1), *weight.shape)
            changed += int((run.masks[path] & ~before[path]).sum())
        before = {path: mask.clone() for path, mask in run.masks.items()}
    assert changed > 0, "no weight came back"
    run.finalize()


@pytest.mark.parametrize("config", [sb.BitmapConfig(0.1), sb.NMConfig(2, 4), sb.NMConfig(1, 4)], ids=str)
def test_the_target_is_met_exactly(config):
    model = tiny_model()
    names = set(model.state_dict())
    run = Movement(config).prepare(model, total_steps=20)
    optimizer = train(model, run, 20)
    assert set(model.state_dict()) == names
    plan = run.finalize()
    assert set(plan.layers) == set(run.masks) and all(c == config for c in plan.layers.values())
    for path in plan.layers:
        weight = run.weight(path)
        if isinstance(config, sb.NMConfig):
            assert nm.find_violation(weight, config.n, config.m) is None
            assert int(run.masks[path].sum()) == weight.numel() * config.n // config.m
        else:
            assert int((weight != 0).sum()) == keep_count(0.1, *weight.shape)
        assert not weight[~run.masks[path]].any()
    assert set(model.state_dict()) == names
    expected = {path: run.weight(path).detach().clone() for path in plan.layers}
    sb.compress_(model, plan)
    for path, weight in expected.items():
        assert torch.equal(model.get_submodule(path).to_linear().weight, weight)
    assert not optimizer._optimizer_step_pre_hooks


def test_the_way_to_the_target():
    """Every 5 steps here, at the end of the descent and at the end; what is kept never grows."""
    model = tiny_model()
    run = Movement(sb.BitmapConfig(0.2), start=3, end=4, every=5).prepare(model, total_steps=20)
    schedule = Cubic(0.2, 20, 3, 4)
    path, kept, changes = next(iter(run.masks)), [], []
    before = run.masks[path]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(20):
        train(model, run, 1, optimizer, first=i)
        run.detach()
        kept.append(int(run.masks[path].sum()))
        if run.masks[path] is not before:
            changes.append(run.step)
        before = run.masks[path]
    assert changes == [5, 10, 15, 16, 20]
    assert kept[:4] == [1024] * 4 and kept[-1] == keep_count(0.2, 32, 32) == kept[15]
    assert kept[9] == keep_count(schedule.remaining(10), 32, 32)
    assert kept == sorted(kept, reverse=True)


def test_nm_goes_in_whole_steps():
    model = tiny_model()
    run = Movement(sb.NMConfig(1, 4), start=1, end=1, every=1).prepare(model, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for i in range(10):
        train(model, run, 1, optimizer, first=i)
        run.detach()
        groups = next(iter(run.masks.values())).unflatten(-1, (-1, 4)).sum(-1)
        assert (groups == groups[0, 0]).all()
        seen.append(int(groups[0, 0]))
    assert seen[0] == 4 and seen[-2:] == [1, 1] and set(seen) == {1, 2, 3, 4}
    assert seen == sorted(seen, reverse=True)


def test_scores_follow_the_schedule_of_the_weights_own_group():
    """The first step of Adam is the learning rate, whatever the gradient."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    run = Movement({"0": HALF, "1": HALF}, score_lr=1e-2).prepare(model, total_steps=10)
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[1].parameters(), "lr": 5e-3}]
    optimizer = torch.optim.SGD(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.5, lambda t: 0.25])
    run.attach(optimizer)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    for path, rate in (("0", 5e-3), ("1", 2.5e-3)):
        torch.testing.assert_close(run.state["score"][path].abs(), torch.full((4, 4), rate), rtol=1e-3, atol=0)


def test_momentum_and_decay_still_move_a_weight_that_is_out():
    model = one_layer()
    run = Movement({"layer": HALF}, start=1, end=2, every=1).prepare(model, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    run.attach(optimizer)
    for _ in range(2):
        step(model, optimizer, [1.0, -1.0, 1.0, -1.0])
    # buffer 1 then 1.5: 4 - 0.5 - 0.75
    assert run.state["hidden"]["layer"][0, 0].item() == 2.75
    step(model, optimizer, [1.0, -1.0, 1.0, -1.0])
    # without a gradient the buffer is 0.75
    assert run.state["hidden"]["layer"][0, 0].item() == 2.375
    assert model.layer.weight[0, 0].item() == 0.0


@pytest.mark.parametrize("config", [sb.BitmapConfig(0.1), sb.NMConfig(2, 4)], ids=str)
def test_resumed_equals_uninterrupted(config):
    def start(seed):
        model = tiny_model(seed=seed)
        run = Movement(config, start=1, end=2, every=2).prepare(model, total_steps=12)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        return model, run, optimizer

    whole, run, optimizer = start(0)
    train(whole, run, 12, optimizer)

    first, half, optimizer = start(0)
    train(first, half, 7, optimizer)
    saved = {"run": half.state_dict(), "model": first.state_dict(), "optimizer": optimizer.state_dict()}
    other, resumed, optimizer = start(5)
    other.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["run"])
    train(other, resumed, 5, optimizer, first=7)
    for path, mask in run.masks.items():
        assert torch.equal(resumed.masks[path], mask)
    for (name, a), b in zip(whole.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.finalize().layers == run.finalize().layers


def test_same_seed_same_masks():
    runs = []
    for _ in range(2):
        model = tiny_model()
        runs.append(Movement(sb.BitmapConfig(0.2), every=2).prepare(model, total_steps=6))
        train(model, runs[-1], 6)
    assert all(torch.equal(runs[0].masks[path], runs[1].masks[path]) for path in runs[0].masks)


def test_the_model_computes_with_the_masked_weight():
    model = tiny_model()
    run = Movement(sb.BitmapConfig(0.1), every=1).prepare(model, total_steps=10)
    train(model, run, 9)
    assert run.metrics()["sparsity"] == pytest.approx(0.9, abs=1e-3)
    with torch.no_grad():
        before = model(input_ids=tokens()).logits
        run.finalize()
        assert torch.equal(model(input_ids=tokens()).logits, before)


def test_scores_of_half_precision_weights_are_wide():
    model = one_layer(torch.bfloat16)
    run = Movement({"layer": HALF}, start=1).prepare(model, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run.attach(optimizer)
    for _ in range(4):
        step(model, optimizer, [1.0, -1.0, 1.0, -1.0])
    assert {kind: held["layer"].dtype for kind, held in run.state.items()} == {
        "mask": torch.bool,
        "hidden": torch.bfloat16,
        "score": torch.float32,
        "score_mean": torch.float32,
        "score_square": torch.float32,
    }
    other = Movement({"layer": HALF}, start=1).prepare(one_layer(torch.bfloat16), total_steps=4)
    other.load_state_dict(run.state_dict())
    run.finalize()


def test_no_more_than_five_floats_a_weight():
    run = Movement(HALF).prepare(tiny_model(), total_steps=10)
    weights = sum(run.weight(path).numel() for path in run.masks)
    held = sum(t.numel() * t.element_size() for tensors in run.state.values() for t in tensors.values())
    assert held / weights / 4 == 4.25


def test_adam_step_is_torchs():
    torch.manual_seed(0)
    ours = torch.randn(3, 5, dtype=torch.float64)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    mean, square = torch.zeros_like(ours), torch.zeros_like(ours)
    for t in range(1, 5):
        theirs.grad = torch.randn(3, 5, dtype=torch.float64)
        adam_step_(ours, theirs.grad.clone(), mean, square, step=t, lr=1e-2)
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"start": 3, "end": 2}, 5, "start and end take 3 \\+ 2 steps, expected fewer than the 5"),
        ({}, 1, "start and end take 1 \\+ 0 steps, expected fewer than the 1"),
        ({"every": 0}, 5, "every is 0"),
        ({"end": -1}, 5, "end is -1"),
    ],
)
def test_schedules_that_do_not_fit(options, steps, message):
    with pytest.raises(ValueError, match=message):
        Movement(HALF, **options).prepare(tiny_model(), total_steps=steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"start": 0}, "start is 0 steps, expected at least 1"), ({"score_lr": 0.0}, "score_lr is 0.0")],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Movement(HALF, **options)


@pytest.mark.parametrize(("steps", "start", "end"), [(2, 1, 0), (3, 1, 0), (10, 1, 2), (1000, 100, 200)])
def test_defaults_fit_any_training(steps, start, end):
    schedule = Movement({"layer": HALF}).prepare(one_layer(), total_steps=steps)._schedules["layer"]
    assert (schedule.start, schedule.end, schedule.every) == (start, end, 10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (sb.LowRankConfig(ratio=0.3), "is not a mask"),
        (sb.NMConfig(2, 4, columns=0.5), "2:4@0.5 drops columns, which cannot go little by little"),
    ],
    ids=str,
)
def test_configs_that_are_no_mask(config, message):
    with pytest.raises(ValueError, match=message):
        Movement(config).prepare(tiny_model(), total_steps=10)


def test_nan_and_frozen_weights_leave_the_model_as_it_was():
    model = tiny_model()
    weight = model.bert.encoder.layer[1].output.dense.weight
    weight.data[0, 0] = float("nan")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="layer.1.output.dense: weight holds NaN"):
        Movement(HALF).prepare(model, total_steps=10)
    assert all(torch.equal(t, before[name]) or name.endswith("1.output.dense.weight") for name, t in before.items())
    model = tiny_model()
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="layer.1.output.dense: weight is frozen"):
        Movement(HALF).prepare(model, total_steps=10)


def test_weights_that_nothing_reached_are_not_pruned_by_chance():
    model = nn.Module()
    model.layer, model.unused = nn.Linear(4, 4), nn.Linear(4, 4)
    run = Movement({"layer": HALF, "unused": HALF}, start=1, every=1).prepare(model, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    model.layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="unused: all scores are 0 after 2 steps"):
        optimizer.step()


def test_finalize_before_the_target_is_refused_and_changes_nothing():
    model = tiny_model()
    run = Movement(sb.NMConfig(2, 4), start=1, end=2).prepare(model, total_steps=10)
    optimizer = train(model, run, 4)
    with pytest.raises(ValueError, match="finalized after 4 steps, but the target is reached after 8 of 10"):
        run.finalize()
    run.detach()
    train(model, run, 6, optimizer, first=4)
    run.finalize()


def test_a_teacher_is_refused():
    with pytest.raises(ValueError, match="takes no teacher"):
        Movement(HALF).prepare(tiny_model(), total_steps=10, teacher=tiny_model())
