"""Plain SVD and FWSVD, with training afterwards."""

import pytest
import torch
from torch import nn

import sparsebert as sb
from sparsebert.configs import BitmapConfig, NMConfig, RowsConfig
from sparsebert.formats import low_rank, one_shot
from sparsebert.methods import SVD, fisher_row_weights
from sparsebert.methods.factored import FactoredLinear
from sparsebert.nn import LowRankLinear, LowRankSparseLinear
from tiny_models import outputs, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = sb.LowRankConfig(ratio=0.5)
SPARSE = {
    "rows": sb.LowRankSparseConfig(rank=4, sparse=RowsConfig(0.25)),
    "bitmap": sb.LowRankSparseConfig(rank=4, sparse=BitmapConfig(0.1)),
    "n:m": sb.LowRankSparseConfig(rank=4, sparse=NMConfig(1, 4)),
}


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": tokens(), "labels": torch.randint(0, 2, (2,), generator=generator)} for _ in range(count)]


def train(model, run, steps, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    run.attach(optimizer)
    model.train()
    for inputs in batches(steps):
        output = model(**inputs)
        (output.loss + run.loss(output, inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("config", [CONFIG, *SPARSE.values()], ids=["low-rank", *SPARSE])
def test_the_start_is_the_one_shot_approximation(config):
    model = tiny_model()
    weight = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    run = SVD(config).prepare(model, total_steps=1)
    expected = one_shot.approximate(weight, config)
    found = run.factors("bert.encoder.layer.0.output.dense")
    assert found.keys() == expected.factors.keys()
    assert all(torch.equal(found[name], part) for name, part in expected.factors.items())
    assert (run.weight("bert.encoder.layer.0.output.dense") - expected.weight).abs().max() < 1e-6


@pytest.mark.parametrize("kind", SPARSE)
def test_factors_train_and_the_zeros_of_s_hold(kind):
    model = tiny_model()
    names = list(model.state_dict())
    run = SVD({"output": SPARSE[kind], "query": CONFIG}).prepare(model, total_steps=4)
    start = {path: {n: p.detach().clone() for n, p in run.factors(path).items()} for path in run.configs}
    train(model, run, 4)
    plan = run.finalize()
    model.eval()
    assert list(model.state_dict()) == names
    for path, factors in plan.factors.items():
        assert all(not torch.equal(part, start[path][name]) for name, part in factors.items())
        if "sparse" in factors:
            assert torch.equal(factors["sparse"] == 0, start[path]["sparse"] == 0)
    assert plan.layers == run.configs
    expected = outputs(model)
    sb.compress_(model, plan)
    kinds = {type(model.get_submodule(path)) for path in plan.layers}
    assert kinds == {LowRankLinear, LowRankSparseLinear}
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


def test_golden_step():
    """W = diag(4, 1, 1/4) at rank 1 and one row of S: u v = diag(4, 0, 0), u = v = (2, 0, 0), S = diag(0, 1, 0). With
    x = (1, 2, 1) and loss sum(y), dL/dW has the rows x; SGD at 1/8. dL/du = dL/dW vᵀ = (2, 2, 2), dL/dv = uᵀ dL/dW
    = 2 x, dL/dS = x in the second row alone: the others are no parameters."""
    model = nn.Module()
    model.layer = nn.Linear(3, 3, bias=False)
    model.layer.weight.data = torch.diag(torch.tensor([4.0, 1.0, 0.25]))
    config = sb.LowRankSparseConfig(rank=1, sparse=RowsConfig(1 / 3))
    run = SVD({"layer": config}).prepare(model, total_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / 8)
    run.attach(optimizer)
    model.layer(torch.tensor([[1.0, 2.0, 1.0]])).sum().backward()
    optimizer.step()
    assert run.metrics() == {"sparsity": 0.0}  # 3 + 3 + 3 of 9 numbers
    factors = run.finalize().factors["layer"]
    assert factors["u"].tolist() == [[1.75], [-0.25], [-0.25]]
    assert factors["v"].tolist() == [[1.75, -0.5, -0.25]]
    assert factors["sparse"].tolist() == [[0.0, 0.0, 0.0], [-0.125, 0.75, -0.125], [0.0, 0.0, 0.0]]


def test_the_rank_is_rounded_down():
    run = SVD(sb.LowRankConfig(ratio=0.3)).prepare(tiny_model(), total_steps=1)
    shapes = {tuple(run.factors(path)["u"].shape) for path in run.configs}
    # 0.3 * 16 = 4.8 for 32 x 32; 0.3 * 32 * 64 / 96 = 6.4
    assert shapes == {(32, 4), (64, 6), (32, 6)}


def test_row_weights_of_ones_are_the_plain_svd():
    plain = SVD(CONFIG).prepare(tiny_model(), total_steps=1)
    weights = {path: torch.ones(plain.weight(path).shape[0]) for path in plain.configs}
    weighted = SVD(CONFIG, rows=weights).prepare(tiny_model(), total_steps=1)
    for path in plain.configs:
        torch.testing.assert_close(weighted.weight(path), plain.weight(path))


def fisher_of(model, path, given):
    """sqrt(sum_j mean G² + 1e-5) by plain backward passes."""
    total = 0
    for inputs in given:
        model.zero_grad()
        model(**inputs).loss.backward()
        total = total + model.get_submodule(path).weight.grad.double() ** 2
    model.zero_grad()
    return ((total / len(given)).sum(1) + 1e-5).sqrt()


def test_fisher_row_weights_are_the_formula_and_leave_the_model_alone():
    model = tiny_model()
    expected = {path: fisher_of(model, path, batches()) for path in ("bert.encoder.layer.1.output.dense",)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.classifier.weight.grad = torch.ones(2, 32)
    found = fisher_row_weights(model, batches(), CONFIG)
    assert len(found) == 12 and not any(weights.requires_grad for weights in found.values())
    for path, weights in expected.items():
        torch.testing.assert_close(found[path].double(), weights, rtol=1e-5, atol=1e-8)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert torch.equal(model.classifier.weight.grad, torch.ones(2, 32))
    assert model.bert.encoder.layer[0].output.dense.weight.grad is None
    assert not any(module.training for module in model.modules())


def test_fwsvd_lowers_the_weighted_error_and_raises_the_plain_one():
    model = tiny_model()
    weights = fisher_row_weights(model, batches(), CONFIG, loss=lambda outputs, inputs: 100 * outputs.loss)
    dense = {path: model.get_submodule(path).weight.detach().clone() for path in weights}
    plain = SVD(CONFIG).prepare(tiny_model(), total_steps=1)
    weighted = SVD(CONFIG, rows=weights).prepare(model, total_steps=1)
    for path, weight in dense.items():
        ours, theirs = (weight - run.weight(path).detach() for run in (weighted, plain))
        scale = weights[path].unsqueeze(1)
        assert (scale * ours).norm() < (scale * theirs).norm()
        assert ours.norm() > theirs.norm()
    train(model, weighted, 2)
    weighted.finalize().verify(model)


def test_with_a_sparse_part_s_is_what_the_weighted_factors_leave():
    model = tiny_model()
    config = {"output": SPARSE["rows"]}
    weights = fisher_row_weights(model, batches(), config)
    path = next(iter(weights))
    weight = model.get_submodule(path).weight.detach().clone()
    run = SVD(config, rows=weights).prepare(model, total_steps=1)
    parts = run.factors(path)
    alive = (parts["sparse"] != 0).any(1)
    left = weight - low_rank.unpack(parts["u"], parts["v"])
    assert int(alive.sum()) == 8 and torch.equal(parts["sparse"][alive], left[alive])


@pytest.mark.parametrize("kind", SPARSE)
def test_resumes_as_if_it_had_not_stopped(kind):
    method = SVD({"output": SPARSE[kind], "query": CONFIG})
    model = tiny_model()
    run = method.prepare(model, total_steps=4)
    optimizer = train(model, run, 2)
    saved = [{k: v.clone() for k, v in model.state_dict().items()}, run.state_dict()]
    moments = {"state": {k: {n: t.clone() for n, t in v.items()} for k, v in optimizer.state_dict()["state"].items()}}
    groups = optimizer.state_dict()["param_groups"]
    dropout = torch.get_rng_state()
    run.detach()
    train(model, run, 2, optimizer)

    other = tiny_model(seed=9)
    resumed = method.prepare(other, total_steps=4)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    optimizer.load_state_dict(moments | {"param_groups": groups})
    torch.set_rng_state(dropout)
    train(other, resumed, 2, optimizer)
    assert resumed.step == 4
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    assert all(torch.equal(resumed.state["mask"][path], run.state["mask"][path]) for path in run.configs)
    resumed.finalize().verify(other)


def test_a_state_with_another_structure_is_refused():
    rows, entries = (SVD({"output": SPARSE[kind]}).prepare(tiny_model(), total_steps=1) for kind in ("rows", "bitmap"))
    with pytest.raises(ValueError, match=r"mask is torch.bool \(32, 64\), expected torch.bool \(32, 1\)"):
        rows.load_state_dict(entries.state_dict())


def test_row_weights_of_other_layers_are_refused():
    model = tiny_model()
    weights = {path: torch.ones(32) for path in ("bert.encoder.layer.0.output.dense", "bert.pooler.dense")}
    with pytest.raises(ValueError, match="layer.1.output.dense: no row weights of it"):
        SVD({"output": CONFIG}, rows=dict(list(weights.items())[:1])).prepare(model, total_steps=1)
    with pytest.raises(ValueError, match="bert.pooler.dense: row weights, but it is not factored"):
        SVD({"*.0.output.dense": CONFIG}, rows=weights).prepare(model, total_steps=1)
    assert not any(isinstance(module, FactoredLinear) for module in model.modules())


def test_what_has_no_gradients_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="no batches"):
        fisher_row_weights(model, [], CONFIG)
    with pytest.raises(ValueError, match="the model gives no loss; batches need labels"):
        fisher_row_weights(model, [{"input_ids": tokens()}], CONFIG)
    with pytest.raises(ValueError, match="gradients hold NaN or infinities"):
        fisher_row_weights(model, batches(1), CONFIG, loss=lambda outputs, _: outputs.loss * float("nan"))
    model.bert.encoder.layer[0].output.dense.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="layer.0.output.dense: weight does not require grad"):
        fisher_row_weights(model, batches(), CONFIG)


def test_wrong_configs_and_teachers_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="SVD: bert.*2:4 is not made of factors; expected a LowRankConfig"):
        SVD(sb.NMConfig(2, 4)).prepare(model, total_steps=1)
    with pytest.raises(ValueError, match="takes no teacher"):
        SVD(CONFIG).prepare(model, total_steps=1, teacher=tiny_model())
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer.1.output.dense: weight holds NaN"):
        SVD(CONFIG).prepare(model, total_steps=1)
    assert not any(isinstance(module, FactoredLinear) for module in model.modules())
