"""`report.html`: a run on one page that opens anywhere, offline, in light and dark; and what is written beside a checkpoint.

The page holds its styles and figures itself and refers to nothing that a browser would fetch.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from losa.report import content
from losa.report.card import model_card
from losa.report.figures import plots
from losa.runtime.card import note_of, with_note
from losa.system.doors import door, read_json, read_text
from losa.system.output import BENCH, CARD, EVALUATION, RECORD, read_record
from losa.system.writing import replace

PAGE = "report.html"


def documents(
    record: dict[str, Any], name: str, evaluation: dict[str, Any] | None = None, bench: dict[str, Any] | None = None
) -> dict[str, str]:
    """What people read about a checkpoint: model card and report, by file name.

    Args:
        record: content of `losa.json`.
        name: of the checkpoint's directory, shown as the title.
        evaluation: content of `eval.json`, where there is one.
        bench: content of `bench.json`, where there is one.
    """
    return {CARD: model_card(record, name, evaluation, bench), PAGE: page(record, name, evaluation, bench)}


def refresh(directory: Path) -> Path:
    """Writes the documents of a finished run anew, with what was measured since; returns where the report is.

    Raises:
        ValueError: no record of a run there, or it or what was measured is damaged.
    """
    record, card = read_record(directory), directory / CARD
    evaluation, bench = _measured(directory, EVALUATION), _measured(directory, BENCH)
    found = [RECORD, *([EVALUATION] if evaluation else []), *([BENCH] if bench else [])]
    with door(f"{' and '.join(found)} of {directory}", "report on", "; what is damaged has to be measured again"):
        written = documents(record, directory.resolve().name, evaluation, bench)
    if card.is_file():
        written[CARD] = with_note(written[CARD], note_of(read_text(card)))
    for file, text in written.items():
        replace(directory / file, text)
    return directory / PAGE


def page(record: dict[str, Any], name: str, evaluation: dict[str, Any] | None = None, bench: dict[str, Any] | None = None) -> str:
    """The report as HTML; arguments as of `documents`. Sections without data are left out."""
    template = resources.files("losa.report").joinpath("page.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    config = content.public_config(record["config"])
    return environment.from_string(template).render(
        name=name,
        config=config,
        sparsity=record["sparsity"],
        trained=record["kind"] == "run",
        warning=content.warning(record),
        numbers=content.headline(record, evaluation, bench),
        overview=content.overview(record, bench),
        samples=content.samples(record),
        openers=content.openers(record),
        perplexities=content.perplexities(record, evaluation),
        zero_shot=content.zero_shot(evaluation) if evaluation and evaluation.get("tasks") else None,
        sizes=content.sizes(record),
        speed=content.speed(bench) if bench else None,
        plots=plots(record),
        times=content.times(record),
        origin=content.origin(record),
        command=content.command(record),
        yaml=yaml.safe_dump(config, sort_keys=False),
    )


def _measured(directory: Path, name: str) -> dict[str, Any] | None:
    """What a later command saved beside the record.

    Raises:
        ValueError: a file that is not JSON.
    """
    path = directory / name
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; delete it, or measure again") from error
