"""Tables for the terminal, made of records and plans. Nothing here computes a result."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from losa.inspect import LayerSparsity
from losa.plan import Plan
from losa.rehearsal import Rehearsal
from losa.report.comparison import cells, provenance
from losa.report.content import TITLES, duration, gap_closed, size, speed, warning

ABOUT = ("items", "truncated", "split", "shots", "version", "data")  # of a task, what is no metric


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
    title = f"perplexity, {evaluation['windows']} windows of {evaluation['window']} tokens"
    if record["config"]["eval"]["windows"] == evaluation["windows"]:  # there may be more of them
        title += "; losa eval takes all"
    quality = Table(title=title, title_justify="left")
    for column in ("model", "perplexity", "sparsity"):
        quality.add_column(column, justify="left" if column == "model" else "right")
    for name, value in found.items():
        quality.add_row(TITLES[name], f"{value:.2f}", "0 %" if name == "dense" else f"{sparsity['achieved']:.2%}")
    parts = [f"sparsity asked {sparsity['asked']:.4f}, achieved {sparsity['achieved']:.4f}"]
    if (closed := gap_closed(found)) is not None:
        parts.append(f"gap in log-perplexity closed: {closed:.1%}")
    if (far := warning(record)) is not None:
        parts.append(f"[bold yellow]{far}[/]")
    time = Table(title="time", title_justify="left")
    time.add_column("stage")
    time.add_column("seconds", justify="right")
    time.add_column("share", justify="right")
    total = sum(seconds.values())
    for stage, value in seconds.items():
        time.add_row(stage, f"{value:.1f}", f"{value / total:.0%}")
    time.add_row("total", f"{total:.1f}", "", style="bold")
    return Group(quality, "\n".join(parts), time)


def rehearsal(found: Rehearsal) -> Group:
    """Output of `losa run --dry-run`."""
    nothing = "nothing was loaded or written; losa plan says how long it would take"
    return Group(escape(found.config.to_yaml()), pairs("texts", found.texts), nothing)


def evaluation_tables(result: dict[str, Any]) -> Group:
    """Output of `losa eval`."""
    parts: list[Any] = []
    if result["perplexity"]:
        parts.append(perplexity_table(result["perplexity"]))
    if result["tasks"]:
        parts += [task_table(result), *_remarks(result["tasks"])]
    return Group(*parts)


def perplexity_table(rows: list[dict[str, Any]]) -> Table:
    """Perplexities, each with its definition and window."""
    table = Table(title="perplexity", title_justify="left")
    for column in ("per", "window (tokens)", "over", "perplexity", "text"):
        table.add_column(column, justify="left" if column in ("per", "text") else "right", overflow="fold")
    for row in rows:
        over = f"{row['windows']:,} windows" if "windows" in row else f"{row['documents']:,} documents"
        table.add_row(row["definition"], str(row["window"]), over, f"{row['perplexity']:.4f}", escape(row["data"]))
    return table


def comparison_table(rows: list[dict[str, Any]]) -> Group:
    """Output of `losa compare`."""
    head, *body = cells(rows)
    table = Table(title="perplexity", title_justify="left")
    for column in head:
        table.add_column(column, justify="left" if column == "method" else "right")
    for line in body:
        table.add_row(*line)
    return Group(table, escape(provenance(rows)))


def task_table(result: dict[str, Any]) -> Table:
    """Tasks with their metrics and standard errors, and the mean of the paper's seven when all were measured."""
    tasks, mean = result["tasks"], result["mean_acc"]
    keys = dict.fromkeys(key for task in tasks.values() for key in task)  # in order, each once
    metrics = [key for key in keys if key not in ABOUT and not key.endswith("_stderr")]
    source = ", local data" if any(task["data"] == "local" for task in tasks.values()) else ""
    table = Table(title=f"tasks, lm-eval {result['lm_eval']}{source}", title_justify="left")
    for column in ("task", *metrics, "items", "split", "shots"):
        table.add_column(column, justify="left" if column in ("task", "split") else "right", no_wrap=column != "split")
    for name, task in tasks.items():
        about = (f"{task['items']:,}", task["split"], str(task["shots"]))
        table.add_row(name, *(_with_error(task, metric) for metric in metrics), *about)
    if mean:
        table.add_section()
        table.add_row("paper's seven", *(_with_error(mean, metric) for metric in metrics), style="bold")
    return table


def _with_error(values: Mapping[str, Any], metric: str) -> str:
    if metric not in values:
        return ""
    error = values.get(f"{metric}_stderr")
    value = values[metric]  # a ratio, or a perplexity of any size
    return (f"{value:.4f}" if value <= 1 else f"{value:.6g}") + (f" ± {error:.4f}" if error is not None else "")


def _remarks(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of the numbers should know."""
    cut = [f"{name} {task['truncated']:,}" for name, task in tasks.items() if task["truncated"]]
    return [f"longer than the model's window, so scored without their beginning (requests): {', '.join(cut)}"] if cut else []


def sparsity_table(layers: list[LayerSparsity], each: bool) -> Table:
    """Output of `losa inspect`: a row a block, or a row a layer."""
    table = Table(title="sparsity", title_justify="left")
    for column in ("layer" if each else "block", "weights", "zeros", "sparsity", "pattern"):
        table.add_column(column, justify="left" if column in ("layer", "block", "pattern") else "right")
    groups: dict[Any, list[LayerSparsity]] = {}
    for layer in layers:
        groups.setdefault(layer.name if each else layer.block, []).append(layer)
    for name, members in groups.items():
        table.add_row(str(name), *_cells(members))
    table.add_section()
    table.add_row("all", *_cells(layers), style="bold")
    return table


def _cells(layers: Iterable[LayerSparsity]) -> list[str]:
    layers = list(layers)
    zeros, numel = sum(layer.zeros for layer in layers), sum(layer.numel for layer in layers)
    patterns = set.intersection(*(set(layer.patterns) for layer in layers))
    return [f"{numel:,}", f"{zeros:,}", f"{zeros / numel:.4%}", " ".join(sorted(patterns))]


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
    rows = ("runtime", "weights", "masks", "dense_copy", "trained", "training", "calibration", "evaluation")
    for name in rows:
        table.add_row(name.replace("_", " "), size(getattr(plan, name)))
    table.add_section()
    table.add_row("peak memory", f"{size(plan.peak_memory)} of {size(plan.available_memory)} available", style="bold")
    table.add_row("host memory", f"{size(plan.host_memory)} of {size(plan.available_host)} available", style="bold")
    table.add_row("disk", f"{size(plan.disk)} of {size(plan.available_disk)} available", style="bold")
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
    return Group(
        table,
        how,
        "it fits"
        if plan.fits
        else "[bold red]it does not fit[/]; take --train adapters, or lower train.batch_size or train.length",
    )


def bench_table(result: dict[str, Any]) -> Group:
    """Output of `losa bench`."""
    found = speed(result)
    table = Table(pad_edge=False)  # so, and with heads on two lines, 80 columns are enough
    for column, name in enumerate(found.head):
        table.add_column(name.replace(" ", "\n"), justify="left" if column < found.words else "right", no_wrap=True)
    for row in found.rows:
        table.add_row(*row)
    return Group(table, found.note)
