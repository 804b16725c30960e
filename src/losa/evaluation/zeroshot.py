"""Zero-shot tasks: which ones, where their data is, and what is kept of their results. lm-eval measures (`harness.py`).

The hub serves lm-eval its data. Without a network, a local folder does: `local_rows` gives its rows the fields of the hub's, and
every template, choice and answer stays lm-eval's own.
"""

import re
from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from losa.data import json_lines
from losa.system.doors import door, read_text, regular

PAPER = ("hellaswag", "winogrande", "boolq", "openbookqa", "piqa", "arc_easy", "arc_challenge")  # of the LoSA paper's tables
MORE = ("rte", "lambada_openai")  # of its neighbours'

Row = dict[str, Any]


def task_names(tasks: str) -> list[str]:
    """Names out of a comma-separated list, each once; `paper` is the paper's seven with rte and lambada_openai.

    Raises:
        ValueError: no name in it.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--tasks is {tasks!r}, expected `paper` or names of lm-eval's tasks, separated by commas")
    return list(dict.fromkeys(each for name in names for each in ((*PAPER, *MORE) if name == "paper" else (name,))))


def _boolq(row: Row) -> Row:
    return {**row, "label": int(row["answer"])}


def _hellaswag(row: Row) -> Row:
    """Takes a joined query apart: a query that stops amid a sentence (ActivityNet) begins that sentence in `ctx_b`."""
    activity, _, context = row["query"].partition(": ")
    start = re.search(r"(?<=[.!?] )[^.!?]+$", context)
    ctx_a, ctx_b = (context[: start.start() - 1], start[0]) if start else (context, "")
    return {"activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": row["choices"], "label": str(row["gold"])}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['context']} {row['continuation']}"}


# What differs from `<task>/validation`, saved by datasets, with the hub's fields: the file, and how its rows become the hub's.
FILES = {"hellaswag": "hellaswag/hellaswag_val.jsonl", "lambada_openai": "lambada/llm-foundry_lambada_openai.jsonl"}
FIELDS: dict[str, Callable[[Row], Row]] = {"boolq": _boolq, "hellaswag": _hellaswag, "lambada_openai": _lambada}
SPLITS = {"lambada_openai": "test"}  # of the local rows; of all others it is the validation split


def local_rows(task: str, folder: Path) -> list[Row]:
    """The rows of a task in `folder`, with the fields that the hub's have.

    Raises:
        ValueError: the folder does not hold the task.
    """
    path = folder / FILES.get(task, f"{task}/validation")
    if not path.exists():
        raise ValueError(f"no data for the task {task!r}: expected {path}; leave --task-data out to read it from the hub")
    with door(path, hint="; expected the data of " + task):
        rows = _arrow_rows(path) if path.is_dir() else json_lines(read_text(path))
        return [FIELDS.get(task, dict)(row) for row in rows]


def _arrow_rows(folder: Path) -> list[Row]:
    """The rows that `Dataset.save_to_disk` wrote, which datasets would map: a file that was cut short then ends the process."""
    import pyarrow as pa  # comes with datasets; slow to import

    rows: list[Row] = []
    for file in sorted(folder.glob("*.arrow")):
        with pa.ipc.open_stream(pa.BufferReader(regular(file).read_bytes())) as stream:
            table = stream.read_all()
        table.validate(full=True)  # Arrow trusts the offsets that a file holds
        rows += table.to_pylist()
    if not rows:
        raise ValueError("it holds no rows in .arrow files")
    return rows


def mean_accuracy(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Mean `acc` of the paper's seven tasks and its standard error; None unless all seven are there, under one `limit`."""
    if not set(PAPER) <= set(tasks) or len({tasks[name].get("limit") for name in PAPER}) > 1:
        return None
    errors = [tasks[name]["acc_stderr"] for name in PAPER]  # None of a task with one item
    return {
        "tasks": list(PAPER),
        "acc": sum(tasks[name]["acc"] for name in PAPER) / len(PAPER),
        "acc_stderr": None if None in errors else sqrt(sum(error**2 for error in errors)) / len(PAPER),
    }
