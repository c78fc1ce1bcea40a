"""The measured choices that the package ships with, from the op sweeps of GPUs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from sparsebert.bench.records import Run
from sparsebert.bench.report.compare import steadied, timed
from sparsebert.ops import measurements

Row = dict[str, Any]
Weight = tuple[str, str, int, int, str]


def measured_rows(runs: Iterable[Run]) -> list[measurements.Row]:
    """What selection may use of ``runs``: for each weight and layout, dense among them, the fastest backend with its
    configuration. Dry runs, CPUs and times that hold launches are left out.

    Layouts are compared with each other, so all rows of one weight are of one run, the newest that has it, and of one
    activation: none, where the weight was measured without. Of the token counts that one bucket holds the largest
    counts. ``ValueError`` where a row is of another device than its run.
    """
    chosen: dict[Weight, list[measurements.Row]] = {}
    for run in sorted(runs, key=lambda run: str(run.record.get("measured"))):
        if not run.on_gpu:
            continue
        weights: dict[Weight, list[Row]] = defaultdict(list)
        for row in steadied(run.of("linear")):
            # What has no op is a part of a layer, or several.
            if row.get("group") != "own" or "op" not in row or not timed(row) or row.get("mode") != "cuda-graph":
                continue
            if row["device"] != run.record["gpu"]:
                raise ValueError(f"{run.path}: {row.get('key')} is of {row['device']}, the run of {run.record['gpu']}")
            sizes = row["op_out_features"], row["op_in_features"]
            weights[row["device"], row["op"], *sizes, row["weight_dtype"]].append(row)
        chosen |= {weight: _of_weight(weight, rows) for weight, rows in weights.items()}
    return sorted((row for rows in chosen.values() for row in rows), key=lambda row: row.key)


def _of_weight(weight: Weight, rows: list[Row]) -> list[measurements.Row]:
    activation = min((row["activation"] for row in rows), key=lambda name: (name != "none", name))
    largest: dict[int, int] = {}
    for row in rows:
        if row["activation"] == activation:
            bucket = measurements.token_bucket(row["tokens"])
            largest[bucket] = max(largest.get(bucket, 0), row["tokens"])
    best: dict[tuple[int, str], Row] = {}
    for row in rows:
        bucket = measurements.token_bucket(row["tokens"])
        if row["activation"] != activation or row["tokens"] != largest[bucket]:
            continue
        before = best.get((bucket, row["layout"]))
        if before is None or row["median_us"] < before["median_us"]:
            best[bucket, row["layout"]] = row
    device, op, out_features, in_features, dtype = weight
    return [
        measurements.Row(
            device,
            op,
            layout,
            out_features,
            in_features,
            bucket,
            dtype,
            round(row["median_us"], 3),
            round(row["mad_us"], 3),
            row["backend"],
            measurements.SHIPPED,
            dict(row.get("configuration") or {}),
        )
        for (bucket, layout), row in best.items()
    ]
