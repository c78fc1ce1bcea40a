"""Rows as plots, on white so that they read on light and on dark pages. The same rows give the same SVG to the byte."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsebert.bench.models.published import PublishedLine
from sparsebert.bench.report import compare, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

FORMATS = ("svg", "png")
# Told apart by every kind of sight, and from the grey of what is neither.
_VERDICTS = {compare.FASTER: "#0072b2", compare.EQUAL: "#bbbbbb", compare.SLOWER: "#d55e00"}
_RUNGS = {"dense": "#555555", "library": "#e69f00", "own": "#0072b2"}
_PUBLISHED = "#cccccc"
_BEST_DENSE = "best dense path"
_COLUMNS = 3


@dataclass(frozen=True)
class Plot:
    """``name`` is that of its files, ``title`` says what it shows; nothing is drawn before ``draw``."""

    name: str
    title: str
    draw: Callable[[], Figure]


def of(slug: str, label: str, rows: Sequence[Row], published: Iterable[PublishedLine] = ()) -> list[Plot]:
    """The plots that ``rows``, all of the device ``label``, have numbers for. Needs no matplotlib."""
    points = compare.points(rows)
    rungs = {key: found for key, found in tables.by_input(rows).items() if any(map(compare.timed, found))}
    roofs, rated = _roofs(rows), _rated(points)
    found: list[tuple[str, str, Callable[[str], Figure]]] = []
    for i, variant in enumerate(compare.variants(points)):
        those = compare.of_variant(points, variant)
        if not any(outcome.speed_up for point in those for outcome in point.formats.values()):
            continue
        # A figure of its own for each: all in one would be too large to read.
        more, of = ("-" + "-".join(variant), f", {', '.join(variant)}") if i else ("", "")
        text = f"speed-up of each format over the best dense path{of}"
        found.append((f"speed-up{more}", text, partial(speed_ups, those)))
        text = f"where each format beats the best dense path{of}"
        found.append((f"break-even{more}", text, partial(break_even, those)))
    if roofs and rated:
        found.append(("roofline", "rates reached, and the measured ceilings", partial(roofline, rated, *roofs)))
    if rungs:
        found.append(("ladder", "models end to end", partial(ladder, rungs, list(published))))
    return [Plot(f"{slug}-{name}", f"{label}: {text}", partial(draw, f"{label}: {text}")) for name, text, draw in found]


def save(plot: Plot, folder: Path) -> list[Path]:
    """``<name>.svg`` and ``.png`` in ``folder``. ``ImportError`` where matplotlib is missing."""
    try:
        from matplotlib import rc_context, style
    except ImportError:
        raise ImportError("plots need matplotlib, which is not installed: pip install 'sparsebert[plots]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    # Not what the user's own settings say. The salt stands in for random ids; a date would change with each run.
    with style.context("default"), rc_context({"svg.hashsalt": "sparsebert", "font.size": 9}):
        figure = plot.draw()
        for kind in FORMATS:
            files.append(folder / f"{plot.name}.{kind}")
            metadata = {"Date": None} if kind == "svg" else {}
            figure.savefig(files[-1], dpi=130, facecolor="white", metadata=metadata)
    return files


def speed_ups(points: Sequence[compare.Point], title: str) -> Figure:
    """A panel a format, layers over token counts; the colour is the logarithm of the speed-up, grey at 1."""
    from matplotlib.colors import Normalize

    formats = compare.formats(points)
    names, counts = _names(points), sorted({point.tokens for point in points})
    cells = {(point.name, point.tokens): point.formats for point in points}
    known = [o.speed_up for point in points for o in point.formats.values() if o.speed_up]
    # At least to 1.5x, so that noise has no strong colour; not beyond 4x, so that one outlier does not fade the rest.
    reach = min(2.0, max(math.log2(1.5), *(abs(math.log2(value)) for value in known)))
    norm = Normalize(-reach, reach)
    figure, panels = _panels(len(formats), 1.2 + 0.5 * len(counts), 1.2 + 0.3 * len(names), title)
    for axes, format in zip(panels, formats, strict=True):
        values = [[math.nan] * len(counts) for _ in names]
        for y, name in enumerate(names):
            for x, tokens in enumerate(counts):
                outcome = cells.get((name, tokens), {}).get(format)
                if outcome is None:
                    continue
                text = outcome.text
                if outcome.speed_up:
                    values[y][x] = math.log2(outcome.speed_up)
                    text = tables.ratio(outcome.speed_up)
                strong = abs(values[y][x]) > 0.65 * reach
                axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color="white" if strong else "black")
        image = axes.imshow(values, norm=norm, cmap="RdBu", aspect="auto")
        axes.set_title(format, fontsize=9)
        _grid(axes, counts, names)
    bar = figure.colorbar(image, ax=panels, shrink=0.6, location="bottom", aspect=40, extend="both")
    ticks = [power for power in range(-2, 3) if abs(power) <= reach]
    bar.set_ticks(ticks, labels=[f"{2.0**power:g}x" for power in ticks])
    bar.set_label("times as fast as the best dense path (hatched: no number)")
    return figure


def break_even(points: Sequence[compare.Point], title: str) -> Figure:
    """A panel a format, layers over token counts: faster, equal or slower; hatched where there is no number, with the
    reason where it is not that nobody measured."""
    from matplotlib.patches import Patch, Rectangle

    formats = compare.formats(points)
    names, counts = _names(points), sorted({point.tokens for point in points})
    figure, panels = _panels(len(formats), 1.2 + 0.4 * len(counts), 1.4 + 0.25 * len(names), title)
    by_format = dict(zip(formats, panels, strict=True))
    for entry in compare.break_even(points):
        y = names.index(compare.name_of(entry.problem, entry.roles))
        for tokens, verdict in entry.verdicts.items():
            axes, x = by_format[entry.format], counts.index(tokens)
            if colour := _VERDICTS.get(verdict):
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour, linewidth=0))
            elif verdict != compare.NOT_MEASURED:
                axes.text(x, y, verdict, ha="center", va="center", fontsize=6)
    for format, axes in by_format.items():
        axes.set_title(format, fontsize=9)
        axes.set_xlim(-0.5, len(counts) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        _grid(axes, counts, names)
    handles = [Patch(color=colour, label=f"{name} than dense") for name, colour in _VERDICTS.items()]
    handles[1].set_label("equal within max(2 %, 3 MAD)")
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def roofline(rated: dict[str, list[Row]], bandwidth: float, peaks: dict[str, float], title: str) -> Figure:
    """Operations a second over operations a byte, both logarithmic, below the ceilings measured in the same run: of the
    best dense paths, each format's fastest kernels and the library peers."""
    figure, (axes,) = _panels(1, 9, 5.5, title)
    points = {
        name: [(row["operations"] / row["bytes"], row["operations"] / row["median_us"] / 1e6) for row in rows]
        for name, rows in rated.items()
    }
    every = [x for found in points.values() for x, _ in found]
    low, high = min(every) / 2, max(*every, *(1e3 * peak / bandwidth for peak in peaks.values())) * 2
    for name, peak in sorted(peaks.items(), key=lambda item: item[1]):
        knee = 1e3 * peak / bandwidth
        axes.plot([min(low, knee), knee, high], [min(low, knee) * bandwidth / 1e3, peak, peak], color="black", lw=0.8)
        axes.text(high, peak, f"{name} ", ha="right", va="bottom", fontsize=7)
    markers = "os^vD<>pPX*hd"
    for i, (name, found) in enumerate(points.items()):
        xs, ys = zip(*found, strict=True)
        style = {"marker": markers[i % len(markers)], "color": f"C{i % 10}" if i else "black", "s": 16, "alpha": 0.7}
        axes.scatter(xs, ys, label=name, linewidths=0, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations that the format needs, a byte that must move")
    axes.set_ylabel("10¹² operations a second")
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def ladder(rungs: dict[tuple[str, int, int, str], list[Row]], published: Sequence[PublishedLine], title: str) -> Figure:
    """Milliseconds by rung, a panel an input; what others published is hatched and names its hardware."""
    most = max(len(rows) for rows in rungs.values()) + len(published)
    figure, panels = _panels(len(rungs), 4.5, 1 + 0.24 * most, title)
    for axes, ((model, batch, length, lengths), rows) in zip(panels, rungs.items(), strict=True):
        bars = [
            (row["peer"], row["median_us"] / 1e3, _RUNGS[compare.rung_group(row)]) for row in rows if compare.timed(row)
        ]
        measured = len(bars)
        for line in tables.matching(published, model, batch, length):
            if line.milliseconds is not None:
                bars.append((tables.published_name(line), line.milliseconds, _PUBLISHED))
        drawn = axes.barh([name for name, _, _ in bars], [ms for _, ms, _ in bars], color=[c for _, _, c in bars])
        for bar in drawn[measured:]:
            bar.set_hatch("///")
            bar.set_edgecolor("#555555")
        axes.bar_label(drawn, labels=[tables.number(ms) for _, ms, _ in bars], fontsize=7, padding=2)
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(f"{model}, {batch} x {length}{f', {lengths}' if lengths else ''}, ms")
    return figure


def _panels(count: int, width: float, height: float, title: str) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` panels, each ``width`` by ``height`` inches, a few in a row."""
    from matplotlib.figure import Figure

    columns, width = min(count, _COLUMNS), max(width, 3.2)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(columns * width + 2, lines * height + 1.2), layout="constrained")
    figure.suptitle(title)
    every = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for axes in every[count:]:
        axes.remove()
    return figure, every[:count]


def _grid(axes: Any, counts: Sequence[int], names: Sequence[str]) -> None:
    """Token counts below, layers to the left, and hatching behind: it shows where nothing was measured."""
    from matplotlib.patches import Rectangle

    axes.set_xticks(range(len(counts)), [str(count) for count in counts], fontsize=7, rotation=45)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("tokens", fontsize=7)
    size = (len(counts), len(names))
    axes.add_patch(Rectangle((-0.5, -0.5), *size, fill=False, hatch="////", edgecolor="#dddddd", lw=0, zorder=-1))


def _names(points: Sequence[compare.Point]) -> list[str]:
    return list(dict.fromkeys(point.name for point in points))


def _roofs(rows: Iterable[Row]) -> tuple[float, dict[str, float]] | None:
    """GB/s of a copy and 10¹² operations a second by matrix product, or None where one of them was not measured."""
    found = {row["peer"]: row for row in rows if row["kind"] == "ceiling" and row.get("status") == "ok"}
    bandwidth = found.get("copy", {}).get("gbps")
    peaks = {name: row["tflops"] for name, row in found.items() if row.get("tflops")}
    return (bandwidth, peaks) if bandwidth and peaks else None


def _rated(points: Iterable[compare.Point]) -> dict[str, list[Row]]:
    """The rows of a roofline plot by what to call them, the best dense paths first."""
    found: dict[str, list[Row]] = defaultdict(list)
    for point in points:
        if point.dense:
            found[_BEST_DENSE].append(point.dense)
    for group in ("formats", "library"):
        for point in points:
            for name, outcome in getattr(point, group).items():
                if outcome.row:
                    found[name].append(outcome.row)
    return {name: rated for name, rows in found.items() if (rated := [row for row in rows if row.get("operations")])}
