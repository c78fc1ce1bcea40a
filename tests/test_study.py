"""The accuracy study on a tiny model: every arm runs and says what it did, runs again to the same bits, and the queue
hands out the right run whatever is there already."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

import sparsebert as sb
from sparsebert.configs import parse_config

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import accuracy  # noqa: E402
from study import arms, latency, queue, run, tasks  # noqa: E402
from study.arms import ARMS, BUDGETS, FINE_TUNED, Budget  # noqa: E402
from study.run import Job  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "red green blue good bad fine poor cat dog bird sat ran flew on under the a mat tree house".split()
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
# 7 steps an epoch.
TINY = Budget("tiny", 2, 6, (1e-3, 3e-3), batch_size=8, max_length=16, words=False)


def write_rows(file: Path, count: int, seed: int) -> None:
    draw = random.Random(seed)
    lines = ["label\tsentence1"]
    for _ in range(count):
        good = draw.randrange(2)
        words = [*draw.choices(WORDS, k=draw.randint(2, 8)), "good" if good else "poor"]
        lines.append(f"{good}\t{' '.join(words)}")
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module", autouse=True)
def tiny_budget():
    BUDGETS["tiny"] = TINY
    yield
    del BUDGETS["tiny"]


@pytest.fixture(autouse=True)
def as_before():
    """A run makes torch deterministic, for good."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(3)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=24)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=24, initializer_range=0.3, **SIZES)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "CoLA").mkdir()
    write_rows(folder / "CoLA" / "train.tsv", 60, 0)
    write_rows(folder / "CoLA" / "dev.tsv", 20, 1)
    return folder


@pytest.fixture(scope="module")
def bench(data, encoder, tmp_path_factory) -> run.Bench:
    """With the fine-tuned model of seed 0 at its place."""
    found = run.Bench(data, str(encoder), tmp_path_factory.mktemp("cache"), torch.device("cpu"))
    run.execute(start(1e-3), found, None)
    return found


def start(rate: float, seed: int = 0) -> Job:
    return Job("tiny", "CoLA", FINE_TUNED, 0, seed, rate)


def job(arm: str, sparsity: int | None = None, rate: float | None = 1e-3, seed: int = 0) -> Job:
    return Job("tiny", "CoLA", arm, ARMS[arm].sparsities[0] if sparsity is None else sparsity, seed, rate)


# The table of arms


def test_arms_refer_to_arms():
    for arm in ARMS.values():
        assert arm.baseline is None or arm.baseline in ARMS, arm.name
        if arm.tuned_as is not None:
            assert ARMS[arm.tuned_as].tuned_as is None and ARMS[arm.tuned_as].trained, arm.name
        assert set(arm.sparsities) <= {0, 50, 75, 80, 90, 95} and arm.parts, arm.name
    assert {name for name, arm in ARMS.items() if arm.distilled} > {"admm+kd", "lpaf+kd", "losparse+kd"}
    assert not ARMS["knowledge"].distilled and ARMS["knowledge"].taught


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_takes_the_steps_of_its_budget_and_stores_what_its_sparsity_says(name):
    arm = ARMS[name]
    for sparsity in arm.sparsities:
        stages = arm.stages(sparsity, 241, 1e-4, TINY)
        assert sum(stage.steps for stage in stages) == 241
        target = stages[-1].target
        if target is None or name == "one-layer":
            continue
        config = parse_config(target)
        weight = torch.nn.Linear(384, 1536)
        model = torch.nn.Sequential(weight)
        sb.compress_(model, {"0": config})
        kept = sum(
            tensor.count_nonzero() if tensor.is_floating_point() and label != "bias" else 0
            for label, tensor in model[0].state_dict().items()
        )
        # Ranks and rows are whole numbers.
        assert float(kept) / weight.weight.numel() == pytest.approx(arms.density(sparsity), abs=0.004), sparsity


def test_stages_of_one_arm_share_its_steps():
    first, second = ARMS["lpaf"].stages(50, 241, 1e-4, TINY)
    assert (first.method, second.method, first.steps, second.steps) == ("movement", "lpaf", 120, 121)


def test_an_unknown_arm_is_named():
    with pytest.raises(ValueError, match="arm is 'magic', expected some of dense"):
        arms.pick("admm,magic")
    assert [arm.name for arm in arms.pick("seven, admm,seven")] == ["seven", "admm"]


# Data


def test_the_same_rows_are_held_out_and_none_is_lost():
    train, held = tasks.split(8551)
    assert len(held) == 855 and sorted(train + held) == list(range(8551))
    assert tasks.split(8551) == (train, held)
    assert len(tasks.split(67349)[1]) == tasks.MOST_HELD_OUT
    with pytest.raises(ValueError, match="has 9 rows to train on, expected at least 10"):
        tasks.split(9)


def test_metrics_are_those_of_glue():
    assert [tasks.metric_of(name) for name in ("CoLA", "SST-2", "MRPC", "RTE", "other")] == [
        *("matthews", "accuracy", "f1", "accuracy", "accuracy")
    ]


def test_a_regression_is_refused(bench, tmp_path):
    for part in ("train", "dev"):
        (tmp_path / f"{part}.tsv").write_text("label\tsentence1\n" + "0.5\tred cat\n1.5\tblue dog\n" * 10)
    with pytest.raises(ValueError, match="is a regression, which the study does not have"):
        tasks.load(tmp_path, bench.tokenizer(), 16)


# Runs

FIELDS = {
    *("kind", "key", "budget", "task", "arm", "sparsity", "seed", "lr", "command", "start", "start_lr", "stages"),
    *("steps", "budget_steps", "metric", "holdout", "dev", "one_class", "at_start", "before_projection", "masks"),
    *("weights", "density", "format", "bytes", "int8", "trace", "probes", "seconds", "reload_agrees"),
}
# Half of the arms with a teacher differ from these by nothing but the loss.
TRIED = [name for name, arm in ARMS.items() if not arm.distilled or name in ("admm+kd", "lpaf+kd", "one-layer")]


@pytest.mark.parametrize("name", TRIED)
def test_every_arm_runs_and_keeps_to_its_format(bench, name):
    arm = ARMS[name]
    tried = job(name, max(arm.sparsities), 1e-3 if arm.trained else None)
    row = run.execute(tried, bench, 1e-3)
    assert row.keys() == FIELDS
    json.dumps(row, allow_nan=False)
    assert row["reload_agrees"] and len(row["masks"]) == len(row["weights"]) == 64
    own, both = (42, 56) if arm.start == FINE_TUNED else (56, 56)
    assert (row["steps"], row["budget_steps"]) == ((own, both) if arm.trained else (0, 14))
    if name == "one-layer":
        assert row["bytes"]["encoder"]["disk_bytes"] * 2 == row["bytes"]["encoder"]["dense_bytes"]
    elif tried.sparsity:
        # Of a matrix of 32 x 32 a rank is 6 %, and a row 3 %.
        assert row["density"] == pytest.approx(
            arms.density(tried.sparsity), abs=0.06 if "low" in row["format"] else 1e-3
        )
        assert row["bytes"]["encoder"]["disk_bytes"] < 0.8 * row["bytes"]["encoder"]["dense_bytes"]
    assert (row["int8"] is not None) == (row["format"][0].isdigit() or name.startswith("dense"))
    assert (row["probes"] is not None) == arm.probed
    if arm.trained:
        assert row["trace"][-1]["stage"] == len(arm.parts) - 1
        assert [e["step"] for e in row["trace"] if e["stage"] == 0][-1] == row["stages"][0]["steps"]


def test_the_projection_is_measured_before_it_happened(bench, monkeypatch):
    seen, before = [], run._Execution.score

    def score(self, model, examples):
        if examples is self.task.dev:
            seen.append(run.density_of(model, run.CompressionPlan()) if self.measured["at_start"] is None else None)
        return before(self, model, examples)

    monkeypatch.setattr(run._Execution, "score", score)
    monkeypatch.setattr(run._Execution, "int8", lambda self, model, stages: None)
    monkeypatch.setattr(run._Execution, "reloaded", lambda self, model, plan: (model, True))
    run.execute(job("admm-pull", 50), bench, 1e-3)
    # Dense, and then at 2:4.
    assert seen == [pytest.approx(1.0, abs=1e-3), 0.5]


def test_what_claims_need_is_in_the_rows(bench):
    dense = run.execute(job("dense"), bench, 1e-3)
    assert dense["probes"]["shuffled"] is None and set(dense["probes"]["truncated"]) == {"0.5", "0.25"}
    ranks = run.execute(job("movement-ranks", 80), bench, 1e-3)["probes"]
    assert 0 < ranks["spectra"]["stable_rank"] < 1 and ranks["shuffled"]["layers"] == 12
    pulled = run.execute(job("admm-pull", 50), bench, 1e-3)
    assert pulled["before_projection"] is not None and pulled["at_start"] is None
    assert [entry["round"] for entry in pulled["trace"] if "round" in entry][-1] == 10
    assert run.execute(job("lpaf", 50), bench, 1e-3)["at_start"] is not None
    regrown = run.execute(job("admm-srste", 50), bench, 1e-3)["trace"]
    assert all(0 <= entry["flipped"] <= 1 for entry in regrown if "flipped" in entry)
    assert any("flipped" in entry for entry in regrown)


def test_a_run_gives_the_same_bits_again_and_another_seed_others(bench):
    first, again = (run.execute(job("admm-srste", 50), bench, 1e-3) for _ in range(2))
    assert all(first[name] == again[name] for name in (*accuracy.SAME, "trace", "int8"))
    run.execute(start(1e-3, seed=1), bench, None)
    other = run.execute(job("admm-srste", 50, seed=1), bench, 1e-3)
    assert other["masks"] != first["masks"]


def test_a_run_without_its_start_says_so(bench):
    with pytest.raises(ValueError, match="the fine-tuned model is not there; run its job first"):
        run.execute(job("admm", 50), replace(bench, cache=bench.cache / "none"), 1e-3)
    with pytest.raises(ValueError, match="needs a fine-tuned model, but the rate of none is known"):
        run.execute(job("knowledge", 95), bench, None)


def test_a_digest_sees_every_bit_and_name():
    one = torch.zeros(4)
    other = one.clone()
    other[2] = -0.0
    assert run.digest([("a", one)]) == run.digest([("a", one.clone())])
    assert run.digest([("a", one)]) != run.digest([("a", other)]) != run.digest([("b", other)])
    assert run.digest([("a", one), ("b", other)]) == run.digest([("b", other), ("a", one)])


# The queue


def queue_of(names: str, *, seeds=(0, 1), there=True, **more) -> queue.Queue:
    return queue.Queue(TINY, arms.pick(names), ["CoLA"], seeds, None, lambda job: there, **more)


def row(done: Job, holdout: float) -> tuple[str, dict]:
    return done.key, {"holdout": holdout}


def drain(work: queue.Queue, score=lambda job: 0.5) -> list[Job]:
    found = []
    while (now := work.next()) is not None:
        found.append(now)
        work.rows[now.key] = {"holdout": score(now)}
    return found


def test_the_start_comes_first_then_grids_then_other_seeds_at_the_best_rate():
    found = drain(queue_of("admm"), lambda job: job.rate)
    rates = [(job.arm, job.sparsity, job.seed, job.rate) for job in found]
    assert rates == [
        (FINE_TUNED, 0, 0, 1e-3),
        (FINE_TUNED, 0, 0, 3e-3),
        (FINE_TUNED, 0, 1, 3e-3),
        *(("admm", sparsity, seed, rate) for sparsity in (50, 75) for seed, rate in ((0, 1e-3), (0, 3e-3), (1, 3e-3))),
    ]


def test_equal_rates_go_to_the_smaller_and_ablations_take_their_arms_rate():
    found = drain(queue_of("seven-signed,seven", seeds=(0,)))
    assert [(job.arm, job.rate) for job in found if job.arm != FINE_TUNED and job.sparsity == 50] == [
        *(("seven", 1e-3), ("seven", 3e-3), ("seven-signed", 1e-3))
    ]
    # Its own sparsities are not all among those of the arm it ablates: the nearest one's.
    found = drain(
        queue_of("movement-ranks,movement", seeds=(0,)), lambda job: job.rate * (1 if job.sparsity > 80 else -1)
    )
    assert {job.sparsity: job.rate for job in found if job.arm == "movement-ranks"} == {80: 1e-3, 90: 3e-3, 95: 3e-3}


def test_nothing_starts_before_what_it_starts_from():
    work = queue_of("admm,dense-pretrained")
    for _ in range(2):
        now = work.next()
        assert now.arm == FINE_TUNED
        work.running.add(now.key)
    # What needs no fine-tuned model may begin meanwhile.
    assert work.next().arm == "dense-pretrained"


def test_a_lost_fine_tuned_model_is_made_again_and_a_failed_run_is_not_tried_again():
    rows = dict(row(start(rate, seed), rate) for rate, seed in ((1e-3, 0), (3e-3, 0), (3e-3, 1)))
    work = queue_of("one-shot", there=False, rows=rows)
    assert work.next() == start(3e-3)
    assert queue_of("one-shot", rows=rows).next() == job("one-shot", 50, None)
    work = queue_of("admm", rows=rows, failed={job("admm", 50, 1e-3).key})
    assert [now.rate for now in drain(work) if now.sparsity == 50] == [3e-3, 3e-3]


def test_a_key_is_of_one_run_alone():
    jobs = [job("admm", s, r, seed) for s in (50, 75) for r in (1e-3, 3e-3) for seed in (0, 1)]
    assert len({one.key for one in jobs}) == len(jobs)
    assert jobs[0].command.endswith("--task CoLA --arm admm --sparsity 50 --seed 0 --rate 0.001")


# The program


def options(data, encoder, tmp_path, *more: str) -> list[str]:
    where = ["--rows", str(tmp_path / "rows.jsonl"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    return ["--data", str(data), "--model", str(encoder), "--budget", "short", *where, *more]


def test_a_study_runs_in_workers_and_goes_on_where_it_ended(data, encoder, tmp_path, capsys):
    words = options(data, encoder, tmp_path, "--arms", "one-shot", "--seeds", "0", "--sparsities", "50", "--jobs", "2")
    assert accuracy.main(["run", *words, "--most", "3"]) == 0
    file = accuracy.File(tmp_path / "rows.jsonl")
    assert [key.split("/")[2] for key in file.rows()] == [FINE_TUNED] * 3
    assert accuracy.main(["status", *words[:-2]]) == 0
    assert "ready   short/CoLA/one-shot/50/0" in capsys.readouterr().out
    assert accuracy.main(["run", *words]) == 0
    assert list(file.rows())[3:] == ["short/CoLA/one-shot/50/0"]
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    records = {line["environment"]: line["record"] for line in lines if line["kind"] == "environment"}
    assert len(records) == 2 and all(line["environment"] in records for line in lines)
    assert all(record["cpu_threads"] == 1 for record in records.values())
    again = ["again", *options(data, encoder, tmp_path), "--key", "short/CoLA/one-shot/50/0"]
    assert accuracy.main(again) == 0
    said = capsys.readouterr().out
    assert said.endswith("masks: the same\nweights: the same\nholdout: the same\ndev: the same\n")


def test_the_background_run_outlives_its_command(data, encoder, tmp_path):
    words = options(data, encoder, tmp_path, "--arms", "one-shot", "--seeds", "0", "--most", "1", "--jobs", "1")
    command = [sys.executable, str(BENCHMARKS / "accuracy.py"), "run", *words, "--background"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "runs in the background as process" in said
    log = tmp_path / "cache" / "short.log"
    for _ in range(240):
        if "fine-tuned" in log.read_text():
            break
        time.sleep(0.5)
    assert "short/CoLA/fine-tuned/0/0/5e-05: matthews" in log.read_text()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["run", "--arms", "magic"], "arm is 'magic'"),
        (["run", "--tasks", "QNLI"], "has no folder QNLI"),
        (
            ["one", "--task", "CoLA", "--arm", "admm", "--sparsity", "60", "--rate", "1e-4"],
            "sparsity is 60, expected 50",
        ),
        (["one", "--task", "CoLA", "--arm", "admm", "--sparsity", "50"], "admm: rate is None, expected one"),
        (
            ["one", "--task", "CoLA", "--arm", "admm", "--sparsity", "50", "--rate", "1e-4"],
            "the fine-tuned model's rate is not known yet: give --start-rate",
        ),
        (["again", "--key", "short/none"], "there is no row 'short/none'"),
    ],
)
def test_mistakes_are_one_line(data, encoder, tmp_path, capsys, words, complaint):
    assert accuracy.main([words[0], *options(data, encoder, tmp_path), *words[1:]]) == 2
    said = capsys.readouterr().err
    assert complaint in said and len(said.splitlines()) == 1


def test_a_cut_off_line_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"kind": "accuracy", "key": "a"}\n{"kind": "acc')
    with pytest.raises(ValueError, match="rows.jsonl, line 2: is no JSON; remove it to go on"):
        accuracy.File(tmp_path / "rows.jsonl").rows()


def test_formats_are_timed_beside_dense(encoder):
    targets = latency.targets(ARMS.values())
    assert {"2:4", "int8+2:4", "bitmap:0.05", "low-rank:0.25", "int8"} < set(targets) and "dense" not in targets
    rows = list(latency.measure(str(encoder), ["low-rank:0.5"], torch.device("cpu"), budget_s=0.05))
    assert [(found["batch"], found["length"]) for found in rows] == [(1, 24), (8, 24)]
