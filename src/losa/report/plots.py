"""Plots of what `losa compare` found: quality against bytes, speed, sparsity and time. Few colours, names beside the marks.

Of a dense merge, the model masked again is shown: a sparse model among sparse models.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa.report.comparison import Rows, making
from losa.report.pareto import Point, front, is_default, label, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILIES = {"dense": "#555555", "dense, few bits": "#d9822b", "sparse": "#5b8fd6", "sparse and rounded": "#1f4e9c"}
OURS, OTHERS = "#1f4e9c", "#a9a9a9"
SHOWN = 6.0  # times the best perplexity, above which a point is left out of a plot and named below it
GAP = 0.042  # of the height of a plot, between two labels
NEAR = 0.3  # of its width: labels further apart do not meet
PERPLEXITY = "perplexity (lower is better)"


def write_plots(path: Path, rows: Rows) -> None:
    """`path` with `-by-bytes.svg`, with `-by-speed.svg` if speed was measured, with `-by-sparsity.svg` if there are several
    sparsities, with `-by-time.svg` if something was trained."""
    found = points(rows)
    bits = "bits a weight of the decoder's blocks, mask and scales included"
    drawn = {"bytes": _pareto(found, lambda point: point.bits, bits, rows[0]["model"])}
    fast = [point for point in found if point.speed]
    if len(fast) > 1:
        times = "tokens per second, times the dense model's"
        drawn["speed"] = _pareto(fast, lambda point: -(point.of_dense or 0.0), times, rows[0]["model"])
    sparsities = sorted({sparsity for row in rows if (sparsity := _sparsity(row)) is not None})
    if len(sparsities) > 1:
        drawn["sparsity"] = _by_sparsity(rows, sparsities)
    targets = list(dict.fromkeys(row["target"] for row in rows if row["target"] and row["seconds"].get("training")))
    if targets:
        drawn["time"] = _by_time(rows, targets)
    for name, figure in drawn.items():
        figure.savefig(path.with_name(f"{path.name}-by-{name}.svg"), metadata={"Date": None})


def _pareto(found: Sequence[Point], cost: Callable[[Point], float], axis: str, title: str) -> "Figure":
    """Points by family, and what no other beats as a line. `cost` is negative where more is better."""
    from matplotlib.ticker import LogLocator

    shown = [point for point in found if point.perplexity <= SHOWN * min(point.perplexity for point in found)]
    sign = -1.0 if cost(shown[0]) < 0 else 1.0
    figure, axes = _figure(4.6)
    best = front(shown, cost)
    axes.plot([sign * cost(point) for point in best], [point.perplexity for point in best], color="#999999", linewidth=1)
    for family, colour in FAMILIES.items():
        mine = [point for point in shown if point.family == family]
        if mine:
            sizes = [64 if point.default else 26 for point in mine]
            x, y = [sign * cost(point) for point in mine], [point.perplexity for point in mine]
            axes.scatter(x, y, s=sizes, color=colour, label=family, zorder=3)
    axes.set(xlabel=axis, title=title)
    if sign > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(2, (1, 1.25, 1.5)))
    _finish(axes)
    axes.margins(x=0.16)
    _label(axes, [(sign * cost(point), point.perplexity, point.name, point.default) for point in shown])
    left_out = [f"{point.name} ({point.perplexity:,.0f})" for point in found if point not in shown]
    if left_out:
        figure.supxlabel(f"above the plot: {', '.join(left_out)}", fontsize=7)
    axes.legend(fontsize=7, frameon=False)
    return figure


def _by_sparsity(rows: Rows, sparsities: Sequence[float]) -> "Figure":
    """A line a method, with error bars over seeds."""
    figure, axes = _figure(4.6)
    ends = []
    for name in dict.fromkeys(_name(row) for row in rows if row["target"]):
        line = []
        for sparsity in sparsities:
            values = [_sparse_value(row) for row in rows if _name(row) == name and _sparsity(row) == sparsity]
            if values:
                line.append((sparsity * 100, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
        if line:
            x, y, error = zip(*line, strict=True)
            ours = is_default(name)
            axes.errorbar(x, y, error, color=OURS if ours else OTHERS, capsize=2, marker="o", markersize=3, linewidth=1 + ours)
            ends.append((x[-1], y[-1], name, ours))
    for name, value in {row["method"]: row["perplexity"] for row in rows if row["method"] == "dense"}.items():
        axes.axhline(value, color="#555555", linestyle=":")
        ends.append((sparsities[0] * 100, value, name, False))
    axes.set(xlabel="sparsity (%)", xticks=[sparsity * 100 for sparsity in sparsities], title=rows[0]["model"])
    axes.set_xlim(right=sparsities[-1] * 100 + 0.45 * 100 * (sparsities[-1] - sparsities[0]))  # room for names
    _finish(axes)
    _label(axes, ends)
    return figure


def _by_time(rows: Rows, targets: Sequence[str]) -> "Figure":
    """A plot a target, a mark a seed."""
    figure = _blank(3.2 * len(targets))
    for axes, target in zip(figure.subplots(len(targets), squeeze=False)[:, 0], targets, strict=True):
        named = []
        for name in dict.fromkeys(_name(row) for row in rows if row["target"] == target and row["seconds"].get("training")):
            mine = [row for row in rows if _name(row) == name and row["target"] == target]
            x, y = [making(row) for row in mine], [_sparse_value(row) for row in mine]
            axes.plot(x, y, "o", color=OURS if is_default(name) else OTHERS, markersize=5)
            named.append((x[0], y[0], name, is_default(name)))
        axes.set(xlabel="pruning and training (s)", title=f"{rows[0]['model']}, {label(target)}")
        _finish(axes)
        axes.margins(x=0.25)
        _label(axes, named)
    return figure


def _sparsity(row: dict[str, Any]) -> float | None:
    """What a row's target says, however it was written (`0.5`, `.50`); None of n:m patterns and of rows without a target."""
    target: str = row["target"]
    return None if not target or ":" in target else float(target)


def _sparse_value(row: dict[str, Any]) -> float:
    value: float = row["perplexity"] if row["masked_again"] is None else row["masked_again"]
    return value


def _name(row: dict[str, Any]) -> str:
    return f"{row['method']}{', masked again' if row['masked_again'] is not None else ''}"


def _blank(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(7.2, height), layout="constrained")


def _figure(height: float) -> "tuple[Figure, Any]":
    figure = _blank(height)
    return figure, figure.subplots()


def _finish(axes: Any) -> None:
    """What all have in common: perplexity upwards, as plain numbers on a scale of ratios, without a box."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    axes.set(ylabel=PERPLEXITY, yscale="log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, (1, 1.5, 2, 3, 4, 5, 7)) if high > 3 * low else MaxNLocator(8))
    axes.yaxis.set_minor_locator(MaxNLocator(1))
    for axis in (axes.yaxis, axes.xaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(y=0.08)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Any, placed: Sequence[tuple[float, float, str, bool]]) -> None:
    """Names beside marks `(x, y, name, bold)`, from the lowest upwards, moved up where two would meet."""
    axes.get_xlim(), axes.get_ylim()  # matplotlib takes margins into account only when it is asked for the limits
    to_axes = axes.transData + axes.transAxes.inverted()
    used: list[tuple[float, float]] = []
    for x, y, name, bold in sorted(placed, key=lambda one: one[1]):
        left, height = to_axes.transform((x, y))
        while any(abs(height - other) < GAP and abs(left - near) < NEAR for near, other in used):
            height += GAP / 4
        used.append((left, height))
        axes.annotate(
            name, (x, y), (left + 0.015, height), textcoords="axes fraction", fontsize=7, va="center",
            fontweight="bold" if bold else "normal", arrowprops={"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.5},
        )  # fmt: skip
