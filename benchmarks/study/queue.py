"""Which run of the study is next: what is done, what has to be there before, and workers that do it side by side."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from study.arms import ARMS, FINE_TUNED, Arm, Budget
from study.run import START, Bench, Job, execute

Row = Mapping[str, Any]


@dataclass
class Queue:
    """The runs of ``arms`` on ``tasks`` with ``seeds``, in this order: an arm's grid on the first seed, then the other
    seeds at the best rate. ``rows`` are those that there are, by key; ``failed`` those that a run failed for.

    ``has_checkpoint`` says whether the fine-tuned model of a job is there: without it its row alone is not enough.
    """

    budget: Budget
    arms: Sequence[Arm]
    tasks: Sequence[str]
    seeds: Sequence[int]
    sparsities: Sequence[int] | None
    has_checkpoint: Callable[[Job], bool]
    rows: dict[str, Row] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)

    def next(self) -> Job | None:
        """The first job that can be done now; None where all are done, running or waiting for one that is."""
        return next((job for job in self.waiting() if self.ready(job)), None)

    def waiting(self) -> Iterable[Job]:
        """Every job that is known by now and neither done nor running."""
        for task in self.tasks:
            cells = [(START, 0), *((arm, sparsity) for arm in self.arms for sparsity in self.wanted(arm))]
            for arm, sparsity in cells:
                for job in self.jobs(task, arm, sparsity):
                    if job.key not in self.running | self.failed and not self.done(job):
                        yield job

    def wanted(self, arm: Arm) -> list[int]:
        return [s for s in arm.sparsities if not s or self.sparsities is None or s in self.sparsities]

    def jobs(self, task: str, arm: Arm, sparsity: int) -> Iterable[Job]:
        """Of one cell: the grid on the first seed, and where its best rate is known, the other seeds."""

        def job(seed: int, rate: float | None) -> Job:
            return Job(self.budget.name, task, arm.name, sparsity, seed, rate)

        first, *others = self.seeds
        if not arm.trained:
            yield from (job(seed, None) for seed in self.seeds)
            return
        if arm.tuned_as is not None:
            if (rate := self.inherited(task, arm, sparsity)) is not None:
                yield from (job(seed, rate) for seed in self.seeds)
            return
        yield from (job(first, rate) for rate in self.budget.rates)
        if (rate := self.best_rate(task, arm, sparsity)) is not None:
            yield from (job(seed, rate) for seed in others)

    def done(self, job: Job) -> bool:
        if job.key not in self.rows:
            return False
        # A grid's other models are of no use.
        selected = job.arm != FINE_TUNED or job.rate != self.best_rate(job.task, START, 0)
        return selected or self.has_checkpoint(job)

    def ready(self, job: Job) -> bool:
        if not needs_start(job):
            return True
        rate = self.start_rate(job.task)
        if rate is None:
            return False
        start = Job(job.budget, job.task, FINE_TUNED, 0, job.seed, rate)
        return self.done(start)

    def start_rate(self, task: str) -> float | None:
        return self.best_rate(task, START, 0)

    def best_rate(self, task: str, arm: Arm, sparsity: int) -> float | None:
        """The rate with the best metric on held-out rows, the smaller of equals; None before the grid is done."""
        found = {}
        for rate in self.budget.rates:
            key = Job(self.budget.name, task, arm.name, sparsity, self.seeds[0], rate).key
            if key in self.rows:
                found[rate] = self.rows[key]["holdout"]
            elif key not in self.failed:
                return None
        return max(found, key=lambda rate: (found[rate], -rate)) if found else None

    def inherited(self, task: str, arm: Arm, sparsity: int) -> float | None:
        """The rate of the arm that this one ablates, at the nearest sparsity that is measured."""
        tuned = ARMS[arm.tuned_as or arm.name]
        nearest = sorted(tuned.sparsities, key=lambda s: (abs(s - sparsity), s))
        if not nearest:
            return None
        return self.best_rate(task, tuned, nearest[0])


def needs_start(job: Job) -> bool:
    """Whether the job starts from the fine-tuned model, or learns from it."""
    if job.arm == FINE_TUNED:
        return False
    arm = ARMS[job.arm]
    return arm.start == FINE_TUNED or arm.taught


def work(
    queue: Queue,
    bench: tuple[Path, str, Path, str],
    workers: int,
    threads: int,
    keep: Callable[[Job, Row], None],
    fail: Callable[[Job, str], None],
    most: int | None = None,
) -> None:
    """Does every job of ``queue``, ``workers`` at a time, each in a process of ``threads`` threads, and hands each row
    to ``keep`` as it comes, or the reason for which there is none to ``fail``. ``most``: stops after so many."""
    context = multiprocessing.get_context("spawn")
    began = 0
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(*bench, threads)) as pool:
        active: dict[Future[dict[str, Any]], Job] = {}
        try:
            while True:
                while len(active) < workers and (most is None or began < most) and (job := queue.next()) is not None:
                    active[pool.submit(_do, job, queue.start_rate(job.task) if needs_start(job) else None)] = job
                    queue.running.add(job.key)
                    began += 1
                if not active:
                    return
                for future in wait(active, return_when=FIRST_COMPLETED).done:
                    job = active.pop(future)
                    queue.running.discard(job.key)
                    if (error := future.exception()) is not None:
                        queue.failed.add(job.key)
                        fail(job, f"{type(error).__name__}: {error}")
                        continue
                    queue.rows[job.key] = future.result()
                    keep(job, queue.rows[job.key])
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise


_bench: Bench | None = None


def _begin(data: Path, model: str, cache: Path, device: str, threads: int) -> None:
    """In a worker: Ctrl-C is for the process that hands out the work."""
    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    make_repeatable(threads, device)
    _bench = Bench(data, model, cache, torch.device(device))


def _do(job: Job, start_rate: float | None) -> dict[str, Any]:
    if _bench is None:
        raise RuntimeError("a worker was not begun")
    return execute(job, _bench, start_rate)


def make_repeatable(threads: int, device: str) -> None:
    """The same numbers in the same order in every process: sums depend on the number of threads, and on a GPU on which
    kernels are allowed (which CUBLAS_WORKSPACE_CONFIG has to say before CUDA begins)."""
    torch.set_num_threads(threads)
    # On a GPU some ops are only said to differ in what the methods do not use, as kthvalue in its indices of ties.
    torch.use_deterministic_algorithms(True, warn_only=torch.device(device).type != "cpu")
    # Nothing here reads what nobody wrote, and filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False
