"""Quality against bytes and against speed, of what `losa compare` found: what is not beaten in both, and what to use."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from losa.report.content import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILIES = {"dense": "#555555", "dense, few bits": "#d9822b", "sparse": "#5b8fd6", "sparse and rounded": "#1f4e9c"}
WITHIN = (1.1, 1.25, 1.5, 2.0, 3.0)  # times the dense model's perplexity, that recommendations are made for
SHOWN = 6.0  # times the dense model's perplexity, above which a point is left out of a plot and named below it
GAP = 0.045  # of the height of a plot, between two labels


@dataclass(frozen=True)
class Point:
    """A method at a target, over its seeds."""

    name: str
    family: str
    default: bool  # what `losa run` makes
    perplexity: float
    bits: float
    bytes: float
    speed: float | None  # tokens per second
    of_dense: float | None  # times that of the dense model, in turns


def points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """One for every method and target, in their order."""
    found = []
    for method, target in dict.fromkeys((row["method"], row["target"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["target"]) == (method, target)]
        zeros = target if ":" in target else f"{float(target) * 100:g} %" if target else ""

        def mean(of: Callable[[dict[str, Any]], float], mine: list[dict[str, Any]] = mine) -> float:
            return statistics.mean(map(of, mine))

        fast = all(row["speed"] for row in mine)
        found.append(
            Point(
                f"{method} {zeros}".strip(),
                _family(mine[0]),
                method.startswith("losa"),
                mean(lambda row: row["perplexity"]),
                mean(lambda row: row["bits"]),
                mean(lambda row: row["bytes"]),
                mean(lambda row: row["speed"]["tokens_per_second"]) if fast else None,
                mean(lambda row: row["speed"]["of_dense"]) if fast else None,
            )
        )
    return found


def _family(row: dict[str, Any]) -> str:
    values = row["config"]["values"]
    if not row["target"]:
        return "dense, few bits" if values else "dense"
    return "sparse and rounded" if values else "sparse"


def front(found: Sequence[Point], cost: Callable[[Point], float]) -> list[Point]:
    """Those that no other beats in perplexity and cost both, the cheapest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (cost(point), point.perplexity)):
        if not best or point.perplexity < best[-1].perplexity:
            best.append(point)
    return best


def recommendations(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For what quality costs least in bytes and in time: a sentence for each loss of quality that anything stays within."""
    found = points(rows)
    dense = next((point for point in found if point.family == "dense"), None)
    if dense is None:
        return []
    lines: list[str] = []
    for times in WITHIN:
        good = [point for point in found if point is not dense and point.perplexity <= times * dense.perplexity]
        if not good:
            continue
        small = min(good, key=lambda point: point.bits)
        run = " (llama.cpp and others run dense models of few bits)" if small.family == "dense, few bits" else ""
        told = f"smallest is {small.name}, {small.bits:.2f} bits a weight, perplexity {small.perplexity:.2f}{run}"
        fast = max((point for point in good if point.speed), key=lambda point: point.speed or 0.0, default=None)
        if fast is not None:
            told += f"; fastest is {fast.name}, {fast.of_dense:.1f}x dense, perplexity {fast.perplexity:.2f}"
        if not lines or told != lines[-1].partition(": ")[2]:
            lines.append(f"Within {times:g} times the dense model's perplexity: {told}")
    return lines or ["Nothing here stays within three times the dense model's perplexity: keep more weights, or train longer"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Size and speed beside quality, in Markdown."""
    found = points(rows)
    fast = any(point.speed for point in found)
    head = ["method", "bits a weight", "size", "perplexity", *(["tokens/s", "of dense"] if fast else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for point in found:
        cells = [point.name, f"{point.bits:.2f}", size(round(point.bytes)), f"{point.perplexity:.2f}"]
        if fast:
            cells += [f"{point.speed:.0f}", f"{point.of_dense:.2f}x"] if point.speed else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_bytes(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Perplexity against bits a weight."""
    return _plot(points(rows), lambda point: point.bits, "bits a weight of the decoder's blocks, mask and scales included", rows)


def by_speed(rows: Sequence[dict[str, Any]]) -> "Figure | None":
    """Perplexity against tokens per second; None where fewer than two were measured."""
    found = [point for point in points(rows) if point.speed]
    if len(found) < 2:
        return None
    return _plot(found, lambda point: -(point.of_dense or 0.0), "tokens per second, times the dense model's", rows)


def _plot(found: Sequence[Point], cost: Callable[[Point], float], label: str, rows: Sequence[dict[str, Any]]) -> "Figure":
    """Points by family, the front as a line, labels beside the points. `cost` is negative where more is better."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    floor = min(point.perplexity for point in found)
    shown = [point for point in found if point.perplexity <= SHOWN * floor]
    sign = -1.0 if cost(shown[0]) < 0 else 1.0
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    best = front(shown, cost)
    axes.plot([sign * cost(p) for p in best], [p.perplexity for p in best], color="#999999", linewidth=1, zorder=1)
    for family, colour in FAMILIES.items():
        mine = [point for point in shown if point.family == family]
        if mine:
            sizes = [64 if point.default else 26 for point in mine]
            x, y = [sign * cost(point) for point in mine], [point.perplexity for point in mine]
            axes.scatter(x, y, s=sizes, color=colour, label=family, zorder=3)
    axes.set(xlabel=label, ylabel="perplexity (lower is better)", yscale="log", title=rows[0]["model"])
    if sign > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(10, (1, 1.5, 2, 3, 4, 5, 7)))
    for axis in (axes.yaxis, axes.xaxis):
        axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.16, y=0.08)
    _label(axes, [(sign * cost(point), point.perplexity, point) for point in shown])
    left_out = [f"{point.name} ({point.perplexity:,.0f})" for point in found if point not in shown]
    if left_out:
        figure.supxlabel(f"above the plot: {', '.join(left_out)}", fontsize=7)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _label(axes: Any, placed: list[tuple[float, float, Point]]) -> None:
    """Names beside their points, from the lowest upwards, moved up where two would meet."""
    to_axes = axes.transData + axes.transAxes.inverted()
    used: list[tuple[float, float]] = []
    for x, y, point in sorted(placed, key=lambda one: one[1]):
        left, height = to_axes.transform((x, y))
        while any(abs(height - other) < GAP and abs(left - near) < 0.3 for near, other in used):
            height += GAP / 4
        used.append((left, height))
        weight = "bold" if point.default else "normal"
        axes.annotate(
            point.name, (x, y), (left + 0.015, height), textcoords="axes fraction", fontsize=7, va="center", fontweight=weight,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5},
        )  # fmt: skip
