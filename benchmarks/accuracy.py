"""Methods x sparsities x tasks x seeds: what compression costs in accuracy, measured the same way for every arm.

    python benchmarks/accuracy.py run --data GLUE [--tasks CoLA] [--arms admm,magnitude] [--seeds 0,1] [--background]
    python benchmarks/accuracy.py status --data GLUE
    python benchmarks/accuracy.py one --data GLUE --task CoLA --arm admm --sparsity 50 --seed 0 --rate 1e-4
    python benchmarks/accuracy.py again --data GLUE --key short/CoLA/admm/50/0/0.0001
    python benchmarks/accuracy.py latency

``--data`` is a folder with a folder for each task, in it train.tsv and dev.tsv (label, sentence1, perhaps sentence2).
The arms, and the budgets of steps and learning rates, are those of benchmarks/study/arms.py.

``run`` goes on where the file of rows, benchmarks/data/accuracy/<budget>.jsonl, ends: it may be interrupted at any
time, and what was at work then starts again. ``again`` does one row's run once more and compares the masks, the
weights and the metric. ``latency`` times every format beside dense on this machine. ``benchmarks/report.py accuracy``
makes tables and plots of what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
# Before CUDA begins: products of one shape then always add in one order.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402

from sparsebert.bench import records  # noqa: E402
from sparsebert.bench.environment import environment  # noqa: E402
from sparsebert.cli.demo import find_model  # noqa: E402
from study import latency  # noqa: E402
from study.arms import ARMS, BUDGETS, FINE_TUNED, pick  # noqa: E402
from study.queue import Queue, make_repeatable, needs_start, work  # noqa: E402
from study.run import Bench, Job, execute  # noqa: E402

DATA = ROOT / "benchmarks" / "data" / "accuracy"
CACHE = ROOT / "benchmarks" / "out" / "accuracy"
# What a second run of a row has to give again.
SAME = ("masks", "weights", "holdout", "dev")


class File:
    """The rows of a budget: JSON lines that are only ever added to, each naming the environment that it is of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._record: str | None = None

    def rows(self) -> dict[str, dict[str, Any]]:
        """The accuracy rows by key, the newest of each."""
        found = {}
        if self.path.exists():
            for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    raise ValueError(f"{self.path}, line {number}: is no JSON; remove it to go on") from None
                if row.get("kind") == "accuracy":
                    found[row["key"]] = row
        return found

    def add(self, row: dict[str, Any], record: dict[str, Any]) -> None:
        name = records.identity(record)
        lines = [] if self._record == name else [{"kind": "environment", "environment": name, "record": record}]
        lines.append({**row, "environment": name})
        self._record = name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def make_queue(options: argparse.Namespace, file: File) -> Queue:
    budget = BUDGETS[options.budget]
    bench = bench_of(options)
    return Queue(
        budget,
        pick(options.arms),
        [name.strip() for name in options.tasks.split(",")],
        [int(seed) for seed in options.seeds.split(",")],
        None if options.sparsities is None else [int(s) for s in options.sparsities.split(",")],
        lambda job: bench.checkpoint(job).is_file(),
        dict(file.rows()),
    )


def bench_of(options: argparse.Namespace) -> Bench:
    return Bench(options.data, options.model or str(find_model()), options.cache, torch.device(options.device))


def run(options: argparse.Namespace) -> int:
    file = File(options.rows or DATA / f"{options.budget}.jsonl")
    queue = make_queue(options, file)
    for task in queue.tasks:
        if not (options.data / task).is_dir():
            raise ValueError(f"{options.data}: has no folder {task}")
    if options.background:
        return in_background(options)
    torch.set_num_threads(options.threads)
    record = environment(options.device)
    failures = []

    def keep(job: Job, row: Any) -> None:
        file.add(dict(row), record)
        print(
            f"{clock()} {job.key}: {row['metric']} {row['dev'][row['metric']]:.4f}, "
            f"held out {row['holdout']:.4f}, {row['seconds']['total']:.0f} s",
            flush=True,
        )

    def fail(job: Job, reason: str) -> None:
        failures.append(job)
        print(f"{clock()} {job.key}: failed: {reason}", flush=True)

    bench = bench_of(options)
    parts = (bench.data, bench.model, bench.cache, options.device)
    try:
        work(queue, parts, options.jobs, options.threads, keep, fail, options.most)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return int(bool(failures))


def in_background(options: argparse.Namespace) -> int:
    """Starts the same command in a session of its own and says where it reports."""
    log = options.cache / f"{options.budget}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [word for word in sys.argv[1:] if word != "--background"]
    with log.open("a", encoding="utf-8") as out:
        child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    print(f"runs in the background as process {child.pid}; it reports to {log}; kill {child.pid} ends it")
    return 0


def status(options: argparse.Namespace) -> int:
    file = File(options.rows or DATA / f"{options.budget}.jsonl")
    queue = make_queue(options, file)
    waiting = list(queue.waiting())
    print(f"{len(queue.rows)} rows in {file.path}")
    for job in waiting:
        print(f"{'ready  ' if queue.ready(job) else 'waiting'} {job.key}")
    print(f"{len(waiting)} runs are known to be due; more follow where a grid is not done")
    return 0


def do_one(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Runs ``job`` here, after the fine-tuned model it needs where that is not there."""
    make_repeatable(options.threads, options.device)
    bench = bench_of(options)
    rate = None
    if needs_start(job):
        queue = make_queue(options, File(options.rows or DATA / f"{options.budget}.jsonl"))
        rate = queue.start_rate(job.task) if options.start_rate is None else options.start_rate
        if rate is None:
            raise ValueError(f"{job.key}: the fine-tuned model's rate is not known yet: give --start-rate")
        start = Job(job.budget, job.task, FINE_TUNED, 0, job.seed, rate)
        if not bench.checkpoint(start).is_file():
            execute(start, bench, None)
    return execute(job, bench, rate)


def one(options: argparse.Namespace) -> int:
    job = Job(options.budget, options.task, options.arm, options.sparsity, options.seed, options.rate)
    check_job(job)
    print(json.dumps(do_one(job, options), indent=2))
    return 0


def check_job(job: Job) -> None:
    """``ValueError`` for a job that no queue has."""
    if job.arm == FINE_TUNED:
        return
    (arm,) = pick(job.arm)
    if job.sparsity not in arm.sparsities:
        raise ValueError(f"{job.arm}: sparsity is {job.sparsity}, expected {', '.join(map(str, arm.sparsities))}")
    if arm.trained == (job.rate is None):
        raise ValueError(f"{job.arm}: rate is {job.rate}, expected {'one' if arm.trained else 'none'}")


def again(options: argparse.Namespace) -> int:
    """Exit status 1 where the second run gives another mask, weight or metric."""
    rows = File(options.rows or DATA / f"{options.budget}.jsonl").rows()
    if options.key not in rows:
        raise ValueError(f"there is no row {options.key!r}")
    before = rows[options.key]
    options.start_rate = before["start_lr"]
    names = ("budget", "task", "arm", "sparsity", "seed")
    after = do_one(Job(*(before[name] for name in names), before["lr"]), options)
    for name in SAME:
        same = before[name] == after[name]
        print(f"{name}: {'the same' if same else f'{before[name]} and now {after[name]}'}")
    return int(any(before[name] != after[name] for name in SAME))


def time_formats(options: argparse.Namespace) -> int:
    file = File(options.rows or DATA / f"{options.budget}.jsonl")
    torch.set_num_threads(options.threads)
    record = environment(options.device)
    targets = latency.targets(ARMS.values())
    for row in latency.measure(bench_of(options).model, targets, torch.device(options.device)):
        file.add(row, record)
        print(f"{row['format']}: {row['ratio']:.3f} of dense, {row['batch']} x {row['length']}", flush=True)
    return 0


def clock() -> str:
    return time.strftime("%H:%M:%S")


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--budget", choices=list(BUDGETS), default="short")
    every.add_argument("--model", help="a pre-trained checkpoint; by default all-MiniLM-L6-v2 of the demo's package")
    every.add_argument("--rows", type=Path, metavar="FILE", help="where the rows are, other than benchmarks/data")
    every.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="where fine-tuned models lie")
    every.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    with_data = argparse.ArgumentParser(add_help=False)
    with_data.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="a folder for each task")
    with_data.add_argument("--threads", type=int, default=1, help="of a run; another number gives other sums")
    many = argparse.ArgumentParser(add_help=False)
    many.add_argument("--tasks", default="CoLA", metavar="A,B")
    many.add_argument("--arms", metavar="A,B", help="in this order; by default all")
    many.add_argument("--seeds", default="0,1", metavar="N,N")
    many.add_argument("--sparsities", metavar="N,N", help="of those that an arm has; by default all")

    add = commands.add_parser("run", parents=[every, with_data, many], help="every run that is not done yet")
    add.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, on one GPU as well")
    add.add_argument("--most", type=int, metavar="N", help="stop after so many runs")
    add.add_argument("--background", action="store_true", help="go on after this terminal is closed")
    add.set_defaults(function=run)
    commands.add_parser("status", parents=[every, with_data, many], help="what is done and due").set_defaults(
        function=status
    )
    single = argparse.ArgumentParser(add_help=False)
    single.add_argument("--start-rate", type=float, help="of the fine-tuned model, where no row says it")
    single.set_defaults(arms=None, tasks="CoLA", seeds="0", sparsities=None)
    add = commands.add_parser("one", parents=[every, with_data, single], help="one run, its row on the screen")
    add.add_argument("--task", required=True)
    add.add_argument("--arm", required=True)
    add.add_argument("--sparsity", type=int, required=True)
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--rate", type=float, help="none for an arm that does not train")
    add.set_defaults(function=one)
    add = commands.add_parser("again", parents=[every, with_data, single], help="a row's run once more, compared")
    add.add_argument("--key", required=True)
    add.set_defaults(function=again)
    add = commands.add_parser("latency", parents=[every], help="every format beside dense, on this machine")
    add.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    add.set_defaults(function=time_formats, data=Path())
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    try:
        return options.function(options)
    except (ValueError, OSError) as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
