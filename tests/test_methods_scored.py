"""SEVEN, PLATON, SNIP and gradual magnitude: their rules by hand and against plain loops, and the contract of each."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebert as sb
from sparsebert.formats import nm
from sparsebert.methods import SEVEN, GradualMagnitude, Platon, Snip
from tiny_models import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

BITMAP = sb.BitmapConfig(0.3)
STEPS = 20
# Every method, on a training of STEPS steps.
METHODS = {
    "gradual": lambda config, **options: GradualMagnitude(config, **{"every": 3, **options}),
    "snip": lambda config, **options: Snip(config, **{"batches": 4, **options}),
    "seven": lambda config, **options: SEVEN(config, **{"start": 2, "length": 11, "every": 2, **options}),
    "seven-signed": lambda config, **options: SEVEN(config, **{"signed": True, "every": 1, **options}),
    "seven-pre": lambda config, **options: SEVEN(config, **{"variant": "pre", "batches": 5, **options}),
    "platon": lambda config, **options: Platon(config, **{"window": 3, **options}),
    "platon-mean": lambda config, **options: Platon(config, **{"window": 4, "beta2": 1, **options}),
}
MONOTONE = [name for name in METHODS if not name.startswith("platon")]
GRADIENT = [name for name in METHODS if name != "gradual"]
# N = 3072 weights in four layers; at 0.3 they keep round(307.2) + 2 round(153.6) + round(307.2) = 307 + 308 + 307.
SIZES = {"0": (64, 16), "2": (8, 64), "4": (64, 8), "6": (16, 64)}
TOTAL, KEPT = 3072, 922

every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def small_net(seed=0):
    torch.manual_seed(seed)
    layers = [layer for out, size in SIZES.values() for layer in (nn.Linear(size, out), nn.Dropout(0.1))]
    return nn.Sequential(*layers[:-1])


def train(model, run, steps, optimizer, *, watch=None):
    """Each step's batch and dropout follow from its number, so that a resumed training sees the same."""
    if not run._handles:
        run.attach(optimizer)
    model.train()
    for _ in range(steps):
        torch.manual_seed(run.step)
        x = torch.randn(4, 16)
        outputs = torch.tanh(model(x))
        (F.mse_loss(outputs, x.flip(-1)) + run.loss(outputs, {"x": x})).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def prepared(make, config=BITMAP, *, steps=STEPS, seed=0, **options):
    model = small_net(seed)
    selection = config if isinstance(config, dict) else {"*": config}
    return model, make(selection, **options).prepare(model, total_steps=steps)


def trained(make, config=BITMAP, *, watch=None, **options):
    model, run = prepared(make, config, **options)
    train(model, run, STEPS, adamw(model), watch=watch and (lambda: watch(run)))
    return model, run


def nonzeros(model, paths):
    return {path: int(model.get_submodule(path).weight.count_nonzero()) for path in paths}


def kept_in(run):
    return sum(int(mask.sum()) for mask in run.masks.values())


# The contract, of every method


@every_method
def test_a_transformer_meets_its_target_in_what_is_packed(make):
    """round(0.3 * 1024) = 307 of each attention matrix and 614 of the others, shared by all."""
    model = tiny_model()
    names = set(model.state_dict())
    run = make(BITMAP, granularity="global").prepare(model, total_steps=STEPS)
    optimizer = adamw(model)
    run.attach(optimizer)
    model.train()
    for _ in range(STEPS):
        model(input_ids=tokens(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plan = run.finalize()
    assert set(model.state_dict()) == names and type(model.bert.encoder.layer[0].output.dense) is nn.Linear
    found = nonzeros(model, plan.layers)
    assert len(found) == 12 and sum(found.values()) == 2 * (4 * 307 + 2 * 614) and len(set(found.values())) > 4
    sb.compress_(model, plan)
    assert {path: model.get_submodule(path).state_dict()["values"].numel() for path in found} == found


@every_method
@pytest.mark.parametrize("granularity", ["global", "matrix"])
def test_bitmap_targets_are_met_in_what_is_packed(make, granularity):
    model, run = trained(make, granularity=granularity)
    plan = run.finalize()
    found = nonzeros(model, plan.layers)
    if granularity == "matrix":
        assert found == {"0": 307, "2": 154, "4": 154, "6": 307}
    else:
        assert sum(found.values()) == KEPT and len(set(found.values())) > 2
    expected = {path: model.get_submodule(path).weight.clone() for path in found}
    sb.compress_(model, plan)
    for path, weight in expected.items():
        module = model.get_submodule(path)
        assert module.state_dict()["values"].numel() == found[path]
        assert torch.equal(module.to_linear().weight, weight)


@every_method
@pytest.mark.parametrize("n, m", [(2, 4), (1, 8)])
def test_nm_targets_are_met_in_what_is_packed(make, n, m):
    config = sb.NMConfig(n, m)
    model, run = trained(make, config)
    plan = run.finalize()
    assert set(plan.layers.values()) == {config}
    for path, found in nonzeros(model, plan.layers).items():
        weight = model.get_submodule(path).weight
        assert found == weight.numel() * n // m and nm.find_violation(weight, n, m) is None
    sb.compress_(model, plan)


@every_method
def test_groups_and_a_threshold_over_the_rest_in_one_run(make):
    config = {"0": sb.BitmapConfig(0.1), "2": sb.NMConfig(2, 4), "6": sb.BitmapConfig(0.5)}
    model, run = trained(make, config, granularity="global")
    plan = run.finalize()
    found = nonzeros(model, plan.layers)
    # round(102.4) + 512, shared by layers 0 and 6
    assert found["2"] == 256 and found["0"] + found["6"] == 102 + 512 and found["0"] != 102
    assert plan.layers["2"] == sb.NMConfig(2, 4) and plan.layers["0"] == sb.BitmapConfig(found["0"] / 1024)
    assert model[4].weight.all()
    sb.compress_(model, plan)


@every_method
@pytest.mark.parametrize("config", [BITMAP, sb.NMConfig(1, 4)], ids=str)
def test_resumed_training_is_the_same(make, config):
    model, run = trained(make, config)
    for stop in (3, 4, 11, 17):
        first, begun = prepared(make, config)
        optimizer = adamw(first)
        train(first, begun, stop, optimizer)
        saved = begun.state_dict()

        second, again = prepared(make, config, seed=5)
        other = adamw(second)
        second.load_state_dict(first.state_dict())
        again.load_state_dict(saved)
        other.load_state_dict(optimizer.state_dict())
        train(second, again, STEPS - stop, other)
        for kind, held in run.state.items():
            assert all(torch.equal(held[path], again.state[kind][path]) for path in held), (stop, kind)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, second.state_dict()[name]), (stop, name)


@pytest.mark.parametrize("name", MONOTONE)
@pytest.mark.parametrize("config", [BITMAP, sb.NMConfig(2, 8)], ids=str)
def test_masks_only_shrink_and_hold(name, config):
    seen = []

    def watch(run):
        for path, mask in run.masks.items():
            assert not run.weight(path)[~mask].any()
        seen.append({path: mask.clone() for path, mask in run.masks.items()})

    trained(METHODS[name], config, watch=watch)
    for before, after in zip(seen, seen[1:], strict=False):
        assert not any((after[path] & ~before[path]).any() for path in before)
    kept = {sum(int(mask.sum()) for mask in masks.values()) for masks in seen}
    # Once, or in several steps.
    assert len(kept) == 2 if name in ("snip", "seven-pre") else len(kept) > 4


@every_method
def test_metrics_tell_the_sparsity(make):
    _, run = trained(make)
    assert run.metrics()["sparsity"] == pytest.approx(1 - KEPT / TOTAL)


def test_platon_tells_what_was_last_masked():
    model, run = prepared(METHODS["platon"], start=2, end=4)
    train(model, run, 8, adamw(model))
    # After step 6 of a descent of 14 steps from 2: left (10/14)^3; two steps later all weights have moved again.
    kept = KEPT + int((TOTAL - KEPT) * (10 / 14) ** 3)
    assert run.metrics() == pytest.approx({"sparsity": 0.0, "masked": 1 - kept / TOTAL})


@every_method
def test_it_is_not_finalized_before_its_target(make):
    model, _ = trained(make)
    early, begun = prepared(make)
    optimizer = adamw(early)
    train(early, begun, 2, optimizer)
    with pytest.raises(ValueError, match="3072 weights are kept after step 2 of 20, expected 922: the schedule"):
        begun.finalize()
    # Nothing has happened: it goes on as if it had not been asked.
    train(early, begun, STEPS - 2, optimizer)
    plan = begun.finalize()
    assert all(torch.equal(early.get_submodule(p).weight, model.get_submodule(p).weight) for p in plan.layers)


@every_method
@pytest.mark.parametrize(
    "config, message",
    [
        (sb.LowRankConfig(rank=4), "low-rank:r4 is not a mask; expected an NMConfig or a BitmapConfig"),
        (sb.NMConfig(2, 4, columns=0.5), "2:4@0.5 drops columns, which cannot go little by little"),
    ],
)
def test_other_configs_are_refused(make, config, message):
    with pytest.raises(ValueError, match=message):
        prepared(make, config)


@every_method
def test_what_cannot_be_prepared_leaves_the_model_as_it_was(make):
    model = small_net()
    with pytest.raises(ValueError, match="takes no teacher"):
        make({"*": BITMAP}).prepare(model, total_steps=STEPS, teacher=small_net())
    model[6].weight.data[0, 0] = math.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="6: weight holds NaN"):
        make({"*": BITMAP}).prepare(model, total_steps=STEPS)
    after = model.state_dict()
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)


@pytest.mark.parametrize("name", GRADIENT)
def test_frozen_weights_have_no_gradient_to_score(name):
    model = small_net()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="2: weight does not require grad"):
        METHODS[name]({"*": BITMAP}).prepare(model, total_steps=STEPS)
    METHODS["gradual"]({"*": BITMAP}).prepare(model, total_steps=STEPS)


@pytest.mark.parametrize("name", ["seven", "platon", "snip"])
def test_a_layer_without_gradient_scores_nothing(name):
    """Such as one that layer drop skips: the other layers go on."""
    model = nn.ModuleDict({"a": nn.Linear(8, 4, bias=False), "b": nn.Linear(8, 4, bias=False)})
    run = METHODS[name]({"*": sb.BitmapConfig(0.5)}, granularity="matrix").prepare(model, total_steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run.attach(optimizer)
    for i in range(STEPS):
        optimizer.zero_grad()
        model["a" if i % 2 else "b"](torch.ones(1, 8)).square().sum().backward()
        optimizer.step()
    run.finalize()


@pytest.mark.parametrize(
    "method, options, message",
    [
        (GradualMagnitude, {"start": 12, "end": 8}, r"take 12 \+ 8 steps"),
        (GradualMagnitude, {"every": 0}, "every is 0"),
        (SEVEN, {"start": 10, "length": 11}, r"ends after 10 \+ 11 steps, but the training has 20"),
        (SEVEN, {"every": -1}, "every is -1"),
        (SEVEN, {"variant": "pre", "batches": 21}, "batches is 21, expected at most the 20 steps"),
        (Snip, {"batches": 21}, "batches is 21, expected at most the 20 steps"),
        (Platon, {"start": 16}, r"take 16 \+ 4 steps"),
        (Platon, {"window": 18}, "from step 17 of 20 on, before a first window of 18 steps"),
        (Platon, {"window": 21, "end": 0}, "from step 20 of 20 on, before a first window of 21 steps"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        prepared(method, **options)


@pytest.mark.parametrize(
    "method, options, message",
    [
        (SEVEN, {"variant": "post"}, "variant is 'post', expected one of dynamic, pre"),
        (SEVEN, {"batches": 5}, "batches is 5, but the variant 'dynamic' has no such option"),
        (SEVEN, {"variant": "pre", "length": 5}, "length is 5, but the variant 'pre' has no such option"),
        (SEVEN, {"granularity": "row"}, "granularity is 'row', expected one of global, matrix"),
        (SEVEN, {"alpha1": 1.0}, "alpha1 is 1.0, expected 0 to below 1"),
        (SEVEN, {"alpha2": -0.1}, "alpha2 is -0.1"),
        (SEVEN, {"variant": "pre", "batches": 0}, "batches is 0, expected a whole number, 1 or more"),
        (Snip, {"batches": 2.5}, "batches is 2.5, expected a whole number"),
        (Snip, {"granularity": "all"}, "granularity is 'all'"),
        (GradualMagnitude, {"granularity": ""}, "granularity is ''"),
        (Platon, {"beta1": 1}, "beta1 is 1, expected 0 to below 1"),
        (Platon, {"beta2": 1.1}, "beta2 is 1.1, expected 0 to 1"),
        (Platon, {"window": 1}, "window is 1, expected a whole number, 2 or more"),
        (Platon, {"granularity": "nm"}, "granularity is 'nm'"),
    ],
)
def test_options_are_checked(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(BITMAP, **options)


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11, 100])
@pytest.mark.parametrize("options", [None, {}, {"variant": "pre"}], ids=["gradual", "seven", "seven-pre"])
def test_defaults_fit_any_training(options, steps):
    prepared(GradualMagnitude if options is None else SEVEN, steps=steps, **(options or {}))


@pytest.mark.parametrize("method", [Platon, Snip])
@pytest.mark.parametrize("steps", [12, 100])
def test_defaults_with_a_fixed_window_fit_a_dozen_steps(method, steps):
    prepared(method, steps=steps)


def test_states_of_one_variant_are_not_taken_for_the_other():
    runs = [prepared(SEVEN, variant=variant)[1] for variant in ("dynamic", "pre")]
    with pytest.raises(ValueError, match="the state's method is 'SEVEN', expected 'SEVENPre'"):
        runs[1].load_state_dict(runs[0].state_dict())


@every_method
def test_at_most_three_floats_a_weight_are_kept(make):
    _, run = trained(make)
    held = sum(tensor.nbytes for tensors in run.state.values() for tensor in tensors.values())
    assert held <= TOTAL * 3 * 4


# The rules, on toys whose gradient is known


def toy(weight):
    """A layer whose gradient is what its input is, so that a test gives each step the gradient it wants."""
    model = nn.Module()
    model.layer = nn.Linear(len(weight), 1, bias=False)
    model.layer.weight.data = torch.tensor([weight])
    return model


def steps_of(model, run, gradients, optimizer):
    run.attach(optimizer)
    for gradient in gradients:
        optimizer.zero_grad()
        model.layer(torch.tensor([gradient])).sum().backward()
        optimizer.step()
        yield model.layer.weight.detach().flatten().tolist()


def kept(run):
    return run.masks["layer"].flatten().nonzero().flatten().tolist()


def test_gradual_magnitude_golden():
    """8 weights, 2 to stay; a descent of 3 steps after the first: left 8/27, 1/27, 0, so 2 + 1, 2, 2 are kept. With
    lr 1 and gradient 1 each step lowers a kept weight by 1."""
    model = toy([8.0, -7.0, 6.0, 5.0, -4.0, 3.0, -2.0, 0.5])
    run = GradualMagnitude({"layer": sb.BitmapConfig(0.25)}, start=1, end=1, every=1).prepare(model, total_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert list(steps_of(model, run, [[1.0] * 8] * 5, optimizer)) == [
        [7.0, -8.0, 5.0, 4.0, -5.0, 2.0, -3.0, -0.5],
        # |6, -9, 4, 3, -6, 1, -4, -1.5|
        [6.0, -9.0, 0.0, 0.0, -6.0, 0.0, 0.0, 0.0],
        # |5, -10, -7|
        [0.0, -10.0, 0.0, 0.0, -7.0, 0.0, 0.0, 0.0],
        [0.0, -11.0, 0.0, 0.0, -8.0, 0.0, 0.0, 0.0],
        [0.0, -12.0, 0.0, 0.0, -9.0, 0.0, 0.0, 0.0],
    ]
    run.finalize()


def test_gradual_magnitude_keeps_a_zero_rather_than_bring_one_back():
    """A weight that happens to be 0 is as small as those that are out, and must not lose its place to one of them."""
    model = toy([4.0, 1.0, 3.0, 2.0])
    run = GradualMagnitude({"layer": sb.BitmapConfig(0.5)}, start=0, end=0, every=1).prepare(model, total_steps=2)
    # left 1/8 after the first step: 2 + 0 of 4 kept, weights 0 and 2; the second step makes both of them 0.
    weights = list(steps_of(model, run, [[0.0] * 4, [4.0, 0.0, 3.0, 0.0]], torch.optim.SGD(model.parameters(), lr=1.0)))
    assert weights == [[4.0, 0.0, 3.0, 0.0], [0.0] * 4] and kept(run) == [0, 2]


def test_gradual_masks_are_renewed_every_few_steps():
    counts = []
    trained(
        METHODS["gradual"],
        granularity="global",
        watch=lambda run: counts.append(kept_in(run)),
        every=4,
        start=3,
        end=6,
    )
    changes = [i + 1 for i in range(1, STEPS) if counts[i] != counts[i - 1]]
    # Multiples of 4 after step 3, and the first of the last six.
    assert changes == [4, 8, 12, 15]
    # After step 8, 6 of the 11 steps of the descent are still to come.
    assert counts[7] == KEPT + (TOTAL - KEPT) * 6**3 // 11**3


def test_snip_golden():
    """Sums of |W g|: 1*1 + 1*3 = 4, 2*2 + 2*0 = 4, 4*0.5 + 4*0.25 = 3, 8*0 + 8*0.75 = 6. The layer keeps 6 and, of the
    equals, the earlier 4; the weights have not moved, and the third step is the first that trains."""
    model = toy([1.0, -2.0, 4.0, 8.0])
    run = Snip({"layer": sb.BitmapConfig(0.5)}, batches=2).prepare(model, total_steps=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.5)
    walk = steps_of(model, run, [[1.0, 2.0, 0.5, 0.0], [-3.0, 0.0, 0.25, 0.75], [1.0] * 4], optimizer)
    assert next(walk) == [1.0, -2.0, 4.0, 8.0] and not optimizer.state
    assert next(walk) == [1.0, 0.0, 0.0, 8.0] and not optimizer.state
    assert run.state["sum"]["layer"][0, [0, 3]].tolist() == [4.0, 6.0]
    # AdamW: W (1 - 0.25) - 0.5 * 1
    assert next(walk) == pytest.approx([0.25, 0.0, 0.0, 5.5], abs=1e-6)
    run.finalize()


def test_nothing_at_all_moves_while_scores_are_gathered():
    model, run = prepared(Snip, batches=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = adamw(model)
    train(model, run, 2, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not optimizer.state
    train(model, run, 2, optimizer)
    assert not torch.equal(model[0].bias, before["0.bias"])


def test_seven_golden():
    """a1 = a2 = 1/2, lr 0, so I as in the golden test of the update: |W g| is added where g is steady. 4 weights, 1 to
    stay, a window of 3 steps after the first: 1 + floor(3 * 8/27) = 1, 1, 1."""
    model = toy([1.0, 3.0, -4.0, 2.0])
    run = SEVEN({"layer": sb.BitmapConfig(0.25)}, start=1, length=3, alpha1=0.5, alpha2=0.5, every=1).prepare(
        model, total_steps=5
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    walk = steps_of(
        model, run, [[9.0] * 4, [2.0, 2.0, 0.0, 1.0], [2.0, -2.0, 9.0, 9.0], [9.0] * 4, [9.0] * 4], optimizer
    )
    assert next(walk) == [1.0, 3.0, -4.0, 2.0]
    assert not run.state["importance"]["layer"].any()
    # I = 2, 6, 0, 2; -1 marks what is out.
    assert next(walk) == [0.0, 3.0, 0.0, 0.0]
    assert run.state["importance"]["layer"].flatten().tolist() == pytest.approx([-1, 6, -1, -1])
    assert next(walk) == [0.0, 3.0, 0.0, 0.0]
    # Gradients of what is out do not count; |-2| is as steady as 2.
    assert run.state["importance"]["layer"].flatten().tolist() == pytest.approx([-1, 12, -1, -1])
    list(walk)
    run.finalize()


def test_seven_keeps_what_is_in_at_a_score_of_zero():
    """Nothing has a gradient: all scores are 0, and the ties go to the earlier of those that are still in."""
    model = toy([1.0, 2.0, 3.0, 4.0])
    run = SEVEN({"layer": sb.BitmapConfig(0.25)}, start=0, length=4, every=1).prepare(model, total_steps=4)
    run.state["importance"]["layer"][0, 0] = -1.0  # out
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert list(steps_of(model, run, [[0.0] * 4] * 4, optimizer))[-1] == [0.0, 2.0, 0.0, 0.0]


def test_seven_signed_prefers_steady_signs():
    """Weight 0 has the larger gradients, but they flip."""
    for signed, expected in ((False, [0]), (True, [1])):
        model = toy([1.0, 1.0])
        run = SEVEN({"layer": sb.BitmapConfig(0.5)}, start=0, length=6, signed=signed).prepare(model, total_steps=6)
        gradients = [[1.2 * (-1) ** i, 1.0] for i in range(6)]
        list(steps_of(model, run, gradients, torch.optim.SGD(model.parameters(), lr=0.0)))
        assert kept(run) == expected


def reference_net(sizes=(8, 6, 4)):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(b, a, generator=generator, dtype=torch.float64) for a, b in zip(sizes, sizes[1:], strict=False)]


def data(steps):
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(5, 8, generator=generator).double(), torch.randn(5, 4, generator=generator).double())
        for _ in range(steps)
    ]


def net_loss(weights, x, y):
    return F.mse_loss(torch.tanh(x @ weights[0].t()) @ weights[1].t(), y)


def run_net(method, steps, lr, momentum=0.0):
    """The method on the same net as an ``nn.Module``; yields weights and masks after every step."""
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False)).double()
    for layer, weight in zip((model[0], model[2]), reference_net(), strict=True):
        layer.weight.data = weight.clone()
    run = method.prepare(model, total_steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    run.attach(optimizer)
    history = []
    for x, y in data(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        history.append(
            [(layer.weight.detach().clone(), run.masks[p].clone()) for p, layer in zip("02", model[::2], strict=True)]
        )
    run.finalize()
    return history


LAYERS = {"0": sb.BitmapConfig(0.25), "2": sb.BitmapConfig(0.25)}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("every", [1, 4])
def test_seven_against_a_plain_loop(signed, every):
    """The masked forward of the published code in float64: W * M in the forward, autograd through it, plain SGD."""
    steps, start, length, lr, a1, a2 = 16, 3, 9, 0.3, 0.8, 0.9
    method = SEVEN(LAYERS, start=start, length=length, every=every, signed=signed)
    weights = [w.requires_grad_() for w in reference_net()]
    masks = [torch.ones_like(w) for w in weights]
    m, v, importance = ([torch.zeros_like(w) for w in weights] for _ in range(3))
    total = sum(w.numel() for w in weights)
    for t, ((x, y), found) in enumerate(zip(data(steps), run_net(method, steps, lr), strict=True)):
        gradients = torch.autograd.grad(net_loss([w * k for w, k in zip(weights, masks, strict=True)], x, y), weights)
        with torch.no_grad():
            for w, g in zip(weights, gradients, strict=True):
                w -= lr * g
            if start <= t < start + length:
                j = t - start
                for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
                    g = g if signed else g.abs()
                    m[i] = a1 * m[i] + (1 - a1) * g
                    v[i] = a2 * v[i] + (1 - a2) * g * g
                    mh, vh = m[i] / (1 - a1 ** (j + 1)), (v[i] / (1 - a2 ** (j + 1))).sqrt() + 1e-9
                    importance[i] += (w * g * mh / vh).abs() * masks[i]
                if (j + 1) % every == 0 or j == length - 1:
                    r = 0.25 + 0.75 * (1 - (j + 1) / length) ** 3
                    threshold = torch.cat([i.flatten() for i in importance]).sort(descending=True).values
                    threshold = threshold[math.floor(r * total + 1e-9) - 1]
                    masks = [(i >= threshold).double() for i in importance]
                    importance = [i * k for i, k in zip(importance, masks, strict=True)]
            for w, k in zip(weights, masks, strict=True):
                w *= k
        for (weight, mask), w, k in zip(found, weights, masks, strict=True):
            assert torch.equal(mask, k.bool()), t
            assert torch.allclose(weight, w, rtol=1e-12, atol=1e-12)
    assert sum(int(k.sum()) for k in masks) == total // 4


def test_masked_weights_do_not_drift_in_the_export():
    """Momentum moves weights that are out, were they not zeroed again."""
    history = run_net(SEVEN(LAYERS, start=1, length=4, every=1), 12, 0.1, momentum=0.9)
    assert all(not weight[~mask].any() for step in history for weight, mask in step)


def test_the_last_renewal_of_the_window_is_at_the_target():
    """The published window stops a step earlier, with 1 / 10^3 of the way to go: two weights more."""
    counts = []
    trained(
        METHODS["seven"],
        start=0,
        length=10,
        every=9,
        watch=lambda run: counts.append(kept_in(run)),
    )
    assert counts[7] == TOTAL and counts[8] == KEPT + (TOTAL - KEPT) // 10**3 and counts[9:] == [KEPT] * 11


def plain_platon(steps, window, start, end, lr, beta1, beta2, density):
    """PLATON in float64 with all ranks and averages spelled out; also what was decided at each step."""
    weights = [w.requires_grad_() for w in reference_net()]
    total = sum(w.numel() for w in weights)
    samples, s, u = [], *([torch.zeros_like(w) for w in weights] for _ in range(2))
    decided = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    for t, (x, y) in enumerate(data(steps), 1):
        gradients = torch.autograd.grad(net_loss(weights, x, y), weights)
        with torch.no_grad():
            for w, g in zip(weights, gradients, strict=True):
                w -= lr * g
            if t % window == 0:
                for i in range(len(weights)):
                    mean = torch.stack([sample[i] for sample in samples]).mean(0)
                    s[i] = beta1 * s[i] + (1 - beta1) * mean
                    u[i] = beta2 * u[i] + (1 - beta2) * (mean - s[i]).abs()
                samples = []
            samples.append([(w * g).abs() for w, g in zip(weights, gradients, strict=True)])
            last = t > steps - end
            if t > start and (last or t % window == 0):
                left = 0.0 if last else (1 - (t - start) / (steps - start - end)) ** 3
                score = [a * b if beta2 < 1 else a for a, b in zip(s, u, strict=True)]
                count = round(density * total) + int((total - round(density * total)) * left)
                threshold = torch.cat([i.flatten() for i in score]).sort(descending=True).values[count - 1]
                # Strictly below goes; the one at the threshold survives.
                decided = [i >= threshold for i in score]
                for w, k in zip(weights, decided, strict=True):
                    w *= k
        yield [w.detach().clone() for w in weights], [k.clone() for k in decided]


@pytest.mark.parametrize("window, start, end, beta2", [(3, 4, 8, 0.7), (4, 0, 9, 1), (2, 2, 5, 0.9), (5, 3, 0, 0.65)])
def test_platon_against_a_plain_loop(window, start, end, beta2):
    steps, lr = 25, 0.3
    method = Platon(LAYERS, window=window, start=start, end=end, beta1=0.85, beta2=beta2)
    plain = plain_platon(steps, window, start, end, lr, 0.85, beta2, 0.25)
    for t, (found, (weights, decided)) in enumerate(zip(run_net(method, steps, lr), plain, strict=True), 1):
        for (weight, mask), w, k in zip(found, weights, decided, strict=True):
            assert torch.equal(mask, k), t
            assert torch.allclose(weight, w, rtol=1e-12, atol=1e-12), t


def test_platon_lets_weights_return():
    history = run_net(Platon(LAYERS, window=3, start=3, end=9), 30, 0.3)
    returned = sum(
        int((after & ~before).sum())
        for step, following in zip(history, history[1:], strict=False)
        for (_, before), (_, after) in zip(step, following, strict=True)
    )
    assert returned >= 1
    # Between maskings the weights that were zeroed move again, in the last phase they stay zero.
    assert any(weight[~mask].any() for weight, mask in history[12])
    assert all(not weight[~mask].any() for step in history[21:] for weight, mask in step)


def test_platon_repeats_one_decision_for_a_window():
    history = run_net(Platon(LAYERS, window=4, start=2, end=25), 34, 0.5)
    decisions = [torch.cat([mask.flatten() for _, mask in step]) for step in history]
    # The last phase begins after step 10, with the scores of step 8.
    changes = [t for t in range(11, 35) if not torch.equal(decisions[t - 1], decisions[t - 2])]
    assert len(changes) > 1 and set(changes) <= {12, 16, 20, 24, 28, 32}


def test_platon_first_window_has_no_phantom_sample():
    """|W g| of steps 1 and 2 is 2 and 4, mean 3, not (0 + 2 + 4) / 3; at step 3, S = 0.5 * 3 and U = 0.5 * 1.5. The
    sample of step 3 is the first of the next window, and those of 3 to 5, 8, 2 and 2, have the mean 4: S = 0.75 + 2,
    U = 0.375 + 0.5 * 1.25."""
    model = toy([2.0, 2.0])
    run = Platon({"layer": sb.BitmapConfig(0.5)}, window=3, start=0, end=1, beta1=0.5, beta2=0.5).prepare(
        model, total_steps=7
    )
    gradients = [[1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]
    walk = steps_of(model, run, gradients, torch.optim.SGD(model.parameters(), lr=0.0))
    state = {kind: run.state[kind]["layer"] for kind in ("mean", "smoothed", "uncertainty")}
    seen = [next(walk) and [float(state[kind][0, 0]) for kind in state] for _ in gradients]
    assert seen == [
        [2.0, 0.0, 0.0],
        [3.0, 0.0, 0.0],
        [8.0, 1.5, 0.75],
        [5.0, 1.5, 0.75],
        [4.0, 1.5, 0.75],
        [0.0, 2.75, 1.0],
    ]


def test_platon_zeroed_weights_get_their_gradients():
    """b1 = 1/2 and S alone, lr 1, one of two weights stays. |W g| of step 1: (0, 6), so S = (0, 3) at step 2, and the
    first weight goes. Steps 2 and 3 have (0, 7) and, as it moved back to 2, (4, 0): S = (1, 3.25), it goes again. Steps
    4 and 5 have (10 * 8, 0) and (1 * 1, 0): S = (20.75, 1.625), and it is the other that goes."""
    model = toy([1.0, 5.0])
    run = Platon({"layer": sb.BitmapConfig(0.5)}, window=2, start=0, end=1, beta1=0.5, beta2=1).prepare(
        model, total_steps=6
    )
    gradients = [[0.0, -1.0], [0.0, -1.0], [-2.0, 0.0], [-8.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]
    weights = list(steps_of(model, run, gradients, torch.optim.SGD(model.parameters(), lr=1.0)))
    assert weights == [[1.0, 6.0], [0.0, 7.0], [2.0, 7.0], [0.0, 7.0], [1.0, 7.0], [2.0, 0.0]]
    assert run.state["smoothed"]["layer"].tolist() == [[20.75, -1.625]]  # its sign: what goes
    run.finalize()
