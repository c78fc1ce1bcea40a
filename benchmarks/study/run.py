"""One run of the study: an arm at a sparsity, a seed and a learning rate, from its start to what is measured of it."""

from __future__ import annotations

import copy
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsebert as sb
from sparsebert.cli import metrics, models
from sparsebert.cli.recipes import Stage, steps_per_epoch
from sparsebert.cli.training import Examples, Loop, measure_on, predict
from sparsebert.configs import Int8Config, LowRankConfig, NMConfig, parse_config
from sparsebert.formats import one_shot
from sparsebert.methods import Method, Run
from sparsebert.plan import CompressionPlan
from sparsebert.roles import family_of, find_layers
from study import spectra, tasks
from study.arms import ARMS, BUDGETS, FINE_TUNED, FINE_TUNING, ONE_LAYER, Arm, Budget

# How often a training's own numbers are kept.
TRACES = 10
# L3 of the claims: the factors' share of the dense weights.
TRUNCATIONS = (0.5, 0.25)
_EVAL_BATCH = 64
# The dense model that others start from is no arm, but is trained and measured as one.
START = Arm(FINE_TUNED, "the fine-tuned model that others start from", (), (0,))


@dataclass(frozen=True)
class Job:
    """``rate`` is None for an arm that does not train."""

    budget: str
    task: str
    arm: str
    sparsity: int
    seed: int
    rate: float | None

    @property
    def key(self) -> str:
        rate = "" if self.rate is None else f"/{self.rate:g}"
        return f"{self.budget}/{self.task}/{self.arm}/{self.sparsity}/{self.seed}{rate}"

    @property
    def command(self) -> str:
        """What does it again."""
        rate = "" if self.rate is None else f" --rate {self.rate:g}"
        return (
            f"python benchmarks/accuracy.py one --data GLUE --budget {self.budget} --task {self.task} --arm {self.arm} "
            f"--sparsity {self.sparsity} --seed {self.seed}{rate}"
        )


class FineTuning(Method):
    """Nothing is pruned: what a dense arm trains with in place of a method."""

    def prepare(self, model: nn.Module, *, total_steps: int, teacher: nn.Module | None = None) -> Run:
        return FineTuningRun(model, total_steps)


class FineTuningRun(Run):
    def __init__(self, model: nn.Module, total_steps: int) -> None:
        # A selection has to choose something; nothing is done to it.
        super().__init__(model, NMConfig(2, 4), total_steps)
        self.configs = {}

    def metrics(self) -> dict[str, float]:
        return {"sparsity": 0.0}

    def finalize(self) -> CompressionPlan:
        self.detach()
        return CompressionPlan()


@dataclass
class Bench:
    """What the runs of a process share: ``data`` is the folder of the tasks, ``cache`` where fine-tuned models lie."""

    data: Path
    model: str
    cache: Path
    device: torch.device
    tasks: dict[tuple[str, int], tasks.Task] = field(default_factory=dict)

    def task(self, name: str, budget: Budget) -> tasks.Task:
        key = name, budget.max_length
        if key not in self.tasks:
            self.tasks[key] = tasks.load(self.data / name, self.tokenizer(), budget.max_length)
        return self.tasks[key]

    def tokenizer(self) -> Any:
        found = models.load_tokenizer(models.find(self.model))
        if found is None:
            raise ValueError(f"{self.model}: has no tokenizer")
        return found

    def pretrained(self, task: tasks.Task, seed: int) -> Any:
        """The pre-trained model, its new head drawn by ``seed``."""
        torch.manual_seed(seed)
        source = models.find(self.model)
        return models.load_classifier(source, device=self.device, classes=task.classes)[0]

    def checkpoint(self, job: Job) -> Path:
        """Where the fine-tuned model of this job lies, or will."""
        return self.cache / f"{job.key.replace('/', '_')}.safetensors"

    def fine_tuned(self, job: Job, rate: float) -> Path:
        return self.checkpoint(start_job(job, rate))


def start_job(job: Job, rate: float) -> Job:
    """The job that makes the fine-tuned model of this one's task and seed."""
    return Job(job.budget, job.task, FINE_TUNED, 0, job.seed, rate)


def steps_of(arm: Arm, budget: Budget, task: tasks.Task) -> tuple[int, int]:
    """Optimizer steps of an arm, and those of its start and its own together."""
    per_epoch = steps_per_epoch(len(task.train), budget.batch_size, 1)
    start, more = round(budget.start_epochs * per_epoch), round(budget.epochs * per_epoch)
    if arm is START:
        return start, start
    if not arm.trained:
        return 0, start
    own = more if arm.start == FINE_TUNED else start + more
    return own, start + more


def execute(job: Job, bench: Bench, start_rate: float | None) -> dict[str, Any]:
    """Does ``job`` and returns its row. ``start_rate``: the rate of the fine-tuned model that it starts from or learns
    from, whose checkpoint has to be there; None for a job that needs none."""
    began = time.perf_counter()
    return _Execution(job, bench, start_rate).row(began)


class _Execution:
    def __init__(self, job: Job, bench: Bench, start_rate: float | None) -> None:
        self.job, self.bench, self.start_rate = job, bench, start_rate
        self.budget = BUDGETS[job.budget]
        self.arm = START if job.arm == FINE_TUNED else ARMS[job.arm]
        self.task = bench.task(job.task, self.budget)
        self.steps, self.budget_steps = steps_of(self.arm, self.budget, self.task)
        self.measured: dict[str, float | None] = {"at_start": None, "before_projection": None}
        self.trace: list[dict[str, Any]] = []
        self.seconds = {"train": 0.0, "evaluate": 0.0}

    def row(self, began: float) -> dict[str, Any]:
        job, arm = self.job, self.arm
        model = self.model()
        stages = self.stages()
        plan = self.train(model, stages)
        if arm is START:
            self.keep(model)
        holdout, _ = self.score(model, self.task.holdout)
        digests = digest_masks(model, plan), digest(model.state_dict().items())
        density = density_of(model, plan)
        int8 = self.int8(model, stages)
        probes = self.probes(model, plan) if arm.probed else None
        reloaded, agrees = self.reloaded(model, plan)
        dev, one_class = self.score(reloaded, self.task.dev)
        self.seconds["total"] = time.perf_counter() - began
        return {
            "kind": "accuracy",
            "key": job.key,
            **{name: value for name, value in asdict(job).items() if name != "rate"},
            "lr": job.rate,
            "command": job.command,
            "start": arm.start if arm is not START else "pre-trained",
            "start_lr": self.start_rate,
            "stages": [{"method": s.method, "target": s.target, "steps": s.steps} for s in stages],
            "steps": self.steps,
            "budget_steps": self.budget_steps,
            "metric": self.task.metric,
            "holdout": holdout[self.task.metric],
            "dev": dev,
            "one_class": one_class,
            **self.measured,
            "reload_agrees": agrees,
            "masks": digests[0],
            "weights": digests[1],
            "density": density,
            "format": stages[-1].target if stages and stages[-1].target else "dense",
            "bytes": self.bytes(reloaded),
            "int8": int8,
            "trace": self.trace,
            "probes": probes,
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
        }

    def model(self) -> Any:
        """The model that the arm starts from."""
        model = self.bench.pretrained(self.task, self.job.seed)
        if self.arm.start == FINE_TUNED and self.arm is not START:
            load_(model, self.fine_tuned())
        elif self.arm.start == ONE_LAYER:
            layers = model.get_submodule(f"{model.base_model_prefix}.encoder").layer
            del layers[1:]
            model.config.num_hidden_layers = 1
        model.get_input_embeddings().requires_grad_(self.budget.words)
        return model

    def fine_tuned(self) -> Path:
        if self.start_rate is None:
            raise ValueError(f"{self.job.key}: needs a fine-tuned model, but the rate of none is known")
        return self.bench.fine_tuned(self.job, self.start_rate)

    def teacher(self) -> Any:
        if not self.arm.taught:
            return None
        model = self.bench.pretrained(self.task, self.job.seed)
        load_(model, self.fine_tuned())
        return model.requires_grad_(False)

    def stages(self) -> tuple[Stage, ...]:
        budget, rate = self.budget, self.job.rate
        arm = ARMS["dense"] if self.arm is START else self.arm
        # A rate has to be positive even where nothing is trained.
        return arm.stages(self.job.sparsity, self.steps, rate or budget.rates[0], budget)

    def train(self, model: Any, stages: Iterable[Stage]) -> CompressionPlan:
        teacher = self.teacher()
        # After all models are made, which draw heads.
        torch.manual_seed(self.job.seed)
        plan: CompressionPlan | None = None
        for index, stage in enumerate(stages):
            run = self.prepare(model, stage, index, plan, teacher)
            if stage.method in ("svd", "lpaf"):
                self.measured["at_start"] = self.score(model, self.task.dev)[0][self.task.metric]
            if self.arm.trained:
                self.loop(model, run, stage, index, teacher)
            plan = run.finalize()
        model.eval()
        return plan or CompressionPlan()

    def prepare(
        self, model: Any, stage: Stage, index: int, plan: CompressionPlan | None, teacher: nn.Module | None
    ) -> Run:
        if stage.method == FINE_TUNING:
            return FineTuning(NMConfig(2, 4)).prepare(model, total_steps=stage.steps or 1)
        selection = stage.selection(tuple(family_of(model).roles))
        measure = partial(
            measure_on,
            model,
            self.task.train,
            selection,
            stage.batch_size,
            (self.job.seed, index),
            self.bench.device,
        )
        method = stage.build(stage.steps or 1, selection, plan, measure)
        return method.prepare(model, total_steps=stage.steps or 1, **({"teacher": teacher} if stage.teacher else {}))

    def loop(self, model: Any, run: Run, stage: Stage, index: int, teacher: nn.Module | None) -> None:
        loop = Loop(
            model,
            run,
            stage,
            self.task.train,
            seed=self.job.seed,
            index=index,
            device=self.bench.device,
            bf16=self.budget.bf16,
            teacher=teacher,
        )
        loop.start()
        every = max(1, loop.total // TRACES)
        masks: dict[str, Tensor] = {}
        done = getattr(run, "round", None)
        while loop.at.step < loop.total:
            if self.arm.projected and loop.at.step == loop.total - 1:
                self.measured["before_projection"] = self.score(model, self.task.dev)[0][self.task.metric]
            loop.step()
            # ADMM's rounds are told one by one.
            now = getattr(run, "round", None)
            if loop.at.step % every == 0 or loop.at.step == loop.total or now != done:
                loop.check_loss()
                entry = {"stage": index, "step": loop.at.step, "loss": loop.at.loss, **run.metrics()}
                # Factors without a sparse part have empty ones.
                found = {path: mask.clone() for path, mask in run.state.get("mask", {}).items() if mask.numel()}
                if masks and found:
                    entry["flipped"] = flipped(masks, found)
                masks = found
                self.trace.append({name: _rounded(value) for name, value in entry.items()})
            done = now
        self.seconds["train"] += loop.at.seconds

    def keep(self, model: Any) -> None:
        place = self.bench.checkpoint(self.job)
        place.parent.mkdir(parents=True, exist_ok=True)
        building = place.with_name(f"{place.name}.new")
        save_file({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}, building)
        building.rename(place)

    def score(self, model: Any, examples: Examples) -> tuple[dict[str, float], bool]:
        began = time.perf_counter()
        predicted = predict(model, examples, self.bench.device, _EVAL_BATCH).argmax(-1).tolist()
        self.seconds["evaluate"] += time.perf_counter() - began
        found = metrics.classification(examples.labels, predicted, len(self.task.classes))
        return found, len(set(predicted)) == 1

    def reloaded(self, model: Any, plan: CompressionPlan) -> tuple[Any, bool]:
        """The model packed, saved and loaded again, and whether it says the same of the rows held out."""
        some = head(self.task.holdout, _EVAL_BATCH)
        before = predict(model, some, self.bench.device, _EVAL_BATCH)
        folder = Path(tempfile.mkdtemp())
        try:
            with models.quiet_transformers():
                if plan.layers:
                    sb.compress_(model, plan)
                    sb.save_pretrained(model, folder)
                else:
                    model.save_pretrained(folder)
                reloaded = models.load(models.find(str(folder)), device=self.bench.device, dtype=torch.float32).model
        finally:
            shutil.rmtree(folder)
        after = predict(reloaded, some, self.bench.device, _EVAL_BATCH)
        return reloaded, bool(torch.allclose(before, after, rtol=1e-3, atol=1e-4))

    def int8(self, model: Any, stages: tuple[Stage, ...]) -> dict[str, Any] | None:
        """The same weights rounded to int8, with activations quantized as they come: for n:m and dense models."""
        target = stages[-1].target if stages else None
        pattern = None if target is None else parse_config(target)
        if self.arm is START or (pattern is not None and not isinstance(pattern, NMConfig)):
            return None
        rounded = copy.deepcopy(model)
        sb.compress_(rounded, Int8Config("dynamic", pattern))
        with sb.quantizing(rounded):
            dev, _ = self.score(rounded, self.task.dev)
        return {"dev": dev, "bytes": self.bytes(rounded)}

    def probes(self, model: Any, plan: CompressionPlan) -> dict[str, Any]:
        weights = linear_weights(model)
        generator = torch.Generator().manual_seed(self.job.seed)
        found: dict[str, Any] = {"spectra": spectra.measure(weights), "shuffled": None, "truncated": {}}
        if plan.layers:
            found["shuffled"] = spectra.measure(
                {path: spectra.shuffled(weight, generator) for path, weight in weights.items()}
            )
        for ratio in TRUNCATIONS:
            config = LowRankConfig(ratio=ratio)
            kept = {path: spectra.truncated(w, one_shot.rank_of(config, *w.shape)) for path, w in weights.items()}
            with replaced(model, kept):
                found["truncated"][f"{ratio:g}"] = self.score(model, self.task.dev)[0][self.task.metric]
        return found

    def bytes(self, model: Any) -> dict[str, Any]:
        found = sb.size_report(model).to_dict()
        if self.arm.start == ONE_LAYER:
            # Held against the model that it stands in for.
            whole = sb.size_report(self.bench.pretrained(self.task, self.job.seed)).to_dict()
            for part in ("encoder", "model"):
                found[part]["dense_bytes"] = whole[part]["dense_bytes"]
        return {part: found[part] for part in ("encoder", "model")}


class replaced:
    """Inside, the linear layers of ``model`` have these weights; afterwards their own."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.model, self.weights = model, weights

    @torch.no_grad()
    def _swap(self) -> None:
        own = {path: self.model.get_submodule(path).weight.clone() for path in self.weights}  # type: ignore[operator]
        for path, weight in self.weights.items():
            self.model.get_submodule(path).weight.copy_(weight)  # type: ignore[union-attr, operator]
        self.weights = own

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()


def load_(model: nn.Module, file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file}: the fine-tuned model is not there; run its job first")
    model.load_state_dict(load_file(file))


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the encoder's linear layers by path."""
    return {layer.path: model.get_submodule(layer.path).weight.detach() for layer in find_layers(model)}  # type: ignore[misc]


def density_of(model: nn.Module, plan: CompressionPlan) -> float:
    """What is stored of the encoder's linear weights: non-zeros, or the factors' numbers."""
    stored = total = 0
    for path, weight in linear_weights(model).items():
        factors = plan.factors.get(path)
        total += weight.numel()
        if factors is None:
            stored += int(weight.count_nonzero())
        else:
            sparse = factors.get("sparse")
            stored += factors["u"].numel() + factors["v"].numel()
            stored += 0 if sparse is None else int(sparse.count_nonzero())
    return stored / total


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_masks(model: nn.Module, plan: CompressionPlan) -> str:
    """``digest`` of where the weights, or what is sparse beside the factors, are not zero."""
    parts = {}
    for path, weight in linear_weights(model).items():
        factors = plan.factors.get(path)
        sparse = weight if factors is None else factors.get("sparse", weight.new_zeros(0))
        parts[path] = sparse != 0
    return digest(parts.items())


def flipped(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The fraction of mask bits that changed."""
    changed = sum(int((mask != after[path]).sum()) for path, mask in before.items())
    return changed / sum(mask.numel() for mask in before.values())


def head(examples: Examples, count: int) -> Examples:
    inputs = {name: values[:count] for name, values in examples.inputs.items()}
    return Examples(examples.tokenizer, inputs, examples.labels[:count])


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
