"""Tables for the terminal, made of records and plans. Nothing here computes a result."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from losa.commands.inspect import LayerSparsity
from losa.planning.plan import Plan
from losa.planning.rehearsal import Rehearsal
from losa.report.comparison import cells, provenance
from losa.report.content import TITLES, gap_closed, size, speed, warning
from losa.system.doors import printable
from losa.system.progress import duration

NARROW = 80  # columns that every table fits
ABOUT = ("items", "truncated", "split", "shots", "version", "data", "limit")  # of a task, what is no metric


def middle(text: str, width: int = 24) -> str:
    """A long text, such as a path, with its middle left out."""
    tail = width * 2 // 3
    return text if len(text) <= width else f"{text[: width - tail - 1]}…{text[-tail:]}"


def grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str], last: int = 0) -> Table:
    """A table without the columns that are empty.

    Args:
        words: heads of the columns that are no numbers.
        last: so many rows at the end are set apart.
    """
    table = Table(title=title, title_justify="left")
    shown = [column for column in range(len(head)) if any(row[column] for row in rows)]
    for column in shown:
        table.add_column(head[column], justify="left" if head[column] in words else "right", overflow="fold")
    for number, row in enumerate(rows):
        if number == len(rows) - last:
            table.add_section()
        table.add_row(*(escape(printable(row[column])) for column in shown), style="bold" if number >= len(rows) - last else None)
    return table


def pairs(title: str, values: Mapping[str, str]) -> Table:
    """Two columns, names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(name, value)
    return table


def summary(record: dict[str, Any]) -> Group:
    """The end of a run: perplexities, sparsity asked and achieved, time per stage."""
    evaluation, sparsity, seconds = record["evaluation"], record["sparsity"], record["seconds"]
    found = record["perplexity"]
    of = " of answers" if evaluation.get("counts") == "answers" else ""
    title = f"perplexity{of}, {evaluation['windows']} windows of {evaluation['window']} tokens"
    if record["config"]["eval"]["windows"] == evaluation["windows"]:  # there may be more of them
        title += "; losa eval takes all"
    achieved = f"{sparsity['achieved']:.2%}"
    rows = [(TITLES.get(name, name), f"{value:.2f}", "0 %" if name == "dense" else achieved) for name, value in found.items()]
    quality = grid(title, ("model", "perplexity", "sparsity"), rows, ("model",))
    parts = [f"sparsity asked {sparsity['asked']:.4f}, achieved {sparsity['achieved']:.4f}"]
    if (closed := gap_closed(found)) is not None:
        parts.append(f"gap in log-perplexity closed: {closed:.1%}")
    if (far := warning(record)) is not None:
        parts.append(f"[bold yellow]{far}[/]")
    total = sum(seconds.values())
    spent = [(stage, f"{value:.1f}", f"{value / total:.0%}") for stage, value in seconds.items()]
    time = grid("time", ("stage", "seconds", "share"), [*spent, ("total", f"{total:.1f}", "")], ("stage",), last=1)
    return Group(quality, "\n".join(parts), time)


def rehearsal(found: Rehearsal) -> Group:
    """Output of `losa run --dry-run`."""
    nothing = "nothing was loaded or written; losa plan says how long it would take"
    return Group(escape(found.config.to_yaml()), pairs("texts", found.texts), nothing)


def evaluation_tables(result: dict[str, Any], width: int = NARROW) -> Group:
    """Output of `losa eval`, for a terminal of so many columns."""
    parts: list[Any] = []
    if result["perplexity"]:
        parts.append(perplexity_table(result["perplexity"], width))
    if result["tasks"]:
        parts += [task_table(result), *_remarks(result["tasks"])]
    return Group(*parts)


def perplexity_table(rows: list[dict[str, Any]], width: int = NARROW) -> Table:
    """Perplexities, each with its definition and window; of the text's name as much as there is room for."""
    room = 17 + max(0, width - NARROW)
    head = ("per", "window", "over", "perplexity", "text")
    cells = []
    for row in rows:
        over = f"{row['windows']:,} windows" if "windows" in row else f"{row['documents']:,} documents"
        cells.append((row["definition"], str(row["window"]), over, f"{row['perplexity']:.2f}", middle(row["data"], room)))
    return grid("perplexity; windows in tokens", head, cells, ("per", "text"))


def comparison_table(rows: list[dict[str, Any]]) -> Group:
    """Output of `losa compare`."""
    head, *body = cells(rows)
    table = grid("perplexity", head, body, ("method",))
    return Group(table, escape(provenance(rows)))


def task_table(result: dict[str, Any]) -> Table:
    """Tasks with their metrics and standard errors, and the mean of the paper's seven when all were measured."""
    tasks, mean = result["tasks"], result["mean_acc"]
    keys = dict.fromkeys(key for task in tasks.values() for key in task)  # in order, each once
    metrics = [key for key in keys if key not in ABOUT and not key.endswith("_stderr")]
    source = ", local data" if any(task["data"] == "local" for task in tasks.values()) else ""
    shots = {task["shots"] for task in tasks.values()}
    each = f", {shots.pop()} shots" if len(shots) == 1 else ""
    rows = [
        (name, *(_with_error(task, metric) for metric in metrics), f"{task['items']:,}", task["split"][:5], str(task["shots"]))
        for name, task in tasks.items()
    ]
    last = [("paper's seven", *(_with_error(mean, metric) for metric in metrics), "", "", "")] if mean else []
    head = ["task", *metrics, "items", "split", "shots"]
    body = [*rows, *last]
    if each:
        head, body = head[:-1], [row[:-1] for row in body]
    title = f"tasks, lm-eval {result['lm_eval']}{source}{each}; accuracies in percent, ± one standard error"
    return grid(title, head, body, ("task", "split"), len(last))


def _with_error(values: Mapping[str, Any], metric: str) -> str:
    """An accuracy in percent, or any other metric as it is, with its standard error, two decimals each."""
    if metric not in values:
        return ""
    scale = 100 if "acc" in metric or "exact_match" in metric else 1  # as lm-eval names them
    error = values.get(f"{metric}_stderr")
    return f"{scale * values[metric]:.2f}" + (f" ±{scale * error:.2f}" if error is not None else "")


def _remarks(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of the numbers should know."""
    cut = [f"{name} {task['truncated']:,}" for name, task in tasks.items() if task["truncated"]]
    return [f"longer than the model's window, so scored without their beginning (requests): {', '.join(cut)}"] if cut else []


def sparsity_table(layers: list[LayerSparsity], each: bool) -> Table:
    """Output of `losa inspect`: a row a block, or a row a layer."""
    groups: dict[Any, list[LayerSparsity]] = {}
    for layer in layers:
        groups.setdefault(layer.name if each else layer.block, []).append(layer)
    rows = [(middle(str(name).removesuffix(".weight"), 40), *_cells(members)) for name, members in groups.items()]
    head = ("layer" if each else "block", "weights", "zeros", "sparsity", "pattern")
    return grid("sparsity", head, [*rows, ("all", *_cells(layers))], ("layer", "block", "pattern"), last=1)


def _cells(layers: Iterable[LayerSparsity]) -> list[str]:
    layers = list(layers)
    zeros, numel = sum(layer.zeros for layer in layers), sum(layer.numel for layer in layers)
    patterns = set.intersection(*(set(layer.patterns) for layer in layers))
    return [f"{numel:,}", f"{zeros:,}", f"{zeros / numel:.2%}", " ".join(sorted(patterns))]


def sparsity_json(layers: list[LayerSparsity]) -> dict[str, Any]:
    """`losa inspect --json`."""
    zeros, numel = sum(layer.zeros for layer in layers), sum(layer.numel for layer in layers)
    rows = [{"name": la.name, "block": la.block, "sparsity": la.sparsity, "patterns": la.patterns} for la in layers]
    return {"sparsity": zeros / numel, "weights": numel, "zeros": zeros, "layers": rows}


def plan_table(plan: Plan) -> Group:
    """Output of `losa plan`."""
    each = f", each of {plan.processes} processes" if plan.processes > 1 else ""
    table = Table(title=f"plan on {plan.device}{each}", title_justify="left", show_header=False)
    table.add_row("parameters", f"{plan.parameters:,}, of which {plan.prunable:,} prunable")
    table.add_row("computes in", plan.computes_in)
    rows = ("runtime", "weights", "masks", "dense_copy", "trained", "training", "calibration", "evaluation")
    for name in rows:
        table.add_row(name.replace("_", " "), size(getattr(plan, name)))
    table.add_section()
    for name, (need, there) in plan.limits.items():
        table.add_row(name, size(need) + (f" of {size(there)} available" if there is not None else ""), style="bold")
    table.add_section()
    for name, seconds in plan.stages.items():
        over = f", {plan.windows:,} windows each time" if name == "evaluation" else ""
        table.add_row(name, duration(seconds) + over)
    table.add_row("time", f"{'about' if plan.probed else 'at least'} {duration(plan.seconds)}", style="bold")
    how = (
        "Times are an estimate, from a probe of a few seconds of one decoder block on this machine."
        if plan.probed
        else "Times are a lower bound: large products over the speed of one of them, without solvers."
    )
    verdict = "it fits"
    if not plan.fits:
        memory = f"; less memory: {plan.advice}" if plan.lacking != ["disk"] else ""
        verdict = f"[bold red]it does not fit[/]: not enough {' and '.join(plan.lacking)}{memory}"
    return Group(table, how, verdict)


def bench_table(result: dict[str, Any]) -> Group:
    """Output of `losa bench`."""
    found = speed(result)
    table = Table(pad_edge=False)  # so, and with heads on two lines, 80 columns are enough
    for column, name in enumerate(found.head):
        table.add_column(name.replace(" ", "\n"), justify="left" if column < found.words else "right", no_wrap=True)
    for row in found.rows:
        table.add_row(*row)
    return Group(table, found.note)
