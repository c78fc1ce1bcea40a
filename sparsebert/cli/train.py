"""``sparsebert train``: a method of ``sparsebert.methods`` on a task, from a dense checkpoint to a packed one.

While it trains, OUT holds ``training/``: the settings, and the newest state, from which ``--resume`` goes on. In its
place come the packed checkpoint and ``plan/`` at the end.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparsebert as sb
from sparsebert import storage
from sparsebert.bench.environment import device_label
from sparsebert.cli import data as reading
from sparsebert.cli import info, metrics, models, recipes
from sparsebert.cli.common import Rendered, few, megabytes, size_table, table, the_device
from sparsebert.cli.inputs import cut_length, tokenize
from sparsebert.cli.recipes import Recipe, Stage
from sparsebert.cli.steps import Steps
from sparsebert.cli.training import (
    SHOWN_EVERY_S,
    Examples,
    Interrupted,
    Loop,
    Shelf,
    measure_on,
    predict,
    read_state,
    stop_between_steps,
)
from sparsebert.plan import CompressionPlan
from sparsebert.roles import family_of

TRAINING, SETTINGS_FILE, START, EXPORT, PLAN = "training", "settings.json", "start", "export", "plan"
SETTINGS_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """All that decides what is trained: ``--resume`` reads it where the training began to write it.

    ``model`` and ``teacher`` are checkpoints, ``data`` and ``dev`` as ``cli.data.read`` takes them. ``metric`` is what
    is shown of all scores. ``eval_every`` None evaluates at the end of each epoch; ``save_every`` None saves only when
    a stage ends or Ctrl-C is pressed.
    """

    model: str
    data: str
    stages: tuple[Stage, ...]
    dev: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str = "label"
    regression: bool | None = None
    limit: int | None = None
    teacher: str | None = None
    recipe: str | None = None
    metric: str | None = None
    seed: int = 0
    bf16: bool = False
    export: bool = True
    eval_batch_size: int = 64
    eval_every: int | None = None
    save_every: int | None = None

    def save(self, folder: Path) -> None:
        content = {**asdict(self), "stages": [stage.to_dict() for stage in self.stages]}
        text = json.dumps({"settings_version": SETTINGS_VERSION, **content}, indent=2)
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Settings:
        file = folder / SETTINGS_FILE
        content = storage.read_json(file)
        try:
            if content.pop("settings_version", None) != SETTINGS_VERSION:
                raise ValueError(f"expected settings_version {SETTINGS_VERSION}")
            stages = tuple(Stage(**stage) for stage in content.pop("stages"))
            columns = content.pop("text_columns")
            return cls(**content, stages=stages, text_columns=None if columns is None else tuple(columns))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}: {error}") from None


def settle(
    *,
    recipe: Recipe | None,
    method: str | None,
    target: str | None,
    layers: Mapping[str, str],
    options: Mapping[str, Any],
    overrides: Mapping[str, Any],
    teacher: str | None,
) -> tuple[Stage, ...]:
    """The stages of a training: the recipe's, or the only one of ``method``, with what the command line says instead.

    ``overrides`` are settings of every stage. ``ValueError`` where something is missing or goes to no stage.
    """
    own: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    if recipe is None:
        if method is None:
            raise ValueError("give --method, such as seven, or --recipe, such as seven:sst2")
        stages: tuple[Stage, ...] = (Stage(method, teacher=teacher is not None and not own.get("distillation")),)
    else:
        stages = recipe.stages
        if method is not None and (len(stages) > 1 or stages[0].method != method):
            raise ValueError(
                f"the recipe {recipe.name} is for {_methods(stages)}; --method {method} does not go with it"
            )
    if len(stages) > 1 and (target is not None or layers or options):
        raise ValueError(
            f"the recipe {recipe.name if recipe else ''} has {len(stages)} stages ({_methods(stages)}), each with a "
            f"target and options of its own; write another recipe file to change them"
        )
    if target is not None:
        own["target"] = target
        own["layers"] = {}
    if layers:
        own["layers"] = dict(layers)
    if "epochs" in own:
        own.setdefault("steps", None)
    made = tuple(replace(stage, **own, options={**stage.options, **options}) for stage in stages)
    wants = [stage.method for stage in made if stage.teacher or stage.distillation]
    if wants and teacher is None:
        raise ValueError(f"{wants[0]}: needs a fine-tuned model to learn from; give --teacher")
    if teacher is not None and not wants:
        raise ValueError(f"no stage of {recipe.name if recipe else 'this training'} takes a teacher")
    for i, stage in enumerate(made):
        cls = recipes.method_class(stage.method)
        first, names = recipes.arguments(cls)
        if stray := sorted(stage.options.keys() - names):
            raise ValueError(f"{stage.method}: has no option {stray[0]!r}; it has {', '.join(sorted(names)) or 'none'}")
        if first == "plan" and i == 0:
            raise ValueError(f"{stage.method}: goes on from what another method ended in; write a recipe of two stages")
        if first != "plan" and stage.target is None and not stage.layers:
            raise ValueError(f"{stage.method}: give --target, such as 2:4, or --layer")
    return made


def train(settings: Settings | None, out: Path, *, device: str | None = None, progress: Steps) -> dict[str, Any]:
    """Trains as ``settings`` say, or goes on in ``out`` where they are None, and saves what came of it to ``out``.

    ``Interrupted`` says what is on disk after Ctrl-C; ``ValueError`` for whatever cannot be.
    """
    work = _Work(settings, out, the_device(device), progress)
    try:
        return work.do()
    except Interrupted:
        raise
    except KeyboardInterrupt:
        if work.shelf.newest() is None:
            raise
        raise Interrupted(work.how_to_resume()) from None


class _Work:
    """One ``sparsebert train`` from its data to its result."""

    def __init__(self, settings: Settings | None, out: Path, device: torch.device, progress: Steps) -> None:
        self.out, self.device, self.progress = out, device, progress
        self.place = out.expanduser().resolve()
        self.shelf = Shelf(self.place / TRAINING)
        self.state: dict[str, Any] | None = None
        self.newest: Path | None = None
        if settings is not None:
            self._check_out()
            self.settings = settings
            return
        if not (self.shelf.folder / SETTINGS_FILE).is_file():
            raise ValueError(f"{out}: holds no training to resume (no {TRAINING}/{SETTINGS_FILE})")
        self.settings = Settings.load(self.shelf.folder)
        self.newest = self.shelf.newest()
        if self.newest is not None:
            self.state = read_state(self.newest)

    def do(self) -> dict[str, Any]:
        self.read_data()
        self.load_models()
        self.tokenize()
        dense, _ = ({}, None) if self.state else self.measure("measure the dense model", self.model)
        self.dense = self.state["dense"] if self.state else dense
        self.history: list[dict[str, Any]] = list(self.state["history"]) if self.state else []
        plan = self.run_stages()
        return self.finish(plan)

    def read_data(self) -> None:
        with self.progress.step("read the data") as step:
            settings = self.settings
            self.data = reading.read(
                settings.data,
                None if settings.dev is None else Path(settings.dev),
                settings.text_columns,
                settings.label_column,
                regression=settings.regression,
                limit=settings.limit,
            )
            kind = "regression" if self.data.classes is None else f"{len(self.data.classes)} classes"
            step.outcome = (
                f"{len(self.data.train.rows):,} rows to train on, {len(self.data.dev.rows):,} held out, {kind}"
            )
        self.fingerprint = self.data.fingerprint()
        if self.state is not None and self.state["data"] != self.fingerprint:
            raise ValueError(f"{settings.data}: is not the data that this training began with")
        known = metrics.REGRESSION if self.data.classes is None else metrics.CLASSIFICATION
        self.metric = settings.metric or known[0]
        if self.metric not in known or (self.metric == "f1" and len(self.data.classes or ()) != 2):
            raise ValueError(f"metric is {self.metric!r}, which {kind} does not have")

    def load_models(self) -> None:
        settings = self.settings
        with self.progress.step("load the model") as step:
            # A head that is new is the seed's.
            torch.manual_seed(settings.seed)
            source = models.find(settings.model)
            tokenizer = models.load_tokenizer(source)
            if tokenizer is None:
                raise ValueError(f"{settings.model}: has no tokenizer, which turning text into its input needs")
            self.tokenizer = tokenizer
            self.model, self.new = models.load_classifier(source, device=self.device, classes=self.data.classes)
            size = sum(p.numel() for p in self.model.parameters()) / 1e6
            step.outcome = f"{type(self.model).__name__}, {size:.1f} M parameters"
            if self.new:
                step.outcome += f"; the checkpoint has no head for this task, so it has a new one ({few(self.new)})"
        self.teacher: Any = None
        if settings.teacher is not None:
            with self.progress.step("load the teacher"):
                source = models.find(settings.teacher)
                self.teacher, lacking = models.load_classifier(source, device=self.device, classes=self.data.classes)
                if lacking:
                    raise ValueError(
                        f"{settings.teacher}: lacks {few(lacking)}; a teacher has to know the task already"
                    )

    def tokenize(self) -> None:
        data, settings = self.data, self.settings
        own: Any = self.model.config.id2label
        names = None if data.classes is None else [own[i] for i in range(len(data.classes))]
        most = cut_length(None, self.model.config, self.tokenizer, settings.model)
        with self.progress.step("tokenize") as step:

            def examples(part: reading.Part, length: int) -> tuple[Examples, int]:
                inputs, cut = tokenize(self.tokenizer, part.rows, length, lambda done, total, _: step.tick(done, total))
                return Examples(self.tokenizer, inputs, data.labels(part, names)), cut

            self.train_rows, cuts = {}, []
            for length in sorted({min(stage.max_length, most) for stage in settings.stages}):
                self.train_rows[length], cut = examples(data.train, length)
                cuts.append(f"{cut:,} rows cut at {length} tokens")
            self.held_out, _ = examples(data.dev, max(self.train_rows))
            step.outcome = ", ".join(cuts)

    def run_stages(self) -> CompressionPlan:
        """Every stage that is not done yet; the plan that the last one ends in."""
        stages = self.settings.stages
        first = self.state["progress"]["stage"] if self.state else 0
        plan = self.load_start() if first else None
        for index in range(first, len(stages)):
            loop = self.prepare(index, plan)
            if index == first:
                self.shelf.folder.mkdir(parents=True, exist_ok=True)
                self.settings.save(self.shelf.folder)
            self.train_stage(loop)
            found = loop.run.metrics()
            plan = loop.run.finalize()
            scores, self.logits = self.measure("measure the compressed model", self.model)
            self.history.append(
                {
                    "method": stages[index].method,
                    "target": _target(stages[index]),
                    "steps": loop.total,
                    "seconds_per_step": loop.at.seconds / max(1, loop.at.step),
                    "metrics": found,
                    "loss": loop.check_loss(),
                    "scores": scores,
                    "evaluations": loop.at.evaluations,
                }
            )
            if index + 1 < len(stages):
                self.save_start(plan)
        if plan is None:
            raise ValueError("a training has no stages")
        return plan

    def prepare(self, index: int, plan: CompressionPlan | None) -> Loop:
        stage = self.settings.stages[index]
        with self.progress.step(f"prepare {self.name(index)}") as step:
            total = stage.total_steps(len(self.data.train.rows))
            selection = stage.selection(tuple(family_of(self.model).roles))
            rows = self.train_rows[min(stage.max_length, max(self.train_rows))]

            measure = partial(
                measure_on, self.model, rows, selection, stage.batch_size, (self.settings.seed, index), self.device
            )
            method = stage.build(total, selection, plan, measure)
            run = method.prepare(self.model, total_steps=total, teacher=self.teacher if stage.teacher else None)
            loop = Loop(
                self.model,
                run,
                stage,
                rows,
                seed=self.settings.seed,
                index=index,
                device=self.device,
                bf16=self.settings.bf16,
                teacher=self.teacher,
            )
            step.outcome = f"{total:,} steps"
            if self.newest is not None and self.state and self.state["progress"]["stage"] == index:
                loop.load(self.newest)
                step.outcome += f", going on after {loop.at.step:,} of them"
            else:
                loop.start()
        return loop

    def train_stage(self, loop: Loop) -> None:
        every = self.settings.eval_every or loop.per_epoch
        shown = ""
        with self.progress.step(f"train, {self.name(loop.index)}") as step, stop_between_steps() as asked:

            def during(done: int, total: int) -> None:
                if asked():
                    raise KeyboardInterrupt

            try:
                looked = -SHOWN_EVERY_S
                # The last step is measured when it is final.
                while loop.at.step < loop.total:
                    # Before a step, so that one interrupted here is done where it is resumed.
                    if loop.at.step and loop.at.step % every == 0 and not loop.evaluated():
                        loop.at.evaluations.append((loop.at.step, self.scores(self.model, during)[0]))
                    loop.step()
                    if asked():
                        raise KeyboardInterrupt
                    if self.settings.save_every and loop.at.step % self.settings.save_every == 0:
                        self.save(loop)
                    if time.perf_counter() - looked >= SHOWN_EVERY_S:
                        shown = self.shown(loop)
                        looked = time.perf_counter()
                    step.tick(loop.at.step, loop.total, shown)
                loop.check_loss()
                # What comes next may be interrupted too.
                self.save(loop)
            except KeyboardInterrupt:
                # In the middle of an optimizer step there is nothing to go on from but the state before.
                if not loop.torn:
                    self.save(loop)
                raise Interrupted(self.how_to_resume()) from None
            step.outcome = self.shown(loop)

    def shown(self, loop: Loop) -> str:
        """Loss, sparsity and what else the method counts, and the latest score."""
        loss = loop.check_loss()
        parts = [f"{self.name(loop.index)}: epoch {loop.epoch:.2f}"] + ([] if loss is None else [f"loss {loss:.4f}"])
        parts += [f"{name} {value:.4g}" for name, value in loop.run.metrics().items()]
        if loop.at.evaluations:
            step, scores = loop.at.evaluations[-1]
            parts.append(f"{self.metric} {scores[self.metric]:.4f} after step {step}")
        return ", ".join(parts)

    def finish(self, plan: CompressionPlan) -> dict[str, Any]:
        """Saves the checkpoint, loads it again and measures it, and only then gives the state away."""
        settings = self.settings
        building = self.shelf.folder / EXPORT
        shutil.rmtree(building, ignore_errors=True)
        (building / PLAN).mkdir(parents=True)
        with self.progress.step("pack and save" if settings.export else "save") as step, models.quiet_transformers():
            plan.save(building / PLAN)
            self.model.eval()
            if settings.export:
                sb.compress_(self.model, plan)
                sb.save_pretrained(self.model, building, tokenizer=self.tokenizer)
            else:
                self.model.save_pretrained(building)
                self.tokenizer.save_pretrained(building)
            written = info.inspect(str(building))["file_bytes"]
            step.outcome = megabytes(written)
        reloaded = models.load(models.find(str(building)), device=self.device, dtype=torch.float32).model
        # A layer that quantizes x on the device it is for does so here too.
        with sb.quantizing(reloaded):
            scores, logits = self.measure("reload and measure", reloaded)
        sizes = sb.size_report(reloaded).to_dict()
        for entry in building.iterdir():
            entry.rename(self.place / entry.name)
        shutil.rmtree(self.shelf.folder)
        return {
            "model": settings.model,
            "data": self.data.name,
            "recipe": settings.recipe,
            "out": str(self.out),
            "seed": settings.seed,
            "device": device_label(self.device),
            "rows": len(self.data.train.rows),
            "held_out": len(self.data.dev.rows),
            "new_head": list(self.new),
            "metric": self.metric,
            "dense": self.dense,
            "stages": self.history,
            "masked": self.history[-1]["scores"],
            "reloaded": scores,
            "same_predictions": self.same(logits),
            "largest_difference": float((logits - self.logits).abs().max()),
            "exported": settings.export,
            "resumed": self.state is not None,
            "file_bytes": written,
            "size": {part: sizes[part] for part in ("encoder", "model")},
            "seconds": dict(self.progress.seconds),
        }

    def measure(self, name: str, model: Any) -> tuple[dict[str, float], Tensor]:
        with self.progress.step(name) as step:
            found = self.scores(model, step.tick)
            step.outcome = f"{self.metric} {found[0][self.metric]:.4f}"
        return found

    def scores(self, model: Any, tick: Any) -> tuple[dict[str, float], Tensor]:
        logits = predict(model, self.held_out, self.device, self.settings.eval_batch_size, tick)
        if self.data.classes is None:
            return metrics.regression(self.held_out.labels, logits.squeeze(-1).tolist()), logits
        predicted = logits.argmax(-1).tolist()
        return metrics.classification(self.held_out.labels, predicted, len(self.data.classes)), logits

    def same(self, logits: Tensor) -> float:
        """The share of the held-out rows for which the reloaded model says what the compressed one said."""
        if self.data.classes is None:
            same = torch.isclose(logits, self.logits, rtol=1e-4, atol=1e-5).squeeze(-1)
        else:
            same = logits.argmax(-1) == self.logits.argmax(-1)
        return float(same.double().mean())

    def save(self, loop: Loop) -> None:
        self.shelf.keep(loop, {"data": self.fingerprint, "dense": self.dense, "history": self.history})

    def save_start(self, plan: CompressionPlan) -> None:
        """What the next stage begins with: its method is prepared on these weights, also where it is resumed."""
        folder = self.shelf.folder / START
        building = folder.with_name(f"{START}.new")
        for old in (folder, building):
            shutil.rmtree(old, ignore_errors=True)
        building.mkdir()
        tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in self.model.state_dict().items()}
        save_file(tensors, building / "model.safetensors")
        plan.save(building)
        building.rename(folder)

    def load_start(self) -> CompressionPlan:
        folder = self.shelf.folder / START
        file = folder / "model.safetensors"
        storage.read_headers([file])
        try:
            self.model.load_state_dict(load_file(file))
        except RuntimeError as error:
            raise ValueError(f"{file}: does not fit this model: {error}") from None
        return CompressionPlan.load(folder)

    def name(self, index: int) -> str:
        stages = self.settings.stages
        more = f" (stage {index + 1} of {len(stages)})" if len(stages) > 1 else ""
        return f"{stages[index].method}{more}"

    def how_to_resume(self) -> str:
        newest = self.shelf.newest()
        if newest is None:
            return "no step was done yet, so there is nothing to resume"
        at = read_state(newest)["progress"]
        return (
            f"the state after step {at['step']:,} of {self.name(at['stage'])} is in {newest}; to go on: "
            f"sparsebert train --resume --out {shlex.quote(str(self.out))}"
        )

    def _check_out(self) -> None:
        if not self.place.exists():
            return
        if not self.place.is_dir():
            raise ValueError(f"{self.out}: is a file, expected a folder that is new or empty")
        if self.shelf.newest() is not None:
            raise ValueError(
                f"{self.out}: holds a training that was interrupted; --resume goes on with it, or choose another folder"
            )
        # Settings alone are of a training that failed before its first state.
        if [entry for entry in self.place.iterdir() if entry != self.shelf.folder]:
            raise ValueError(f"{self.out}: is not empty; choose another folder")


def _methods(stages: Sequence[Stage]) -> str:
    return ", then ".join(stage.method for stage in stages)


def _target(stage: Stage) -> str:
    parts = [] if stage.target is None else [stage.target]
    return ", ".join([*parts, *(f"{which}={text}" for which, text in stage.layers.items())]) or "as the stage before"


def render(result: dict[str, Any]) -> Rendered:
    stages = result["stages"]
    yield f"{result['model']} on {result['data']}: {result['rows']:,} rows, measured on {result['held_out']:,}"
    header = ["", "dense", *("compressed" if len(stages) == 1 else f"stage {i + 1}" for i in range(len(stages)))]
    rows = [
        ["method", "-", *(stage["method"] for stage in stages), ""],
        ["target", "-", *(stage["target"] for stage in stages), ""],
        ["steps", "-", *(f"{stage['steps']:,}" for stage in stages), ""],
        ["seconds a step", "-", *(f"{stage['seconds_per_step']:.3f}" for stage in stages), ""],
    ]
    for name in dict.fromkeys(name for stage in stages for name in stage["metrics"]):
        values = [stage["metrics"].get(name) for stage in stages]
        rows.append([name, "-", *("-" if value is None else f"{value:.4f}" for value in values), ""])
    for name in result["dense"]:
        found = [result["dense"], *(stage["scores"] for stage in stages), result["reloaded"]]
        star = " *" if name == result["metric"] and len(result["dense"]) > 1 else ""
        rows.append([metrics.NAMES[name] + star, *(f"{scores[name]:.4f}" for scores in found)])
    yield table([*header, "reloaded"], rows)
    if result["new_head"]:
        yield "The dense model's head was new, so its scores say nothing about what compression costs."
    same = f"{100 * result['same_predictions']:.2f} %"
    yield f"The reloaded model says the same as the compressed one for {same} of the rows."
    yield size_table(result["size"])
    kind = "packed" if result["exported"] else "not packed"
    out = shlex.quote(result["out"])
    yield f"Saved to {result['out']}, {kind}: {megabytes(result['file_bytes'])} of tensors, the tokenizer and {PLAN}/"
    if not result["exported"]:
        yield f"To pack it: sparsebert compress {out} PACKED --plan {shlex.quote(str(Path(result['out'], PLAN)))}"
