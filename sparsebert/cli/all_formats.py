"""Every format on one real model: what each costs in quality, bytes and time, in one shot and without any training.

``sparsebert demo --all-formats`` takes the demo's model and task through each entry of ``ALL_FORMATS``: compress, save,
reload in a fresh process, measure there, and compare the embeddings of the queries with those from before bit for bit
(those of the longer documents too would double the time that all of this takes). All latencies are measured in turns in
one run and shown as ratios to dense, so a format that loses is shown as losing.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text as Line
from torch import Tensor

import sparsebert as sb
from sparsebert.bench.docstrings import Split
from sparsebert.bench.environment import device_label, environment
from sparsebert.bench.retrieval import embed, score
from sparsebert.bench.timing import Timing
from sparsebert.cli import calibrate, models
from sparsebert.cli.compress import one_shot_method
from sparsebert.cli.demo import (
    DEFAULT_OUT,
    EVALUATION_BATCH,
    LATENCY_SHAPES,
    MODEL_NAME,
    DemoFailed,
    Reloaded,
    Task,
    describe,
    find_model,
    held_out_texts,
    load_model,
    make_folder,
    measure,
    measure_latency,
    read_corpus,
    reload_fresh,
    tensor_bytes,
    totals,
)
from sparsebert.cli.rows import Row
from sparsebert.cli.steps import Steps
from sparsebert.configs import Config, Int8Config, NMConfig, parse_config
from sparsebert.plan import Selection

MIXED = "mixed"
# Attention at 2:4, the feed-forward net in int8, and the first layer, on which all others build, left dense.
MIXED_SELECTION: dict[str, Config | None] = {
    **dict.fromkeys(("query", "key", "value", "attention_output"), NMConfig(2, 4)),
    **dict.fromkeys(("intermediate", "output"), Int8Config()),
    "*.layer.0.*": None,
}
_SPECS = (
    "2:4 1:4 2:4@0.5 bitmap:0.5 bitmap:0.1 low-rank:0.5 low-rank:0.25 low-rank:0.25+rows:0.1 low-rank:0.25+2:4 "
    "low-rank:0.25+bitmap:0.1 int8 int8-static int8+2:4"
)
ALL_FORMATS: dict[str, Selection] = {**{text: parse_config(text) for text in _SPECS.split()}, MIXED: MIXED_SELECTION}

# At each shape, for each model.
LATENCY_SECONDS = 1.0
# Training texts that static scales are measured on.
CALIBRATION_TEXTS = 128
JSON_FILE, PICTURE = "all-formats.json", "all-formats.png"

# One colour a family of formats, in the order of their first appearance.
_COLOURS = {
    "dense": "#222222",
    "n:m": "#33658a",
    "bitmap": "#86bbd8",
    "low rank": "#f26419",
    "low rank + sparse": "#f6ae2d",
    "int8": "#5b8e3e",
    "mixed": "#8e5ba6",
}


def run_all_formats(*, out: Path = DEFAULT_OUT, console: Console, quiet: bool = False) -> dict[str, Any]:
    """Runs all of ``ALL_FORMATS``, writes ``all-formats.json`` and ``all-formats.png`` into ``out``, prints one table,
    returns the JSON. The checkpoints are removed again.

    ``quiet`` prints nothing. Raises DemoFailed (after writing the files) if a reloaded model differs in one bit from
    the one that was saved; ValueError for a missing package or a bad argument.
    """
    folder = find_model()
    out = make_folder(out)
    progress = Steps(console, quiet)
    started = time.perf_counter()
    split = read_corpus(progress)
    dense, tokenizer = load_model(folder, progress)
    task = Task.of(tokenizer, *held_out_texts(split))
    quality, _ = measure(dense, task, progress, "measure the dense model")

    packed: dict[str, Any] = {}
    queries: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    # Beside the results and not in /tmp, which may be memory.
    with tempfile.TemporaryDirectory(dir=out, prefix=".checkpoints-") as scratch:
        folders = {name: Path(scratch, str(place)) for place, name in enumerate(ALL_FORMATS)}
        for name, selection in ALL_FORMATS.items():
            packed[name] = copy.deepcopy(dense)
            entries[name] = compress(packed[name], selection, tokenizer, split, folders[name], progress, name)
            with progress.step(f"{name}: embed the queries") as step, sb.quantizing(packed[name]) as held_dense:
                queries[name] = embed(packed[name], task.queries, batch_size=EVALUATION_BATCH, progress=step.tick)
            entries[name]["layers"]["quantized_for_quality"] = len(held_dense)
        reloaded = reload_fresh(folders, split, progress)
    timings = measure_latency({"dense": dense, **packed}, progress, LATENCY_SECONDS * (1 + len(packed)))

    formats = [
        {
            "name": "dense",
            "family": "dense",
            "method": None,
            "quality": quality.to_dict(),
            "sizes": totals(sb.size_report(dense).to_dict()),
            "file_bytes": (folder / "model.safetensors").stat().st_size,
            "ran": "torch.nn.Linear",
            "latency": _latencies(timings, "dense"),
        }
    ]
    for name, entry in entries.items():
        formats.append({**entry, **_judged(reloaded[name], queries[name]), "latency": _latencies(timings, name)})
    failures = [
        f"{entry['name']}: embeddings of the reloaded model differ from the saved one's by up to "
        f"{entry['largest_difference']:.3g}, expected none"
        for entry in formats[1:]
        if not entry["bitwise_equal"]
    ]
    result = {
        "passed": not failures,
        "failures": failures,
        "model": MODEL_NAME,
        "training": "none: every format in one shot",
        "task": describe(split),
        "device": device_label("cpu"),
        "formats": formats,
        "environment": environment("cpu"),
    }
    result["seconds"] = {**progress.seconds, "total": time.perf_counter() - started}
    (out / JSON_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    # After the data, which took minutes.
    with progress.step("draw the picture"):
        draw(result, out / PICTURE)
    if not quiet:
        console.print(render(result))
        console.print(f"written to {out}: {JSON_FILE}, {PICTURE}", highlight=False)
    if failures:
        raise DemoFailed(f"demo: {'; '.join(failures)}", result)
    return result


def compress(
    model: Any, selection: Selection, tokenizer: Any, split: Split, folder: Path, progress: Steps, name: str
) -> dict[str, Any]:
    """Compresses ``model`` in place, in one shot, and saves it to ``folder``; what the result says of it."""
    with progress.step(f"{name}: compress and save") as step, models.quiet_transformers():
        report = sb.compress_(model, selection)
        configs = [parse_config(layer.config) for layer in report.layers]
        calibration = None
        if any(isinstance(config, Int8Config) and config.activations == "static" for config in configs):
            # Never the held-out texts: the scales would fit them.
            rows = [Row(0, (text,)) for text in calibrate.spread(split.training_texts(), CALIBRATION_TEXTS)]
            calibration = calibrate.calibrate(
                model, tokenizer, rows, calibrate.Text(None), name, lambda done, total, _: step.tick(done, total)
            )
        sb.save_pretrained(model, folder, tokenizer=tokenizer)
        step.outcome = f"{len(report.layers)} layers packed"
    mapping = selection if isinstance(selection, Mapping) else None
    return {
        "name": name,
        "family": _family(name),
        "method": one_shot_method(configs),
        "selection": None if mapping is None else {key: str(config or "dense") for key, config in mapping.items()},
        "layers": {"packed": len(report.layers), "left_dense": _left_dense(report)},
        "kept_energy": sum(layer.kept_energy for layer in report.layers) / len(report.layers),
        "calibration": calibration,
        "file_bytes": tensor_bytes(folder),
    }


def render(result: dict[str, Any]) -> Group:
    """The one table, and the few sentences that belong to it."""
    table = Table(title=f"{result['model']}, one shot, no training, on {result['device']}", title_justify="left")
    table.add_column("format")
    shapes = [f"{batch} x {tokens}\ntokens" for batch, tokens in LATENCY_SHAPES]
    for name in (
        "MRR@10",
        "recall@1",
        "encoder\non disk",
        "encoder\nin memory",
        "model\nfile",
        *shapes,
        "reload\nequal",
    ):
        table.add_column(name, justify="right")
    for entry in result["formats"]:
        quality, encoder = entry["quality"], entry["sizes"]["encoder"]
        dense = entry["name"] == "dense"
        counts = (encoder["disk_bytes"], encoder["memory_bytes"], entry["file_bytes"])
        times = [f"{x['median_us'] / 1e3:.1f} ms" if dense else f"{x['ratio']:.2f}x" for x in entry["latency"]]
        table.add_row(
            entry["name"],
            f"{quality['mrr_at_10']:.4f}",
            f"{quality['recall_at_1']:.3f}",
            *(f"{size / 1e6:.1f} MB" for size in counts),
            *times,
            "-" if dense else "yes" if entry["bitwise_equal"] else "NO",
            end_section=dense,
        )
    lines = [
        f"Retrieval among {result['task']['held_out']} held-out docstrings. Encoder: its linear layers. Latency: the "
        "time of dense, and of the others as a multiple of it, measured in turns; above 1 is slower than dense.",
        f"{MIXED}: {_selection_text()}.",
        *_quantized(result["formats"]),
        *_verdicts(result["formats"]),
        "No format was trained: methods that train win quality back, as `sparsebert demo` shows for 2:4.",
    ]
    return Group(table, *(Line(line) for line in lines))


def draw(result: dict[str, Any], file: Path) -> None:
    """Quality against the encoder's size on disk, and latency as a multiple of dense."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    formats = result["formats"]
    figure = Figure(figsize=(14, 6.2), layout="constrained")
    # The one that can tell how large words come out.
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    points = []
    for entry in formats:
        point = entry["sizes"]["encoder"]["disk_bytes"] / 1e6, entry["quality"]["mrr_at_10"]
        left.scatter(*point, color=_COLOURS[entry["family"]], s=45, zorder=3)
        points.append(point)
    left.set_xlim(0, 1.15 * max(x for x, _ in points))
    left.set_ylim(0, 1.15 * max(y for _, y in points))
    left.set_xlabel("encoder linears on disk, MB")
    left.set_ylabel("MRR@10")
    left.set_title(f"retrieval, {result['task']['held_out']} held-out pairs: up and to the left is better")
    left.grid(alpha=0.3)
    _label(figure, left, points, [entry["name"] for entry in formats])

    others = formats[1:]
    height = 0.8 / len(LATENCY_SHAPES)
    for i, (batch, tokens) in enumerate(LATENCY_SHAPES):
        places = [place + (i - (len(LATENCY_SHAPES) - 1) / 2) * height for place in range(len(others))]
        bars = right.barh(
            places,
            [entry["latency"][i]["ratio"] for entry in others],
            height,
            label=f"{batch} x {tokens} tokens",
            color=[_COLOURS[entry["family"]] for entry in others],
            alpha=(1.0, 0.55)[i % 2],
        )
        right.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    right.axvline(1, color="black", linewidth=1)
    right.set_yticks(range(len(others)), [entry["name"] for entry in others])
    right.invert_yaxis()
    right.margins(x=0.1)
    right.set_xlabel("time of a forward pass, dense = 1 (below is faster)")
    right.set_title("latency")
    # Grey, since the colours tell the families.
    handles = right.legend(fontsize=8, loc="lower right").legend_handles
    for i, handle in enumerate(handles):
        handle.set_color("#777777")
        handle.set_alpha((1.0, 0.55)[i % 2])
    figure.suptitle(f"{result['model']}, every format in one shot, no training; {result['device']}", fontsize=10)
    figure.savefig(file, dpi=130)


def _label(figure: Any, axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Writes each name beside its point, at the nearest place where it covers no other name and no point."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    pixels = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in pixels]
    frame = axes.get_window_extent(renderer)
    # From the bottom up, so that names are pushed away from the crowd and not into it.
    for point, name in sorted(zip(points, names, strict=True), key=lambda item: item[0][1]):
        options = [(dx, dy) for dy in (0, 14, -14, 28, -28, 42, -42, 56, -56) for dx in (9, -9)]
        for dx, dy in sorted(options, key=lambda offset: abs(offset[1])):
            text = axes.annotate(
                name,
                point,
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                va="center",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#888888"} if dy else None,
            )
            # Of the words alone: an annotation's own box has the line in it.
            box = _words_box(text, renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axes.annotate(name, point, (9, 0), textcoords="offset points", va="center", fontsize=8)
            box = _words_box(text, renderer)
        taken.append(box)


def _words_box(annotation: Any, renderer: Any) -> Any:
    from matplotlib.text import Text

    annotation.update_positions(renderer)
    return Text.get_window_extent(annotation, renderer)


def _judged(reloaded: Reloaded, queries: Tensor) -> dict[str, Any]:
    """Of the reloaded model: what it finds, what it takes, and whether it is the one that was saved."""
    return {
        "quality": score(reloaded.queries, reloaded.documents).to_dict(),
        "sizes": totals(reloaded.sizes),
        "ran": reloaded.kernel,
        "bitwise_equal": torch.equal(queries, reloaded.queries),
        "largest_difference": (queries - reloaded.queries).abs().max().item(),
    }


def _latencies(timings: Mapping[tuple[int, int], Mapping[str, Timing]], name: str) -> list[dict[str, Any]]:
    return [
        {
            "batch": batch,
            "tokens": tokens,
            **by_name[name].to_dict(),
            "ratio": by_name[name].median_us / by_name["dense"].median_us,
            "within_noise": abs(by_name[name].median_us - by_name["dense"].median_us)
            <= 3 * (by_name[name].mad_us + by_name["dense"].mad_us),
        }
        for (batch, tokens), by_name in timings.items()
    ]


def _verdicts(formats: Sequence[dict[str, Any]]) -> list[str]:
    """Who wins and who loses in time, beyond noise."""
    lines = []
    for i, (batch, tokens) in enumerate(LATENCY_SHAPES):
        found = [(entry["name"], entry["latency"][i]) for entry in formats[1:]]
        clear = [(name, latency) for name, latency in found if not latency["within_noise"]]
        faster = [name for name, latency in clear if latency["ratio"] < 1]
        slower = [name for name, latency in clear if latency["ratio"] > 1]
        lines.append(
            f"At {batch} x {tokens} tokens, beyond noise: faster than dense {', '.join(faster) or 'none'}; "
            f"slower {', '.join(slower) or 'none'}."
        )
    return lines


def _quantized(formats: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the int8 rows has to know where their quality and their latency are of two functions."""
    if not any(entry["layers"]["quantized_for_quality"] for entry in formats[1:]):
        return []
    return [
        "int8: quality of layers that quantize their inputs, as devices with int8 instructions compute; latency and "
        "memory of layers held as dense, as here by default, which do not."
    ]


def _selection_text() -> str:
    groups: dict[str, list[str]] = {}
    for key, config in MIXED_SELECTION.items():
        groups.setdefault(str(config or "dense"), []).append(key)
    return "; ".join(f"{', '.join(keys)} {config}" for config, keys in groups.items())


def _family(name: str) -> str:
    if name == MIXED:
        return "mixed"
    if name.startswith("low-rank"):
        return "low rank + sparse" if "+" in name else "low rank"
    return next((kind for kind in ("bitmap", "int8") if name.startswith(kind)), "n:m")


def _left_dense(report: Any) -> list[str]:
    """The layers of the encoder that were left as they were; others are dense in every format."""
    return [layer.path for layer in report.size.layers if layer.role is not None and layer.format == "dense"]
