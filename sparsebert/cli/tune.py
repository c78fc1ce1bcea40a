"""``sparsebert tune``: measures the layouts of a packed model on a device, for later loads to choose by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sparsebert.cli.common import Rendered, Report, few, table, the_device

_MOST_TOKENS = 1 << 20


def parse_tokens(text: str) -> list[int]:
    """``128,4096`` as token counts."""
    counts = []
    for part in text.split(","):
        part = part.strip()
        if not part.isdecimal() or not 1 <= int(part) <= _MOST_TOKENS:
            raise ValueError(f"{part!r} is not a token count; write them as 128,4096 (at most {_MOST_TOKENS})")
        counts.append(int(part))
    return counts


def tune(
    model: str,
    tokens: Sequence[int],
    *,
    fuse: bool = False,
    device: str | None = None,
    report: Report = lambda done, total, text: None,
) -> dict[str, Any]:
    """Loads the packed ``model`` and measures it (``sparsebert.tune``), ``fuse`` as ``sparsebert.fuse_`` runs it, which
    writes the table of measurements."""
    import sparsebert
    from sparsebert.bench.environment import device_label
    from sparsebert.cli import models

    where = the_device(device)
    report(0, 1, "loading")
    source = models.find(model)
    if not source.packed:
        raise ValueError(f"{model}: nothing in it is packed, so there is nothing to tune; sparsebert compress first")
    network = models.load(source, device=where).model
    if fuse:
        sparsebert.fuse_(network)
    # sparsebert.tune names the device as the table does; a reader also wants the number of threads.
    result = sparsebert.tune(network, list(tokens), progress=report).to_dict()
    return {
        "model": model,
        "fused": fuse,
        "device_label": device_label(where),
        "on_gpu": where.type == "cuda",
        **result,
    }


def render(result: dict[str, Any]) -> Rendered:
    names = sorted({name for row in result["rows"] for name in row["median_us"]})
    yield f"Median microseconds a call by layout, on {result['device_label']} ({result['mode']})"
    yield table(
        ["layer", "dtype", "tokens", *names],
        [
            [
                f"{row['op']}, {row['out_features']} x {row['in_features']}",
                row["dtype"],
                str(row["tokens"]),
                *(f"{row['median_us'][name]:,.1f}" if name in row["median_us"] else "-" for name in names),
            ]
            for row in result["rows"]
        ],
    )
    groups = defaultdict(list)
    for path, layout in result["held"].items():
        groups[layout, result["reasons"][path]].append(path)
    for (layout, reason), paths in groups.items():
        yield f"{len(paths)} layers held as {layout}: {reason}"
        yield f"    {few(paths, 2)}"
    yield f"written to {result['table_file']}; models loaded on this device from now on choose by it"
    if not result["on_gpu"]:
        yield (
            "These are this CPU's figures and say nothing about a GPU. A CPU has no arithmetic for n:m patterns and "
            "bitmaps, which compute as dense does there; only low rank, dropped columns and int8 can be faster."
        )
