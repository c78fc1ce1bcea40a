"""``sparsebert compress``: one-shot magnitude pruning of a dense checkpoint into a packed one."""

from __future__ import annotations

import os
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparsebert.cli.common import Rendered, Report, few, megabytes, size_table, table, the_device
from sparsebert.configs import NMConfig
from sparsebert.roles import ROLES

STEPS = ("looking up the model", "loading", "pruning and packing", "saving", "checking the files")


def parse_layer(text: str) -> tuple[str, NMConfig | None]:
    """``intermediate=1:4`` or ``pooler.dense=dense`` as (role or pattern, config or None for dense)."""
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise ValueError(f"{text!r} does not say what for which layer; write it as intermediate=1:4 or output=dense")
    return key.strip(), None if value.strip() == "dense" else NMConfig.parse(value)


def compress(
    model: str,
    out: Path,
    *,
    pattern: NMConfig | None,
    layers: Sequence[tuple[str, NMConfig | None]] = (),
    ignore: Sequence[str] = (),
    dtype: str | None = None,
    layout: str = "auto",
    device: str | None = None,
    force: bool = False,
    report: Report = lambda done, total, text: None,
) -> dict[str, Any]:
    """Prunes and packs ``model`` and saves it to the folder ``out``, all of it or nothing; returns what was done.

    ``pattern`` is for every encoder linear and ``layers`` for those named; ``dtype`` None keeps the stored one.
    """
    import torch

    import sparsebert
    from sparsebert.bench.environment import device_label
    from sparsebert.cli import info, models

    def step(index: int) -> None:
        report(index, len(STEPS), STEPS[index])

    selection: dict[str, NMConfig | None] = {} if pattern is None else dict.fromkeys(ROLES, pattern)
    selection.update(layers)
    where = the_device(device)
    target = _target(out, force)
    step(0)
    source = models.find(model)
    if source.packed:
        raise ValueError(f"{model}: is compressed already; start from the dense model it was made of")
    if source.folder is not None and source.folder.resolve() == target:
        raise ValueError(f"{out}: is the model itself, which would be lost; choose another folder")
    step(1)
    # Before the work, not after it.
    tokenizer = models.load_tokenizer(source)
    loaded = models.load(source, device=where, dtype=None if dtype is None else getattr(torch, dtype))
    network = loaded.model
    _refuse_non_finite(network)
    step(2)
    done = sparsebert.compress_(network, selection, ignore=ignore, layout=layout)
    step(3)
    with _appearing(target) as folder, models.quiet_transformers():
        sparsebert.save_pretrained(network, folder, tokenizer=tokenizer)
        step(4)
        written = info.inspect(str(folder))
    return {
        "model": model,
        "out": str(out),
        "architecture": type(network).__name__,
        "method": "magnitude, one-shot",
        "dtype": str(network.dtype).removeprefix("torch."),
        "device": device_label(where),
        **done.to_dict(),
        "file_bytes": written["file_bytes"],
        "tokenizer": tokenizer is not None,
        "untrained": list(loaded.untrained),
        "dropped": list(loaded.dropped),
        "accuracy_measured": False,
    }


def render(result: dict[str, Any]) -> Rendered:
    packed, skipped = result["layers"], result["skipped"]
    linears = len(packed) + len(skipped)
    yield f"{result['architecture']}: packed {len(packed)} of {linears} linear layers, {result['dtype']}"
    groups = defaultdict(list)
    for layer in packed:
        groups[layer["role"] or layer["path"], layer["config"]].append(layer["kept_energy"])
    yield table(
        ["role", "pattern", "layers", "share of |W|^2 kept"],
        [[*key, str(len(kept)), f"{sum(kept) / len(kept):.3f}"] for key, kept in groups.items()],
    )
    reasons = defaultdict(list)
    for path, reason in skipped.items():
        reasons[reason].append(path)
    for reason, paths in reasons.items():
        yield f"Left dense: {few(paths)}: {reason}"
    size = result["size"]
    yield size_table(size)
    held = sorted({layer["layout"] for layer in packed})
    on_cpu = held == ["dense"] and result["device"].startswith("CPU")
    unpacked = "; a CPU computes with the unpacked weight" if on_cpu else ""
    yield f"In memory is as held on {result['device']}, layout {', '.join(held)}{unpacked}."
    if result["untrained"]:
        names = few(result["untrained"])
        yield f"Warning: the checkpoint lacks {names}; they are random, here and in what was saved"
    if result["dropped"]:
        yield f"Warning: {result['architecture']} has no place for {few(result['dropped'])}; they were not saved"
    if not result["tokenizer"]:
        yield "Note: there was no tokenizer beside the model, so none was saved"
    tokenizer = " and the tokenizer" if result["tokenizer"] else ""
    yield f"Saved to {result['out']}: {megabytes(result['file_bytes'])} of tensors{tokenizer}"
    yield "One-shot pruning costs accuracy, and this command did not measure how much. To see:"
    yield f"    sparsebert eval {shlex.quote(result['out'])} --compare {shlex.quote(result['model'])} --data FILE"
    yield "Training with a method of sparsebert.methods wins much of it back: `sparsebert demo` shows one such run."


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
