"""Knowledge-aware pruning: what is captured, the loss against one computed apart, masks, schedule, resume, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebert as sb
from sparsebert.methods import KnowledgePruning, Magnitude
from sparsebert.methods.capture import Capture
from tiny_models import FAMILIES, inputs, tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
BITMAP = sb.BitmapConfig(0.1)
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
INPUTS = {"input_ids": tokens(), "attention_mask": MASK, "labels": torch.tensor([0, 1])}


def undropped(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def pair(family="bert"):
    return undropped(tiny_model(family, seed=0)).train(), tiny_model(family, seed=1)


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)


def our_hooks(model):
    """transformers leaves hooks of its own once it was asked for hidden states."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if getattr(hook, "func", hook).__module__.startswith("sparsebert")]


def loop(model, run, optimizer, steps, after=lambda: None):
    """From the step where the run is: batches depend on the step alone."""
    model.train()
    for _ in range(steps):
        generator = torch.Generator().manual_seed(run.step)
        batch = {"input_ids": torch.randint(3, 100, (2, 7), generator=generator), "labels": torch.tensor([0, 1])}
        optimizer.zero_grad()
        run.total_loss(model(**batch), batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after()


def started(config=BITMAP, *, total_steps=20, teacher=None, seed=0, **options):
    model = undropped(tiny_model(seed=seed))
    run = KnowledgePruning(config, **options).prepare(
        model, total_steps=total_steps, teacher=teacher or tiny_model(seed=1)
    )
    optimizer = optimizer_of(model)
    run.attach(optimizer)
    return model, run, optimizer


# --- what is captured ---

EXACT = [name for name in FAMILIES if name not in ("mpnet",) and not name.startswith(("deberta", "modernbert"))]


@pytest.mark.parametrize("family", EXACT)
def test_scores_are_those_of_the_eager_attention(family):
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    capture = Capture(model, training=False).attach()
    outputs = model(**inputs(model), output_attentions=True)
    found = capture.take(outputs)
    assert len(found.attention_scores) == len(outputs.attentions) and len(found.hidden_states) == len(found[1]) + 1
    for scores, attention in zip(found.attention_scores, outputs.attentions, strict=True):
        torch.testing.assert_close(scores.softmax(-1), attention)


def test_shared_layers_count_each_time():
    model = tiny_model("albert")
    assert len(sb.roles.find_layers(model)) == 12
    capture = Capture(model, training=False).attach()
    assert len(capture.take(model(**inputs(model))).attention_scores) == 4


def test_joined_query_key_value_is_split_in_its_order(monkeypatch):
    """Without rotation and inside the window ModernBERT's scores are q k alone."""
    model = tiny_model("modernbert")
    model.set_attn_implementation("eager")

    def unturned(x, position_ids, layer_type=None):
        shape = (*position_ids.shape, 8)
        return torch.ones(shape), torch.zeros(shape)

    monkeypatch.setattr(model.model.rotary_emb, "forward", unturned)
    ids = {"input_ids": tokens(length=3)}
    capture = Capture(model, training=False).attach()
    outputs = model(**ids, output_attentions=True)
    for scores, attention in zip(capture.take(outputs).attention_scores, outputs.attentions, strict=True):
        torch.testing.assert_close(scores.softmax(-1), attention)


@pytest.mark.parametrize("family", ["mpnet", "modernbert", "vit"])
def test_other_families_give_every_layer(family):
    model = tiny_model(family).train()
    capture = Capture(model).attach()
    found = capture.take(model(**inputs(model)))
    assert len(found.attention_scores) == 2 and len(found.hidden_states) == 3
    assert all(scores.requires_grad for scores in found.attention_scores)


def test_deberta_has_no_scores_of_its_own_to_give():
    model = tiny_model("deberta-v3")
    with pytest.raises(ValueError, match="deberta-v2 adds scores of relative pos.*leave the term 'attention' out"):
        Capture(model)
    run = KnowledgePruning(BITMAP, terms=("embedding", "hidden", "logits")).prepare(
        model, total_steps=4, teacher=tiny_model("deberta-v3", seed=1)
    )
    optimizer = optimizer_of(model)
    run.attach(optimizer)
    loop(model, run, optimizer, 1)
    assert set(run.metrics()) == {"sparsity", "loss_embedding", "loss_hidden", "loss_logits"}


def test_evaluation_is_left_alone():
    model, _ = pair()
    capture = Capture(model).attach()
    assert model.eval()(**INPUTS).hidden_states is None
    with torch.no_grad():
        assert model.train()(**INPUTS).hidden_states is None
    with pytest.raises(RuntimeError, match="BertForSequenceClassification was called 0 times in training mode since"):
        capture.take(None)
    assert len(model(**INPUTS).hidden_states) == 3


def test_two_forwards_are_not_mixed_up():
    model, _ = pair()
    capture = Capture(model).attach()
    first = model(**INPUTS)
    model(**INPUTS)
    with pytest.raises(RuntimeError, match="was called 2 times in training mode since the last loss"):
        capture.take(first)
    capture.take(model(**INPUTS))
    with pytest.raises(RuntimeError, match="was called 0 times"):
        capture.take(first)


def test_hooks_come_off():
    model, _ = pair()
    capture = Capture(model).attach().attach()
    # Before and after the model, and on queries and keys of two layers.
    assert len(our_hooks(model)) == 6
    capture.detach()
    assert not our_hooks(model)


def test_a_copy_of_the_model_keeps_to_itself():
    model, _ = pair()
    capture = Capture(model).attach()
    outputs = model(**INPUTS)
    copy.deepcopy(model)(**INPUTS)
    assert len(capture.take(outputs).attention_scores) == 2


def gradients_under(checkpointing, **options):
    model, teacher = pair()
    if checkpointing is not None:
        # Its newer name takes the place of the older one in transformers.
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(model, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": checkpointing}})
    run = KnowledgePruning(BITMAP, **options).prepare(model, total_steps=9, teacher=teacher)
    run.attach(optimizer_of(model))
    for _ in range(2):  # accumulated, and what the first backward computes again must not count as the second forward
        run.total_loss(model(**INPUTS), INPUTS).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("reentrant", "terms"),
    [(False, ("embedding", "hidden", "attention", "logits")), (True, ("embedding", "hidden", "logits"))],
    ids=["not reentrant", "reentrant"],
)
def test_gradient_checkpointing_and_accumulation_change_nothing(reentrant, terms):
    plain, checkpointed = (gradients_under(how, terms=terms) for how in (None, reentrant))
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_scores_without_a_gradient_are_refused():
    with pytest.raises(RuntimeError, match="attention scores of BertForSequenceClassification carry no gradient"):
        gradients_under(True)


def test_empty_terms_are_refused():
    model, _ = pair()
    capture = Capture(model).attach()
    with pytest.raises(RuntimeError, match="hidden states of BertForSequenceClassification are empty: its outputs"):
        capture.take(model(**INPUTS, return_dict=False))
    # Layers that nobody calls, as where a fused one stands in for them.
    capture = Capture(model, hidden=False).attach()
    for layer in model.bert.encoder.layer:
        layer.attention.self.forward = lambda hidden, *_, **__: (hidden, None)
    outputs = model(**INPUTS)
    with pytest.raises(RuntimeError, match="attention scores of BertForSequenceClassification are empty: its query"):
        capture.take(outputs)


# --- the loss ---


def eager(model, training, batch):
    """A forward by the attention's own code: outputs, and the scores read where they enter the softmax."""
    model = copy.deepcopy(model).train(training)
    model.set_attn_implementation("eager")
    seen, real = [], F.softmax

    def softmax(x, *args, **kwargs):
        seen.append(x)
        return real(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "softmax", softmax)
        outputs = model(**batch, output_hidden_states=True)
    # Padding has minus the largest float there, which the code of the paper sets to 0 as all of -100 or less.
    return outputs, [torch.where(x <= -100, 0.0, x) for x in seen]


def expected_terms(model, teacher, batch, temperature=1.0):
    found = eager(model, True, batch), eager(teacher, False, batch)
    (ours, our_scores), (theirs, their_scores) = found
    states = [((a - b) ** 2).mean() for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True)]
    target = (theirs.logits / temperature).softmax(-1)
    log = torch.log((ours.logits / temperature).softmax(-1))
    return {
        "embedding": states[0],
        "hidden": states[1] + states[2],
        "attention": sum(((a - b) ** 2).mean() for a, b in zip(our_scores, their_scores, strict=True)),
        "logits": -(target * log).sum() / target.numel(),
    }


def test_the_loss_is_that_of_the_paper():
    model, teacher = pair()
    expected = expected_terms(model, teacher, INPUTS, 2.0)
    weights = {"hidden": 0.5, "attention": 3.0}
    run = KnowledgePruning(BITMAP, temperature=2.0, weights=weights).prepare(model, total_steps=9, teacher=teacher)
    run.attach(optimizer_of(model))
    outputs = model(**INPUTS)
    assert len(outputs.hidden_states) == 3 and outputs.attentions is None
    loss = run.total_loss(outputs, INPUTS)
    torch.testing.assert_close(
        loss, expected["embedding"] + 0.5 * expected["hidden"] + 3 * expected["attention"] + expected["logits"]
    )
    for name, value in expected.items():
        assert run.metrics()[f"loss_{name}"] == pytest.approx(value.item(), rel=1e-5), name
    # Each of them reaches the encoder.
    loss.backward()
    assert all(run.weight(path).grad.abs().sum() > 0 for path in run.configs)


def test_the_task_is_out_unless_it_is_asked_for():
    gradients = []
    for options in ({}, {"task_loss": True}):
        model, teacher = pair()
        run = KnowledgePruning(BITMAP, **options).prepare(model, total_steps=9, teacher=teacher)
        run.attach(optimizer_of(model))
        outputs = model(**INPUTS)
        added = run.total_loss(outputs, INPUTS) - (outputs.loss if options else 0)
        other = {**INPUTS, "labels": torch.tensor([1, 0])}
        value = run.total_loss(model(**other), other)
        value.backward()
        gradients.append(model.classifier.weight.grad)
        if not options:
            torch.testing.assert_close(value, added)
    assert not torch.allclose(*gradients)


def test_adding_the_loss_to_the_task_is_refused():
    model, teacher = pair()
    run = KnowledgePruning(BITMAP).prepare(model, total_steps=9, teacher=teacher)
    run.attach(optimizer_of(model))
    outputs = model(**INPUTS)
    loss = outputs.loss + run.loss(outputs, INPUTS)
    with pytest.raises(RuntimeError, match="outputs.loss was backpropagated, but this method replaces the task's loss"):
        loss.backward()


def test_total_loss_of_a_method_that_adds_nothing_is_the_task():
    model, _ = pair()
    run = Magnitude(BITMAP).prepare(model, total_steps=9)
    outputs = model(**INPUTS)
    assert torch.equal(run.total_loss(outputs, INPUTS), outputs.loss)
    with pytest.raises(ValueError, match="Magnitude: the outputs have no loss; call the model with labels"):
        run.total_loss(model(input_ids=tokens()), INPUTS)


def test_a_step_without_the_loss_is_refused():
    model, run, optimizer = started()
    model.train()
    model(**INPUTS).loss.backward()
    with pytest.raises(RuntimeError, match="the method's loss was not part of this step; backpropagate run.total_loss"):
        optimizer.step()


def test_the_teacher_answers_in_evaluation_mode_and_stays_as_it_was():
    model, teacher = pair()
    modes = []
    teacher.bert.encoder.layer[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    teacher.train()
    teacher.bert.pooler.eval()
    before = [module.training for module in teacher.modules()]
    run = KnowledgePruning(BITMAP).prepare(model, total_steps=9, teacher=teacher)
    optimizer = optimizer_of(model)
    run.attach(optimizer)
    students = []
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda module, _: students.append(module.training))
    weights = copy.deepcopy(teacher.state_dict())
    loop(model, run, optimizer, 3)
    assert modes == [False] * 3 and students == [True] * 3
    assert [module.training for module in teacher.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not our_hooks(teacher)


def test_a_regression_learns_its_labels():
    model, teacher = (tiny_model(seed=seed) for seed in (0, 1))
    for one in (model, teacher):
        one.classifier = nn.Linear(32, 1)
        one.config.num_labels = one.num_labels = 1
    undropped(model).train()
    run = KnowledgePruning(BITMAP, terms=("logits",)).prepare(model, total_steps=9, teacher=teacher)
    run.attach(optimizer_of(model))
    batch = {"input_ids": tokens(), "labels": torch.tensor([0.5, -1.0])}
    outputs = model(**batch)
    x, y = outputs.logits.flatten().tolist()
    assert float(run.total_loss(outputs, batch).detach()) == pytest.approx(((x - 0.5) ** 2 + (y + 1) ** 2) / 2)
    unlabelled = {"input_ids": tokens()}
    with pytest.raises(ValueError, match="a regression learns from the labels, but the inputs have none"):
        run.loss(model(**unlabelled), unlabelled)


def test_padding_has_no_class():
    model, teacher = pair()
    run = KnowledgePruning(BITMAP, terms=("logits",)).prepare(model, total_steps=9, teacher=teacher)
    run.attach(optimizer_of(model))
    model(**INPUTS)
    ours, theirs = torch.randn(2, 7, 2), torch.randn(2, 7, 2)
    stand_in = nn.Module()
    stand_in.forward = lambda **_: type("Answer", (), {"logits": theirs})
    run.teacher.model = run.teacher._capture.model = stand_in
    value = run.loss(type("Outputs", (), {"logits": ours}), INPUTS)
    target = theirs.softmax(-1)[MASK.bool()]
    assert len(target) == 12
    torch.testing.assert_close(value, -(target * ours.log_softmax(-1)[MASK.bool()]).mean())


def test_a_bare_encoder_learns_without_logits():
    model, teacher = pair("bert-bare")
    with pytest.raises(ValueError, match="term 'logits': BertModel has no logits; leave it out, as in terms="):
        KnowledgePruning(BITMAP).prepare(model, total_steps=9, teacher=teacher)
    run = KnowledgePruning(BITMAP, terms=("embedding", "hidden", "attention")).prepare(
        model, total_steps=9, teacher=teacher
    )
    run.attach(optimizer_of(model))
    assert run.total_loss(model(input_ids=tokens()), {"input_ids": tokens()}).item() > 0


# --- masks ---


def reference_masks(weights, kept):
    """The rule on one matrix, weight after weight, by a full sort in float64."""
    order = sorted(range(len(weights)), key=lambda i: (-abs(weights[i]), i))[:kept]
    return [i in order for i in range(len(weights))]


def test_golden_updates_of_one_matrix():
    model, run, optimizer = started({"*.layer.0.output.dense": sb.BitmapConfig(0.25)}, total_steps=4, updates=2)
    (path,) = run.configs
    weight = run.weight(path)
    assert weight.shape == (32, 64) and run.masks[path].all()
    seen = []

    def note():
        seen.append((weight.detach().double().flatten().tolist(), run.masks[path].clone()))

    loop(model, run, optimizer, 4, note)
    # T = 4, 2 updates: f = 2, C = 2; after 2 steps c/C = 1/2: 1 - 0.75 (1 - 1/8) = 0.34375 of 2048 = 704; then 512
    assert [int(mask.sum()) for _, mask in seen] == [2048, 704, 704, 512]
    for values, mask in seen:
        assert not torch.tensor(values)[~mask.flatten()].any()
    assert torch.equal(seen[1][1], seen[2][1])


def test_an_update_keeps_the_largest_of_what_is_left():
    model, run, _ = started({"*.layer.0.output.dense": sb.BitmapConfig(0.25)}, total_steps=4, updates=4)
    (path,) = run.configs
    with torch.no_grad():
        run.weight(path).copy_(torch.arange(2048.0).view(32, 64) - 1000)
        run.masks[path][0] = False  # the largest of all, but out
    mask = run._renewed(path, 0.5)
    weights = [0.0] * 64 + [abs(i - 1000) for i in range(64, 2048)]
    assert mask.flatten().tolist() == reference_masks(weights, 1024)


def test_a_weight_that_is_out_stays_out_when_others_are_zero():
    model, run, _ = started({"*.layer.0.output.dense": sb.BitmapConfig(0.25)}, total_steps=4, updates=4)
    (path,) = run.configs
    with torch.no_grad():
        run.weight(path).zero_()
        run.masks[path][:16] = False
    mask = run._renewed(path, 0.5)
    # All scores are equal but for the mask; the first rows would win the tie.
    assert mask[16:].all() and not mask[:16].any()


@pytest.mark.parametrize(
    "config", [BITMAP, sb.NMConfig(1, 16), sb.NMConfig(1, 8), sb.NMConfig(2, 8), sb.NMConfig(2, 4)], ids=str
)
def test_the_exported_plan_meets_the_target(config):
    model, run, optimizer = started(config, total_steps=12, updates=5)
    names = list(model.state_dict())
    history = []
    loop(model, run, optimizer, 12, lambda: history.append({path: mask.clone() for path, mask in run.masks.items()}))
    for path, mask in run.masks.items():
        for old, new in zip(history, history[1:], strict=False):
            assert not (new[path] & ~old[path]).any()  # monotone
        assert not run.weight(path)[~mask].any()
    plan = run.finalize()
    assert list(model.state_dict()) == names and not run.attached
    assert not our_hooks(model)
    for path in plan.layers:
        weight = model.get_submodule(path).weight
        density = config.density if config is BITMAP else config.n / config.m
        assert int(weight.count_nonzero()) == round(density * weight.numel())
    expected = {path: model.get_submodule(path).weight.detach().clone() for path in plan.layers}
    report = sb.compress_(model, plan)
    assert len(report.layers) == 12
    for path, weight in expected.items():
        assert torch.equal(model.get_submodule(path).to_linear().weight, weight)


def test_layers_may_have_different_targets():
    config = {"query": sb.NMConfig(2, 4), "key": sb.BitmapConfig(0.5), "intermediate": BITMAP}
    model, run, optimizer = started(config, total_steps=8)
    loop(model, run, optimizer, 8)
    kept = {path: float(mask.float().mean()) for path, mask in run.masks.items()}
    assert sorted(set(kept.values())) == [pytest.approx(205 / 2048), 0.5]
    run.finalize().verify(model)


@pytest.mark.parametrize(("total_steps", "updates"), [(7, 100), (7, 3), (30, 7), (1, 100)])
def test_the_target_is_reached_at_any_length(total_steps, updates):
    model, run, optimizer = started(total_steps=total_steps, updates=updates)
    loop(model, run, optimizer, total_steps)
    run.finalize()
    for path in run.configs:
        weight = run.weight(path)
        assert int(weight.count_nonzero()) == round(0.1 * weight.numel())


def test_a_cooldown_holds_the_target():
    model, run, optimizer = started(total_steps=10, cooldown=0.3)
    sparsity = []
    loop(model, run, optimizer, 10, lambda: sparsity.append(run.metrics()["sparsity"]))
    assert sparsity[5] < sparsity[6] == sparsity[9] == pytest.approx(0.9, abs=1e-3)


def test_a_training_that_ends_early_is_refused():
    model, run, optimizer = started(total_steps=20)
    loop(model, run, optimizer, 15)
    with pytest.raises(ValueError, match="15 steps are done, but the target is reached at step 20 of 20"):
        run.finalize()
    assert run.attached


def test_updates_that_skipped_steps_left_out_are_made_up_for():
    model, run, optimizer = started(total_steps=200)
    run.step = 198
    run.masks.update({path: run._renewed(path, run.schedules[path].remaining(198)) for path in run.masks})
    plan = run.finalize()
    for path in plan.layers:
        weight = run.weight(path)
        assert int(weight.count_nonzero()) == round(0.1 * weight.numel())


# --- resume ---


@pytest.mark.parametrize("config", [BITMAP, sb.NMConfig(1, 8)], ids=str)
def test_resumed_training_is_the_uninterrupted_one(config):
    model, run, optimizer = started(config, total_steps=12, updates=5)
    loop(model, run, optimizer, 7)
    saved, weights, moments = run.state_dict(), copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    loop(model, run, optimizer, 5)

    other, resumed, second = started(config, total_steps=12, updates=5, seed=7)
    other.load_state_dict(weights)
    second.load_state_dict(moments)
    resumed.load_state_dict(saved)
    loop(other, resumed, second, 5)
    for path, mask in run.masks.items():
        assert torch.equal(resumed.masks[path], mask)
    for (name, ours), (_, theirs) in zip(other.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_state_of_another_training_is_refused():
    _, run, _ = started(total_steps=12)
    with pytest.raises(ValueError, match="the state's total_steps is 20, expected 12"):
        run.load_state_dict(started(total_steps=20)[1].state_dict())


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates": 0}, "updates is 0, expected a positive int"),
        ({"updates": 1.5}, "updates is 1.5"),
        ({"terms": ()}, "terms is "),
        ({"terms": "hidden"}, "terms is 'hidden'"),
        ({"terms": ("hidden", "hidden")}, "each once"),
        ({"terms": ("hiden",)}, "expected some of embedding, hidden, attention, logits"),
        ({"weights": {"hiden": 1.0}}, "weights has 'hiden': 1.0"),
        ({"weights": {"hidden": -1.0}}, "weights has 'hidden': -1.0"),
        ({"weights": {"logits": 1.0}, "terms": ("hidden",)}, "weights has 'logits'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"cooldown": 1.0}, "cooldown is 1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KnowledgePruning(BITMAP, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (sb.LowRankConfig(4), "low-rank:r4 is not a mask"),
        (sb.NMConfig(2, 4, columns=0.5), "2:4@0.5 drops columns, which cannot go little by little"),
    ],
)
def test_configs_that_are_no_masks_are_refused(config, message):
    model, teacher = pair()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        KnowledgePruning(config).prepare(model, total_steps=9, teacher=teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_nan_leaves_the_model_as_it_was():
    model, teacher = pair()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    before = model.bert.encoder.layer[0].output.dense.weight.clone()
    with pytest.raises(ValueError, match="layer.1.output.dense: weight holds NaN"):
        KnowledgePruning(BITMAP).prepare(model, total_steps=9, teacher=teacher)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_teacher_that_does_not_fit_is_refused():
    model, _ = pair()
    method = KnowledgePruning(BITMAP)
    with pytest.raises(ValueError, match="needs a teacher; pass teacher="):
        method.prepare(model, total_steps=9)
    with pytest.raises(ValueError, match="the teacher is the student itself"):
        method.prepare(model, total_steps=9, teacher=model)
    for name, value in (("num_hidden_layers", 3), ("hidden_size", 64), ("num_attention_heads", 2), ("vocab_size", 9)):
        teacher = tiny_model(seed=1)
        ours = getattr(teacher.config, name)
        setattr(teacher.config, name, value)
        expected = rf"{name} is {ours} in the student \(BertFor\w+\) and {value} in the teacher \(BertFor"
        with pytest.raises(ValueError, match=expected):
            method.prepare(model, total_steps=9, teacher=teacher)
    # Depth and width go by other names in some families' configs.
    small, big = tiny_model("distilbert"), tiny_model("distilbert")
    big.config.n_layers = 5
    with pytest.raises(ValueError, match="num_hidden_layers is 2 in the student"):
        method.prepare(small, total_steps=9, teacher=big)


def test_classes_that_do_not_exclude_each_other_are_refused():
    model, teacher = pair()
    model.config.problem_type = "multi_label_classification"
    run = KnowledgePruning(BITMAP).prepare(model, total_steps=9, teacher=teacher)
    run.attach(optimizer_of(model))
    batch = {"input_ids": tokens()}
    with pytest.raises(ValueError, match="multi_label_classification.*leave the term out"):
        run.loss(model(**batch), batch)
