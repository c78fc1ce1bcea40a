"""A method's run inside the Trainer: real training on a tiny model, its constraint, and resuming it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

import sparsebert as sb
from sparsebert.hf.callback import load_run_state, save_run_state

_CONFIG = dict(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=40,
)  # fmt: skip
STEPS = 10


class Batches(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(4, 100, (80, 8), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": int(self.ids[index, 0] > 50)}


def prepared(seed):
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(**_CONFIG))
    return model, sb.methods.Magnitude(sb.NMConfig(2, 4)).prepare(model, total_steps=STEPS)


def trainer(model, run, folder, **callback):
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=5,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=11,
    )
    callbacks = [sb.hf.CompressionCallback(run, **callback)]
    return Trainer(model, arguments, train_dataset=Batches(), callbacks=callbacks)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    model, run = prepared(seed=1)
    before = {path: run.weight(path).detach().clone() for path in run.configs}
    trainer(model, run, folder).train()
    return folder, model, run, before


def test_constraint_holds_on_the_exported_model(trained, tmp_path):
    _, model, run, before = trained
    # Accumulated gradients count as one step, and the weights did train.
    assert run.step == STEPS
    assert all(not torch.equal(run.weight(path), weight) for path, weight in before.items())
    for path, mask in run.masks.items():
        assert not run.weight(path)[~mask].any()
    model.save_pretrained(tmp_path)
    exported = BertForSequenceClassification.from_pretrained(tmp_path)
    plan = sb.CompressionPlan(run.configs)
    plan.verify(exported)
    report = sb.compress_(exported, plan)
    assert len(report.layers) == 12


def test_without_the_callback_the_constraint_would_be_lost(tmp_path):
    model, run = prepared(seed=1)
    without = trainer(model, run, tmp_path)
    without.pop_callback(sb.hf.CompressionCallback)
    without.train()
    with pytest.raises(ValueError, match="does not obey 2:4"):
        sb.CompressionPlan(run.configs).verify(model)


def test_resumed_run_has_identical_masks_and_ends_the_same(trained):
    folder, model, run, _ = trained
    # Another start, and so other masks, until the state is restored.
    other, resumed = prepared(seed=2)
    assert any(not torch.equal(resumed.masks[path], mask) for path, mask in run.masks.items())
    shutil.rmtree(folder / "checkpoint-10")
    trainer(other, resumed, folder).train(resume_from_checkpoint=True)
    assert resumed.step == STEPS
    assert all(torch.equal(resumed.masks[path], mask) for path, mask in run.masks.items())
    for (name, ours), (_, theirs) in zip(other.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_resumes_from_a_folder_elsewhere_only_when_told(trained, tmp_path):
    folder, model, run, _ = trained
    moved = tmp_path / "kept" / "checkpoint-5"
    shutil.copytree(folder / "checkpoint-5", moved)
    other, resumed = prepared(seed=2)
    with pytest.raises(ValueError, match="resumes at step 5, but no compression_state.json of it was found in"):
        trainer(other, resumed, tmp_path / "new").train(resume_from_checkpoint=str(moved))
    trainer(other, resumed, tmp_path / "new", resume_from=moved).train(resume_from_checkpoint=str(moved))
    assert all(torch.equal(resumed.masks[path], mask) for path, mask in run.masks.items())


def test_state_of_another_training_is_not_taken(trained, tmp_path):
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(trained[0] / "checkpoint-5", folder)
    saved = json.loads((folder / "trainer_state.json").read_text())
    saved["log_history"][0]["loss"] += 1.0
    (folder / "trainer_state.json").write_text(json.dumps(saved))
    state = TrainerState.load_from_json(str(trained[0] / "checkpoint-5" / "trainer_state.json"))
    _, run = prepared(seed=2)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="compression_state.json of it was found"):
        sb.hf.CompressionCallback(run).on_train_begin(arguments, state, TrainerControl())


def test_training_twice_attaches_once(tmp_path):
    model, run = prepared(seed=1)
    again = trainer(model, run, tmp_path)
    again.args.max_steps = 2
    again.train()
    again.train()
    assert run.step == 4


def test_run_state_round_trip(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "step": 7,
        "ratio": 0.25,
        "name": "x",
        "none": None,
        "mask.a.b": torch.tensor([[True, False]]),
        "nested": {"views": [shared[:3], shared[2:].flip(0)], "done": False},
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    save_run_state(state, tmp_path)
    loaded = load_run_state(tmp_path)
    assert {key: loaded[key] for key in ("step", "ratio", "name", "none")} == {
        "step": 7, "ratio": 0.25, "name": "x", "none": None,
    }  # fmt: skip
    assert torch.equal(loaded["mask.a.b"], state["mask.a.b"]) and loaded["mask.a.b"].dtype == torch.bool
    assert torch.equal(loaded["nested"]["views"][1], state["nested"]["views"][1])
    assert loaded["nested"]["done"] is False and loaded["half"].dtype == torch.bfloat16
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "compression_state.json",
        "compression_state.safetensors",
    ]


@pytest.mark.parametrize("state", [{"f": print}, {"a": {1: 2}}, {"a": {"$tensor": "b"}}, {"d": {1, 2}}], ids=str)
def test_run_state_takes_nothing_else(tmp_path, state):
    with pytest.raises(TypeError, match="compression state: "):
        save_run_state(state, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a compression state"),
        ('{"format_version": 2, "state": {}}', "not a compression state of format_version 1"),
        ('{"format_version": 1, "state": {"a": {"$tensor": "gone"}}}', "tensor 'gone' is not in"),
        ('{"format_version": 1, "state": {"a": {"$tensor": [1]}}}', r"tensor \[1\] is not in"),
    ],
)
def test_broken_run_state_is_refused(tmp_path, content, message):
    save_run_state({"a": torch.ones(2)}, tmp_path)
    (tmp_path / "compression_state.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_run_state(tmp_path)


def test_run_state_without_its_tensors_is_refused(tmp_path):
    save_run_state({"a": torch.ones(2)}, tmp_path)
    (tmp_path / "compression_state.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="the compression state cannot be read"):
        load_run_state(tmp_path)
