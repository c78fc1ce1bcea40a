"""``sparsebert eval``: quality on the whole of a data set, and latency, of one model or of two side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebert.cli.common import Rendered, Report, few, table, the_device
from sparsebert.cli.inputs import STDLIB_LENGTH, cut_length, pad, tokenize
from sparsebert.cli.rows import LABEL_COLUMN, TEXT_COLUMNS, Row, label_ids, read_rows

if TYPE_CHECKING:
    from torch import Tensor

TASKS = ("classification", "retrieval")
# Spent on the latency of each model.
TIMING_SECONDS = 2.0

_NAMES = {
    "accuracy": "accuracy",
    "f1": "F1 of class 1",
    "matthews": "Matthews correlation",
    "mrr_at_10": "MRR@10",
    "recall_at_1": "recall@1",
}
# Retrieval holds every query against every document: this many take 3 GB.
_MOST_PAIRS = 20_000


@dataclass(frozen=True)
class Outcome:
    """Of one model: scores by name, the predicted class of each row (classification), how many texts were cut, and the
    batch and call to time."""

    scores: dict[str, float]
    predictions: list[int] | None
    cut: int
    call: Callable[[], object]
    batch_shape: tuple[int, ...]


def evaluate(
    model: str,
    *,
    data: Path | None = None,
    task: str = "classification",
    text_columns: Sequence[str] | None = None,
    label_column: str = LABEL_COLUMN,
    batch_size: int = 32,
    max_length: int | None = None,
    limit: int | None = None,
    compare: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    report: Report = lambda done, total, text: None,
) -> dict[str, Any]:
    """Scores and latency of ``model``, and of ``compare`` on the same rows; the rows come from ``data`` or are the
    docstrings of the standard library. ``dtype`` None is the stored one. ``max_length`` None is the most that the model
    takes, or what the demo takes for the docstrings, so that their scores compare.
    """
    import torch

    import sparsebert
    from sparsebert.bench.environment import device_label
    from sparsebert.bench.timing import measure_together
    from sparsebert.cli import models

    where = the_device(device)
    if task == "classification":
        _metrics()
    if data is None and max_length is None:
        max_length = STDLIB_LENGTH
    rows = _rows(data, task, text_columns, label_column, limit, report)
    sources = []
    for name in [model] if compare is None else [model, compare]:
        report(0, 1, f"looking up {name}")
        sources.append(models.find(name))
        if task == "classification":
            _refuse_headless(sources[-1])
    outcomes, described = [], []
    for source in sources:
        report(0, 1, f"loading {source.name}")
        tokenizer = models.load_tokenizer(source)
        if tokenizer is None:
            raise ValueError(f"{source.name}: has no tokenizer, which turning text into its input needs")
        loaded = models.load(source, device=where, dtype=None if dtype is None else getattr(torch, dtype))
        network = loaded.model
        length = cut_length(max_length, network.config, tokenizer, source.name)
        # Scores are those of the checkpoint and not of this device; times are of this device.
        with sparsebert.quantizing(network) as held_dense:
            if task == "classification":
                _refuse_untrained(loaded.untrained, source.name)
                outcome = _classify(network, tokenizer, rows, data or Path(), source.name, length, batch_size, report)
            else:
                _refuse_untrained([key for key in loaded.untrained if "pooler" not in key.split(".")], source.name)
                outcome = _retrieve(network.base_model, tokenizer, rows, length, batch_size, report)
        outcomes.append(outcome)
        described.append(
            {
                "model": source.name,
                "architecture": type(network).__name__,
                "compressed": source.packed,
                "formats": _formats(network),
                "unpacked_layers": _unpacked(network),
                "quantized_for_scores": len(held_dense),
                "dtype": str(network.dtype).removeprefix("torch."),
                "max_length": length,
                "texts_cut": outcome.cut,
                "scores": outcome.scores,
            }
        )
    report(0, 1, "timing")
    with torch.inference_mode():
        timings = measure_together(
            {str(i): outcome.call for i, outcome in enumerate(outcomes)},
            device=where,
            budget_s=TIMING_SECONDS * len(outcomes),
            warmup=1,
            min_repeats=3,
        )
    for i, (entry, outcome) in enumerate(zip(described, outcomes, strict=True)):
        entry["latency"] = {**timings[str(i)].to_dict(), "batch": list(outcome.batch_shape)}
    result = {
        "task": task,
        "data": "docstrings of the Python standard library" if data is None else str(data),
        "rows": len(rows),
        "batch_size": batch_size,
        "device": device_label(where),
        "on_gpu": where.type == "cuda",
        "models": described,
    }
    first, other = outcomes[0].predictions, outcomes[-1].predictions
    if compare is not None and first is not None and other is not None:
        result["agreement"] = sum(a == b for a, b in zip(first, other, strict=True)) / len(rows)
    return result


def render(result: dict[str, Any]) -> Rendered:
    yield f"{result['task']} on {result['rows']:,} rows: {result['data']}"
    entries = result["models"]
    header = ["", *(_short(entry["model"]) for entry in entries)]
    if len(entries) == 2:
        header.append("difference")
    rows: list[list[str]] = [
        ["model", *(f"{e['architecture']}, {_what(e)}" for e in entries)],
    ]
    for key in entries[0]["scores"]:
        values = [entry["scores"].get(key) for entry in entries]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        if len(values) == 2:
            cells.append("-" if None in values else f"{values[0] - values[1]:+.4f}")
        rows.append([_NAMES[key], *cells])
    latencies = [entry["latency"] for entry in entries]
    cells = [f"{latency['median_us'] / 1e3:,.2f} ms" for latency in latencies]
    if len(latencies) == 2:
        first, other = (latency["median_us"] for latency in latencies)
        noise = 3 * sum(latency["mad_us"] for latency in latencies)
        cells.append(f"{first / other:.2f}x the time{', within noise' if abs(first - other) <= noise else ''}")
    rows.append(["latency a batch", *cells])
    # The first row of a two-model table has no difference.
    yield table(header, [row + [""] * (len(header) - len(row)) for row in rows])
    if "agreement" in result:
        yield f"The two predict the same class for {100 * result['agreement']:.2f} % of the rows."
    for cut, length in sorted({(entry["texts_cut"], entry["max_length"]) for entry in entries}):
        if cut:
            yield f"{cut:,} inputs were longer than {length} tokens and were cut there."
    for latency in {tuple(entry["latency"]["batch"]): entry["latency"] for entry in entries}.values():
        shape = " x ".join(str(size) for size in latency["batch"])
        yield (
            f"Latency: median of {latency['repeats']} forward passes of {shape} tokens on {result['device']} "
            f"({latency['mode']}, not compiled)."
        )
    if len(dtypes := {entry["dtype"] for entry in entries}) > 1:
        both = " and ".join(sorted(dtypes))
        yield f"The two compute in {both}, which alone changes latency; --dtype makes them alike."
    if not result["on_gpu"] and any(entry["unpacked_layers"] for entry in entries):
        yield (
            "Packed layers that a CPU holds as dense compute with the unpacked weight: the zeros of a pattern or a "
            "bitmap, and int8 weights, make a model smaller on disk there, not faster."
        )
    if any(entry["quantized_for_scores"] for entry in entries):
        yield (
            "Scores are of int8 layers that quantize their inputs, as devices with int8 instructions compute; the "
            "latency is of these layers held as dense, which does not."
        )


def _rows(
    data: Path | None,
    task: str,
    text_columns: Sequence[str] | None,
    label_column: str,
    limit: int | None,
    report: Report,
) -> list[Row]:
    if data is None:
        from sparsebert.bench.docstrings import read_pairs, split_pairs

        pairs = read_pairs(progress=lambda done, total: report(done, total, "reading the standard library"))
        held_out = split_pairs(pairs).evaluation[:limit]
        return [Row(0, (pair.summary, pair.body)) for pair in held_out]
    if task == "classification":
        if text_columns is not None and not 1 <= len(text_columns) <= 2:
            raise ValueError(f"text columns are {', '.join(text_columns)}; classification takes one or two")
        return read_rows(data, text_columns, label_column, limit=limit)
    if text_columns is not None and len(text_columns) != 2:
        raise ValueError(f"text columns are {', '.join(text_columns)}; retrieval takes two, of queries and of answers")
    rows = read_rows(data, text_columns or TEXT_COLUMNS, None, limit=limit)
    if len(rows) > _MOST_PAIRS:
        raise ValueError(
            f"{data}: {len(rows)} rows, but retrieval compares each with all others and takes at most {_MOST_PAIRS}; "
            f"use --limit"
        )
    return rows


def _metrics() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise ValueError(
            "classification scores need scikit-learn, which is not installed: pip install 'sparsebert[eval]'"
        ) from None
    return metrics


def _classify(
    network: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    file: Path,
    name: str,
    length: int,
    batch_size: int,
    report: Report,
) -> Outcome:
    import torch

    from sparsebert.bench.retrieval import length_batches

    count = network.config.num_labels
    if count < 2:
        raise ValueError(f"{name}: has {count} output, which is regression; classification needs two classes or more")
    labels = label_ids(rows, [str(network.config.id2label[i]) for i in range(count)], file)
    inputs, cut = tokenize(tokenizer, rows, length, report)
    lengths = [len(ids) for ids in inputs["input_ids"]]
    batches = length_batches(lengths, batch_size)

    def batch(indices: Sequence[int]) -> dict[str, Tensor]:
        picked = {key: [values[i] for i in indices] for key, values in inputs.items()}
        return {key: tensor.to(network.device) for key, tensor in pad(tokenizer, picked).items()}

    predictions = [0] * len(rows)
    done = 0
    for indices in batches:
        report(done, len(rows), f"evaluating {name}")
        with torch.inference_mode():
            logits = network(**batch(indices)).logits
        if not torch.isfinite(logits).all():
            raise ValueError(f"{name}: its output holds NaN or infinities, expected finite numbers")
        for i, prediction in zip(indices, logits.argmax(-1).tolist(), strict=True):
            predictions[i] = prediction
        done += len(indices)
    metrics = _metrics()
    scores = {"accuracy": float(metrics.accuracy_score(labels, predictions))}
    if count == 2:
        scores["f1"] = float(metrics.f1_score(labels, predictions, zero_division=0))
    scores["matthews"] = float(metrics.matthews_corrcoef(labels, predictions))
    typical = batch(batches[(len(batches) - 1) // 2])
    return Outcome(scores, predictions, cut, lambda: network(**typical), tuple(typical["input_ids"].shape))


def _retrieve(
    network: Any, tokenizer: Any, rows: Sequence[Row], length: int, batch_size: int, report: Report
) -> Outcome:
    from sparsebert.bench.retrieval import Texts, embed, length_batches, score
    from sparsebert.cli.models import quiet_transformers

    embeddings = []
    cut = 0
    with quiet_transformers():
        for column, what in enumerate(("queries", "answers")):
            strings = [row.texts[column] for row in rows]
            texts = Texts(tokenizer, strings, max_length=length)
            at_limit = [s for s, size in zip(strings, texts.lengths(), strict=True) if size == length]
            cut += sum(size > length for size in Texts(tokenizer, at_limit, max_length=length + 1).lengths())

            def show(done: int, total: int, what: str = what) -> None:
                report(done, total, f"embedding {what}")

            embeddings.append(embed(network, texts, batch_size=batch_size, progress=show))
        batches = length_batches(texts.lengths(), batch_size)
        typical = texts.batch(batches[(len(batches) - 1) // 2], network.device)
    found = score(*embeddings)
    scores = {"mrr_at_10": found.mrr_at_10, "recall_at_1": found.recall_at_1}
    return Outcome(scores, None, cut, lambda: network(**typical), tuple(typical["input_ids"].shape))


def _refuse_headless(source: Any) -> None:
    if "ForSequenceClassification" not in (source.architecture or ""):
        raise ValueError(
            f"{source.name}: is {source.architecture or 'of unknown class'}, which has no classification head; "
            f"expected a ...ForSequenceClassification, or --task retrieval"
        )


def _refuse_untrained(missing: Sequence[str], name: str) -> None:
    if missing:
        raise ValueError(
            f"{name}: the checkpoint lacks {few(missing)}; filled at random they would make the scores meaningless"
        )


def _formats(network: Any) -> dict[str, int]:
    import sparsebert

    return dict(Counter(layer.format for layer in sparsebert.size_report(network).layers))


def _unpacked(network: Any) -> int:
    """How many packed layers are held as the unpacked weight, which takes other memory than what is stored."""
    import sparsebert

    layers = sparsebert.size_report(network).layers
    return sum(layer.layout == "dense" and layer.bytes.memory != layer.bytes.disk for layer in layers)


def _what(entry: dict[str, Any]) -> str:
    formats = entry["formats"] if len(entry["formats"]) > 1 else dict.fromkeys(entry["formats"] or ["dense"], 0)
    return f"{', '.join(f'{count} x {name}' if count else name for name, count in formats.items())}, {entry['dtype']}"


def _short(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
