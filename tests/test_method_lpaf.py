"""LPAF: weighted factors of a sparse model, gates and their draws, the loss over two passes, resume, what is left."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebert as sb
from sparsebert.formats import low_rank
from sparsebert.methods import LPAF, Movement, fisher_row_weights
from sparsebert.methods.factored import factor_, unfactor_
from sparsebert.methods.lpaf import mix_
from sparsebert.methods.maths.distillation import kl_divergence, symmetric_kl
from sparsebert.methods.maths.factors import importance_of_kept, weighted_svd
from tiny_models import tiny_model, tokens

RANK = sb.LowRankConfig(rank=6)
SPARSITY_WEIGHTINGS = ("none", "row-share", "rows", "rows-columns")


def sparse_model(seed=0, family="bert"):
    """A random model with a tenth of the encoder's weights left, and rows and columns of unlike counts."""
    model = tiny_model(family, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.bert.encoder.modules():
        if isinstance(module, nn.Linear):
            scale = torch.rand(module.out_features, 1, generator=generator) * torch.rand(
                module.in_features, generator=generator
            )
            drawn = torch.rand(module.weight.shape, generator=generator) * scale
            mask = drawn > drawn.flatten().kthvalue(int(0.9 * drawn.numel())).values
            mask[0], mask[:, 1] = False, False
            module.weight.data.mul_(mask).mul_(20)
    return model


def batch(i=0, size=4):
    generator = torch.Generator().manual_seed(i)
    ids = torch.randint(3, 100, (size, 7), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(0, 2, (size,), generator=generator)}


def train(model, run, steps, optimizer=None, first=0):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    run.attach(optimizer)
    model.train()
    for i in range(first, first + steps):
        torch.manual_seed(i)  # dropout
        inputs = batch(i)
        output = model(**inputs)
        (output.loss + run.loss(output, inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.detach()
    return optimizer


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def draws(run):
    return {path: mixed.open for path, mixed in run._mixed.items()}


def expected_draws(run, step, number, p):
    generator = random.Random(f"{run.options.seed} {step} {number}")
    return {path: z for z, paths in ((generator.random() < p, paths) for paths in run._gates) for path in paths}


# Stage 2


def test_what_each_weighting_is():
    sparse = torch.tensor([[1.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    root = 2**0.5
    assert importance_of_kept(sparse, "none") == (None, None)
    rows, columns = importance_of_kept(sparse, "row-share")
    assert rows.tolist() == [0.75, 0.25, 0.0] and columns is None
    rows, columns = importance_of_kept(sparse, "rows")
    assert rows.tolist() == pytest.approx([3**0.5, 1.0, 0.0]) and columns is None
    rows, columns = importance_of_kept(sparse, "rows-columns")
    assert rows.tolist() == pytest.approx([3**0.5, 1.0, 0.0])
    assert columns.tolist() == pytest.approx([1.0, 1.0, 0.0, root])


def test_all_weightings_are_the_weighted_svd_and_differ():
    """Against the closed form worked out here, in float64: B = Dr⁻¹ [Dr W Dc]_k Dc⁻¹."""
    products = {}
    path = "bert.encoder.layer.0.intermediate.dense"
    for weighting in (*SPARSITY_WEIGHTINGS, "fisher"):
        model = sparse_model()
        weight = model.get_submodule(path).weight.detach().clone()
        bias = model.get_submodule(path).bias.detach().clone()
        fisher = {path: torch.arange(1.0, 65.0)} if weighting == "fisher" else None
        run = LPAF({path: RANK}, weighting=weighting, fisher=fisher).prepare(model, total_steps=10)
        u, v = (p.detach() for p in run.trained(path))
        k = (weight != 0).double()
        rows = {
            "none": torch.ones(64),
            "row-share": k.sum(1) / k.sum(),
            "rows": k.sum(1).sqrt(),
            "rows-columns": k.sum(1).sqrt(),
            "fisher": torch.arange(1.0, 65.0),
        }[weighting].double()
        columns = k.sum(0).sqrt() if weighting == "rows-columns" else torch.ones(32).double()
        rows, columns = rows.clamp(min=1e-3 * float(rows.max())), columns.clamp(min=1e-3 * float(columns.max()))
        p, s, q = torch.linalg.svd(rows[:, None] * weight.double() * columns)
        expected = (p[:, :6] * s[:6] @ q[:6]) / rows[:, None] / columns
        torch.testing.assert_close((u @ v).double(), expected, rtol=1e-4, atol=2e-5)
        # Balanced: an optimizer that goes by the scale of a parameter treats both alike.
        torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1), rtol=1e-4, atol=1e-5)
        assert torch.equal(model.get_submodule(path).bias, bias)
        products[weighting] = u @ v
    for a, b in itertools.combinations(products, 2):
        assert (products[a] - products[b]).abs().max() > 1e-3, (a, b)


@pytest.mark.parametrize("weighting", SPARSITY_WEIGHTINGS)
def test_empty_rows_and_columns_stay_exactly_empty(weighting):
    model = sparse_model()
    run = LPAF(RANK, weighting=weighting).prepare(model, total_steps=10)
    for path in run.configs:
        u, v = run.trained(path)
        assert not u[0].any() and not v[:, 1].any()
        assert u.any(1).sum() > 10
        assert not run.weight(path)[0].any() and not run.weight(path)[:, 1].any()


# Stage 3: gates


def test_golden_draws():
    """Seed 0 at p = 0.6 (step 0 of 10, mixed 1.0) and at 0.54 (step 1), two passes each, of four gates."""
    paths = [f"bert.encoder.layer.{i}.{name}.dense" for i in (0, 1) for name in ("intermediate", "output")]
    model = sparse_model()
    run = LPAF(dict.fromkeys(paths, RANK), mixed=1.0).prepare(model, total_steps=10)
    model.train()
    seen = []
    for step in (0, 1):
        run.step = step
        run._next_step()
        for number in (0, 1):
            model(**batch())
            assert draws(run) == expected_draws(run, step, number, [0.6, 0.54][step])
            seen.append([draws(run)[path] for path in paths])
    assert seen == [
        [True, False, False, False],  # random.Random("0 0 0") draws 0.274, 0.767, 0.875, 0.890, against 0.6
        [True, False, True, True],  # "0 0 1": 0.036, 0.776, 0.078, 0.037
        [True, True, True, True],  # "0 1 0": 0.499, 0.258, 0.231, 0.330, against 0.54
        [False, False, True, False],  # "0 1 1": 0.583, 0.982, 0.535, 0.729
    ]


def test_probability():
    run = LPAF(RANK, p0=0.5, mixed=0.4).prepare(sparse_model(), total_steps=10)
    assert [round(run.probability.at(t), 9) for t in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert run.metrics()["mixed"] == 0.5
    run = LPAF(RANK).prepare(sparse_model(), total_steps=1)
    assert run.probability.at(0) == 0.6 and run.probability.at(1) == 0.0


def test_gates_are_open_as_often_as_p_says():
    model = sparse_model()
    run = LPAF(RANK, p0=0.3).prepare(model, total_steps=10)
    model.train()
    count = 0
    for _ in range(200):
        run._draw(model, ())
        count += sum(draws(run).values())
    # 2400 draws: standard deviation 22
    assert abs(count - 720) < 90


@pytest.mark.parametrize(("gate", "count"), [("matrix", 12), ("layer", 2), ("model", 1)])
def test_what_draws_together(gate, count):
    model = sparse_model()
    run = LPAF(RANK, p0=0.5, gate=gate).prepare(model, total_steps=10)
    model.train()
    assert len(run._gates) == count and sorted(itertools.chain(*run._gates)) == sorted(run.configs)
    patterns = set()
    for _ in range(30):
        model(**batch())
        z = draws(run)
        patterns.add(tuple(z.values()))
        if gate == "layer":
            assert all(z[path] == z[f"bert.encoder.layer.{path.split('.')[3]}.output.dense"] for path in z)
        if gate == "model":
            assert len(set(z.values())) == 1
    # 2^1, 2^2, or nearly always another
    assert len(patterns) == {"model": 2, "layer": 4}.get(gate, len(patterns)) and (
        gate != "matrix" or len(patterns) > 20
    )


def test_each_pass_computes_what_was_drawn():
    model = without_dropout(sparse_model())
    dense = copy.deepcopy(model)
    run = LPAF(RANK, consistency=0.0).prepare(model, total_steps=10)
    model.train()
    for number in range(4):
        output = model(**batch()).logits
        torch.testing.assert_close(output, mixed_copy(dense, run, number)(**batch()).logits)
    assert len({tuple(expected_draws(run, 0, i, 0.6).values()) for i in range(4)}) == 4
    model.eval()
    low = mixed_copy(dense, run, None)
    assert any(draws(run).values())
    torch.testing.assert_close(model(**batch()).logits, low(**batch()).logits)


def mixed_copy(dense, run, number, step=0, p=0.6):
    """A plain model with W_s where pass ``number`` draws 1, and u v elsewhere; None: u v everywhere."""
    plain = copy.deepcopy(dense)
    z = dict.fromkeys(run.configs, False) if number is None else expected_draws(run, step, number, p)
    for path in run.configs:
        if not z[path]:
            plain.get_submodule(path).weight.data = run.weight(path).detach().clone()
    return plain


@pytest.mark.parametrize("train_sparse", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("p0", [0.0, 0.6, 1.0])
def test_every_parameter_has_a_gradient_in_every_pass(p0, train_sparse):
    """Else DistributedDataParallel waits for ever, and an optimizer's moments stand still in some steps."""
    model = sparse_model()
    run = LPAF(RANK, p0=p0, consistency=0.0, train_sparse=train_sparse).prepare(model, total_steps=10)
    model.train()
    for i in range(3):
        model.zero_grad()
        model(**batch(i)).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        for path, z in draws(run).items():
            u, v, *sparse = run.trained(path)
            assert bool(u.grad.any()) == (not z) and bool(v.grad.any()) == (not z)
            assert len(sparse) == (train_sparse and p0 > 0)
            if sparse:
                assert bool(sparse[0].grad.any()) == z and not sparse[0].grad[sparse[0] == 0].any()


def test_gradients_are_those_of_the_formula():
    """Of u, v and W_s, against y = x (z W_s + (1 - z) u v)ᵀ written out."""
    torch.manual_seed(0)
    u, v = torch.randn(5, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    sparse = torch.randn(5, 4, dtype=torch.float64) * (torch.rand(5, 4) < 0.5)
    x, target = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for z in (0, 1):
        linear = nn.Linear(4, 5, dtype=torch.float64)
        mixed = mix_(linear, u.clone(), v.clone(), sparse.clone(), trained=True)
        assert mixed is linear
        mixed.open = bool(z)
        F.mse_loss(linear(x), target).backward()
        leaves = [t.clone().requires_grad_() for t in (u, v, sparse)]
        weight = z * (leaves[2] * (sparse != 0)) + (1 - z) * (leaves[0] @ leaves[1])
        F.mse_loss(x @ weight.t() + linear.bias.detach(), target).backward()
        for found, ours in zip((mixed.u, mixed.v, mixed.pruned), leaves, strict=True):
            torch.testing.assert_close(found.grad, ours.grad, rtol=1e-12, atol=1e-14)


# Stage 3: the loss


def test_loss_is_the_formula():
    """In float64, with plain copies of the model for the two passes: the value, and the gradient of a bias."""
    model = without_dropout(sparse_model()).double()
    dense = copy.deepcopy(model)
    run = LPAF(RANK, consistency=0.7).prepare(model, total_steps=10)
    model.train()
    inputs = batch(size=6)
    output = model(**inputs)
    loss = output.loss + run.loss(output, inputs)
    loss.backward()

    first, second = (mixed_copy(dense, run, number) for number in (0, 1))
    second.bert.encoder.layer[0].output.dense.bias = first.bert.encoder.layer[0].output.dense.bias
    a, b = (m(input_ids=inputs["input_ids"]).logits for m in (first, second))
    assert not torch.equal(a, b)
    p, q = a.softmax(-1), b.softmax(-1)
    rows = torch.arange(6)
    ce = [-(m[rows, inputs["labels"]].log()).mean() for m in (p, q)]
    kl = [(m * (m / n).log()).sum(-1).mean() for m, n in ((p, q), (q, p))]
    expected = (ce[0] + ce[1]) / 2 + 0.7 / 2 * (kl[0] + kl[1])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        model.bert.encoder.layer[0].output.dense.bias.grad,
        first.bert.encoder.layer[0].output.dense.bias.grad,
        rtol=1e-9,
        atol=1e-15,
    )


def test_symmetric_kl():
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    expected = sum(
        F.kl_div(x.log_softmax(-1), y.log_softmax(-1), reduction="batchmean", log_target=True)
        for x, y in ((a, b), (b, a))
    )
    torch.testing.assert_close(symmetric_kl(a, b), expected, rtol=1e-12, atol=0)
    assert symmetric_kl(a, a) == 0
    assert torch.autograd.gradcheck(symmetric_kl, (a.requires_grad_(), b.requires_grad_()))


def count_passes(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_second_pass_ends_with_the_mixing():
    model = sparse_model()
    run = LPAF(RANK, mixed=0.5).prepare(model, total_steps=4)
    calls = count_passes(model)
    needed = []
    for i in range(4):
        needed.append(run.needs_loss)
        train(model, run, 1, first=i)
    assert len(calls) == 2 + 2 + 1 + 1 and needed == [True, True, False, False]


def test_no_second_pass_in_eval_mode_or_without_consistency():
    for consistency, training, expected in ((0.0, True, 1), (1.0, False, 1), (1.0, True, 2)):
        model = sparse_model()
        run = LPAF(RANK, consistency=consistency).prepare(model, total_steps=4)
        calls = count_passes(model.train(training))
        output = model(**batch())
        added = run.loss(output, batch())
        assert len(calls) == expected and bool(added != 0) == (expected == 2)


def test_a_step_without_the_loss_is_refused():
    model = sparse_model()
    run = LPAF(RANK).prepare(model, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    model.train()
    model(**batch()).loss.backward()
    with pytest.raises(RuntimeError, match="was not part of this step"):
        optimizer.step()


def test_teacher():
    teacher = tiny_model(seed=4).train()
    model = without_dropout(sparse_model())
    run = LPAF(RANK, consistency=0.0, distillation=0.5).prepare(model, total_steps=10, teacher=teacher)
    assert run.needs_loss
    model.train()
    inputs = batch()
    output = model(**inputs)
    found = run.loss(output, inputs)
    # Asked in evaluation mode, and left as it was.
    assert teacher.training
    teacher.eval()
    expected = 0.5 * kl_divergence(output.logits, teacher(**inputs).logits, 2.0)
    torch.testing.assert_close(found, expected)
    assert all(p.grad is None for p in teacher.parameters())

    # Without labels the task is the teacher's alone.
    run = LPAF(RANK).prepare(without_dropout(sparse_model()), total_steps=10, teacher=teacher)
    run.model.train()
    inputs.pop("labels")
    output = run.model(**inputs)
    first = kl_divergence(output.logits, teacher(**inputs).logits, 2.0)
    assert run.loss(output, inputs) > first
    with pytest.raises(ValueError, match="the teacher is the student itself"):
        LPAF(RANK).prepare(model := sparse_model(), total_steps=10, teacher=model)


def test_losses_that_would_mean_nothing():
    model = sparse_model().train()
    run = LPAF(RANK).prepare(model, total_steps=10)
    inputs = {"input_ids": tokens()}
    with pytest.raises(ValueError, match="gives no loss for these inputs, so the second pass has no task"):
        run.loss(model(**inputs), inputs)
    with pytest.raises(TypeError, match="inputs is list, expected the mapping"):
        run.loss(model(**inputs), [1])
    with pytest.raises(ValueError, match="without logits"):
        run.loss(object(), inputs)
    model.bert.encoder.gradient_checkpointing = True
    with pytest.raises(RuntimeError, match="gradient checkpointing would recompute"):
        run.loss(model(**batch()), batch())

    model = sparse_model().train()
    model.classifier = nn.Linear(32, 1)
    model.num_labels = model.config.num_labels = 1
    run = LPAF(RANK).prepare(model, total_steps=10)
    inputs = {"input_ids": tokens(), "labels": torch.randn(2)}
    with pytest.raises(ValueError, match="logits have one class"):
        run.loss(model(**inputs), inputs)


# The whole training


def test_without_mixing_it_is_plain_svd_fine_tuning():
    model, other = sparse_model(), sparse_model()
    run = LPAF(RANK, weighting="none", p0=0.0, consistency=0.0).prepare(model, total_steps=3)
    assert not run.state and not run.needs_loss
    for path in run.configs:
        linear = other.get_submodule(path)
        u, v = weighted_svd(linear.weight, 6)
        empty_rows, empty_columns = ((linear.weight == 0).all(dim) for dim in (1, 0))
        factor_(linear, {"u": u * ~empty_rows[:, None], "v": v * ~empty_columns})
    train(model, run, 3)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    other.train()
    for i in range(3):
        torch.manual_seed(i)
        other(**batch(i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_nothing_is_left_of_it():
    model = sparse_model()
    names = set(model.state_dict())
    start = {name: t.clone() for name, t in model.state_dict().items()}
    held = {path: set(vars(module)) for path, module in model.named_modules()}
    run = LPAF(sb.LowRankConfig(ratio=0.3)).prepare(model, total_steps=4)
    held = {path: held[path] for path in run.configs}
    assert torch.equal(model.bert.encoder.layer[0].output.dense.bias, start["bert.encoder.layer.0.output.dense.bias"])
    # W_s is no part of a checkpoint of the model.
    assert set(model.state_dict()) - names == {f"{path}.{name}" for path in run.configs for name in ("u", "v")}
    optimizer = train(model, run, 4)
    model.eval()
    with torch.no_grad():
        before = model(input_ids=tokens()).logits
    model.train()
    for mixed in run._mixed.values():
        mixed.open = True
    plan = run.finalize()
    assert set(model.state_dict()) == names
    assert not model._forward_pre_hooks and not optimizer._optimizer_step_pre_hooks
    assert all(type(model.get_submodule(path)) is nn.Linear for path in plan.layers)
    assert all(isinstance(run.weight(path), nn.Parameter) and run.weight(path).requires_grad for path in plan.layers)
    # Nothing of the run's is left on a layer.
    assert {path: vars(model.get_submodule(path)).keys() for path in plan.layers} == held
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens()).logits, before, rtol=1e-4, atol=1e-5)
    for path, factors in plan.factors.items():
        weight = run.weight(path)
        assert factors["u"].shape[1] == low_rank.rank_for_ratio(0.3, *weight.shape) == factors["v"].shape[0]
        assert factors.keys() == {"u", "v"}
    sb.compress_(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens()).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_sparse", [False, True], ids=["frozen", "trained"])
def test_sparse_weights(train_sparse):
    """Held as they were, or trained where they are not zero."""
    model = sparse_model()
    run = LPAF(RANK, train_sparse=train_sparse).prepare(model, total_steps=6)
    find = (lambda path: run.trained(path)[2]) if train_sparse else (lambda path: run._mixed[path].held)
    start = {path: find(path).detach().clone() for path in run.configs}
    train(model, run, 4, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1))
    for path, sparse in start.items():
        assert torch.equal(find(path) != 0, sparse != 0)
        assert torch.equal(find(path), sparse) != train_sparse
    assert ("sparse" in run.state) != train_sparse
    assert all(factors.keys() == {"u", "v"} for factors in run.finalize().factors.values())


@pytest.mark.parametrize("train_sparse", [False, True], ids=["frozen", "trained"])
def test_resumed_equals_uninterrupted(train_sparse):
    def start(seed):
        model = sparse_model(seed)
        run = LPAF(RANK, mixed=0.8, train_sparse=train_sparse).prepare(model, total_steps=6)
        return model, run, torch.optim.AdamW(model.parameters(), lr=1e-3)

    whole, run, optimizer = start(0)
    train(whole, run, 6, optimizer)

    first, half, optimizer = start(0)
    train(first, half, 3, optimizer)
    saved = (half.state_dict(), first.state_dict(), optimizer.state_dict())
    other, resumed, optimizer = start(5)
    other.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    resumed.load_state_dict(saved[0])
    assert resumed.needs_loss
    train(other, resumed, 3, optimizer, first=3)
    for (name, a), b in zip(whole.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    plans = [r.finalize() for r in (run, resumed)]
    assert plans[0].layers == plans[1].layers
    for path, factors in plans[0].factors.items():
        assert all(torch.equal(factors[name], plans[1].factors[path][name]) for name in ("u", "v"))


def test_resumes_inside_the_trainer(tmp_path):
    import transformers

    def trainer(seed, folder, steps=None):
        model = sparse_model(seed)
        run = LPAF(RANK, consistency=0.0).prepare(model, total_steps=6)
        args = transformers.TrainingArguments(
            str(folder),
            max_steps=6,
            per_device_train_batch_size=4,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            learning_rate=1e-3,
            disable_tqdm=True,
        )
        data = [{k: v[0] for k, v in batch(i, size=1).items()} for i in range(24)]
        return run, transformers.Trainer(model, args, train_dataset=data, callbacks=[sb.hf.CompressionCallback(run)])

    run, whole = trainer(0, tmp_path)
    whole.train()
    resumed, other = trainer(5, tmp_path)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.step == 6
    for (name, a), b in zip(whole.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for path in run.configs:
        assert torch.equal(run.state["sparse"][path], resumed._mixed[path].held)


def test_movement_then_lpaf():
    """The two runs after each other, to a model of packed factors."""
    model = tiny_model()
    run = Movement(sb.BitmapConfig(0.2)).prepare(model, total_steps=10)
    train(model, run, 10)
    run.finalize()
    bias = model.bert.encoder.layer[1].output.dense.bias.detach().clone()
    run = LPAF(RANK).prepare(model, total_steps=5)
    assert torch.equal(model.bert.encoder.layer[1].output.dense.bias, bias)
    train(model, run, 5)
    report = sb.compress_(model, run.finalize())
    assert len(report.layers) == 12
    assert all(type(m).__name__ == "LowRankLinear" for m in model.modules() if type(m).__name__.endswith("RankLinear"))


def test_same_seed_same_weights_and_another_seed_others():
    found = []
    for seed in (0, 0, 1):
        model = sparse_model()
        run = LPAF(RANK, seed=seed).prepare(model, total_steps=3)
        train(model, run, 3)
        found.append(torch.cat([p.detach().flatten() for path in run.configs for p in run.trained(path)]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_sparse_weight_moves_with_the_model():
    model = sparse_model()
    run = LPAF(RANK, p0=1.0).prepare(model, total_steps=3)
    model.double().train()
    assert model(**batch()).logits.dtype == torch.float64
    run.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    path = next(iter(run.configs))
    assert run.state["sparse"][path] is run._mixed[path].held and run.state["sparse"][path].dtype == torch.float64


def test_frozen_layers_stay_frozen_parameters():
    model = sparse_model()
    model.bert.encoder.layer[0].requires_grad_(False)
    run = LPAF(RANK).prepare(model, total_steps=3)
    train(model, run, 3)
    with torch.no_grad():
        plan = run.finalize()
    for path in plan.layers:
        weight = model.get_submodule(path).weight
        assert isinstance(weight, nn.Parameter) and weight.requires_grad == (".layer.0." not in path)


def test_unfactor_without_gradient_tracking_leaves_a_parameter():
    linear = nn.Linear(4, 5)
    factor_(linear, {"u": torch.randn(5, 2), "v": torch.randn(2, 4)})
    with torch.no_grad():
        factors = unfactor_(linear)
    assert isinstance(linear.weight, nn.Parameter) and linear.weight.requires_grad
    assert torch.equal(linear.weight, factors["u"] @ factors["v"])


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "w2"}, "weighting is 'w2', expected none, row-share, rows, rows-columns, fisher"),
        ({"gate": "head"}, "gate is 'head', expected matrix, layer, model"),
        ({"p0": 1.5}, "p0 is 1.5"),
        ({"mixed": 0.0}, "mixed is 0.0"),
        ({"consistency": -1.0}, "consistency is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"distillation": float("nan")}, "distillation is nan"),
        ({"weighting": "fisher"}, "go together"),
        ({"fisher": {}}, "go together"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        LPAF(RANK, **options)


def spoil_with_nan(weight):
    weight[0, 0] = float("nan")


def spoil_with_density(weight):
    weight.fill_(1.0)


def spoil_with_zeros(weight):
    weight.zero_()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_with_nan, "layer.1.output.dense: weight holds NaN"),
        (spoil_with_density, "layer.1.output.dense: weight has no zeros, so weighting='rows' says nothing"),
        (spoil_with_zeros, "layer.1.output.dense: weight is all zeros"),
    ],
)
def test_bad_weights_leave_the_model_as_it_was(spoil, message):
    model = sparse_model()
    spoil(model.bert.encoder.layer[1].output.dense.weight.data)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        LPAF(RANK).prepare(model, total_steps=3)
    assert not model._forward_pre_hooks
    for (name, a), b in zip(model.state_dict().items(), before.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_dense_model_is_refused_unless_the_weighting_does_not_look_at_zeros():
    with pytest.raises(ValueError, match="has no zeros"):
        LPAF(RANK, weighting="row-share").prepare(tiny_model(), total_steps=3)
    LPAF(RANK, weighting="none").prepare(tiny_model(), total_steps=3)
    model = tiny_model()
    fisher = fisher_row_weights(model, [batch()], RANK)
    LPAF(RANK, weighting="fisher", fisher=fisher).prepare(model, total_steps=3)
    fisher.pop("bert.encoder.layer.1.output.dense")
    with pytest.raises(ValueError, match="layer.1.output.dense: fisher has no rows"):
        LPAF(RANK, weighting="fisher", fisher=fisher).prepare(tiny_model(), total_steps=3)
    fisher["bert.encoder.layer.1.output.dense"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"row weights: shape \(3,\), expected \(32,\)"):
        LPAF(RANK, weighting="fisher", fisher=fisher).prepare(tiny_model(), total_steps=3)


def test_configs_that_are_not_low_rank():
    with pytest.raises(ValueError, match="2:4 is not low rank"):
        LPAF(sb.NMConfig(2, 4)).prepare(sparse_model(), total_steps=3)
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data[0] = 0
    with pytest.raises(ValueError, match="no roles known"):
        LPAF({"0": sb.LowRankConfig(rank=1)}, gate="layer").prepare(model, total_steps=3)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_states_that_do_not_fit_are_refused():
    run = LPAF(RANK).prepare(sparse_model(), total_steps=3)
    state = LPAF(RANK, p0=0.0).prepare(sparse_model(), total_steps=3).state_dict()
    with pytest.raises(ValueError, match="of other layers than the run"):
        run.load_state_dict(state)
