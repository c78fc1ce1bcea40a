"""What a training step of each method costs beside a plain AdamW step of the same model, in one run, in turns:

    python benchmarks/training.py [--model PATH] [--methods A,B] [--device cuda] > FILE.jsonl

The plain model and the method's train side by side from the same weights on the same batches, a block of steps of the
one and then of the other. A block is ten steps, the interval at which masks are renewed by default, and the ratio is
that of whole blocks: a step that sorts every weight counts, as a median of steps would not show. The method is prepared
for exactly the steps that are done, so its schedule is walked from end to end; the first block warms up. ``ratio`` is
the median over the blocks, ``worst`` that of the dearest block. Distillation counts apart: where a method has a
teacher, a third model trains plainly with the same losses, and what these add to a plain step is taken off the
method's.

``floats`` is what a method holds beyond plain training, in floats of four bytes for each weight it prunes: every
tensor in reach of the model, its gradients, the optimizer and the run, less what the plain training holds; the largest
over all blocks. On a GPU ``peak_floats`` is the same of the largest allocation during a step.

A table goes to stderr, a JSON line a method to stdout. The model is a random BERT of MiniLM's size (6 layers of 384)
unless --model names a checkpoint; --smoke takes a tiny one, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparsebert.bench.environment import device_label, environment  # noqa: E402
from sparsebert.cli.recipes import arguments  # noqa: E402
from sparsebert.configs import LowRankConfig, LowRankSparseConfig, parse_config  # noqa: E402
from sparsebert.methods import METHODS, SVD, Magnitude, Method, Run  # noqa: E402
from sparsebert.methods.capture import Capture  # noqa: E402
from sparsebert.methods.maths import distillation  # noqa: E402
from sparsebert.methods.teacher import Teacher  # noqa: E402
from sparsebert.plan import CompressionPlan  # noqa: E402


@dataclass(frozen=True)
class Case:
    """``bound`` of the ratio: 1.15, or 1.5 where a second forward pass is the method. ``distils``: what its loss takes
    from a teacher, if anything. ``first``: the format of what the stage before left, where the method goes on from
    that."""

    target: str
    options: Mapping[str, Any] | None = None
    distils: tuple[str, ...] = ()
    bound: float = 1.15
    floats: float = 3.0
    first: str | None = None


CASES = {
    "magnitude": Case("2:4"),
    "gradual-magnitude": Case("bitmap:0.5"),
    "snip": Case("bitmap:0.5"),
    "platon": Case("bitmap:0.5"),
    "seven": Case("bitmap:0.5"),
    "movement": Case("bitmap:0.5", floats=5.0),
    "knowledge": Case("bitmap:0.05", {"updates": 6}, distils=("hidden", "attention", "logits")),
    "admm": Case("2:4"),
    "losparse": Case("low-rank:0.05+rows:0.15"),
    "factor-tuning": Case("low-rank:0.05+rows:0.15", distils=("hidden",), first="low-rank:0.05+rows:0.15"),
    "lpaf": Case("low-rank:0.25", bound=1.5, first="bitmap:0.2"),
    "svd": Case("low-rank:0.25"),
}


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int
    feed_forward: int
    vocabulary: int
    batch: int
    length: int


MINILM = Size(6, 384, 12, 1536, 30522, 16, 64)
SMOKE = Size(2, 32, 4, 64, 100, 4, 8)


class Distillation:
    """The losses that a method takes from its teacher, in a plain training."""

    def __init__(self, model: nn.Module, teacher: nn.Module, distils: tuple[str, ...]) -> None:
        self.distils = distils
        captured = {"hidden": "hidden" in distils, "attention": "attention" in distils}
        self.student = Capture(model, **captured)
        self.student.attach()
        self.teacher = Teacher(teacher, **captured)

    def loss(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        ours = self.student.take(outputs)
        theirs, answer = self.teacher.ask(inputs)
        total = distillation.hidden_state_loss(ours.hidden_states, theirs.hidden_states)
        if "attention" in self.distils:
            mask = inputs["attention_mask"]
            total = total + distillation.attention_score_loss(ours.attention_scores, theirs.attention_scores, mask)
        if "logits" in self.distils:
            total = total + distillation.soft_cross_entropy(outputs.logits, answer.logits)
        return total


class Training:
    """A model, its optimizer and, unless it trains plainly, a method's run; ``step`` does one step."""

    def __init__(
        self,
        model: nn.Module,
        method: Method | None,
        steps: int,
        teacher: nn.Module | None,
        distils: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self.run: Run | None = None
        self.distillation = Distillation(model, teacher, distils) if teacher is not None and distils else None
        if method is not None:
            self.run = method.prepare(model, total_steps=steps, teacher=teacher)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        if self.run is not None:
            self.run.attach(self.optimizer)
        model.train()

    def step(self, inputs: dict[str, Tensor]) -> None:
        outputs = self.model(**inputs)
        loss = outputs.loss if self.run is None else self.run.total_loss(outputs, inputs)
        if self.distillation is not None:
            loss = loss + self.distillation.loss(outputs, inputs)
        loss.backward()
        self.optimizer.step()
        # Kept, as a loop that sets them to None would be measured at an odd moment.
        self.optimizer.zero_grad(set_to_none=False)

    def held_bytes(self, *, besides: nn.Module | None) -> int:
        """Of every tensor in reach, each storage once; ``besides`` and what is in its reach does not count."""
        seen: dict[int, int] = {}
        _walk([self.model, self.optimizer.state, self.run], seen, set() if besides is None else {id(besides)})
        return sum(seen.values())


def _walk(value: Any, storages: dict[int, int], visited: set[int]) -> None:
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if value.grad is not None:
            _walk(value.grad, storages, visited)
    elif isinstance(value, Mapping):
        for item in list(value.values()):
            _walk(item, storages, visited)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _walk(item, storages, visited)
    elif isinstance(value, nn.Module | torch.optim.Optimizer) or type(value).__module__.startswith("sparsebert"):
        _walk(getattr(value, "__dict__", None), storages, visited)


def compressed_(model: nn.Module, target: str) -> CompressionPlan:
    """Compresses ``model`` in one shot, in place, as what a method goes on from."""
    config = parse_config(target)
    one_shot = SVD if isinstance(config, LowRankConfig | LowRankSparseConfig) else Magnitude
    return one_shot(config).prepare(model, total_steps=1).finalize()


def build(name: str, case: Case, plan: CompressionPlan | None) -> Method:
    cls: Any = METHODS[name]
    goes_on = arguments(cls)[0] == "plan"
    return cls(plan if goes_on else parse_config(case.target), **(case.options or {}))


def make_model(path: str | None, size: Size, device: torch.device) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if path is not None:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    else:
        config = transformers.BertConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=size.feed_forward,
        )
        model = transformers.BertForSequenceClassification(config)
    return model.to(device)


def make_batches(model: Any, size: Size, count: int, device: torch.device) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(3, model.config.vocab_size, (size.batch, size.length), generator=generator)
        labels = torch.randint(0, model.config.num_labels, (size.batch,), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        found.append({name: tensor.to(device) for name, tensor in inputs.items()})
    return found


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    started = clock(device)
    work()
    return clock(device) - started


def measure(name: str, dense: nn.Module, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One method against plain training: a warm-up block and ``options.blocks`` of ``options.every`` steps each."""
    case, size = CASES[name], SMOKE if options.smoke else MINILM
    steps = options.every * (options.blocks + 1)
    start = copy.deepcopy(dense)
    plan = None if case.first is None else compressed_(start, case.first)
    teacher = copy.deepcopy(dense).eval().requires_grad_(False) if case.distils else None
    plain = Training(copy.deepcopy(start), None, steps, None)
    # A method's own losses come with its run; the same in plain training are counted apart.
    taught = Training(copy.deepcopy(start), None, steps, teacher, case.distils) if case.distils else None
    other = Training(start, build(name, case, plan), steps, teacher)
    weights = sum(plain.model.get_submodule(path).weight.numel() for path in other.run.configs)  # type: ignore[union-attr]
    batches = make_batches(dense, size, options.every, device)

    def block(training: Training) -> float:
        return timed(lambda: [training.step(inputs) for inputs in batches], device)

    times: list[tuple[float, float, float]] = []
    extra = peak = 0
    for i in range(options.blocks + 1):
        # Which goes first alternates: neither always finds the cache as the other left it.
        order: list[Training] = [plain, other] if i % 2 else [other, plain]
        seconds, peaks = {}, {}
        for training in order:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            seconds[id(training)] = block(training)
            if device.type == "cuda":
                peaks[id(training)] = torch.cuda.max_memory_allocated(device) - before
        apart = 0.0 if taught is None else block(taught) - seconds[id(plain)]
        held = other.held_bytes(besides=teacher) - plain.held_bytes(besides=teacher)
        extra = max(extra, held)
        if peaks:
            peak = max(peak, held + peaks[id(other)] - peaks[id(plain)])
        if i:
            times.append((seconds[id(plain)], seconds[id(other)], apart))
    ratios = [(method - apart) / base for base, method, apart in times]
    floats = extra / 4 / weights
    names = ("plain", "method", "distillation")
    per_step = {
        key: statistics.median(column) / options.every
        for key, column in zip(names, zip(*times, strict=True), strict=True)
    }
    return {
        "method": name,
        "target": case.target,
        "ratio": round(statistics.median(ratios), 3),
        "worst": round(max(ratios), 3),
        "spread": [round(ratio, 3) for ratio in sorted(ratios)],
        "bound": case.bound,
        "within_bound": statistics.median(ratios) <= case.bound,
        "step_ms": {key: round(1e3 * value, 3) for key, value in per_step.items()},
        "floats": round(floats, 3),
        "peak_floats": round(peak / 4 / weights, 3) if device.type == "cuda" else None,
        "floats_bound": case.floats,
        "floats_within_bound": floats <= case.floats,
        "pruned_weights": weights,
        "steps": steps,
    }


def rows(results: list[dict[str, Any]]) -> Iterator[str]:
    header = [
        "method",
        "target",
        "ratio",
        "worst",
        "bound",
        "plain ms",
        "method ms",
        "distillation ms",
        "floats",
        "bound",
    ]
    lines = [header]
    for row in results:
        ms = row["step_ms"]
        numbers = [
            row["ratio"],
            row["worst"],
            row["bound"],
            ms["plain"],
            ms["method"],
            ms["distillation"],
            row["floats"],
        ]
        lines.append(
            [row["method"], row["target"], *(f"{value:.2f}" for value in numbers), f"{row['floats_bound']:.0f}"]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a training step of each method costs.")
    parser.add_argument("--model", help="a checkpoint instead of a random BERT of MiniLM's size")
    parser.add_argument("--methods", help="only these, such as seven,lpaf")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=6, help="timed blocks of each method")
    parser.add_argument("--every", type=int, default=10, help="steps in a block")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two blocks: times mean nothing")
    options = parser.parse_args(words)
    if options.smoke:
        options.blocks = 2
    if options.threads:
        torch.set_num_threads(options.threads)
    names = options.methods.split(",") if options.methods else list(METHODS)
    if unknown := [name for name in names if name not in METHODS or name not in CASES]:
        parser.error(f"no case for {', '.join(unknown)}; there are {', '.join(n for n in CASES if n in METHODS)}")
    device = torch.device(options.device)
    size = SMOKE if options.smoke else MINILM
    dense = make_model(options.model, size, device)
    about = {"model": options.model or "random", "batch": size.batch, "length": size.length, "smoke": options.smoke}
    print(json.dumps({"environment": environment(device), "device": device_label(device), **about}), flush=True)
    results = []
    for name in names:
        results.append(measure(name, dense, options, device))
        print(json.dumps(results[-1]), flush=True)
    print("\n".join(rows(results)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
