"""What `losa compare` found: a CSV line a row, tables in Markdown and LaTeX, and what to use (`pareto.py`)."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from losa.report import pareto
from losa.report.pareto import label

Rows = Sequence[dict[str, Any]]

COLUMNS = [
    "method", "target", "seed", "perplexity", "masked_again", "sparsity", "bits", "bytes", "accuracy", "tokens_per_second",
    "of_dense", "tokens", "training_seconds", "seconds", "date",
]  # fmt: skip


def write_tables(path: Path, rows: Rows) -> None:
    """`path` with `.csv`, `.md`, `.tex` and, if it was measured, `-context.md` at its end."""
    with path.with_name(f"{path.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            times = {"training_seconds": row["seconds"].get("training", 0.0), "seconds": round(making(row), 1)}
            speed = row["speed"] or {"tokens_per_second": None, "of_dense": None}
            writer.writerow([(row | times | speed | {"accuracy": pareto.accuracy(row)})[column] for column in COLUMNS])
    tables = [markdown(rows), pareto.table(rows)]
    advice = "".join(f"- {line}.\n" for line in pareto.recommendations(rows))
    path.with_name(f"{path.name}.md").write_text("\n".join([*tables, advice]).rstrip() + "\n", "utf-8")
    path.with_name(f"{path.name}.tex").write_text("\n".join(map(latex, tables)), "utf-8")
    if rows[0]["context"] is not None:
        path.with_name(f"{path.name}-context.md").write_text(context_table(rows), "utf-8")


def markdown(rows: Rows) -> str:
    """Methods against targets: mean perplexity over seeds, its standard deviation, and what it was measured on."""
    targets = list(dict.fromkeys(row["target"] for row in rows if row["target"])) or [""]
    heads = [label(target) if target else "perplexity" for target in targets]
    lines = ["| method | " + " | ".join(heads) + " | seconds |", "|---" * (len(targets) + 2) + "|"]
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
    return float(sum(value for stage, value in row["seconds"].items() if stage not in ("reading text", "evaluation")))


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


def cells(rows: Rows) -> list[list[str]]:
    """The Markdown table's cells, its head first, for a table on a terminal."""
    lines = [line for line in markdown(rows).splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]
