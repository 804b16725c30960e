"""Figures of a record, as SVG text for one page.

A figure is drawn once and follows the reader's theme: text, lines and background are drawn in placeholder colours that become
the page's CSS variables. Its text stays text, in the page's own font. Nothing is drawn at import, no state
of matplotlib is changed, and the same record gives the same bytes.

Legend: `T` dynamic steps, `L` blocks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

QUIET, LINE, PAGE = "#010203", "#010204", "#010205"
THEME = {QUIET: "var(--quiet)", LINE: "var(--line)", PAGE: "var(--page)"}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": QUIET,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
}
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 8.4, 0.75, 0.95, 0.12, 0.42  # inches; the same on every figure, so that blocks line up
COLOURS = "viridis"  # of cells
STEP_COLOURS = ("#3b6fd4", "#9a5fc4", "#d9587f", "#e0803a")  # of lines, first to last step, readable on white and on black
# What the numbers are by the rule of layer rates (`rules.py`); a rule by layer leaves none.
IMPORTANCE = {
    "rmi": "by mutual information with the other blocks: the lower, the more a block resembles the rest, and the more it may "
    "lose. Only the order counts.",
    "depth": "by place in the decoder: the later a block, the more it may lose. Only the order counts.",
    "uniform": "is the same for every block: all lose alike.",
    "owl": "by outliers (OWL), the share of a block's scores that are far above their mean: the fewer, the more it may lose.",
    "dlp": "by median (DLP), minus that of a block's scores: the lower, the fewer weights stand out, and the more it may lose.",
}

Steps = Sequence[dict[str, Any]]  # of a record
Drawing: TypeAlias = "tuple[Figure, str, str]"  # the figure, what it shows, what to read out of it


@dataclass(frozen=True)
class Plot:
    """A figure with what it shows, in words for those who do not see it, and what to read out of it."""

    name: str
    svg: str
    label: str
    caption: str


def plots(record: dict[str, Any]) -> list[Plot]:
    """Everything that the record has figures for, in the order of the method; nothing of steps that did not prune, as of the
    dense models that `losa compare` rounds."""
    from matplotlib import style

    steps = [step for step in record["steps"] if "rates" in step]
    if not steps:
        return []
    trained = all(step.get("loss") for step in steps)
    parts = (
        ("targets", _targets, len(steps) > 1 and all("achieved" in step for step in steps)),
        ("rates", _rates, True),
        ("importance", partial(_importance, rule=record["config"]["rates"]), all(step["importance"] for step in steps)),
        ("errors", _errors, True),
        ("ranks", _ranks, trained and all(step["ranks"] for step in steps)),  # none where all weights are trained
        ("loss", _loss, trained),
    )
    drawn = []
    with style.context(["default", STYLE]):
        for name, draw, has_data in parts:
            if has_data:
                figure, label, caption = draw(steps)
                drawn.append(Plot(name, _svg(figure, name), label, caption))
    return drawn


def _targets(steps: Steps) -> Drawing:
    figure, axes = _figure(1.5)
    numbers = [step["step"] for step in steps]
    achieved = [100 * step["achieved"] for step in steps]
    axes.plot(numbers, [100 * step["target"] for step in steps], color=QUIET, linewidth=1, label="target")
    axes.plot(numbers, achieved, "o", color=STEP_COLOURS[0], markersize=4.5, label="achieved, counted in the masks")
    axes.set(xlabel="dynamic step", ylabel="zeros (%)", ylim=(0, 105))
    _whole_ticks(axes.xaxis, 1, len(steps))
    axes.legend(loc="lower right", frameon=False, labelcolor=QUIET)
    return (
        figure,
        f"Target and achieved sparsity of {len(steps)} dynamic steps.",
        "The cubic schedule removes most weights early, while the model still has many to adapt with; dots on the line mean that "
        "every step met its target.",
    )


def _rates(steps: Steps) -> Drawing:
    rates = [[100 * rate for rate in step["rates"]] for step in steps]
    return (
        _heat_map(rates, "zeros (%)", "{:.1f}"),
        f"Heat map of the zeros of {len(rates[0])} blocks after {len(rates)} dynamic steps.",
        "Layer rates: the share of zeros in each block after each dynamic step. The brighter a column, the more its block lost.",
    )


def _importance(steps: Steps, rule: str) -> Drawing:
    return (
        _by_block([step["importance"] for step in steps], "importance"),
        "Line chart of the importance of every block, a line for every dynamic step.",
        f"Importance {IMPORTANCE[rule]}",
    )


def _errors(steps: Steps) -> Drawing:
    return (
        _by_block([step["errors"] for step in steps], "relative error", floor=0),
        "Line chart of the reconstruction error of every block, a line for every dynamic step.",
        "Reconstruction error: the squared difference of a block's output to the dense model's, relative to its square, after "
        "each step's pruning and before its training. Where a line is high, pruning hurts.",
    )


def _ranks(steps: Steps) -> Drawing:
    ranks = [step["ranks"] for step in steps]
    return (
        _heat_map(ranks, "adapter rank", "{:.0f}"),
        f"Heat map of the adapter ranks of {len(ranks[0])} blocks in {len(ranks)} dynamic steps.",
        "Adapter ranks: the brighter, the more a block has to learn with. Unless they are uniform, they follow the errors.",
    )


def _loss(steps: Steps) -> Drawing:
    figure, axes = _figure(2.2)
    colours, start = _step_colours(len(steps)), 0
    for number, step in enumerate(steps):
        if start:
            axes.axvline(start, color=LINE, linewidth=0.8, zorder=1)
        updates, losses = zip(*step["loss"], strict=True)
        marker = "o" if len(updates) < 10 else None  # a single point makes no line
        axes.plot([start + update for update in updates], losses, color=colours(number), marker=marker)
        start += updates[-1]
    axes.set(xlabel="update", ylabel="training loss (nats per token)", xlim=(0, start))
    _step_bar(figure, len(steps))
    return (
        figure,
        f"Line chart of the training loss in {len(steps)} dynamic steps.",
        "Training loss, every tenth update; a vertical line marks the next pruning. The loss jumps where weights go and falls as "
        "the adapters make up for them.",
    )


def _heat_map(values: Sequence[Sequence[float]], label: str, cell: str) -> "Figure":
    """`(T, L)` values as coloured cells, with their numbers, formatted by `cell`, where they fit."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    values_TL = np.asarray(values, float)
    steps, blocks = values_TL.shape
    height = min(max(0.7, 0.27 * steps), 4.0)
    figure, axes = _figure(height)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    low, high = values_TL.min(), values_TL.max()
    norm = Normalize(low, high) if low < high else Normalize(low - 1, high + 1)
    corners = np.arange(blocks + 1) - 0.5, np.arange(steps + 1) + 0.5
    gap = 1.0 if blocks <= 40 and steps <= 15 else 0.3
    axes.pcolormesh(*corners, values_TL, cmap=COLOURS, norm=norm, edgecolors=PAGE, linewidth=gap)
    axes.set(xlabel="block", ylabel="dynamic step", ylim=(steps + 0.5, 0.5))
    _whole_ticks(axes.xaxis, 0, blocks)
    _whole_ticks(axes.yaxis, 1, steps, most=15)
    numbers = {place: cell.format(value) for place, value in np.ndenumerate(values_TL)}
    points = min(8.0, 108 * (WIDTH - LEFT - RIGHT) / blocks / max(map(len, numbers.values())), 50 * height / steps)
    if points >= 6:
        for (step, block), number in numbers.items():
            colour = "#111111" if norm(values_TL[step, block]) > 0.5 else "#ffffff"
            axes.text(block, step + 1, number, ha="center", va="center", fontsize=points, color=colour)
    _bar(figure, colormaps[COLOURS].resampled(32), norm, label).locator = MaxNLocator(5, integer=True)
    return figure


def _by_block(values: Sequence[Sequence[float]], label: str, floor: float | None = None) -> "Figure":
    """`(T, L)` values as a line a step over the blocks."""
    figure, axes = _figure(1.9)
    marker = "o" if len(values[0]) <= 40 else None
    colours = _step_colours(len(values))
    for number, row in enumerate(values):
        axes.plot(row, color=colours(number), marker=marker)
    axes.set(xlabel="block", ylabel=label, xlim=(-0.5, len(values[0]) - 0.5))
    axes.set_ylim(bottom=floor)
    _whole_ticks(axes.xaxis, 0, len(values[0]))
    _step_bar(figure, len(values))
    return figure


def _figure(height: float) -> "tuple[Figure, Axes]":
    """A figure with axes `height` inches high, and room on the right for a colour bar."""
    from matplotlib.figure import Figure

    total = height + TOP + BOTTOM
    figure = Figure((WIDTH, total), facecolor="none")
    return figure, figure.add_axes((LEFT / WIDTH, BOTTOM / total, (WIDTH - LEFT - RIGHT) / WIDTH, height / total))


def _bar(figure: "Figure", colours: "Colormap", norm: "Normalize", label: str) -> "Colorbar":
    """The colour bar of what was drawn in `colours`, as high as the axes."""
    from matplotlib.cm import ScalarMappable

    _, bottom, _, height = figure.axes[0].get_position().bounds
    place = figure.add_axes((1 - (RIGHT - 0.15) / WIDTH, bottom, 0.13 / WIDTH, height))
    bar = figure.colorbar(ScalarMappable(norm, colours), cax=place, label=label)
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")  # type: ignore[union-attr]
    return bar


def _step_bar(figure: "Figure", steps: int) -> None:
    """Says which colour is which step, where there are several."""
    from matplotlib.colors import BoundaryNorm

    if steps > 1:
        norm = BoundaryNorm([step + 0.5 for step in range(steps + 1)], steps)
        bar = _bar(figure, _step_colours(steps), norm, "dynamic step")
        bar.minorticks_off()
        bar.set_ticks(range(1, steps + 1, -(-steps // 12)))


def _step_colours(steps: int) -> "Colormap":
    """A colour for every step."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("steps", STEP_COLOURS, max(steps, 2))


def _whole_ticks(axis: "Axis", first: int, count: int, most: int = 40) -> None:
    """A tick for each of `count` whole numbers from `first` on, or for every second, fifth, tenth, ... if they are more than
    `most`."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    every = FixedLocator(range(first, first + count))
    axis.set_major_locator(every if count <= most else MaxNLocator(most // 2, integer=True))


def _svg(figure: "Figure", name: str) -> str:
    """The figure as an element of an HTML page: no size of its own, no fonts, colours of the page, ids that start with `name`."""
    from matplotlib import rc_context

    text = BytesIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", svg)
    for placeholder, colour in THEME.items():
        svg = svg.replace(placeholder, colour)
    return svg.strip()
