"""``sparsebert compress``: a dense checkpoint into a packed one, in one shot or as a plan says."""

from __future__ import annotations

import os
import shlex
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsebert import storage
from sparsebert.cli import calibrate
from sparsebert.cli.common import Rendered, Report, few, megabytes, size_table, table, the_device
from sparsebert.configs import (
    BitmapConfig,
    Config,
    DenseConfig,
    Int8Config,
    LowRankConfig,
    LowRankSparseConfig,
    NMConfig,
    parse_config,
)
from sparsebert.plan import FACTORS_FILE, PLAN_FILE, CompressionPlan, load_selection
from sparsebert.roles import family_of

STEPS = ("looking up the model", "loading", "compressing and packing", "calibrating", "saving", "checking the files")


@dataclass(frozen=True)
class Wanted:
    """What to do to which layer: ``every`` encoder linear and ``layers`` by role or pattern (None is dense), or else a
    ``plan``: a promise about weights that are already compressed, or a selection. ``source`` is the file it is from."""

    every: Config | None = None
    layers: Mapping[str, Config | None] | None = None
    plan: CompressionPlan | None = None
    source: str | None = None

    @property
    def configs(self) -> list[Config]:
        if self.plan is not None:
            return list(self.plan.layers.values())
        found = [self.every, *(self.layers or {}).values()]
        return [config for config in found if config is not None]

    def spec(self, network: Any) -> Any:
        """What ``sparsebert.compress_`` takes."""
        if self.plan is not None:
            return self.plan
        roles = {} if self.every is None else dict.fromkeys(family_of(network).roles, self.every)
        return {**roles, **(self.layers or {})}


def parse_layer(text: str) -> tuple[str, Config | None]:
    """``intermediate=1:4`` or ``pooler.dense=dense`` as (role or pattern, config or None for dense)."""
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise ValueError(f"{text!r} does not say what for which layer; write it as intermediate=1:4 or output=dense")
    return key.strip(), None if value.strip() == "dense" else parse_config(value)


def read_plan(path: Path) -> Wanted:
    """The plan in a folder with plan.json, and plan.safetensors where it has factors, or in a JSON file.

    ``ValueError`` naming the file where there is none, or something else.
    """
    file = path / PLAN_FILE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    data = storage.read_json(file)
    selection = load_selection(file)
    if selection is not None:
        return Wanted(layers=selection, source=str(path))
    if file.name == PLAN_FILE:
        return Wanted(plan=CompressionPlan.load(file.parent), source=str(path))
    # A file by itself has no factors beside it.
    try:
        plan = CompressionPlan.from_dict(data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error
    for layer, config in plan.layers.items():
        if isinstance(config, LowRankConfig | LowRankSparseConfig):
            raise ValueError(
                f"{file}: {layer} is {config}, whose factors lie beside a plan; give the folder with {PLAN_FILE} and "
                f"{FACTORS_FILE}"
            )
    return Wanted(plan=plan, source=str(path))


def compress(
    model: str,
    out: Path,
    *,
    wanted: Wanted,
    ignore: Sequence[str] = (),
    text: calibrate.Text | None = None,
    dtype: str | None = None,
    layout: str = "auto",
    device: str | None = None,
    force: bool = False,
    report: Report = lambda done, total, text: None,
) -> dict[str, Any]:
    """Compresses and packs ``model`` and saves it to the folder ``out``, all of it or nothing; returns what was done.

    ``text`` is what static int8 layers are calibrated on; ``dtype`` None keeps the stored one.
    """
    import torch

    import sparsebert
    from sparsebert.bench.environment import device_label
    from sparsebert.cli import info, models

    def step(index: int) -> None:
        report(index, len(STEPS), STEPS[index])

    where = the_device(device)
    target = _target(out, force)
    _check_calibration(wanted.configs, text)
    rows = [] if text is None else text.read(report)
    step(0)
    source = models.find(model)
    if source.packed:
        raise ValueError(f"{model}: is compressed already; start from the dense model it was made of")
    if source.folder is not None and source.folder.resolve() == target:
        raise ValueError(f"{out}: is the model itself, which would be lost; choose another folder")
    step(1)
    # Before the work, not after it.
    tokenizer = models.load_tokenizer(source)
    if text is not None and tokenizer is None:
        raise ValueError(f"{model}: has no tokenizer, which calibrating on text needs")
    loaded = models.load(source, device=where, dtype=None if dtype is None else getattr(torch, dtype))
    network = loaded.model
    _refuse_non_finite(network)
    step(2)
    done = sparsebert.compress_(network, wanted.spec(network), ignore=ignore, layout=layout)
    calibration = None
    if text is not None:
        step(3)
        calibration = calibrate.calibrate(network, tokenizer, rows, text, model, report)
    step(4)
    with _appearing(target) as folder, models.quiet_transformers():
        sparsebert.save_pretrained(network, folder, tokenizer=tokenizer)
        step(5)
        written = info.inspect(str(folder))
    packed = [parse_config(layer.config) for layer in done.layers]
    return {
        "model": model,
        "out": str(out),
        "architecture": type(network).__name__,
        "method": one_shot_method(packed) if wanted.plan is None else "as the plan says",
        "plan": wanted.source,
        "dtype": str(network.dtype).removeprefix("torch."),
        "device": device_label(where),
        "formats": _by_role(done.layers),
        **done.to_dict(),
        "calibration": calibration,
        "file_bytes": written["file_bytes"],
        "tokenizer": tokenizer is not None,
        "untrained": list(loaded.untrained),
        "dropped": list(loaded.dropped),
        "accuracy_measured": False,
    }


def one_shot_method(configs: Iterable[Config]) -> str:
    """What compressing to ``configs`` without training does, in words: ``one-shot: magnitude``."""
    steps = dict.fromkeys(_one_shot_step(config) for config in configs if not isinstance(config, DenseConfig))
    return f"one-shot: {'; '.join(steps) or 'nothing'}"


def _one_shot_step(config: NMConfig | BitmapConfig | LowRankConfig | LowRankSparseConfig | Int8Config) -> str:
    if isinstance(config, NMConfig):
        return "magnitude" if config.columns is None else "columns by their norm, then magnitude"
    if isinstance(config, BitmapConfig):
        return "magnitude"
    if isinstance(config, LowRankConfig):
        return "truncated SVD"
    if isinstance(config, LowRankSparseConfig):
        return "truncated SVD, then magnitude on what it leaves"
    return "rounding" if config.weights is None else "magnitude, then rounding"


def render(result: dict[str, Any]) -> Rendered:
    packed, skipped = result["layers"], result["skipped"]
    linears = len(packed) + len(skipped)
    # A plan says nothing about the layers that it leaves out.
    of = f" of {linears}" if skipped else ""
    yield f"{result['architecture']}: packed {len(packed)}{of} linear layers, {result['dtype']}"
    by_plan = "" if result["plan"] is None else f" ({result['plan']})"
    yield f"Method: {result['method']}{by_plan}"
    groups = defaultdict(list)
    for layer in packed:
        groups[layer["role"] or layer["path"], layer["config"], layer["description"]].append(layer["kept_energy"])
    yield table(
        ["role", "format", "packed as", "layers", "share of |W|^2 kept"],
        [[*key, str(len(kept)), f"{sum(kept) / len(kept):.3f}"] for key, kept in groups.items()],
    )
    reasons = defaultdict(list)
    for path, reason in skipped.items():
        reasons[reason].append(path)
    for reason, paths in reasons.items():
        yield f"Left dense: {few(paths)}: {reason}"
    if calibration := result["calibration"]:
        yield (
            f"Calibrated {len(calibration['layers'])} layers on {calibration['rows_used']:,} of "
            f"{calibration['rows']:,} rows, {calibration['method']}: {calibration['data']}"
        )
    size = result["size"]
    yield size_table(size)
    held = Counter(layer["layout"] for layer in packed)
    unpacked = "; dense is the unpacked weight" if held["dense"] else ""
    yield f"In memory is as held on {result['device']}, layout {', '.join(sorted(held))}{unpacked}."
    if result["untrained"]:
        names = few(result["untrained"])
        yield f"Warning: the checkpoint lacks {names}; they are random, here and in what was saved"
    if result["dropped"]:
        yield f"Warning: {result['architecture']} has no place for {few(result['dropped'])}; they were not saved"
    if not result["tokenizer"]:
        yield "Note: there was no tokenizer beside the model, so none was saved"
    tokenizer = " and the tokenizer" if result["tokenizer"] else ""
    yield f"Saved to {result['out']}: {megabytes(result['file_bytes'])} of tensors{tokenizer}"
    one_shot = result["method"].startswith("one-shot")
    if one_shot:
        yield "One-shot compression costs accuracy, and this command did not measure how much. To see:"
    else:
        yield "This command did not measure accuracy. To see:"
    yield f"    sparsebert eval {shlex.quote(result['out'])} --compare {shlex.quote(result['model'])} --data FILE"
    if one_shot:
        yield "Training with a method of sparsebert.methods can win much of it back; `sparsebert demo` shows one run."


def _check_calibration(configs: Sequence[Config], text: calibrate.Text | None) -> None:
    static = [config for config in configs if isinstance(config, Int8Config) and config.activations == "static"]
    if static and text is None:
        raise ValueError(
            f"{static[0]}: static activations have one scale for all inputs, which has to be measured on text like "
            f"theirs; give --calibrate FILE or --calibrate-stdlib, or take int8, which needs none"
        )
    if text is not None and not static:
        formats = ", ".join(dict.fromkeys(map(str, configs)))
        raise ValueError(f"calibration: is for int8-static, but what was asked for is {formats}")


def _by_role(layers: Iterable[Any]) -> dict[str, dict[str, int]]:
    """Role, or path where there is none -> config -> how many layers."""
    found: dict[str, Counter[str]] = {}
    for layer in layers:
        found.setdefault(layer.role or layer.path, Counter())[layer.config] += 1
    return {role: dict(configs) for role, configs in found.items()}


def _target(out: Path, force: bool) -> Path:
    """Where the folder ``out`` will lie, after making sure that nothing that matters is in its place."""
    target = out.expanduser().resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"{out}: is a file, expected a folder that is new or empty")
    entries = list(target.iterdir())
    if entries and not force:
        raise ValueError(f"{out}: is not empty; choose another folder, or --force to replace the checkpoint in it")
    # --force removes a folder, so it takes one only that can be nothing but a saved model.
    if entries and (not (target / "config.json").is_file() or any(entry.is_dir() for entry in entries)):
        raise ValueError(f"{out}: holds other things than a saved model, which --force does not remove")
    return target


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place at the end, and of which nothing is left on any failure."""
    parents = [folder for folder in target.parents if not folder.exists()]
    folder, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        folder.mkdir(parents=True)
        yield folder
        if target.exists():
            target.rename(old)
        try:
            folder.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for parent in parents:
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _refuse_non_finite(model: Any) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: holds NaN or infinities as {dtype}, expected finite numbers")
