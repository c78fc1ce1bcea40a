"""LoSparse: the split, the scores, pruning and regrowth, what is exported, and the distillation run after it."""

import copy
import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebert as sb
from sparsebert.configs import BitmapConfig, NMConfig, RowsConfig
from sparsebert.formats import low_rank, rows
from sparsebert.methods import FactorTuning, LoSparse
from sparsebert.methods.factored import FactoredLinear
from sparsebert.methods.losparse import INITS, random_factors
from sparsebert.nn import LowRankSparseLinear
from tiny_models import outputs, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def config(sparse=None, **rank):
    return sb.LowRankSparseConfig(**(rank or {"ratio": 0.2}), sparse=sparse or RowsConfig(0.15))


KINDS = {"rows": RowsConfig(0.15), "bitmap": BitmapConfig(0.15), "n:m": NMConfig(1, 4)}


def train(model, run, steps, *, optimizer=None, seed=0, teacher=False):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    run.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        inputs = {"input_ids": tokens(), "labels": torch.randint(0, 2, (2,), generator=generator)}
        output = model(**inputs)
        (output.loss + run.loss(output, inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def sparse_parts(run):
    return {path: run.factors(path)["sparse"].detach() for path in run.configs}


def kept_rows(parts):
    return {path: (part != 0).any(1) for path, part in parts.items()}


@pytest.mark.parametrize("family", ["bert", "deberta-v3", "modernbert"])
def test_at_the_start_the_model_computes_what_it_did(family):
    model = tiny_model(family)
    before = outputs(model)
    LoSparse(config()).prepare(model, total_steps=20)
    assert (outputs(model) - before).abs().max() < 1e-4


@pytest.mark.parametrize("init", INITS)
def test_what_each_init_gives(init):
    model = tiny_model()
    for linear in model.bert.encoder.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data *= 10  # the layers of a new model do next to nothing beside its residuals
    before = outputs(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    run = LoSparse(config(), init=init).prepare(model, total_steps=20)
    for path in run.configs:
        u, v, sparse = (run.factors(path)[name].detach() for name in ("u", "v", "sparse"))
        weight = weights[f"{path}.weight"]
        if init == "random":
            assert torch.equal(sparse, weight)
        else:
            torch.testing.assert_close(sparse, weight - u @ v)
        if init == "svd":
            theirs = low_rank.factorize(weight, len(v))
            assert torch.equal(u, theirs[0]) and torch.equal(v, theirs[1])
        else:
            drawn = random_factors(weight, len(v), seed=0, name=path)
            assert torch.equal(u, drawn[0]) and torch.equal(v, drawn[1])
        change = (run.weight(path) - weight).norm() / weight.norm()
        assert 0.07 < change < 0.14 if init == "random" else change < 1e-6
    moved = (outputs(model) - before).abs().max() / before.abs().max()
    assert 0.01 < moved < 0.5 if init == "random" else moved < 1e-5


def test_with_random_factors_the_old_weight_is_not_trained():
    model = one_layer([[4.0, 0.0], [0.0, 1.0]])
    held = model.layer.weight
    run = LoSparse({"layer": config(RowsConfig(0.5), rank=1)}, init="random").prepare(model, total_steps=4)
    with torch.no_grad():
        run.factors("layer")["sparse"].zero_()
    assert held.tolist() == [[4.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
@pytest.mark.parametrize("rank", [1, 6])
def test_random_factors_have_the_norm_they_are_said_to(shape, rank):
    """In the mean over 400 seeds. At rank 1 |u v|^2 = |u|^2 |v|^2 has the relative variance (1 + 2 / 48) (1 + 2 / 16) -
    1 = 0.17, and the mean a deviation of sqrt(0.17 / 400) = 2 %: four of them are allowed."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).mul(3)
    found = []
    lengths = torch.zeros(2, dtype=torch.float64)
    for seed in range(400):
        u, v = random_factors(weight, rank, seed=seed, name="layer")
        assert u.shape == (shape[0], rank) and v.shape == (rank, shape[1])
        found.append((u @ v).double().square().sum())
        lengths += torch.stack([u.double().square().sum(), v.double().square().sum()])
    expected = 0.01 * weight.double().square().sum()
    assert abs(torch.stack(found).mean() / expected - 1) < 0.08
    assert abs(lengths[0] / lengths[1] - 1) < 0.08


def test_random_factors_follow_from_seed_and_path_alone():
    def factors(**options):
        torch.manual_seed(options.pop("torch_seed", 0))
        model = tiny_model()
        run = LoSparse(config(), init="random", **options).prepare(model, total_steps=20)
        return {path: run.factors(path)["u"].detach() for path in run.configs}

    first, again, other = factors(), factors(torch_seed=7), factors(seed=1)
    assert all(torch.equal(first[path], again[path]) for path in first)
    assert not any(torch.equal(first[path], other[path]) for path in first)
    weight = torch.ones(8, 8)
    a, b = (random_factors(weight, 2, seed=0, name=name)[0] for name in ("a", "b"))
    assert not torch.equal(a, b)
    # Drawn in one dtype for all, and rounded.
    half = random_factors(weight.bfloat16(), 2, seed=0, name="a")
    assert half[0].dtype == torch.bfloat16 and torch.equal(half[0], a.bfloat16())
    # By hand: the same draws in every release, or a seed would mean nothing.
    state = torch.Generator().manual_seed(int(hashlib.sha256(b"0 a").hexdigest()[:8], 16))
    expected = torch.randn(8, 2, generator=state, dtype=torch.float64)
    # c = 0.1 * 8 / sqrt 2, and the variance c / 8.
    torch.testing.assert_close(a, (expected * (0.1 / 2**0.5) ** 0.5).float())


def test_random_factors_of_zeros_are_zeros():
    u, v = random_factors(torch.zeros(3, 4), 2, seed=0, name="layer")
    assert not u.any() and not v.any()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_init_trains_to_a_plan(init, kind):
    model = tiny_model()
    run = LoSparse(config(KINDS[kind]), init=init).prepare(model, total_steps=6)
    start = {path: run.factors(path)["u"].detach().clone() for path in run.configs}
    train(model, run, 6)
    plan = run.finalize()
    plan.verify(model)
    assert not any(torch.equal(plan.factors[path]["u"], start[path]) for path in start)
    model.eval()
    expected = outputs(model)
    sb.compress_(model, plan)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


def one_layer(weight, dtype=torch.float32):
    model = nn.Module()
    model.layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    model.layer.weight.data = torch.tensor(weight, dtype=dtype)
    return model


def test_golden_steps():
    """W = diag(4, 1) at rank 1: u v = diag(4, 0), S = diag(0, 1). With x = (1, 2) and loss sum(y), G = dL/dS is
    ((1, 2), (1, 2)) at every step; SGD at 1/8, windows of 2 steps, beta1 1/2, of 6 steps the last 3 at the target, one
    row of two.

    step  S before pruning             means of |S G|   I                  Ī                    pruned
    1     (-1/8 -1/4), (-1/8 3/4)      5/16  13/16      5/16   13/16       0       0
    2     (-1/4 -1/2), (-1/4 1/2)      5/8   5/8        15/32  23/32       0       0
    3     (-3/8 -3/4), (-3/8 1/4)      15/16 7/16       15/16  7/16        15/64   23/64        the first
    4     (-1/8 -1/4), (-1/2 0)        5/16  1/4        5/8    11/32       15/64   23/64        the first
    5     (-1/8 -1/4), (-5/8 -1/4)     5/16  9/16       5/16   9/16        55/128  45/128       the second: the first is
    6     (-1/4 -1/2), (-1/8 -1/4)     5/8   5/16       15/32  7/16        55/128  45/128       back
    """
    model = one_layer([[4.0, 0.0], [0.0, 1.0]])
    options = {"beta1": 0.5, "window": 2, "start": 0, "end": 3}
    run = LoSparse({"layer": config(RowsConfig(0.5), rank=1)}, **options).prepare(model, total_steps=6)
    assert run.factors("layer")["sparse"].tolist() == [[0.0, 0.0], [0.0, 1.0]]
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / 8)
    run.attach(optimizer)
    found = []
    for _ in range(6):
        optimizer.zero_grad()
        model.layer(torch.tensor([[1.0, 2.0]])).sum().backward()
        optimizer.step()
        state = (run.state["mean"]["layer"].tolist(), run.state["smoothed"]["layer"].tolist())
        found.append((run.factors("layer")["sparse"].tolist(), *state))
    zero = [0.0, 0.0]
    assert found == [
        ([[-1 / 8, -1 / 4], [-1 / 8, 3 / 4]], [5 / 16, 13 / 16], zero),
        ([[-1 / 4, -1 / 2], [-1 / 4, 1 / 2]], [15 / 32, 23 / 32], zero),
        ([zero, [-3 / 8, 1 / 4]], [15 / 16, 7 / 16], [15 / 64, 23 / 64]),
        ([zero, [-1 / 2, 0.0]], [5 / 8, 11 / 32], [15 / 64, 23 / 64]),
        ([[-1 / 8, -1 / 4], zero], [5 / 16, 9 / 16], [55 / 128, 45 / 128]),
        ([[-1 / 4, -1 / 2], zero], [15 / 32, 7 / 16], [55 / 128, 45 / 128]),
    ]
    assert run.metrics()["remaining"] == 0.5 and run.metrics()["rows"] == 1
    plan = run.finalize()
    assert plan.layers == {"layer": config(RowsConfig(0.5), rank=1)}
    assert plan.factors["layer"]["sparse"].tolist() == [[-1 / 4, -1 / 2], zero]


class Toy(nn.Module):
    """Two layers whose rows differ in length."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 5)
        self.double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def toy_batches(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 8, 6, generator=generator, dtype=torch.float64)


def reference(steps, ratio, *, window, start, end, beta1, beta2, kind):
    """The method in its own words: explicit factors, scores of full shape, row means spread over their rows, and
    entries sorted by numpy. Returns S of both layers after every step."""
    toy = Toy()
    found = []
    parts = []
    for layer in (toy.first, toy.second):
        p, s, q = np.linalg.svd(layer.weight.detach().numpy())
        u = torch.from_numpy(p[:, :2] * np.sqrt(s[:2]))
        v = torch.from_numpy(np.sqrt(s[:2])[:, None] * q[:2])
        parts.append([t.clone().requires_grad_() for t in (u, v, layer.weight.detach() - u @ v, layer.bias.detach())])
    optimizer = torch.optim.AdamW([t for part in parts for t in part], lr=0.05, weight_decay=0.0)
    sparse = [part[2] for part in parts]
    mean, smooth, unsure = ([torch.zeros_like(s) for s in sparse] for _ in range(3))
    for c, x in enumerate(toy_batches(steps)):  # c counts from 0, as the published code does
        for i, (u, v, s, b) in enumerate(parts):
            x = x @ v.t() @ u.t() + x @ s.t() + b
            x = torch.tanh(x) if i == 0 else x
        optimizer.zero_grad()
        x.square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for i, s in enumerate(sparse):
                now = (s * s.grad).abs()
                if c % window == 0:
                    smooth[i] = beta1 * smooth[i] + (1 - beta1) * mean[i]
                    unsure[i] = beta2 * unsure[i] + (1 - beta2) * (mean[i] - smooth[i]).abs()
                    mean[i] = now
                else:
                    mean[i] = (mean[i] * (c % window) + now) / (c % window + 1)
            step = c + 1
            final = step > steps - end
            if final or (step > start and c % window == 0 and c):
                left = ratio if final else ratio + (1 - ratio) * (1 - (step - start) / (steps - start - end)) ** 3
                scores = [a * b if beta2 < 1 else a for a, b in zip(smooth, unsure, strict=True)]
                if kind == "rows":
                    scores = [s.mean(1, keepdim=True).expand_as(s) for s in scores]
                flat = np.concatenate([s.reshape(-1).numpy() for s in scores])
                threshold = np.sort(flat)[::-1][round(left * len(flat)) - 1]
                for s, score in zip(sparse, scores, strict=True):
                    s[score < threshold] = 0.0
            found.append([s.clone() for s in sparse])
    return found


@pytest.mark.parametrize("kind", ["rows", "bitmap"])
@pytest.mark.parametrize("beta2", [1.0, 0.8])
def test_equals_an_independent_implementation(kind, beta2):
    steps, ratio = 30, 0.3
    options = {"window": 4, "start": 2, "end": 9, "beta1": 0.85, "beta2": beta2}
    toy = Toy()
    sparse = RowsConfig(ratio) if kind == "rows" else BitmapConfig(ratio)
    run = LoSparse({"*": config(sparse, rank=2)}, **options).prepare(toy, total_steps=steps)
    optimizer = torch.optim.AdamW(toy.parameters(), lr=0.05, weight_decay=0.0)
    run.attach(optimizer)
    pruned = set()
    expected = reference(steps, ratio, kind=kind, **options)
    for batch, theirs in zip(toy_batches(steps), expected, strict=True):
        optimizer.zero_grad()
        toy(batch).square().mean().backward()
        optimizer.step()
        for ours, other in zip(sparse_parts(run).values(), theirs, strict=True):
            assert torch.equal(ours == 0, other == 0), run.step
            # Adam amplifies a difference in the last place: it divides by the root of squares.
            torch.testing.assert_close(ours, other, rtol=1e-7, atol=1e-9)
        pruned.add(sum(int((part == 0).sum()) for part in theirs))
    assert len(pruned) >= 4
    run.finalize()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["global", "matrix"])
def test_the_target_is_met_in_the_plan_and_after_packing(kind, granularity):
    model = tiny_model()
    names = list(model.state_dict())
    method = LoSparse(config(KINDS[kind]), granularity=granularity)
    run = method.prepare(model, total_steps=20)
    assert run.window == 2 and list(model.state_dict()) != names
    train(model, run, 20)
    metrics = run.metrics()
    plan = run.finalize()
    model.eval()
    assert list(model.state_dict()) == names
    assert not any(isinstance(module, FactoredLinear) for module in model.modules())
    plan.verify(model)
    parts = {path: factors["sparse"] for path, factors in plan.factors.items()}
    total = sum(part.numel() for part in parts.values())
    if kind == "n:m":
        kept = sum(int(part.count_nonzero()) for part in parts.values())
        assert kept == total // 4 and metrics["remaining"] == 0.25
        assert all(layer == method.config for layer in plan.layers.values())
    elif kind == "bitmap":
        kept = sum(int(part.count_nonzero()) for part in parts.values())
        per_layer = [round(0.15 * part.numel()) for part in parts.values()]
        assert kept == (round(0.15 * total) if granularity == "global" else sum(per_layer))
    else:
        alive = {path: int(mask.sum()) for path, mask in kept_rows(parts).items()}
        kept = sum(alive[path] * part.shape[1] for path, part in parts.items())
        widest = max(part.shape[1] for part in parts.values())
        if granularity == "global":
            assert 0 <= kept - round(0.15 * total) < widest
            assert len(set(alive.values())) > 3  # each layer has its own share
        else:
            assert all(alive[path] == rows.row_count(0.15, len(part)) for path, part in parts.items())
        assert metrics["rows"] == sum(alive.values())
        assert metrics["remaining"] == pytest.approx(kept / total)
    expected = outputs(model)
    weights = {path: model.get_submodule(path).weight.detach().clone() for path in plan.layers}
    sb.compress_(model, plan)
    stored = 0
    for path, weight in weights.items():
        packed = model.get_submodule(path)
        assert isinstance(packed, LowRankSparseLinear)
        torch.testing.assert_close(packed.to_linear().weight, weight, rtol=1e-6, atol=1e-6)
        state = packed.state_dict()
        stored += state["sparse.values"].numel()
        if kind == "rows":
            assert state["sparse.rows"].tolist() == kept_rows(parts)[path].nonzero().flatten().tolist()
    assert stored == kept
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


def test_on_the_way_groups_keep_ever_fewer():
    model = one_layer(torch.randn(4, 8).tolist())
    run = LoSparse({"layer": config(NMConfig(1, 4), rank=1)}, window=1, start=0, end=2).prepare(model, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run.attach(optimizer)
    found = []
    for step in range(10):
        optimizer.zero_grad()
        model.layer(torch.randn(3, 8)).square().sum().backward()
        optimizer.step()
        groups = (run.factors("layer")["sparse"].unflatten(1, (2, 4)) != 0).sum(2)
        assert len(set(groups.flatten().tolist())) == 1, step
        found.append(int(groups[0, 0]))
    # 4 r(t) = 1 + 3 (1 - t / 8)^3 rounded up: t = 2: 2.27, 3: 1.73, 7: 1.006; 8: 1
    assert found == [4, 3, 2, 2, 2, 2, 2, 1, 1, 1]


def with_rows(ratio, steps=6):
    """A layer that learns nothing beside one that does: its rows of S score nothing."""
    model = tiny_model()
    layers = {"*.0.attention.self.query": config(RowsConfig(ratio)), "*.1.output.dense": config(RowsConfig(ratio))}
    run = LoSparse(layers, window=1).prepare(model, total_steps=steps)
    return model, run


def test_a_layer_may_keep_no_row_and_another_all():
    model, run = with_rows(0.6)
    query, dense = run.configs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        # 32 x 32 entries and 32 x 64: 60 % of 3072 are fewer than the second's 2048.
        run.factors(dense)["sparse"].square().sum().backward()
        optimizer.step()
    plan = run.finalize()
    alive = kept_rows({path: factors["sparse"] for path, factors in plan.factors.items()})
    assert not alive[query].any() and int(alive[dense].sum()) == 29  # 29 * 64 = 1856 >= 1843
    assert rows.row_count(plan.layers[query].sparse.ratio, 32) == 0
    expected = outputs(model)
    sb.compress_(model, plan)
    assert model.get_submodule(query).state_dict()["sparse.rows"].numel() == 0
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


def test_a_plan_without_rows_survives_its_file(tmp_path):
    model, run = with_rows(0.01)
    run.step = 10**6  # past the window: all scores are zero, and the first row of the first layer wins
    plan = run.finalize()
    plan.save(tmp_path)
    again = sb.CompressionPlan.load(tmp_path)
    assert again.layers == plan.layers
    again.verify(model)


def test_with_all_of_s_nothing_is_pruned():
    model = tiny_model()
    run = LoSparse(config(RowsConfig(1.0))).prepare(model, total_steps=4)
    train(model, run, 4)
    assert run.metrics()["remaining"] == 1.0
    plan = run.finalize()
    assert all(layer.sparse == RowsConfig(1.0) for layer in plan.layers.values())


def test_a_row_is_alive_if_any_entry_is_not_zero():
    """Not if its sum is: a row that sums to zero must not be lost."""
    model = one_layer([[4.0, 0.0], [0.0, 1.0]])
    run = LoSparse({"layer": config(RowsConfig(0.5), rank=1)}, window=1).prepare(model, total_steps=2)
    run.step = 2
    run.state["smoothed"]["layer"].copy_(torch.tensor([1.0, 0.0]))
    with torch.no_grad():
        run.factors("layer")["sparse"].copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    plan = run.finalize()
    assert plan.factors["layer"]["sparse"].tolist() == [[1.0, -1.0], [0.0, 0.0]]
    assert plan.layers["layer"].sparse == RowsConfig(0.5)
    sb.compress_(model, plan)
    assert model.layer.state_dict()["sparse.rows"].tolist() == [0]


def test_ties_go_to_the_earlier_row_and_the_count_is_exact():
    """Scores that are all equal, all zero here, prune the same rows on every machine."""
    model = tiny_model()
    run = LoSparse(config(RowsConfig(0.15)), window=1).prepare(model, total_steps=3)
    run.step = 3
    plan = run.finalize()
    alive = kept_rows({path: factors["sparse"] for path, factors in plan.factors.items()})
    taken = [count for path, mask in alive.items() for count in mask.tolist()]
    first_out = taken.index(False)
    assert not any(taken[first_out:])
    kept = sum(int(mask.sum()) * model.get_submodule(path).in_features for path, mask in alive.items())
    assert 0 <= kept - round(0.15 * 2 * (4 * 32 * 32 + 2 * 32 * 64)) < 64


@pytest.mark.parametrize(
    ("kind", "beta2", "init"),
    [(kind, beta2, "svd") for beta2 in (1.0, 0.8) for kind in KINDS] + [("rows", 1.0, init) for init in INITS[1:]],
)
def test_resumes_as_if_it_had_not_stopped(kind, beta2, init):
    """Saved at step 8: inside a window of 3, before the last 4 steps of 13. Then also inside those."""
    method = LoSparse(config(KINDS[kind]), window=3, start=1, end=4, beta2=beta2, init=init)
    straight = tiny_model()
    run = method.prepare(straight, total_steps=13)
    optimizer = train(straight, run, 13)
    expected = {name: value.clone() for name, value in straight.state_dict().items()}

    model = tiny_model()
    run = method.prepare(model, total_steps=13)
    batches = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    dropout = None
    for stop in (8, 11, 13):
        steps = stop - run.step
        if run.step:
            other = tiny_model(seed=9)
            resumed = method.prepare(other, total_steps=13)
            other.load_state_dict(model.state_dict())
            resumed.load_state_dict(run.state_dict())
            fresh = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
            fresh.load_state_dict(optimizer.state_dict())
            model, run, optimizer = other, resumed, fresh
            torch.set_rng_state(dropout)
        run.attach(optimizer)
        model.train()
        for _ in range(steps):
            inputs = {"input_ids": tokens(), "labels": torch.randint(0, 2, (2,), generator=batches)}
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        dropout = torch.get_rng_state()
        run.detach()
    found = model.state_dict()
    assert list(found) == list(expected)
    # Both had dropout from the seed that tiny_model leaves behind.
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_same_seed_same_rows():
    found = []
    for _ in range(2):
        model = tiny_model()
        run = LoSparse(config()).prepare(model, total_steps=10)
        train(model, run, 10)
        found.append(kept_rows({path: parts["sparse"] for path, parts in run.finalize().factors.items()}))
    assert all(torch.equal(found[0][path], found[1][path]) for path in found[0])


def test_a_state_of_another_score_is_refused():
    run = LoSparse(config()).prepare(tiny_model(), total_steps=10)
    other = LoSparse(config(), beta2=0.5).prepare(tiny_model(), total_steps=10)
    with pytest.raises(ValueError, match="state is of other layers|expected"):
        run.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="state is of other layers"):
        other.load_state_dict(run.state_dict())


@pytest.mark.parametrize(
    ("beta2", "sparse", "numbers"),
    [
        (1.0, RowsConfig(0.15), 2 / 32),
        (0.5, RowsConfig(0.15), 3),
        (1.0, NMConfig(1, 4), 2),
        (0.5, BitmapConfig(0.1), 3),
    ],
)
def test_memory(beta2, sparse, numbers):
    """Numbers of state a weight of S: at most 3, and with rows only two a row."""
    run = LoSparse({"query": config(sparse)}, beta2=beta2).prepare(tiny_model(), total_steps=10)
    held = sum(t.numel() for kind in run.state.values() for t in kind.values() if t.is_floating_point())
    assert held == 2 * numbers * 32 * 32


def test_scores_see_an_optimizer_step_once_and_its_whole_gradient():
    """Two micro-batches a step: the published scripts call the pruner for each, with one step number."""
    model = one_layer([[4.0, 0.0], [0.0, 1.0]])
    run = LoSparse({"layer": config(RowsConfig(0.5), rank=1)}, window=2).prepare(model, total_steps=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / 8)
    run.attach(optimizer)
    for _ in range(2):
        model.layer(torch.tensor([[1.0, 2.0]])).sum().div(2).backward()
    optimizer.step()
    assert run.step == 1 and run.state["mean"]["layer"].tolist() == [5 / 16, 13 / 16]  # as in test_golden_steps


def test_a_layer_without_gradient_scores_nothing():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    run = LoSparse({"*": config(RowsConfig(0.5), rank=1)}, window=1).prepare(model, total_steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model["used"](torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
    assert not run.state["smoothed"]["idle"].any() and run.state["smoothed"]["used"].all()
    alive = kept_rows({path: parts["sparse"] for path, parts in run.finalize().factors.items()})
    assert alive["used"].all() and not alive["idle"].any()


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_never_switched(training):
    model = tiny_model()
    method = LoSparse(config(), window=1)
    model.train(training)
    run = method.prepare(model, total_steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    for _ in range(3):
        output = model(input_ids=tokens(), labels=torch.tensor([0, 1]))
        (output.loss + run.loss(output, {})).backward()
        optimizer.step()
        assert all(module.training is training for module in model.modules())
    run.finalize()
    assert all(module.training is training for module in model.modules())


def test_an_optimizer_made_before_is_refused():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = LoSparse(config()).prepare(model, total_steps=10)
    with pytest.raises(ValueError, match="not in the optimizer; prepare the run .* before the optimizer is made"):
        run.attach(optimizer)


@pytest.mark.parametrize("done", [0, 3, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_finalize_before_the_end_still_meets_the_target(done, kind):
    model = tiny_model()
    run = LoSparse(config(KINDS[kind]), window=4).prepare(model, total_steps=20)
    train(model, run, done)
    plan = run.finalize()
    plan.verify(model)
    parts = [factors["sparse"] for factors in plan.factors.values()]
    total = sum(part.numel() for part in parts)
    kept = sum(int(part.count_nonzero()) for part in parts)
    assert kept <= {"rows": 0.16, "bitmap": 0.151, "n:m": 0.25}[kind] * total
    sb.compress_(model, plan)


@pytest.mark.parametrize("steps", [2, 3, 5, 10, 37, 100, 1000])
def test_the_defaults_fit_any_number_of_steps(steps):
    run = LoSparse({"query": config()}).prepare(tiny_model(), total_steps=steps)
    assert run.window == min(10, max(1, steps // 10))
    due = [step for step in range(1, steps + 1) if run._due(step)]
    assert due[-1] == steps and due[0] > run.window
    left = [run.schedules[path].remaining(step) for path in run.configs for step in due[-max(1, int(0.275 * steps)) :]]
    assert set(left) == {0.15}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 6, "end": 4}, r"start and end take 6 \+ 4 steps, expected fewer than the 10"),
        ({"start": -1}, "start is -1"),
        ({"window": 10}, "due from step 9 of 10 on, but the first scores are there after a window of 10 steps"),
        ({"window": 3, "end": 8, "start": 0}, "due from step 3 of 10 on"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(options, message):
    model = tiny_model()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        LoSparse(config(), **options).prepare(model, total_steps=10)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"beta2": 2}, "beta2 is 2"),
        ({"window": 0}, "window is 0"),
        ({"granularity": "layer"}, "granularity is 'layer', expected one of global, matrix"),
        ({"init": "zeros"}, "LoSparse: init is 'zeros', expected one of svd, random, random-residual"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoSparse(config(), **options)


@pytest.mark.parametrize("wrong", [sb.NMConfig(2, 4), sb.LowRankConfig(ratio=0.2), sb.BitmapConfig(0.1)])
def test_a_config_without_a_sparse_part_is_refused(wrong):
    model = tiny_model()
    with pytest.raises(ValueError, match="LoSparse: bert.*has no sparse part; expected a LowRankSparseConfig"):
        LoSparse({"query": config(), "key": wrong}).prepare(model, total_steps=10)
    assert not any(isinstance(module, FactoredLinear) for module in model.modules())


def test_a_frozen_weight_is_refused():
    model = tiny_model()
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="layer.1.output.dense: weight does not require grad"):
        LoSparse(config()).prepare(model, total_steps=10)


def test_nan_leaves_the_model_as_it_was():
    model = tiny_model()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="layer.1.output.dense: weight holds NaN"):
        LoSparse(config()).prepare(model, total_steps=10)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before if "1.output.dense" not in name)


def test_a_teacher_is_for_the_second_run():
    with pytest.raises(ValueError, match="distil afterwards, with FactorTuning"):
        LoSparse(config()).prepare(tiny_model(), total_steps=10, teacher=tiny_model())


def pruned_model(sparse=None, seed=0):
    model = tiny_model(seed=seed)
    selection = {"query": config(sparse), "output": config(sparse), "intermediate": sb.LowRankConfig(ratio=0.3)}
    run = sb.methods.SVD(selection).prepare(model, total_steps=1)
    return model, run.finalize()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_teacher", [True, False])
def test_tuning_trains_the_factors_and_keeps_their_structure(kind, with_teacher):
    model, plan = pruned_model(KINDS[kind])
    names = list(model.state_dict())
    before = outputs(model)
    start = {path: {name: part.clone() for name, part in parts.items()} for path, parts in plan.factors.items()}
    teacher = tiny_model(seed=5) if with_teacher else None
    run = FactorTuning(plan).prepare(model, total_steps=4, teacher=teacher)
    model.eval()
    torch.testing.assert_close(outputs(model), before)
    train(model, run, 4)
    tuned = run.finalize()
    model.eval()
    assert list(model.state_dict()) == names and not model._forward_pre_hooks
    assert tuned.layers == plan.layers
    for path, parts in tuned.factors.items():
        assert all(torch.equal(plan.factors[path][name], start[path][name]) for name in parts)  # a copy was trained
        assert all(not torch.equal(part, start[path][name]) for name, part in parts.items())
        if "sparse" in parts:
            zero = start[path]["sparse"] == 0
            assert torch.equal(parts["sparse"] == 0, zero)
    expected = outputs(model)
    sb.compress_(model, tuned)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


def test_tuning_moves_every_entry_of_a_row_that_is_there():
    """Also those that happen to be zero: the packed form stores the whole row."""
    model = one_layer([[4.0, 0.0], [0.0, 1.0]])
    run = LoSparse({"layer": config(RowsConfig(0.5), rank=1)}, window=1).prepare(model, total_steps=2)
    plan = run.finalize()
    assert plan.factors["layer"]["sparse"].tolist() == [[0.0, 0.0], [0.0, 1.0]]
    run = FactorTuning(plan).prepare(model, total_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / 8)
    run.attach(optimizer)
    model.layer(torch.tensor([[1.0, 2.0]])).sum().backward()
    optimizer.step()
    assert run.finalize().factors["layer"]["sparse"].tolist() == [[0.0, 0.0], [-1 / 8, 3 / 4]]


def test_the_distillation_loss_is_the_formula():
    model, plan = pruned_model()
    teacher = tiny_model(seed=5)
    method = FactorTuning(plan, alpha_output=0.5, alpha_hidden=3.0, temperature=4.0)
    run = method.prepare(model, total_steps=1, teacher=teacher)
    run.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    inputs = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
    output = model(**inputs)
    assert len(output.hidden_states) == 3
    found = run.loss(output, inputs)
    theirs = teacher(input_ids=tokens(), output_hidden_states=True)
    p = (theirs.logits.double() / 4).softmax(-1)
    q = (output.logits.double() / 4).softmax(-1)
    kl = (p * (p.log() - q.log())).sum() / 2 * 16
    mse = sum(((s - t).double() ** 2).mean() for s, t in zip(output.hidden_states, theirs.hidden_states, strict=True))
    torch.testing.assert_close(found.double(), 0.5 * kl + 3.0 * mse, rtol=1e-5, atol=1e-6)
    assert found.requires_grad
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.any() for path in run.configs for p in run.factors(path).values())


def test_the_teacher_is_in_eval_mode_at_every_step_and_the_student_in_training():
    model, plan = pruned_model()
    teacher = tiny_model(seed=5).train()
    run = FactorTuning(plan).prepare(model, total_steps=3, teacher=teacher)
    modes = []
    teacher.register_forward_hook(lambda module, *_: modes.append(("teacher", module.training)))
    model.register_forward_hook(lambda module, *_: modes.append(("student", module.training)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    model.train()
    for _ in range(3):
        teacher.train()  # a loop that switches all it holds
        inputs = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
        output = model(**inputs)
        (output.loss + run.loss(output, inputs)).backward()
        optimizer.step()
    assert modes == [("student", True), ("teacher", False)] * 3


def test_an_evaluation_is_as_without_the_run():
    model, plan = pruned_model()
    run = FactorTuning(plan).prepare(model, total_steps=3, teacher=tiny_model(seed=5))
    run.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    model.eval()
    with torch.no_grad():
        output = model(input_ids=tokens(), labels=torch.tensor([0, 1]))
        assert output.hidden_states is None


@pytest.mark.parametrize("options", [{}, {"alpha_hidden": 0, "alpha_output": 1}], ids=["hidden", "output"])
def test_training_in_eval_mode_is_an_error(options):
    model, plan = pruned_model()
    run = FactorTuning(plan, **options).prepare(model, total_steps=3, teacher=tiny_model(seed=5))
    run.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    model.eval()
    inputs = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
    with pytest.raises(RuntimeError, match="was called 0 times in training mode"):
        run.loss(model(**inputs), inputs)


def test_a_step_without_the_teachers_loss_is_an_error():
    model, plan = pruned_model()
    run = FactorTuning(plan).prepare(model, total_steps=3, teacher=tiny_model(seed=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    model.train()(input_ids=tokens(), labels=torch.tensor([0, 1])).loss.backward()
    with pytest.raises(RuntimeError, match="was not part of this step"):
        optimizer.step()


def test_a_model_without_hidden_states_is_an_error():
    model, plan = pruned_model()
    run = FactorTuning(plan).prepare(model, total_steps=3, teacher=tiny_model(seed=5))
    run.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    model.train()
    inputs = {"input_ids": tokens()}
    output = model(**inputs)
    output.hidden_states = None
    with pytest.raises(RuntimeError, match="hidden states of BertForSequenceClassification are empty"):
        run.loss(output, inputs)


def test_tuning_resumes_as_if_it_had_not_stopped():
    model, plan = pruned_model()
    twin, teacher = copy.deepcopy(model), tiny_model(seed=5)
    method = FactorTuning(plan)
    run = method.prepare(model, total_steps=4, teacher=teacher)
    torch.manual_seed(3)
    optimizer = train(model, run, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
    dropout = torch.get_rng_state()
    run.detach()
    train(model, run, 2, optimizer=optimizer)

    resumed = method.prepare(twin, total_steps=4, teacher=teacher)
    twin.load_state_dict(saved[0])
    resumed.load_state_dict(saved[2])
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer.load_state_dict(saved[1])
    torch.set_rng_state(dropout)
    train(twin, resumed, 2, optimizer=optimizer)
    found, expected = twin.state_dict(), model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(resumed.state["mask"][path], run.state["mask"][path]) for path in run.configs)


def test_after_losparse_tuning_lowers_the_loss():
    model, teacher = tiny_model(), tiny_model()
    run = LoSparse(config()).prepare(model, total_steps=10)
    train(model, run, 10)
    plan = run.finalize()
    run = FactorTuning(plan).prepare(model, total_steps=20, teacher=teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run.attach(optimizer)
    model.train()
    losses = []
    for _ in range(20):
        inputs = {"input_ids": tokens()}
        loss = run.loss(model(**inputs), inputs)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    run.finalize().verify(model)


def test_what_does_not_fit_the_plan_is_refused():
    model, plan = pruned_model()
    with pytest.raises(TypeError, match="plan is LowRankSparseConfig, expected a CompressionPlan"):
        FactorTuning(config())
    with pytest.raises(ValueError, match="alpha_hidden is -1"):
        FactorTuning(plan, alpha_hidden=-1)
    with pytest.raises(ValueError, match="temperature is 0"):
        FactorTuning(plan, temperature=0)
    with pytest.raises(ValueError, match="weight differs from what its factors make"):
        FactorTuning(plan).prepare(tiny_model(seed=4), total_steps=1)
    with pytest.raises(ValueError, match="the teacher is the student itself"):
        FactorTuning(plan).prepare(model, total_steps=1, teacher=model)
    with pytest.raises(ValueError, match="expected no teacher then"):
        FactorTuning(plan, alpha_hidden=0).prepare(model, total_steps=1, teacher=tiny_model())
    smaller = copy.deepcopy(tiny_model())
    smaller.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="num_hidden_layers is 2 in the student .* and 1 in the teacher"):
        FactorTuning(plan).prepare(model, total_steps=1, teacher=smaller)
    pruned = sb.methods.Magnitude(sb.NMConfig(2, 4)).prepare(other := tiny_model(), total_steps=1).finalize()
    with pytest.raises(ValueError, match="2:4 is not made of factors"):
        FactorTuning(pruned).prepare(other, total_steps=1)
    assert not any(isinstance(module, FactoredLinear) for module in [*model.modules(), *other.modules()])
    assert not F.mse_loss(outputs(model), outputs(model))
