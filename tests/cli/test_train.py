"""``sparsebert train``: what it leaves on disk, what it says, and that an interrupted training goes on as if nothing
had happened."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast
from typer.testing import CliRunner

import sparsebert as sb
from sparsebert.cli import models, train, training
from sparsebert.cli.app import app
from sparsebert.cli.recipes import Stage
from sparsebert.formats import nm
from sparsebert.methods import METHODS, Run
from sparsebert.plan import CompressionPlan

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "red green blue good bad fine poor cat dog bird sat ran flew on under the a mat tree house".split()
SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=24,
    # Large enough that a random model does not give one answer to everything.
    initializer_range=0.3,
)
STEPS, CUT = 12, 7
# What each method is given; it is run where the package has it.
TARGETS = {
    "magnitude": "2:4",
    "gradual-magnitude": "2:4",
    "snip": "bitmap:0.5",
    "platon": "bitmap:0.5",
    "seven": "bitmap:0.5",
    "movement": "bitmap:0.5",
    "knowledge": "bitmap:0.5",
    "admm": "2:4",
    "losparse": "low-rank:0.25+rows:0.25",
    "lpaf": "low-rank:0.5",
    "svd": "low-rank:0.5",
}
OPTIONS = {
    "snip": ["--option", "batches=2"],
    "admm": ["--option", "rounds=3"],
    "knowledge": ["--option", "updates=4"],
    "lpaf": ["--option", "weighting=none"],
}
TEACHERS = {"knowledge"}


def write_rows(file: Path, count: int, seed: int, label) -> None:
    draw = random.Random(seed)
    lines = ["label\tsentence1"]
    for _ in range(count):
        good = draw.randrange(2)
        words = ["good" if good else "poor", *draw.choices(WORDS, k=draw.randint(2, 8))]
        lines.append(f"{label(good)}\t{' '.join(words)}")
    file.write_text("\n".join(lines) + "\n")


def save(cls, folder: Path, **config) -> Path:
    torch.manual_seed(3)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=24)
    cls(BertConfig(vocab_size=len(tokenizer), **SIZES, **config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save(BertModel, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    return save(BertForSequenceClassification, tmp_path_factory.mktemp("classifier"), **labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.tsv", 30, 0, int)
    write_rows(folder / "dev.tsv", 12, 1, int)
    return folder


@pytest.fixture(scope="module")
def base(classifier, data) -> list[str]:
    """A training of 12 steps; an epoch is four."""
    steps = ["--steps", STEPS, "--batch-size", 8, "--lr", 1e-3]
    return ["--model", str(classifier), "--data", str(data), *map(str, steps)]


@pytest.fixture(scope="module")
def plain(base) -> list[str]:
    return [*base, "--method", "magnitude", "--target", "2:4"]


@pytest.fixture(scope="module")
def whole(plain, tmp_path_factory) -> Path:
    """``plain``, not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    trained(*plain, "--out", out)
    return out


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def trained(*arguments) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def error_of(*arguments, code: int = 1) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    if code == 1:
        return result.stderr.splitlines()[-1].removeprefix("error: ")
    return " ".join(result.stderr.replace("│", " ").split())


def interrupt(monkeypatch, at: int, how) -> None:
    """Calls ``how`` in the forward pass of the step after ``at`` of them."""
    before, calls = Run.total_loss, 0

    def total_loss(*arguments):
        nonlocal calls
        calls += 1
        if calls == at + 1:
            how()
        return before(*arguments)

    monkeypatch.setattr(Run, "total_loss", total_loss)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def kill() -> None:
    raise KeyboardInterrupt


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# From a dense checkpoint to a packed one


def test_it_ends_in_a_packed_checkpoint_that_says_the_same(plain, classifier, data, tmp_path):
    out = tmp_path / "out"
    done = trained(*plain, "--out", out)
    (stage,) = done["stages"]
    assert (stage["method"], stage["target"], stage["steps"]) == ("magnitude", "2:4", STEPS)
    assert stage["metrics"]["sparsity"] == 0.5
    assert [step for step, _ in stage["evaluations"]] == [4, 8]
    assert stage["seconds_per_step"] > 0
    assert done["masked"] == done["reloaded"] != done["dense"]
    assert set(done["reloaded"]) == {"accuracy", "f1", "matthews"}
    assert done["same_predictions"] == 1.0
    assert done["new_head"] == []
    assert done["size"]["encoder"]["disk_bytes"] < done["size"]["encoder"]["dense_bytes"]
    assert done["file_bytes"] == (out / "model.safetensors").stat().st_size
    # Nothing is left of the training, and what is there loads and obeys its plan.
    assert {"config.json", "model.safetensors", "plan", "tokenizer.json", "README.md"} <= {
        p.name for p in out.iterdir()
    }
    assert not (out / "training").exists()
    model = sb.load_pretrained(out)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert AutoTokenizer.from_pretrained(out)("a cat") == AutoTokenizer.from_pretrained(classifier)("a cat")
    sb.decompress_(model)
    plan = CompressionPlan.load(out / "plan")
    assert len(plan.layers) == 12
    plan.verify(model)
    for path in plan.layers:
        weight = model.get_submodule(path).weight.detach()
        assert torch.equal(weight, nm.project(weight, 2, 4))
    # It has trained: the dense parameters moved too.
    before = load_file(classifier / "model.safetensors")
    assert not torch.equal(before["classifier.weight"], tensors(out)["classifier.weight"])


def test_int8_is_measured_with_quantized_activations(base, tmp_path):
    """Also where a CPU holds it as dense, which does not quantize x: the checkpoint is for devices that do."""
    done = trained(*base, "--method", "admm", "--option", "rounds=3", "--target", "int8", "--out", tmp_path / "out")
    assert done["largest_difference"] > 1e-5
    done = trained(*base, "--method", "magnitude", "--target", "2:4", "--out", tmp_path / "other")
    assert done["largest_difference"] <= 1e-6


def test_it_says_what_came_of_it(plain, tmp_path):
    result = run(*plain, "--out", tmp_path / "out")
    said = " ".join(result.stdout.split())
    for words in (
        "30 rows to train on, 12 held out, 2 classes",
        "train, magnitude",
        "sparsity 0.5",
        "seconds a step",
        "accuracy *",
        "Matthews correlation",
        "says the same as the compressed one for 100.00 % of the rows",
        "encoder linears",
        f"Saved to {tmp_path / 'out'}, packed",
    ):
        assert words in said


def test_a_checkpoint_without_a_head_gets_a_new_one_of_the_seed(encoder, data, tmp_path):
    arguments = ["--model", encoder, "--data", data, "--method", "magnitude", "--target", "2:4", "--steps", 2]
    done = trained(*arguments, "--out", tmp_path / "a")
    assert done["new_head"] == ["classifier.bias", "classifier.weight"]
    trained(*arguments, "--out", tmp_path / "b")
    trained(*arguments, "--out", tmp_path / "c", "--seed", 1)
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")
    said = run(*arguments, "--out", tmp_path / "d").stdout
    assert "has no head for this task, so it has a new one (classifier.bias, classifier.weight)" in said


def test_without_export_the_zeros_stay_and_the_plan_packs_them(plain, whole, tmp_path):
    done = trained(*plain, "--out", tmp_path / "dense", "--no-export")
    assert not done["exported"]
    assert done["masked"] == done["reloaded"]
    assert tensors(tmp_path / "dense")["bert.encoder.layer.0.output.dense.weight"].count_nonzero() == 32 * 64 // 2
    options = [tmp_path / "dense", tmp_path / "later", "--plan", tmp_path / "dense" / "plan"]
    later = CliRunner().invoke(app, ["compress", *map(str, options)])
    assert later.exit_code == 0, later.stderr
    assert same(whole, tmp_path / "later")


def test_layers_may_differ(base, tmp_path):
    layers = ["--layer", "intermediate=1:4", "--layer", "*.layer.0.*=dense"]
    done = trained(*base, "--method", "magnitude", *layers, "--out", tmp_path / "out")
    assert done["stages"][0]["target"] == "intermediate=1:4, *.layer.0.*=dense"
    plan = CompressionPlan.load(tmp_path / "out" / "plan")
    assert {path: str(config) for path, config in plan.layers.items()} == {
        "bert.encoder.layer.1.intermediate.dense": "1:4"
    }


def test_regression(encoder, tmp_path):
    draw = random.Random(0)
    write_rows(tmp_path / "train.tsv", 24, 0, lambda good: good * 3 + draw.random())
    write_rows(tmp_path / "dev.tsv", 10, 1, lambda good: good * 3 + draw.random())
    arguments = ["--model", encoder, "--data", tmp_path, "--method", "magnitude", "--target", "2:4", "--steps", 3]
    done = trained(*arguments, "--out", tmp_path / "out")
    assert set(done["reloaded"]) == {"pearson", "spearman"}
    assert (done["metric"], done["same_predictions"]) == ("pearson", 1.0)
    assert sb.load_pretrained(tmp_path / "out").config.problem_type == "regression"


def test_a_recipe_sets_what_the_command_line_does_not(classifier, data, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(train, "train", lambda settings, out, **_: seen.update(settings=settings) or {})
    monkeypatch.setattr(train, "render", lambda result: ())
    arguments = ["--recipe", "magnitude:mrpc", "--model", classifier, "--out", tmp_path / "out"]
    assert run(*arguments, "--data", data, "--lr", "1e-4", "--steps", "5").exit_code == 0
    settings = seen["settings"]
    (stage,) = settings.stages
    assert (stage.method, stage.target, stage.lr, stage.steps) == ("magnitude", "2:4", 1e-4, 5)
    assert (settings.metric, settings.text_columns) == ("f1", None)
    # Epochs of the command line go before steps, also before those of a recipe.
    assert run(*arguments, "--epochs", "2", "--target", "1:4", "--warmup", "5%").exit_code == 0
    settings = seen["settings"]
    (stage,) = settings.stages
    assert (stage.epochs, stage.steps, stage.target, stage.warmup) == (2.0, None, "1:4", "5%")
    assert (settings.data, settings.text_columns) == ("nyu-mll/glue:mrpc", ("sentence1", "sentence2"))


def test_settings_survive_the_disk(tmp_path):
    stages = (Stage("seven", "bitmap:0.5", {"query": "dense"}, {"start": "10%"}, steps=5), Stage("lpaf", warmup=3))
    settings = train.Settings("m", "d", stages, text_columns=("a", "b"), regression=True, save_every=3)
    settings.save(tmp_path)
    assert train.Settings.load(tmp_path) == settings
    (tmp_path / "settings.json").write_text('{"settings_version": 1, "model": "m"}')
    with pytest.raises(ValueError, match="settings.json: "):
        train.Settings.load(tmp_path)


# The loop


def test_the_rate_warms_up_and_goes_down():
    found = [training.rate(step, 10, 4, "linear") for step in range(10)]
    # 1/4 ... 4/4, then 6/6 ... 1/6 of what is left.
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [training.rate(step, 4, 2, "constant") for step in range(4)] == [0.5, 1, 1, 1]
    assert training.rate(0, 1, 0, "linear") == 1.0


def test_every_row_is_seen_once_an_epoch_and_orders_differ():
    orders = [training.epoch_order(20, seed, stage, epoch) for seed, stage, epoch in [(0, 0, 0), (0, 0, 1), (0, 1, 0)]]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert training.epoch_order(20, 0, 0, 1) == orders[1]


def test_batches_by_length_hold_every_row_once_and_similar_lengths_together():
    draw = random.Random(0)
    lengths = [draw.randint(3, 40) for _ in range(205)]
    order = training.epoch_order(205, 0, 0, 0)
    found = training.by_length(order, lengths, 4, seed=1)
    assert sorted(found) == list(range(205)) and found != order
    batches = [found[i : i + 4] for i in range(0, 205, 4)]
    assert [len(batch) for batch in batches] == [4] * 51 + [1]

    def padding(rows: list[int]) -> int:
        parts = [[lengths[row] for row in rows[i : i + 4]] for i in range(0, 205, 4)]
        return sum(max(part) * len(part) - sum(part) for part in parts)

    assert padding(found) < padding(order) / 5
    # Not from short to long: the last of an epoch are as any.
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts != sorted(firsts)
    assert training.by_length(order, lengths, 4, seed=1) == found != training.by_length(order, lengths, 4, seed=2)


def loop_of(classifier, data, teacher=None, **settings) -> training.Loop:
    from sparsebert.cli import data as reading
    from sparsebert.cli.inputs import tokenize

    found = reading.read(str(data), None, None, "label")
    source = models.find(str(classifier))
    tokenizer = models.load_tokenizer(source)
    model, _ = models.load_classifier(source, device=torch.device("cpu"), classes=found.classes)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs, _ = tokenize(tokenizer, found.train.rows, 24, lambda done, total, text: None)
    examples = training.Examples(tokenizer, inputs, found.labels(found.train))
    stage = Stage("magnitude", "2:4", lr=1e-3, **settings)
    run_ = sb.methods.Magnitude(sb.NMConfig(2, 4)).prepare(model, total_steps=stage.total_steps(len(examples)))
    loop = training.Loop(model, run_, stage, examples, seed=0, index=0, device=torch.device("cpu"), teacher=teacher)
    loop.start()
    return loop


def teacher_of(classifier) -> BertForSequenceClassification:
    """Another model of its architecture, in training mode: it has to be asked in the other one."""
    torch.manual_seed(8)
    return BertForSequenceClassification(BertForSequenceClassification.from_pretrained(classifier).config).train()


def test_a_share_of_the_loss_is_the_distance_from_the_teacher(classifier, data):
    teacher = teacher_of(classifier)
    plain = loop_of(classifier, data, batch_size=8, steps=1, warmup=0)
    taught = loop_of(classifier, data, teacher, batch_size=8, steps=1, warmup=0, distillation=0.25, temperature=3.0)
    (rows,) = taught.micro_batches(0)
    inputs = taught.examples.batch(rows, torch.device("cpu"))
    with torch.no_grad():
        ours = taught.model.train()(**inputs)
        theirs = teacher.eval()(**inputs).logits
        teacher.train()
    # By hand, in float64.
    p, q = ((x.double() / 3.0).log_softmax(-1) for x in (theirs, ours.logits))
    divergence = float((p.exp() * (p - q)).sum(-1).mean()) * 9.0
    plain.step()
    taught.step()
    assert divergence > 1e-3
    assert float(taught.at.loss) == pytest.approx(0.75 * float(plain.at.loss) + 0.25 * divergence, rel=1e-5)
    assert all(p.grad is None for p in teacher.parameters()) and teacher.training


def test_distillation_needs_a_teacher_and_a_loss_to_share(classifier, data):
    with pytest.raises(ValueError, match="magnitude: distillation is 0.5, but there is no teacher"):
        loop_of(classifier, data, batch_size=8, steps=1, warmup=0, distillation=0.5)
    loop, teacher = loop_of(classifier, data, batch_size=8, steps=4), teacher_of(classifier)
    method = sb.methods.KnowledgePruning(sb.BitmapConfig(0.5), updates=2)
    replaced = method.prepare(loop.model, total_steps=4, teacher=teacher)
    stage = Stage("knowledge", "bitmap:0.5", distillation=0.5)
    with pytest.raises(ValueError, match="knowledge: replaces the task's loss"):
        training.Loop(
            loop.model,
            replaced,
            stage,
            loop.examples,
            seed=0,
            index=0,
            device=torch.device("cpu"),
            teacher=teacher,
        )


@pytest.mark.parametrize(
    "own",
    [
        ["--method", "admm", "--target", "2:4", "--option", "rounds=3", "--distillation", 0.5, "--group-by-length"],
        ["--method", "svd", "--target", "low-rank:0.5", "--option", "rows=2", "--group-by-length"],
    ],
    ids=["taught", "fwsvd"],
)
def test_taught_and_measured_trainings_resume_too(own, base, classifier, tmp_path, monkeypatch):
    options = [*base, *own, *(["--teacher", classifier] if "--distillation" in own else [])]
    whole = trained(*options, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, CUT, ctrl_c)
        assert run(*options, "--out", tmp_path / "cut").exit_code == 130
    resumed = trained("--resume", "--out", tmp_path / "cut")
    assert same(tmp_path / "whole", tmp_path / "cut") and resumed["masked"] == whole["masked"]


def test_weighted_factors_are_others_than_plain_ones(base, tmp_path):
    options = [*base, "--method", "svd", "--target", "low-rank:0.5"]
    for name, more in (("plain", []), ("weighted", ["--option", "rows=2"])):
        trained(*options, *more, "--out", tmp_path / name)
    assert not same(tmp_path / "plain", tmp_path / "weighted")


def test_accumulated_batches_are_one_large_batch(classifier, data):
    one = loop_of(classifier, data, batch_size=12, epochs=1)
    # Steps of 12, 12 and 6 rows: in batches of 4, 4, 4 and, at the end, of 4 and 2, which weigh as they hold rows.
    many = loop_of(classifier, data, batch_size=4, accumulate=3, epochs=1)
    assert one.total == many.total == 3
    assert [list(map(len, many.micro_batches(step))) for step in range(3)] == [[4, 4, 4], [4, 4, 4], [4, 2]]
    for _ in range(3):
        one.step()
        many.step()
        assert float(one.at.loss) == pytest.approx(float(many.at.loss), rel=1e-5)
        for (name, a), b in zip(one.model.named_parameters(), many.model.parameters(), strict=True):
            # A key's bias has no gradient but rounding noise, which Adam makes a full step of.
            if not name.endswith("key.bias"):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_gradients_are_clipped_and_biases_do_not_decay(classifier, data):
    loop = loop_of(classifier, data, batch_size=8, steps=2, max_grad_norm=1e-3, weight_decay=0.5)
    loop.step()
    total = sum(float(p.grad.square().sum()) for p in loop.model.parameters() if p.grad is not None)
    assert total**0.5 <= 1.001e-3
    decays = {id(p): g["weight_decay"] for g in loop.optimizer.param_groups for p in g["params"]}
    for name, parameter in loop.model.named_parameters():
        small = name.endswith("bias") or "LayerNorm" in name
        assert decays[id(parameter)] == (0.0 if small else 0.5), name


def test_the_model_trains_in_every_step_whatever_was_measured_before(plain, tmp_path, monkeypatch):
    modes = []
    before = Run.total_loss
    monkeypatch.setattr(
        Run, "total_loss", lambda r, outputs, inputs: modes.append(r.model.training) or before(r, outputs, inputs)
    )
    trained(*plain, "--eval-every", 1, "--out", tmp_path / "out")
    assert modes == [True] * STEPS


def test_bf16_keeps_masks_and_float32_weights(plain, tmp_path):
    done = trained(*plain, "--bf16", "--out", tmp_path / "out")
    assert done["stages"][0]["metrics"]["sparsity"] == 0.5
    assert tensors(tmp_path / "out")["classifier.weight"].dtype == torch.float32


# Ctrl-C and what comes after it


def test_every_method_is_tried():
    assert set(TARGETS) == set(METHODS) - {"factor-tuning"}  # which goes on from a plan: below


CASES = [*((method, OPTIONS.get(method, [])) for method in TARGETS), ("admm", ["--option", "input_moments=2"])]


@pytest.mark.parametrize(
    ("method", "own"), CASES, ids=lambda value: value if isinstance(value, str) else "".join(value)
)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(method, own, base, classifier, tmp_path, monkeypatch):
    """Bit for bit, with dropout; Ctrl-C arrives in a forward pass, and the step is finished first."""
    options = [*base, "--method", method, "--target", TARGETS[method], *own]
    options += ["--teacher", classifier] if method in TEACHERS else []
    whole = trained(*options, "--out", tmp_path / "whole")

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        interrupt(patch, CUT, ctrl_c)
        result = run(*options, "--out", out, "--json")
    assert (result.exit_code, result.stdout) == (130, "")
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"interrupted: the state after step {CUT + 1} of {method} is in ")
    assert said.endswith(f"to go on: sparsebert train --resume --out {out}")
    resumed = trained("--resume", "--out", out)
    assert resumed["resumed"]
    assert same(tmp_path / "whole", out)
    for key in ("dense", "masked", "reloaded"):
        assert resumed[key] == whole[key]
    assert resumed["stages"][0]["evaluations"] == whole["stages"][0]["evaluations"]
    assert not (out / "training").exists()


def test_a_step_that_was_cut_off_is_done_again(plain, whole, tmp_path, monkeypatch):
    """Torch's generator had moved on in that step: it has to go back."""
    with monkeypatch.context() as patch:
        interrupt(patch, CUT, kill)
        said = error_of(*plain, "--out", tmp_path / "cut", code=130)
    assert f"the state after step {CUT} of magnitude" in said
    trained("--resume", "--out", tmp_path / "cut")
    assert same(whole, tmp_path / "cut")


def test_in_the_middle_of_an_optimizer_step_only_an_older_state_is_good(plain, whole, tmp_path, monkeypatch):
    after = sb.methods.magnitude.MagnitudeRun.after_step

    def cut(self):
        if self.step == CUT:
            raise KeyboardInterrupt
        after(self)

    with monkeypatch.context() as patch:
        patch.setattr(sb.methods.magnitude.MagnitudeRun, "after_step", cut)
        assert "the state after step 6 of" in error_of(*plain, "--out", tmp_path / "cut", "--save-every", 3, code=130)
        said = error_of(*plain, "--out", tmp_path / "nothing", code=130)
        assert said.endswith("interrupted: no step was done yet, so there is nothing to resume")
    assert [p.name for p in (tmp_path / "cut" / "training").glob("stage-*")] == ["stage-0-step-00000006"]
    trained("--resume", "--out", tmp_path / "cut")
    assert same(whole, tmp_path / "cut")
    # Where there is nothing to lose, the folder may be used again.
    trained(*plain, "--out", tmp_path / "nothing")


@pytest.mark.parametrize("at", ["finalize", "compress_", "save_pretrained"])
def test_what_comes_after_the_last_step_can_be_done_again(at, plain, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        place = sb.methods.magnitude.MagnitudeRun if at == "finalize" else sb
        patch.setattr(place, at, lambda *arguments, **options: kill())
        assert f"the state after step {STEPS} of" in error_of(*plain, "--out", tmp_path / "cut", code=130)
    trained("--resume", "--out", tmp_path / "cut")
    assert same(whole, tmp_path / "cut")


TWO_STAGES = """
batch_size = 8
lr = 1e-3
steps = 4

[[stages]]
method = "magnitude"
target = "bitmap:0.5"

[[stages]]
method = "magnitude"
target = "1:4"
steps = 5
"""


def two_stages(tmp_path, text=TWO_STAGES) -> str:
    file = tmp_path / "two.toml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("at", [2, 3, 6])
def test_stages_follow_each_other_also_after_an_interruption(at, classifier, data, tmp_path, monkeypatch):
    options = ["--model", classifier, "--data", data, "--recipe", two_stages(tmp_path)]
    whole = trained(*options, "--out", tmp_path / "whole")
    assert [stage["steps"] for stage in whole["stages"]] == [4, 5]
    assert [stage["metrics"]["sparsity"] for stage in whole["stages"]] == [0.5, 0.75]
    with monkeypatch.context() as patch:
        interrupt(patch, at, ctrl_c)
        stage, step = divmod(at, 4)
        said = error_of(*options, "--out", tmp_path / "cut", code=130)
        assert f"the state after step {step + 1} of magnitude (stage {stage + 1} of 2)" in said
    resumed = trained("--resume", "--out", tmp_path / "cut")
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert [stage["scores"] for stage in resumed["stages"]] == [stage["scores"] for stage in whole["stages"]]


def test_a_stage_that_goes_on_from_a_plan(classifier, data, tmp_path, monkeypatch):
    text = TWO_STAGES.replace('"magnitude"\ntarget = "bitmap:0.5"', '"losparse"\ntarget = "low-rank:0.25+rows:0.25"')
    text = text.replace('"magnitude"\ntarget = "1:4"', '"factor-tuning"\nteacher = true')
    options = ["--model", classifier, "--teacher", classifier, "--data", data, "--recipe", two_stages(tmp_path, text)]
    trained(*options, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, 6, ctrl_c)
        assert "of factor-tuning (stage 2 of 2)" in error_of(*options, "--out", tmp_path / "cut", code=130)
    trained("--resume", "--out", tmp_path / "cut")
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_a_state_is_not_taken_for_another_training(plain, data, classifier, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in data.iterdir():
        (folder / file.name).write_text(file.read_text())
    out = tmp_path / "out"
    arguments = [str(folder) if part == str(data) else part for part in plain]
    with monkeypatch.context() as patch:
        interrupt(patch, CUT, ctrl_c)
        error_of(*arguments, "--out", out, code=130)
    (state,) = (out / "training").glob("stage-*")
    assert "holds a training that was interrupted; --resume goes on with it" in error_of(*arguments, "--out", out)

    rows = (folder / "dev.tsv").read_text()
    (folder / "dev.tsv").write_text(rows.replace("cat", "dog"))
    assert "is not the data that this training began with" in error_of("--resume", "--out", out)
    (folder / "dev.tsv").write_text(rows)

    settings = out / "training" / "settings.json"
    written = settings.read_text()
    settings.write_text(written.replace('"steps": 12', '"steps": 13'))
    said = error_of("--resume", "--out", out)
    assert "does not fit this model and method" in said and "total_steps is 12, expected 13" in said
    settings.write_text(written)

    content = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({**content, "state_version": 2}))
    assert "is no training state of version 1" in error_of("--resume", "--out", out)
    (state / "state.json").write_text(json.dumps(content))
    (state / "state.safetensors").write_bytes(b"\x80\x02")
    assert "state.safetensors" in error_of("--resume", "--out", out)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--out", "o", "--resume", "--lr", "1e-5"], "it does not go with --lr"),
        (["--out", "o", "--steps", "3", "--epochs", "1"], "give --steps or --epochs, not both"),
        (["--out", "o", "--schedule", "cosine"], "'cosine' is not one of linear, constant"),
        (["--out", "o", "--metric", "bleu"], "'bleu' is not one of accuracy"),
        (["--out", "o", "--option", "start"], "write it as start=100"),
        (["--out", "o", "--layer", "query=4"], "'4' is no format"),
        (["--out", "o", "--device", "tpu"], "'tpu' is not a device"),
        (["--out", "o", "--batch-size", "0"], "--batch-size"),
        ([], "--out"),
    ],
)
def test_usage_mistakes_end_with_code_2(arguments, complaint):
    assert complaint in error_of(*arguments, code=2)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"--method": None}, "give --method, such as seven, or --recipe"),
        ({"--method": "magic"}, "method is 'magic', expected one of "),
        ({"--target": None}, "magnitude: give --target, such as 2:4, or --layer"),
        ({"--target": "2-4"}, "'2-4' is no format"),
        ({"--target": "low-rank:0.5"}, "is not a mask"),
        ({"--option": "start=3"}, "magnitude: has no option 'start'; it has none"),
        ({"--option": "input_moments=3"}, "magnitude: has no option 'input_moments'"),
        (
            {"--method": "admm", "--option": "input_moments=some"},
            "input_moments is 'some', expected in how many batches",
        ),
        ({"--teacher": "no-such"}, "no-such: there is no such folder"),
        ({"--distillation": "0.5"}, "magnitude: needs a fine-tuned model to learn from; give --teacher"),
        ({"--distillation": "1.5"}, "distillation is 1.5, expected 0 to 1"),
        ({"--method": "svd", "--target": "low-rank:0.5", "--option": "rows=0"}, "rows is 0, expected in how many"),
        ({"--model": None}, "give --model"),
        ({"--model": "no-such-model/at-all"}, "there is no such folder, and the hub did not give it"),
        ({"--data": None}, "give --data, or a recipe with a task"),
        ({"--data": "./nowhere"}, "./nowhere: there is no such file or folder"),
        ({"--lr": "0"}, "lr is 0.0, expected a positive number"),
        ({"--warmup": "12"}, "warmup takes 12 steps, expected fewer than the 12"),
        ({"--warmup": "some"}, "warmup is 'some', expected a number, or a share"),
        ({"--metric": "pearson"}, "metric is 'pearson', which 2 classes does not have"),
        ({"--text-columns": "body"}, "has no column 'body'; its columns: label, sentence1"),
        ({"--label-column": "gold"}, "has no column 'gold'"),
        ({"--recipe": "seven:sst2"}, "the recipe seven:sst2 is for seven; --method magnitude does not go with it"),
        ({"--method": None, "--recipe": "knowledge:cola", "--option": None}, "needs a fine-tuned model to learn from"),
        ({"--method": None, "--recipe": "lpaf:cola"}, "has 2 stages (movement, then lpaf), each with a target"),
    ],
)
def test_what_cannot_be_trained_is_one_line(plain, tmp_path, change, complaint):
    arguments = dict(zip(plain[::2], plain[1::2], strict=True)) | change
    flat = [part for name, value in arguments.items() if value is not None for part in (name, value)]
    said = error_of(*flat, "--out", tmp_path / "out")
    assert complaint in said
    assert not (tmp_path / "out").exists()


def test_folders_that_are_in_use(plain, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    assert "is a file, expected a folder" in error_of(*plain, "--out", tmp_path / "file")
    assert "is not empty; choose another folder" in error_of(*plain, "--out", tmp_path / "full")
    assert "holds no training to resume" in error_of("--resume", "--out", tmp_path / "full")


def test_labels_that_the_head_does_not_know(classifier, data, tmp_path, base):
    write_rows(tmp_path / "train.tsv", 8, 0, lambda good: "up" if good else "down")
    write_rows(tmp_path / "dev.tsv", 8, 1, lambda good: "up" if good else "down")
    arguments = [str(tmp_path) if part == str(data) else part for part in base]
    said = error_of(*arguments, "--method", "magnitude", "--target", "2:4", "--out", tmp_path / "out")
    assert "its head knows the labels no, yes, but the data has down, up" in said


def test_a_loss_that_diverges_is_an_error(plain, tmp_path):
    said = error_of(*plain, "--lr", "1e30", "--out", tmp_path / "out")
    assert "at step" in said and "a smaller --lr may help" in said or "holds NaN" in said
