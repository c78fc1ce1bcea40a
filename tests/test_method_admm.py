"""ADMM: its update rules by hand and against a second implementation, both finishes, the int8 set, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.formats import int8, nm
from sparsebert.methods import ADMM, Block, Dictionary
from sparsebert.methods.maths import layerwise
from sparsebert.methods.maths.projections import Int8Grid, Largest, Scaled
from tiny_models import tiny_model, tokens

CONFIG = sb.NMConfig(2, 4)
JOINT = sb.Int8Config(weights=CONFIG)


def one_layer(weight):
    model = nn.Module()
    model.layer = nn.Linear(4, 1, bias=False)
    model.layer.weight.data = torch.tensor([weight])
    return model


def start(model, config=CONFIG, *, total_steps, lr=0.5, **options):
    run = ADMM({"layer": config}, **options).prepare(model, total_steps=total_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    run.attach(optimizer)
    return run, optimizer


def step(model, optimizer, x=(1.0, 1.0, 1.0, 1.0)):
    """One step with the gradient ``x``."""
    optimizer.zero_grad()
    model.layer(torch.tensor([x])).sum().backward()
    optimizer.step()


def state(run, kind):
    return run.state[kind]["layer"].flatten().tolist()


def train(model, run, steps, optimizer=None, first=0):
    """Steps ``first`` to ``first + steps`` of the same data, whoever trains."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    if run is not None:
        run.detach()
        run.attach(optimizer)
    model.eval()
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 100, (2, 7), generator=generator)
        output = model(input_ids=ids, labels=torch.randint(0, 2, (2,), generator=generator))
        (output.loss if run is None else output.loss + run.loss(output, {})).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# the first phase


def test_golden_rounds():
    """Two rounds of one step, then a step with the mask held."""
    model = one_layer([4.0, 0.0, 3.0, 8.0])
    run, optimizer = start(model, total_steps=3, admm=2 / 3, rounds=2, rho=0.75, rho_growth=2.0)
    assert (run.admm_steps, run.round_ends) == (2, [1, 2])
    # Z = (4, 0, 0, 8), |W - Z| = 3, |G| = |(1, 1, 1, 1)| = 2: rho = 0.75 * 2 / 3 = 0.5.
    # G + rho (W - Z) = (1, 1, 2.5, 1); W = (3.5, -0.5, 1.75, 7.5).
    step(model, optimizer)
    assert model.layer.weight.tolist() == [[3.5, -0.5, 1.75, 7.5]]
    # Z = (3.5, 0, 0, 7.5), U = (0, -0.5, 1.75, 0); rho doubles, so U halves: (0, -0.25, 0.875, 0).
    assert state(run, "rho") == [1.0]
    assert state(run, "dual") == [0.0, -0.25, 0.875, 0.0]
    assert state(run, "anchor") == [3.5, 0.25, -0.875, 7.5]  # Z - U
    w, gap = 12.25 + 0.25 + 3.0625 + 56.25, 0.25 + 3.0625
    found = run.residuals["layer"]
    assert found.primal == pytest.approx((gap / w) ** 0.5) and found.out_of_pattern == pytest.approx(gap / w)
    assert found.dual_residual == pytest.approx(0.5 * 0.5**0.5)  # Z moved by (-0.5, 0, 0, -0.5), at rho = 0.5
    assert run.metrics()["round"] == 1.0 and run.metrics()["sparsity"] == 0.0
    # G + 1 (W - Z + U) = (1, 1 - 0.75, 1 + 2.625, 1); W = (3, -0.625, -0.0625, 7), and P_S(W) = (3, 0, 0, 7).
    step(model, optimizer)
    assert model.layer.weight.tolist() == [[3.0, 0.0, 0.0, 7.0]]
    # W + U = (3, -0.875, 0.8125, 7): at that round's end |W - Z| = |(-0.625, -0.0625)|, and Z moved by 0.5 twice.
    found = run.residuals["layer"]
    assert found.dual_residual == pytest.approx(0.5**0.5)
    assert found.out_of_pattern == pytest.approx((0.625**2 + 0.0625**2) / (9 + 0.625**2 + 0.0625**2 + 49))
    step(model, optimizer)
    assert model.layer.weight.tolist() == [[2.5, 0.0, 0.0, 6.5]]
    run.finalize()
    assert model.layer.weight.tolist() == [[2.5, 0.0, 0.0, 6.5]]


def test_a_dual_moves_the_pattern():
    """Z = P_S(W + U) and not P_S(W): what training holds against the penalty comes back in."""
    model = one_layer([4.0, 2.0, 0.0, 1.0])
    run, optimizer = start(model, CONFIG, total_steps=9, rounds=2, rho=0.0)
    run.state["dual"]["layer"] += torch.tensor([[0.0, 0.0, 3.0, 0.0]])
    for _ in range(3):
        step(model, optimizer, (0.0, 0.0, 0.0, 0.0))
    # W + U = (4, 2, 3, 1): Z = (4, 0, 3, 0); U = (0, 2, 0, 1).
    assert state(run, "dual") == [0.0, 2.0, 0.0, 1.0]
    assert state(run, "anchor") == [4.0, -2.0, 3.0, -1.0]


def test_rho_follows_the_mean_gradient_of_the_first_round_and_grows_up_to_its_limit():
    model = one_layer([4.0, 0.0, 3.0, 8.0])
    run, optimizer = start(model, total_steps=10, admm=1.0, rounds=5, rho=0.75, rho_growth=3.0, rho_max=6.0, lr=0.0)
    found = []
    for size in (1.0, 2.0, 7.0, 7.0, 7.0, 7.0, 7.0):
        step(model, optimizer, (size,) * 4)
        found.append(state(run, "rho")[0])
    # |G| is twice the size, |W - Z| stays 3: 0.75 * 2 / 3, then 0.75 * mean(2, 4) / 3 = 0.75; grown by 3 at the ends of
    # rounds, up to 6 * 0.75.
    assert found == [0.5, 2.25, 2.25, 4.5, 4.5, 4.5, 4.5]


def test_a_decoupled_pull_is_outside_of_the_optimizer():
    model = one_layer([4.0, 0.0, 3.0, 8.0])
    run, optimizer = start(model, total_steps=4, admm=0.5, rounds=2, rho=0.75, rho_growth=1.0, decoupled=True)
    # The optimizer's step is -0.5, over lr its norm is 2: rho = 0.5 again. W = (3.5, -0.5, 2.5, 7.5) after it, and
    # W - 0.5 * 0.5 (W - Z) with Z = (4, 0, 0, 8).
    step(model, optimizer)
    assert model.layer.weight.tolist() == [[3.625, -0.375, 1.875, 7.625]]
    assert not run._old_weights and state(run, "rho") == [0.5]
    # U = (0, -0.375, 1.875, 0); a step, then towards Z - U = (3.625, 0.375, -1.875, 7.625) by a quarter.
    optimizer.param_groups[0]["lr"] = 0.25
    step(model, optimizer, (0.0, 0.0, 8.0, 0.0))
    # W = (3.625, -0.375, -0.125, 7.625) and lr rho = 0.125: -0.375 + 0.125 * 0.75 and so on; then projected.
    assert state(run, "rho") == [0.5] and model.layer.weight.tolist() == [[3.625, 0.0, 0.0, 7.625]]
    gap = (-0.375 + 0.125 * 0.75) ** 2 + (-0.125 - 0.125 * 1.75) ** 2
    assert run.residuals["layer"].out_of_pattern == pytest.approx(gap / (gap + 3.625**2 + 7.625**2))


def test_rho_of_zero_is_plain_training():
    plain = tiny_model()
    train(plain, None, 4)
    for decoupled in (False, True):
        model = tiny_model()
        train(model, ADMM(CONFIG, rho=0.0, decoupled=decoupled).prepare(model, total_steps=8), 4)
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("optimizer_class, lr", [(torch.optim.SGD, 0.05), (torch.optim.Adam, 0.01)])
def test_against_another_implementation(optimizer_class, lr):
    """The augmented Lagrangian through autograd, with the unscaled dual Y = rho U, in float64."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 8, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    model = nn.Module()
    model.layer = nn.Linear(8, 4, bias=False).double()
    w = model.layer.weight.detach().clone().requires_grad_()
    rounds, length, share, growth = 4, 5, 0.3, 1.5

    run = ADMM({"layer": CONFIG}, admm=0.8, rounds=rounds, rho=share, rho_growth=growth).prepare(model, total_steps=25)
    optimizer = optimizer_class(model.parameters(), lr=lr)
    run.attach(optimizer)
    project = Largest(CONFIG)
    z, dual, norms = project(w.detach()), torch.zeros_like(w), []
    gap = (w.detach() - z).norm()
    other = optimizer_class([w], lr=lr)
    for k in range(rounds):
        for t in range(length):
            optimizer.zero_grad()
            (model.layer(x) - y).square().mean().backward()
            optimizer.step()
            task = (x @ w.t() - y).square().mean()
            if k == 0:
                norms.append(torch.autograd.grad(task, w, retain_graph=True)[0].norm())
                rho = share * sum(norms) / len(norms) / gap
            other.zero_grad()
            (task + (dual * (w - z)).sum() + rho / 2 * (w - z).square().sum()).backward()
            other.step()
            if t < length - 1:
                torch.testing.assert_close(model.layer.weight, w, rtol=1e-5, atol=1e-7)
        z = project(w.detach() + dual / rho)
        dual = dual + rho * (w.detach() - z)
        rho = rho * growth
        if k < rounds - 1:
            torch.testing.assert_close(run.state["dual"]["layer"] * rho, dual, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(model.layer.weight, project(w.detach()), rtol=1e-5, atol=1e-7)


def test_residuals_of_a_convex_problem_go_to_zero():
    """f = |A (W - T)|² / 2 with a support that never changes: a subspace. W goes to the minimum inside it."""
    torch.manual_seed(0)
    target = torch.tensor([[3.0, 0.6, 0.5, 2.0]])
    a = torch.eye(4) + 0.2 * torch.randn(4, 4)
    model = one_layer([3.0, 0.3, 0.2, 2.0])
    run, optimizer = start(model, total_steps=2001, admm=2000 / 2001, rounds=200, lr=0.2, rho=2.0, rho_growth=1.0)
    primal, dual = [], []
    for number in range(2000):
        optimizer.zero_grad()
        (0.5 * ((model.layer.weight - target) @ a.t()).square().sum()).backward()
        optimizer.step()
        if (number + 1) % 10 == 0:
            primal.append(run.residuals["layer"].primal)
            dual.append(run.residuals["layer"].dual_residual)
    assert primal[-1] < 1e-5 and dual[-1] < 1e-5 and primal[-1] < 1e-3 * primal[0]
    h = (a.t() @ a)[[0, 3]]
    inside = torch.linalg.solve(h[:, [0, 3]], h @ target[0])
    torch.testing.assert_close(model.layer.weight[0, [0, 3]], inside, rtol=1e-4, atol=1e-4)


# Steps on the int8 grid are about 5e-4 here: Adam must be able to move a weight by less.
@pytest.mark.parametrize("config, lr", [(CONFIG, 5e-4), (sb.BitmapConfig(0.5), 5e-4), (sb.Int8Config(), 2e-6)], ids=str)
def test_out_of_pattern_energy_falls_every_round(config, lr):
    model = tiny_model()
    run = ADMM(config, rounds=6, rho=1.0, rho_growth=1.5).prepare(model, total_steps=40)
    before = copy.deepcopy(run.residuals)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    found = [run.metrics()["out_of_pattern"]]
    for k in range(6):
        train(model, run, 4, optimizer, first=4 * k)
        found.append(run.metrics()["out_of_pattern"])
    assert all(later < earlier for earlier, later in zip(found, found[1:], strict=False)), found
    assert all(run.residuals[path].out_of_pattern < before[path].out_of_pattern for path in run.configs)
    assert set(run.metrics()) == {"sparsity", "primal", "dual_residual", "out_of_pattern", "rho", "round"}


# the first phase, layer by layer


def test_golden_rounds_of_a_layer():
    """By hand: independent inputs, so C is diagonal and every weight is on its own."""
    model = one_layer([4.0, 3.0, 1.0, 8.0])
    moment = torch.diag(torch.tensor([1.0, 4.0, 36.0, 1.0]))
    run, optimizer = start(model, total_steps=2, input_moments={"layer": moment}, rounds=2, rho=1.0, rho_growth=1.0)
    # D = (1, 2, 6, 1): |w d| = (4, 6, 6, 8), and of the two that are equal the earlier stays: Z = (0, 3, 0, 8), U = 0.
    # With C D^-2 = 1 + DAMPING = c: W = (c W_0 + Z) / (c + 1), that is (4 r, 3, r, 8) with r = c / (c + 1); W + U
    # keeps the same, so U = (4 r, 0, r, 0). Then W = (4 (c - r) / (c + 1), 3, (c - r) / (c + 1), 8), and what W + U
    # has at the first and third still is below: 4 s, 6 s with s = r + (c - r) / (c + 1) against 6 and 8.
    c = 1 + layerwise.DAMPING
    r = c / (c + 1)
    outside = (c - r) / (c + 1)
    w = (4 * outside, 3.0, outside, 8.0)
    gap, whole = 17 * outside**2, sum(x * x for x in w)
    found = run.residuals["layer"]
    assert found.primal == pytest.approx((gap / whole) ** 0.5) and found.dual_residual == pytest.approx(0.0)
    assert found.out_of_pattern == pytest.approx(gap / whole)
    assert model.layer.weight.tolist() == [[0.0, pytest.approx(3.0), 0.0, pytest.approx(8.0)]]
    assert run.metrics()["round"] == 2.0 and run.metrics()["rho"] == 1.0 and run.metrics()["sparsity"] == 0.5
    assert set(run.state) == {"mask", "rho", "primal", "dual_residual", "out_of_pattern"}
    step(model, optimizer)
    assert model.layer.weight.tolist() == [[0.0, pytest.approx(2.5), 0.0, pytest.approx(7.5)]]


def covariance(columns, seed=0, samples=4096):
    """Of inputs that a few hidden numbers make, up to some noise, and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(samples, columns // 4, generator=generator, dtype=torch.float64)
    x = hidden @ torch.randn(columns // 4, columns, generator=generator, dtype=torch.float64)
    x += torch.randn(samples, columns, generator=generator, dtype=torch.float64)
    x *= torch.logspace(-1, 1, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    return x.t() @ x / samples


def output_error(weight, moment, reference):
    off = weight.double() - reference.double()
    return float(((off @ moment) * off).sum() / ((reference.double() @ moment) * reference.double()).sum())


def layer_run(config, *, rows=16, columns=32, dtype=torch.float32, **options):
    model = nn.Module()
    torch.manual_seed(1)
    model.layer = nn.Linear(columns, rows).to(dtype)
    before, moment = model.layer.weight.detach().clone(), covariance(columns)
    method = ADMM({"layer": config}, input_moments={"layer": moment}, **options)
    return model, method.prepare(model, total_steps=4), before, moment


@pytest.mark.parametrize(
    "config",
    [CONFIG, sb.NMConfig(1, 4), sb.BitmapConfig(0.5), JOINT, sb.Int8Config(weights=sb.NMConfig(4, 8))],
    ids=str,
)
def test_a_layer_keeps_its_outputs_far_better_than_by_its_largest_weights(config):
    model, run, before, moment = layer_run(config)
    grid = isinstance(config, sb.Int8Config)
    pattern = Largest(config.weights if grid else config)
    largest = Int8Grid(pattern)(before) if grid else pattern(before)
    scale = moment.diagonal().sqrt()
    wanda = Scaled(pattern, scale)(before)
    ours = output_error(model.layer.weight.detach(), moment, before)
    assert ours < 0.5 * output_error(wanda, moment, before) < 0.5 * output_error(largest, moment, before)
    assert run.finalize().layers["layer"] == config


def test_rounds_come_near_the_best_weight_of_their_mask():
    """Against least squares on the support, row by row in float64."""
    model, run, before, moment = layer_run(CONFIG, dtype=torch.float64)
    best = torch.zeros_like(before)
    damped = moment + layerwise.DAMPING * moment.diag().diag()
    for row, mask in enumerate(run.masks["layer"]):
        best[row, mask] = torch.linalg.solve(damped[mask][:, mask], damped[mask] @ before[row])
    ours, least = (output_error(w, moment, before) for w in (model.layer.weight.detach(), best))
    assert least <= ours < 1.05 * least
    assert run.residuals["layer"].primal < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_of_a_round_is_the_minimum(dtype):
    """Its gradient is zero: (W - W_0) C + rho (W - A) D² with the damped C, in float64."""
    torch.manual_seed(0)
    weight, anchor, moment = torch.randn(6, 24), torch.randn(6, 24).to(dtype), covariance(24)
    layer = layerwise.OutputError(weight.to(dtype), moment)
    torch.testing.assert_close(layer.scale.double(), moment.diagonal().sqrt(), rtol=1e-6, atol=0)
    found = layer.minimum(anchor, 0.3)
    assert found.dtype == dtype
    d = moment.diagonal()
    pull = 0.3 * d
    form = moment + layerwise.DAMPING * d.diag() + pull.diag()
    expected = torch.linalg.solve(
        form, weight.to(dtype).double() @ (form - pull.diag()) + anchor.double() * pull, left=False
    )
    rtol, atol = {torch.float64: (1e-8, 1e-8), torch.float32: (1e-3, 1e-4)}.get(dtype, (1e-2, 1e-2))
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)


def test_inputs_that_were_always_zero_may_lose_their_weights_first():
    moment = torch.diag(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    model = one_layer([9.0, 1.0, 2.0, 8.0])
    run, _ = start(model, total_steps=2, input_moments={"layer": moment})
    assert run.masks["layer"].tolist() == [[False, True, True, False]]
    torch.testing.assert_close(model.layer.weight.detach(), torch.tensor([[0.0, 1.0, 2.0, 0.0]]))


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({}, "layer: has no input_moments"),
        ({"layer": torch.ones(4)}, r"layer: its moment is \(4,\), expected \(4, 4\)"),
        ({"layer": torch.zeros(4, 4)}, r"layer: its moment is not E\[x x\^T\]"),
        ({"layer": -torch.eye(4)}, r"layer: its moment is not E\[x x\^T\]"),
        ({"layer": torch.full((4, 4), torch.nan)}, r"layer: its moment is not E\[x x\^T\]"),
    ],
)
def test_moments_that_do_not_fit_are_refused(moments, message):
    model = one_layer([4.0, 0.0, 3.0, 8.0])
    with pytest.raises(ValueError, match=message):
        start(model, total_steps=4, input_moments=moments)
    assert model.layer.weight.tolist() == [[4.0, 0.0, 3.0, 8.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"admm": 0.5}, "expected no admm, no decoupled"),
        ({"decoupled": True}, "expected no admm, no decoupled"),
        ({"projection": Dictionary(1, 4, 2)}, "input_moments and a Dictionary do not go together"),
        ({"rho": 0.0}, "rho is 0, expected more with input_moments"),
    ],
)
def test_options_that_mean_nothing_to_a_layer_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ADMM({"layer": CONFIG}, input_moments={"layer": torch.eye(4)}, **options)


@pytest.mark.parametrize("finish", ["frozen", "sr-ste"])
@pytest.mark.parametrize("config", [CONFIG, JOINT], ids=str)
def test_a_layer_run_trains_resumes_and_packs(config, finish):
    """As any other from its first step on: stopped after three steps of six, resumed on a model made anew."""
    options = {"finish": finish, "every": 2, "freeze": 0.2} if finish == "sr-ste" else {}
    moments = sb.methods.input_moments(tiny_model(), [{"input_ids": tokens()}], config)
    method = ADMM(config, input_moments=moments, **options)

    def begin():
        model = tiny_model()
        return model, method.prepare(model, total_steps=6)

    model, run = begin()
    assert run.options.input_moments is None and method.input_moments is moments
    train(model, run, 6)
    whole = {path: run.weight(path).detach().clone() for path in run.configs}
    sb.compress_(model, run.finalize())
    model, run = begin()
    optimizer = train(model, run, 3)
    saved = copy.deepcopy((model.state_dict(), run.state_dict(), optimizer.state_dict()))
    model, run = begin()
    model.load_state_dict(saved[0])
    run.load_state_dict(saved[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    optimizer.load_state_dict(saved[2])
    train(model, run, 3, optimizer, first=3)
    for path, weight in whole.items():
        assert torch.equal(run.weight(path), weight), path


def test_input_moments_are_means_over_tokens():
    model = tiny_model().train()
    path = "bert.encoder.layer.1.intermediate.dense"
    twin, seen = copy.deepcopy(model).eval(), []
    twin.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    batches = [{"input_ids": tokens()}, {"input_ids": tokens()[:1, :3]}]
    found = sb.methods.input_moments(model, batches, {path: CONFIG})
    for batch in batches:
        twin(**batch)
    assert model.training and all(module.training for module in model.modules())
    assert not model.get_submodule(path)._forward_pre_hooks
    flat = torch.cat([x.flatten(0, 1) for x in seen])
    torch.testing.assert_close(found, {path: flat.t() @ flat / len(flat)})
    with pytest.raises(ValueError, match="no batch came through this layer"):
        sb.methods.input_moments(model, [], {path: CONFIG})


# the second phase


def test_golden_sr_ste():
    model = one_layer([4.0, 1.0, 2.0, 8.0])
    run, optimizer = start(
        model, total_steps=4, admm=0.25, rho=0.0, finish="sr-ste", sr_ste_decay=0.5, every=1, freeze=0.25
    )
    assert (run.admm_steps, run.frozen_from) == (1, 3)
    step(model, optimizer)  # W = (3.5, 0.5, 1.5, 7.5)
    assert model.layer.weight.tolist() == [[3.5, 0.0, 0.0, 7.5]] and state(run, "hidden") == [0.0, 0.5, 1.5, 0.0]
    # G = (1, 1, -5, 1) + 0.5 (0, 0.5, 1.5, 0): W = (3, -0.125, 1.5 + 2.125, 7), and the third comes back.
    step(model, optimizer, (1.0, 1.0, -5.0, 1.0))
    assert run.masks["layer"].tolist() == [[False, False, True, True]]
    assert model.layer.weight.tolist() == [[0.0, 0.0, 3.625, 7.0]] and state(run, "hidden") == [3.0, -0.125, 0.0, 0.0]
    # G = (1, 1, 1, 1) + 0.5 (3, -0.125, 0, 0): W = (1.75, -0.59375, 3.125, 6.5). From here on the mask is frozen.
    step(model, optimizer)
    assert model.layer.weight.tolist() == [[0.0, 0.0, 3.125, 6.5]] and "hidden" not in run.state
    step(model, optimizer, (-99.0, -99.0, 1.0, 1.0))
    assert model.layer.weight.tolist() == [[0.0, 0.0, 2.625, 6.0]]


def test_sr_ste_masks_are_renewed_every_so_many_steps_and_at_the_freeze():
    model = one_layer([4.0, 1.0, 2.0, 8.0])
    run, optimizer = start(
        model, total_steps=9, admm=1 / 9, rho=0.0, finish="sr-ste", sr_ste_decay=0.0, every=3, freeze=1 / 9, lr=1.0
    )
    masks = []
    for _ in range(9):
        # The second and third grow by one each step, the others stay.
        step(model, optimizer, (0.0, -1.0, -1.0, 0.0))
        masks.append("".join("01"[bit] for bit in run.masks["layer"][0].tolist()) if "mask" in run.state else "")
    # Step 1 imposes, 4 and 7 renew, and 8 is the last before the freeze. W after 1: 4 2 3 8; after 4: 4 5 6 8; after 7:
    # 4 8 9 8 (the earlier 8); after 8: 4 9 10 8.
    assert masks == ["1001", "1001", "1001", "0011", "0011", "0011", "0110", "0110", "0110"]


@pytest.mark.parametrize("finish", ["frozen", "sr-ste"])
def test_the_optimizer_starts_anew_for_the_pruned_weights(finish):
    model = tiny_model()
    run = ADMM(CONFIG, admm=0.5, finish=finish).prepare(model, total_steps=6)
    optimizer = train(model, run, 3)
    weight, bias = run.weight(next(iter(run.configs))), model.bert.encoder.layer[0].output.dense.bias
    assert optimizer.state[weight]["step"] == 3
    train(model, run, 1, optimizer, first=3)
    assert optimizer.state[weight]["step"] == 1 and optimizer.state[bias]["step"] == 4
    train(model, run, 1, optimizer, first=4)
    assert optimizer.state[weight]["step"] == 2


def test_frozen_masks_hold_against_momentum_and_decay():
    model = tiny_model()
    run = ADMM(CONFIG, admm=0.3).prepare(model, total_steps=10)
    optimizer = train(model, run, 3)
    masks = {path: mask.clone() for path, mask in run.masks.items()}
    kept = {path: run.weight(path).detach().clone() for path in masks}
    train(model, run, 7, optimizer, first=3)
    for path, mask in masks.items():
        assert torch.equal(run.masks[path], mask) and not run.weight(path)[~mask].any()
        assert not torch.equal(run.weight(path), kept[path])


# int8


@pytest.mark.parametrize("finish", ["frozen", "sr-ste"])
@pytest.mark.parametrize("config", [sb.Int8Config(), JOINT, sb.Int8Config("static")], ids=str)
def test_the_exported_int8_weight_is_the_trained_one(config, finish):
    model = tiny_model()
    run = ADMM(config, admm=0.4, finish=finish, every=1, freeze=0.2).prepare(model, total_steps=10)
    optimizer = train(model, run, 4)
    starts = {path: run.weight(path).detach().clone() for path in run.configs}
    train(model, run, 6, optimizer, first=4)
    trained = {path: run.weight(path).detach().clone() for path in run.configs}
    assert all(not torch.equal(trained[path], starts[path]) for path in trained)
    plan = run.finalize()
    sb.compress_(model, plan)
    for path, weight in trained.items():
        module = model.get_submodule(path)
        assert torch.equal(module.to_linear().weight, weight)
        if config.weights is not None:
            assert nm.find_violation(weight, 2, 4) is None


def test_golden_int8_finish():
    """The dense weight stays behind the grid and moves by the rounded one's gradient."""
    model = one_layer([127.0, 10.3, -3.0, 0.2])
    run, optimizer = start(model, sb.Int8Config(), total_steps=3, admm=1 / 3, rho=0.0)
    step(model, optimizer, (0.0,) * 4)
    # The grid's a by hand: q = 127, 10, -3, 0, a = (16129 + 103 + 9) / (16129 + 100 + 9) = 16241 / 16238.
    a = 16241 / 16238
    assert model.layer.weight[0].tolist() == pytest.approx([127 * a, 10 * a, -3 * a, 0.0], rel=1e-6)
    grid = model.layer.weight.detach().clone()
    assert state(run, "hidden") == [0.0] * 4
    # A dense step of a third: the second goes to 10 + 1/3, which rounds to 10 still, and twice that to 11.
    step(model, optimizer, (0.0, -2 / 3, 0.0, 0.0))
    assert torch.equal(model.layer.weight, grid)
    assert state(run, "hidden") == pytest.approx([0.0, 1 / 3, 0.0, 0.0], abs=1e-5)
    step(model, optimizer, (0.0, -2 / 3, 0.0, 0.0))
    assert model.layer.weight[0, 1].item() == pytest.approx(11 * a)
    assert state(run, "hidden")[1] == pytest.approx(10 * a + 2 / 3 - 11 * a, abs=1e-5)


def test_the_dense_weight_comes_back_exactly():
    model = tiny_model()
    run = ADMM(JOINT, admm=0.5, finish="sr-ste", freeze=0.0).prepare(model, total_steps=20)
    optimizer = train(model, run, 12)
    path = next(iter(run.configs))
    dense = run.weight(path).detach() + run.state["hidden"][path]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, run, 1, optimizer, first=12)
    assert torch.equal(run.weight(path) + run.state["hidden"][path], dense)
    assert torch.equal(int8.dequantize(*int8.quantize_weight(run.weight(path).detach())), run.weight(path))


# configs, projections, targets


CASES = {
    "n:m": (CONFIG, {}),
    "columns": (sb.NMConfig(2, 4, columns=0.5), {}),
    "unstructured": (sb.BitmapConfig(0.3), {}),
    "rows of one": (CONFIG, {"projection": Block(1, 4, 2)}),
    "block": (sb.BitmapConfig(0.375), {"projection": Block(4, 4, 6)}),
    "dictionary": (sb.BitmapConfig(0.25), {"projection": Dictionary(2, 4, 2, size=8)}),
    "n:m dictionary": (sb.NMConfig(2, 8), {"projection": Dictionary(1, 8, 2, size=8)}),
    "int8": (sb.Int8Config(), {}),
    "joint": (JOINT, {}),
    "mixed": ({"query": CONFIG, "key": JOINT, "value": sb.Int8Config(), "output": sb.BitmapConfig(0.2)}, {}),
}


@pytest.mark.parametrize("finish", ["frozen", "sr-ste"])
@pytest.mark.parametrize("case", CASES)
def test_the_exported_plan_meets_its_target(case, finish):
    config, options = CASES[case]
    model = tiny_model()
    names = list(model.state_dict())
    run = ADMM(config, finish=finish, every=1, freeze=0.2, **options).prepare(model, total_steps=5)
    train(model, run, 5)
    plan = run.finalize()
    assert list(model.state_dict()) == names and all(type(model.get_submodule(p)) is nn.Linear for p in plan.layers)
    for path, found in plan.layers.items():
        expected, weight = run.configs[path], model.get_submodule(path).weight
        if isinstance(expected, sb.BitmapConfig):
            assert found.density == pytest.approx(expected.density, abs=1 / weight.numel())
            assert abs(int(weight.count_nonzero()) - expected.density * weight.numel()) <= 1
        else:
            assert found == expected
        sparse = expected.weights if isinstance(expected, sb.Int8Config) else expected
        if isinstance(sparse, sb.NMConfig) and sparse.columns is None:
            assert nm.find_violation(weight.detach(), sparse.n, sparse.m) is None
            assert isinstance(expected, sb.Int8Config) or float((weight != 0).float().mean()) == sparse.n / sparse.m
        if "projection" in options:
            tiles = options["projection"]
            grouped = weight.view(weight.shape[0] // tiles.p, tiles.p, -1, tiles.q).transpose(1, 2)
            shapes = (grouped != 0).reshape(-1, tiles.p * tiles.q)
            assert (shapes.sum(-1) == tiles.k).all()
            if isinstance(tiles, Dictionary):
                assert len(run.state_dict()["patterns"]) <= tiles.size
                allowed = set(map(tuple, run.state_dict()["patterns"].tolist()))
                assert set(map(tuple, shapes.tolist())) <= allowed
    expected = {path: model.get_submodule(path).weight.detach().clone() for path in plan.layers}
    with torch.no_grad():
        before = model(input_ids=tokens()).logits
    sb.compress_(model, plan)
    for path, weight in expected.items():
        module = model.get_submodule(path)
        if module.columns is None if hasattr(module, "columns") else True:
            assert torch.equal(module.to_linear().weight, weight), path
    if not any(isinstance(c, sb.Int8Config) for c in plan.layers.values()):
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=tokens()).logits, before)


def test_the_dictionary_is_that_of_all_layers():
    model = tiny_model()
    run = ADMM(sb.BitmapConfig(0.25), projection=Dictionary(2, 4, 2, size=5)).prepare(model, total_steps=5)
    weights = [model.get_submodule(path).weight for path in run.configs]
    expected = Dictionary(2, 4, 2, size=5).fit(weights).patterns
    assert torch.equal(run.state_dict()["patterns"], expected)
    given = Dictionary(2, 4, 2, patterns=expected[:3])
    run = ADMM(sb.BitmapConfig(0.25), projection=given).prepare(model, total_steps=5)
    assert torch.equal(run.state_dict()["patterns"], expected[:3])


def test_finalize_in_the_first_phase_projects():
    model = tiny_model()
    run = ADMM(CONFIG).prepare(model, total_steps=10)
    train(model, run, 2)
    weights = {path: run.weight(path).detach().clone() for path in run.configs}
    run.finalize()
    for path, weight in weights.items():
        assert torch.equal(run.weight(path), nm.project(weight, 2, 4))


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("finish", ["frozen", "sr-ste"])
def test_defaults_fit_any_number_of_steps(total_steps, finish):
    model = tiny_model()
    run = ADMM(CONFIG, finish=finish).prepare(model, total_steps=total_steps)
    train(model, run, total_steps)
    run.finalize().verify(model)


@pytest.mark.parametrize("finish", ["frozen", "sr-ste"])
def test_same_seed_same_masks(finish):
    found = []
    for _ in range(2):
        model = tiny_model(seed=3)
        run = ADMM(CONFIG, finish=finish, every=1).prepare(model, total_steps=6)
        train(model, run, 6)
        found.append({path: mask.clone() for path, mask in run.masks.items()})
    assert all(torch.equal(found[0][path], found[1][path]) for path in found[0])


# resuming


RESUMED = {
    "frozen": (CONFIG, {}),
    "sr-ste": (CONFIG, {"finish": "sr-ste", "every": 2, "freeze": 0.2}),
    "decoupled": (CONFIG, {"decoupled": True}),
    "dictionary": (sb.BitmapConfig(0.25), {"projection": Dictionary(2, 4, 2, size=8)}),
    "joint": (JOINT, {"finish": "sr-ste", "every": 1, "freeze": 0.2}),
    "mixed": ({"query": CONFIG, "value": sb.Int8Config()}, {"finish": "sr-ste", "every": 1, "freeze": 0.2}),
}


@pytest.mark.parametrize("at", [1, 4, 6, 7, 9])
@pytest.mark.parametrize("case", RESUMED)
def test_resuming_goes_on_as_if_uninterrupted(case, at):
    config, options = RESUMED[case]
    method = ADMM(config, admm=0.6, rounds=3, **options)
    model = tiny_model()
    run = method.prepare(model, total_steps=10)
    optimizer = train(model, run, at)
    saved, weights = run.state_dict(), copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    train(model, run, 10 - at, optimizer, first=at)

    other = tiny_model(seed=9)
    resumed = method.prepare(other, total_steps=10)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert resumed.step == at and resumed.metrics() == pytest.approx(resumed.metrics())
    second = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
    second.load_state_dict(moments)
    train(other, resumed, 10 - at, second, first=at)
    for path, mask in run.masks.items():
        assert torch.equal(resumed.masks[path], mask)
    assert run.residuals == resumed.residuals
    for plan, trained in ((run.finalize(), model), (resumed.finalize(), other)):
        plan.verify(trained)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    model = tiny_model()
    run = ADMM(CONFIG, admm=0.5).prepare(model, total_steps=4)
    first = run.state_dict()
    train(model, run, 3)
    second = run.state_dict()
    assert "mask." + next(iter(run.configs)) in second and not any(name.startswith("anchor") for name in second)
    other = ADMM(CONFIG, admm=0.5).prepare(tiny_model(), total_steps=4)
    for bad, message in (
        ({**second, "step": 1}, "of other layers than the run"),
        ({**first, "step": 3}, "of other layers than the run"),
        ({**first, "total_steps": 5}, "total_steps is 5, expected 4"),
        ({**first, "patterns": torch.zeros(1, 8)}, "has a dictionary of patterns, expected none"),
        ({**first, "rho." + next(iter(run.configs)): torch.zeros(2)}, r"rho is torch.float32 \(2,\), expected"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(bad)
        assert other.step == 0 and set(other.state) == other._kinds_at(0)
        assert all(other.state["anchor"].keys() == kind.keys() for kind in other.state.values())
    other.load_state_dict(second)
    assert other.step == 3

    tiles = ADMM(sb.BitmapConfig(0.25), projection=Dictionary(2, 4, 2, size=4)).prepare(model, total_steps=4)
    patterns = tiles.state_dict()["patterns"]
    for bad, message in (
        ({**tiles.state_dict(), "patterns": patterns[:, :4]}, r"the patterns are torch.bool \(4, 4\), expected"),
        ({**tiles.state_dict(), "patterns": [1]}, "the patterns are list, expected a tensor"),
        ({name: t for name, t in tiles.state_dict().items() if name != "patterns"}, "no dictionary"),
    ):
        with pytest.raises(ValueError, match=message):
            tiles.load_state_dict(bad)
        assert torch.equal(tiles.state_dict()["patterns"], patterns)


# what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"every": 1.5}, "every is 1.5"),
        ({"rho": -1.0}, "rho is -1"),
        ({"rho_growth": 0.9}, "rho_growth is 0.9"),
        ({"rho_max": float("inf")}, "rho_max is inf"),
        ({"finish": "dense"}, "finish is 'dense', expected one of frozen, sr-ste"),
        ({"admm": 0.0}, "admm is 0"),
        ({"admm": 1.1}, "admm is 1.1"),
        ({"admm": 0.9, "freeze": 0.2, "finish": "sr-ste"}, "expected at most 1 together"),
        ({"sr_ste_decay": float("nan")}, "sr_ste_decay is nan"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ADMM(CONFIG, **options)


def test_a_projection_has_to_be_one():
    with pytest.raises(TypeError, match="projection is NMConfig, expected Block, Dictionary or None"):
        ADMM(CONFIG, projection=CONFIG)


@pytest.mark.parametrize(
    "config, projection, message",
    [
        (sb.LowRankConfig(ratio=0.5), None, "there is no projection for low-rank:0.5"),
        (sb.BitmapConfig(0.4), Block(2, 4, 4), r"Block\(2, 4, 4\) keeps the density 0.5, but the config is bitmap:0.4"),
        (CONFIG, Block(2, 2, 2), r"Block\(2, 2, 2\) does not make 2:4"),
        (CONFIG, Block(1, 8, 4), "does not make 2:4"),
        (sb.NMConfig(2, 4, columns=0.5), Block(1, 4, 2), "does not make 2:4@0.5"),
        (sb.Int8Config(), Block(1, 4, 2), "does not make int8"),
        (sb.BitmapConfig(1 / 9), Block(3, 3, 1), "which tiles of 3 x 3 do not divide"),
    ],
)
def test_configs_without_a_fitting_projection_are_refused(config, projection, message):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"ADMM: bert.encoder.layer.0.*: .*{message}"):
        ADMM(config, projection=projection).prepare(model, total_steps=10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_more_rounds_than_steps_are_refused():
    with pytest.raises(ValueError, match=r"7 rounds do not fit the 6 steps of the first phase \(0.6 of 10\)"):
        ADMM(CONFIG, rounds=7).prepare(tiny_model(), total_steps=10)
    assert ADMM(CONFIG, rounds=6).prepare(tiny_model(), total_steps=10).round_ends == [1, 2, 3, 4, 5, 6]
    assert ADMM(CONFIG, rounds=4).prepare(tiny_model(), total_steps=10).round_ends == [2, 3, 5, 6]


def test_nan_leaves_the_model_as_it_was():
    model = tiny_model()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    before = model.bert.encoder.layer[0].output.dense.weight.clone()
    with pytest.raises(ValueError, match="layer.1.output.dense: weight holds NaN"):
        ADMM(CONFIG).prepare(model, total_steps=1)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, before)


def test_a_teacher_is_refused():
    with pytest.raises(ValueError, match="takes no teacher"):
        ADMM(CONFIG).prepare(tiny_model(), total_steps=1, teacher=tiny_model())


def test_a_layer_that_obeys_already_stays_finite():
    model = one_layer([4.0, 0.0, 0.0, 8.0])
    run, optimizer = start(model, total_steps=4, admm=0.5)
    for _ in range(4):
        step(model, optimizer)
    assert torch.isfinite(model.layer.weight).all()
    model = one_layer([0.0] * 4)
    run, optimizer = start(model, total_steps=4, admm=0.5)
    for _ in range(4):
        step(model, optimizer)
    assert torch.isfinite(model.layer.weight).all()


def test_weights_that_do_not_train_are_projected_all_the_same():
    model = tiny_model()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    run = ADMM(CONFIG, finish="sr-ste").prepare(model, total_steps=6)
    start = {path: run.weight(path).detach().clone() for path in run.configs}
    train(model, run, 6, torch.optim.SGD(model.classifier.parameters(), lr=0.1))
    run.finalize()
    for path, weight in start.items():
        assert torch.equal(run.weight(path), nm.project(weight, 2, 4))
