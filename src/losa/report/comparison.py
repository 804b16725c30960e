"""What `losa compare` found: a CSV line a row, tables in Markdown and LaTeX, plots, and what to use (`pareto.py`)."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losa.report import pareto

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]

COLUMNS = [
    "method", "target", "seed", "perplexity", "masked_again", "sparsity", "bits", "bytes", "tokens_per_second", "of_dense",
    "tokens", "training_seconds", "seconds", "date",
]  # fmt: skip


def write_tables(path: Path, rows: Rows) -> None:
    """`path` with `.csv`, `.md`, `.tex` and, if it was measured, `-context.md` at its end."""
    with path.with_name(f"{path.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            times = {"training_seconds": row["seconds"].get("training", 0.0), "seconds": round(making(row), 1)}
            speed = row["speed"] or {"tokens_per_second": None, "of_dense": None}
            writer.writerow([(row | times | speed)[column] for column in COLUMNS])
    tables = [markdown(rows), pareto.table(rows)]
    advice = "".join(f"- {line}.\n" for line in pareto.recommendations(rows))
    path.with_name(f"{path.name}.md").write_text("\n".join([*tables, advice]).rstrip() + "\n", "utf-8")
    path.with_name(f"{path.name}.tex").write_text("\n".join(map(latex, tables)), "utf-8")
    if rows[0]["context"] is not None:
        path.with_name(f"{path.name}-context.md").write_text(context_table(rows), "utf-8")


def markdown(rows: Rows) -> str:
    """Methods against targets: mean perplexity over seeds, its standard deviation, and what it was measured on."""
    targets = list(dict.fromkeys(row["target"] for row in rows if row["target"]))
    lines = ["| method | " + " | ".join(map(label, targets)) + " | seconds |", "|---" * (len(targets) + 2) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [cell([row for row in mine if row["target"] in ("", target)]) for target in targets]
        lines.append(f"| {method} | {' | '.join(cells)} | {statistics.mean(map(making, mine)):.0f} |")
    return "\n".join(lines) + f"\n\n{provenance(rows)}\n"


def latex(table: str) -> str:
    """A Markdown table as a tabular of booktabs."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    special = {"%": r"\%", "±": r"$\pm$", "&": r"\&", "_": r"\_", "#": r"\#"}
    rows = [" & ".join("".join(special.get(sign, sign) for sign in cell.strip(" |")) for cell in line) + r" \\" for line in lines]
    columns = "l" + "r" * (len(lines[0]) - 1)
    body = "\n".join([r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"])
    return f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n"


def context_table(rows: Rows) -> str:
    """Rows against tokens of context, in Markdown; the mean over seeds."""
    bands = [f"{first}-{last}" for first, last, _ in rows[0]["context"]["by_context"]]
    head = ["method", "sparsity", *(f"{band} tokens" for band in bands), "a passage", "the same again"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, target in dict.fromkeys((row["method"], row["target"]) for row in rows):
        found = [row["context"] for row in rows if (row["method"], row["target"]) == (method, target)]
        values = [[band[2] for band in one["by_context"]] + [one["passage"], one["passage_again"]] for one in found]
        means = [f"{statistics.mean(column):.2f}" for column in zip(*values, strict=True)]
        lines.append(f"| {method} | {label(target) if target else '0 %'} | {' | '.join(means)} |")
    return "\n".join(lines) + f"\n\nPerplexity by tokens of context. {provenance(rows)}\n"


def making(row: dict[str, Any]) -> float:
    """Seconds that making a row's model took: importance, pruning and training, not reading text or evaluating."""
    return sum(value for stage, value in row["seconds"].items() if stage not in ("reading text", "evaluation"))


def label(target: str) -> str:
    """`0.7` -> `70 %`; patterns as they are."""
    return target if ":" in target else f"{float(target) * 100:g} %"


def cell(rows: Rows) -> str:
    """Perplexity of the seeds of one method at one target."""
    if not rows:
        return ""
    text = spread([row["perplexity"] for row in rows])
    again = [row["masked_again"] for row in rows if row["masked_again"] is not None]
    return f"{text} dense, {spread(again)} masked again" if again else text


def spread(values: Sequence[float]) -> str:
    """Mean, and the sample standard deviation of several."""
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def provenance(rows: Rows) -> str:
    """One line: model, texts, tokens, seeds, windows, dates."""
    trained = [row for row in rows if row["tokens"]]
    some = (trained or list(rows))[0]
    names = ("training text", "calibration text", "evaluation text")
    texts = [f"{name} {text}" for name, text in zip(names, some["data"], strict=True) if text]
    budgets = sorted(
        {f"{row['tokens']:,} tokens" if row["samples"] is None else f"{row['samples']:,} samples" for row in trained}
    )
    seeds = sorted({row["seed"] for row in rows})
    evaluation = some["evaluation"]
    parts = [
        some["model"], *texts, *([f"trained on {' or '.join(budgets)}"] if budgets else []),
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        f"perplexity over {evaluation['windows']} windows of {evaluation['window']} tokens",
        " to ".join(sorted({min(row["date"] for row in rows), max(row["date"] for row in rows)})),
    ]  # fmt: skip
    note = " Seconds are those of pruning and training." + (" ± is one standard deviation over seeds." if len(seeds) > 1 else "")
    return "; ".join(parts) + "." + note


def write_plots(path: Path, rows: Rows) -> None:
    """`path` with `-by-bytes.svg`, with `-by-speed.svg` if speed was measured, with `-by-sparsity.svg` if there are several
    sparsities, with `-by-time.svg` if something was trained.

    Of a dense merge, the model masked again is shown: a sparse model among sparse models.
    """
    _save(pareto.by_bytes(rows), path.with_name(f"{path.name}-by-bytes.svg"))
    speeds = pareto.by_speed(rows)
    if speeds is not None:
        _save(speeds, path.with_name(f"{path.name}-by-speed.svg"))
    sparsities = sorted({float(row["target"]) for row in rows if row["target"] and ":" not in row["target"]})
    if len(sparsities) > 1:
        _save(_by_sparsity(rows, sparsities), path.with_name(f"{path.name}-by-sparsity.svg"))
    targets = list(dict.fromkeys(row["target"] for row in rows if row["seconds"].get("training")))
    if targets:
        _save(_by_time(rows, targets), path.with_name(f"{path.name}-by-time.svg"))


def _sparse_value(row: dict[str, Any]) -> float:
    value: float = row["perplexity"] if row["masked_again"] is None else row["masked_again"]
    return value


def _name(row: dict[str, Any]) -> str:
    return f"{row['method']}{', masked again' if row['masked_again'] is not None else ''}"


def _by_sparsity(rows: Rows, sparsities: Sequence[float]) -> "Figure":
    figure = _figure(7.2, 4.6)
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(_name(row) for row in rows if row["target"])):
        points = []
        for sparsity in sparsities:
            values = [_sparse_value(row) for row in rows if _name(row) == name and row["target"] == f"{sparsity:g}"]
            if values:
                points.append((sparsity * 100, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
        if points:
            x, y, error = zip(*points, strict=True)
            axes.errorbar(x, y, error, label=name, capsize=2, markersize=4, linewidth=1.2, **_look(number))
    for name, value in {row["method"]: row["perplexity"] for row in rows if not row["target"]}.items():
        axes.axhline(value, color="grey", linestyle=":", label=name)
    ticks = [sparsity * 100 for sparsity in sparsities]
    axes.set(xlabel="sparsity (%)", xticks=ticks, ylabel="perplexity (lower is better)", yscale="log", title=rows[0]["model"])
    _plain_ticks(axes)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def _by_time(rows: Rows, targets: Sequence[str]) -> "Figure":
    figure = _figure(7.2, 3.2 * len(targets))
    for axes, target in zip(figure.subplots(len(targets), squeeze=False)[:, 0], targets, strict=True):
        names = dict.fromkeys(_name(row) for row in rows if row["target"] == target and row["seconds"].get("training"))
        for number, name in enumerate(names):
            mine = [row for row in rows if _name(row) == name and row["target"] == target]
            x, y = [making(row) for row in mine], [_sparse_value(row) for row in mine]
            axes.plot(x, y, label=name, linestyle="none", markersize=5, **_look(number))
        title = f"{rows[0]['model']}, {label(target)}"
        axes.set(xlabel="pruning and training (s)", ylabel="perplexity (lower is better)", xlim=(0, None), title=title)
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


MARKERS = "osD^vP*X<>hd"


def _look(number: int) -> dict[str, Any]:
    """Marker and colour of a method; no two of the first twenty are alike."""
    from matplotlib import colormaps

    return {"marker": MARKERS[number % len(MARKERS)], "color": colormaps["tab20"](2 * number % 20 + number // 10 % 2)}


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(MaxNLocator(1))


def _save(figure: "Figure", path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})


def cells(rows: Rows) -> list[list[str]]:
    """The Markdown table's cells, its head first, for a table on a terminal."""
    lines = [line for line in markdown(rows).splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]
