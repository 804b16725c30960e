"""Promised: docs/cli.md has every command, every option and every key of a configuration, as they are in the source.

`python tests/test_cli_page.py` writes the page.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from typer.models import ArgumentInfo, OptionInfo

from losa.cli import app
from losa.config import LosaConfig

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# All options

Written by `python tests/test_cli_page.py` from the commands and the configuration themselves; a test says when it is out of
date. [Usage](usage.md) says what they are for.
"""
KEYS = """## Keys of a configuration

`-c run.yaml` reads them from a file, `--set key=value` sets one; an option that a verb has wins over the file, and `--set` over
both. Every run prints the resolved configuration.

| key | default | |
|---|---|---|
"""

TAKES = {float: "FLOAT", int: "INTEGER", str: "TEXT", Path: "PATH", list[str]: "TEXT", list[int]: "INTEGER"}


def verbs() -> dict[str, Callable[..., None]]:
    """The functions behind the commands, by the commands' names."""
    made = [(known.name, known.callback) for known in app.registered_commands]
    return {name or verb.__name__: verb for name, verb in made if verb is not None}


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def command(name: str, verb: Callable[..., None]) -> str:
    """A command's section: its usage, what it does, a table of what it takes."""
    parameters = inspect.signature(verb).parameters.values()
    arguments = [argument(parameter) for parameter in parameters if isinstance(info(parameter), ArgumentInfo)]
    usage = " ".join(["losa", name, *arguments, "[OPTIONS]"])
    table = "\n".join(["| | |", "|---|---|", *map(row, parameters)])
    return f"## losa {name}\n\n```text\n{usage}\n```\n\n{inspect.cleandoc(verb.__doc__ or '')}\n\n{table}\n"


def info(parameter: inspect.Parameter) -> ArgumentInfo | OptionInfo:
    """What typer was told of a parameter, in its annotation."""
    found: ArgumentInfo | OptionInfo = get_args(parameter.annotation)[1]
    return found


def argument(parameter: inspect.Parameter) -> str:
    name = parameter.name.upper()
    return name if parameter.default is parameter.empty else f"[{name}]"


def row(parameter: inspect.Parameter) -> str:
    """One line of the table: how it is written, what it means, its default where it has one to name."""
    told, kind = info(parameter), get_args(parameter.annotation)[0]
    if isinstance(told, ArgumentInfo):
        return f"| `{argument(parameter)}` | {cell(told.help or '')} |"
    first = [told.default] if isinstance(told.default, str) else []  # of `Option("--output", "-o")` in an annotation
    names = [*first, *(told.param_decls or [])] or ["--" + parameter.name.replace("_", "-")]
    spelled = ", ".join(f"`{name}`" for name in names)
    takes = next((shown for of, shown in TAKES.items() if of in (kind, *get_args(kind))), None)
    value = "" if takes is None else f" `{takes}`"
    known = parameter.default not in (None, False, "", parameter.empty)
    return f"| {spelled}{value} | {cell(told.help or '')}{f' Default: `{parameter.default}`.' if known else ''} |"


def keys(config: type, prefix: str = "") -> list[str]:
    """Rows of a configuration dataclass: the comment behind a field, or else in the lines above it, is its meaning."""
    found = re.findall(r"((?:^    # .*\n)*)^    (\w+): [^#\n]*?(?:# (.*))?$", inspect.getsource(config), re.MULTILINE)
    comments = {name: behind or above.replace("    # ", " ") for above, name, behind in found}
    rows = []
    for field in dataclasses.fields(config):
        made = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        if dataclasses.is_dataclass(made):
            rows += keys(type(made), f"{prefix}{field.name}.")
        else:
            default = "" if made in ("", None) else f"`{made}`"
            rows.append(f"| `{prefix}{field.name}` | {default} | {cell(comments[field.name])} |")
    return rows


def written() -> str:
    sections = [command(name, verb) for name, verb in verbs().items()]
    return "\n".join([HEAD, *sections, KEYS + "\n".join(keys(LosaConfig))]) + "\n"


def test_the_page_of_options_is_up_to_date():
    assert PAGE.read_text("utf-8") == written(), "docs/cli.md is out of date: python tests/test_cli_page.py"


def test_every_command_and_every_key_is_on_the_page():
    page = written()
    assert {"run", "compare", "eval", "serve", "doctor"} <= set(verbs())
    assert all(f"## losa {name}\n" in page for name in verbs())
    assert all(f"| `{key}` |" in page for key in ("sparsity", "train.lr", "calibration.sequences", "eval.windows"))
    assert "`--sparsity` `FLOAT` | Ratio of zeros" in page


if __name__ == "__main__":
    sys.exit(PAGE.write_text(written(), encoding="utf-8") and None)
