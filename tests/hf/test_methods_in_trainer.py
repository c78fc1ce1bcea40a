"""Every method inside transformers' Trainer and under mixed precision: accumulated, clipped and skipped steps, the
loss it backpropagates, evaluation in between, logs, and resuming."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import sparsebert as sb
from method_cases import METHODS, Row
from sparsebert.methods.masked import MaskedRun
from tiny_models import tiny_model, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


class PulledRun(MaskedRun):
    """Adds a term of its own to the task's loss, and keeps the gradients that it is shown."""

    needs_loss = True

    def __init__(self, model, config, total_steps):
        super().__init__(model, config, total_steps)
        for mask in self.new_state("mask").values():
            mask.fill_(True)
        self.seen = []

    def added_loss(self, outputs, inputs):
        assert "labels" in inputs
        return 0.1 * sum(self.weight(path).square().sum() for path in self.configs)

    def before_step(self, optimizer):
        super().before_step(optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.seen.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))


class Pulled(sb.methods.Method):
    def prepare(self, model, *, total_steps, teacher=None):
        return PulledRun(model, self.config, total_steps)


every_method = pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)


class Data(torch.utils.data.Dataset):
    def __init__(self, rows=96):
        self.ids = torch.randint(4, 100, (rows, 6), generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": int(self.ids[index, 0] > 50)}


def student(seed=0, dropout=None):
    model = tiny_model(seed=seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and dropout is not None:
            module.p = dropout
    return model


def prepare(row, model, steps=STEPS):
    return row.prepare(model, steps, tiny_model(seed=5))


def arguments(folder, **changes):
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 48,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 11,
    }
    return TrainingArguments(str(folder), **{**given, **changes})


def trainer(model, run, folder, kind=sb.hf.CompressionTrainer, callbacks=(), options=None, **changes):
    given = {"run": run} if issubclass(kind, sb.hf.CompressionTrainerMixin) else {}
    callbacks = list(callbacks) if given else [*callbacks, sb.hf.CompressionCallback(run)]
    return kind(
        model,
        arguments(folder, **changes),
        train_dataset=Data(),
        eval_dataset=Data(48),
        callbacks=callbacks,
        **given,
        **(options or {}),
    )


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- every method ---


class Watcher(TrainerCallback):
    """Placed before the run's callback, as those that report to a service are."""

    def __init__(self, run):
        self.run, self.evaluated, self.logs = run, [], []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.evaluated.append((self.run.step, self.run.metrics()["sparsity"], metrics["eval_loss"]))

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


@every_method
def test_trains_evaluates_the_pruned_model_and_exports(row, tmp_path):
    model = student()
    run = prepare(row, model)
    watcher = Watcher(run)
    training = trainer(model, run, tmp_path, callbacks=[watcher], eval_strategy="steps", eval_steps=3)
    training.train()
    # Accumulated gradients make one step.
    assert run.step == STEPS
    assert [step for step, _, _ in watcher.evaluated] == [3, 6]
    assert watcher.evaluated[-1][1] > 0.05
    logged = [entry for entry in training.state.log_history if "eval_loss" in entry]
    assert [entry["compression/sparsity"] for entry in logged] == pytest.approx([s for _, s, _ in watcher.evaluated])
    assert [entry["compression/sparsity"] for entry in watcher.logs if "eval_loss" in entry] == pytest.approx(
        [s for _, s, _ in watcher.evaluated]
    )
    training.remove_callback(watcher)
    plan = run.finalize()
    dense = training.evaluate()["eval_loss"]
    assert dense == pytest.approx(watcher.evaluated[-1][2])
    assert len(sb.compress_(model, plan).layers) == 12
    # Packed layers have no weight to measure: the run is over, and logs without it.
    assert training.evaluate()["eval_loss"] == pytest.approx(dense, rel=1e-4)
    assert "compression/sparsity" not in training.state.log_history[-1]


@every_method
def test_resumes_bit_for_bit(row, tmp_path):
    def run_once(seed, **options):
        model = student(seed)
        run = prepare(row, model)
        trainer(model, run, tmp_path, save_strategy="steps", save_steps=3).train(**options)
        return run, parameters(model)

    run, expected = run_once(0)
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    # Another start, until the checkpoint is read.
    resumed, found = run_once(9, resume_from_checkpoint=True)
    assert resumed.step == STEPS
    for kind, tensors in run.state.items():
        for path, tensor in tensors.items():
            assert torch.equal(resumed.state[kind][path], tensor), (kind, path)
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name


@every_method
def test_trains_under_bfloat16(row, tmp_path):
    model = student()
    run = prepare(row, model)
    trained = [parameter for path in run.configs for parameter in run.trained(path)]
    before = [parameter.detach().clone() for parameter in trained]
    trainer(model, run, tmp_path, bf16=True).train()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in parameters(model).values())
    assert all(not torch.equal(new, old) for new, old in zip(trained, before, strict=True))
    run.finalize().verify(model)


@every_method
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_a_scaler_skips_counts_for_nothing(row, fused):
    model = student()
    run = prepare(row, model, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    run.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batch = {"input_ids": tokens(4), "labels": torch.tensor([0, 1, 1, 0])}
    model.train()
    for i in range(4):
        before, state = parameters(model), run.state_dict()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = run.total_loss(model(**batch), batch)
        scaler.scale(loss).backward()
        if i == 1:
            model.bert.pooler.dense.bias.grad = torch.full((32,), float("inf"))
        scaler.step(optimizer)
        scaler.update()
        after = parameters(model)
        changed = any(not torch.equal(after[name], parameter) for name, parameter in before.items())
        assert changed == (i != 1)
        if i == 1:
            assert run.step == 1
            new = run.state_dict()
            assert all(torch.equal(new[k], v) if isinstance(v, torch.Tensor) else new[k] == v for k, v in state.items())
    assert run.step == 3
    run.finalize().verify(model)


# --- the loss ---


def trained(folder, row, kind=sb.hf.CompressionTrainer, **changes):
    """Weights after two plain gradient steps without noise: they tell how large the gradients were."""
    model = student(dropout=0.0)
    given = {"max_steps": 2, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "weight_decay": 0.0}
    trainer(model, prepare(row, model, 2), folder, kind, **{**given, **changes}).train()
    return parameters(model)


PULLED = Row(lambda model: Pulled(sb.BitmapConfig(0.5)))
KEEPING = Row(lambda model: sb.methods.KnowledgePruning(sb.BitmapConfig(1.0)), teacher=True)
BOTH = Row(lambda model: sb.methods.KnowledgePruning(sb.BitmapConfig(1.0), task_loss=True), teacher=True)


def mean_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("row", "options"),
    [
        (PULLED, {}),
        (PULLED, {"label_smoothing_factor": 0.2}),
        (PULLED, {"options": {"compute_loss_func": mean_loss}}),
        (KEEPING, {}),
        (BOTH, {}),
    ],
    ids=["added", "added-smoothed", "added-function", "replaced", "both"],
)
def test_accumulated_batches_are_as_one(row, options, tmp_path):
    whole = trained(tmp_path, row, per_device_train_batch_size=8, gradient_accumulation_steps=1, **options)
    parts = trained(tmp_path, row, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    start = parameters(student())
    for name, parameter in whole.items():
        torch.testing.assert_close(parts[name], parameter, rtol=1e-4, atol=2e-6, msg=name)
    assert sum(float((whole[name] - start[name]).abs().sum()) for name in whole) > 1e-2


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.2}], ids=["model", "smoothed"])
def test_the_loss_is_the_tasks_and_the_methods(options, tmp_path):
    """Against a loop by hand."""
    found = trained(tmp_path, PULLED, per_device_train_batch_size=8, gradient_accumulation_steps=1, **options)
    model = student(dropout=0.0)
    run = prepare(PULLED, model)
    twin = student()
    loader = trainer(twin, prepare(PULLED, twin), tmp_path, per_device_train_batch_size=8).get_train_dataloader()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    # The Trainer seeds before it shuffles.
    torch.manual_seed(11)
    for _, batch in zip(range(2), loader, strict=False):
        optimizer.zero_grad()
        logits = model(input_ids=batch["input_ids"]).logits
        task = F.cross_entropy(logits, batch["labels"], label_smoothing=options.get("label_smoothing_factor", 0.0))
        (task + 0.1 * sum(run.weight(path).square().sum() for path in run.configs)).backward()
        optimizer.step()
    for name, parameter in parameters(model).items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=2e-6, msg=name)


def test_a_method_that_adds_nothing_trains_as_with_the_trainer(tmp_path):
    row = METHODS["magnitude"]
    ours, theirs = (trained(tmp_path, row, kind) for kind in (sb.hf.CompressionTrainer, Trainer))
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.items())


def test_a_bare_encoder_learns_from_its_teacher_alone(tmp_path):
    model = tiny_model("bert-bare")
    method = sb.methods.KnowledgePruning(sb.BitmapConfig(0.1), terms=("embedding", "hidden", "attention"))
    run = method.prepare(model, total_steps=STEPS, teacher=tiny_model("bert-bare", seed=5))
    training = trainer(model, run, tmp_path)
    training.train_dataset = [{"input_ids": row["input_ids"]} for row in (Data()[i] for i in range(96))]
    training.train()
    logged = [entry for entry in training.state.log_history if "compression/loss_hidden" in entry]
    assert len(logged) == STEPS + 1
    for term in ("embedding", "hidden", "attention"):
        assert all(entry[f"compression/loss_{term}"] > 0 for entry in logged)
    run.finalize().verify(model)


def test_gradients_are_shown_clipped_and_unscaled(tmp_path):
    model = student()
    run = prepare(PULLED, model)
    trainer(model, run, tmp_path, max_grad_norm=0.01).train()
    assert run.seen == pytest.approx([0.01] * STEPS, rel=1e-3)

    for fused in (False, True):
        model = student(dropout=0.0).train()
        run = prepare(PULLED, model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused)
        run.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        batch = {"input_ids": tokens(), "labels": torch.tensor([0, 1])}
        for scaled in (True, False):
            optimizer.zero_grad()
            loss = run.total_loss(model(**batch), batch)
            if scaled:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
        assert run.seen[0] == pytest.approx(run.seen[1], rel=1e-5)


# --- what does not fit ---


def test_a_plain_trainer_is_told_to_add_the_loss(tmp_path):
    model = student()
    run = prepare(METHODS["knowledge"], model)
    with pytest.raises(RuntimeError, match="train with sparsebert.hf.CompressionTrainer in place of the Trainer"):
        trainer(model, run, tmp_path, Trainer).train()


def test_the_run_comes_from_one_place(tmp_path):
    model = student()
    run, other = (prepare(METHODS["magnitude"], model) for _ in range(2))
    with pytest.raises(ValueError, match=r"CompressionTrainer: has no run; pass run=, or callbacks="):
        trainer(model, None, tmp_path).train()
    with pytest.raises(ValueError, match="run= is not the run of the CompressionCallback"):
        trainer(model, run, tmp_path, callbacks=[sb.hf.CompressionCallback(other)])
    twice = [sb.hf.CompressionCallback(run), sb.hf.CompressionCallback(other)]
    with pytest.raises(ValueError, match="2 CompressionCallbacks, expected one run at a time"):
        trainer(model, None, tmp_path, callbacks=twice).train()
    given = trainer(model, None, tmp_path, callbacks=[sb.hf.CompressionCallback(run)], max_steps=1)
    given.train()
    assert run.step == 1


def test_a_training_of_another_length_is_remarked_on(tmp_path, caplog):
    model = student()
    trainer(model, prepare(METHODS["magnitude"], model, 7), tmp_path, max_steps=1).train()
    assert "the Trainer makes 1 optimizer steps, but the run was prepared for 7" in caplog.text
