"""`losa compare`: many methods on one model, the same texts, tokens and seeds, in one table.

A row is a method at a target (a sparsity or an n:m pattern) and a seed. What it found is one JSON file, named by what decides
it, so a comparison that was stopped goes on where it was, and two comparisons in one directory share the rows they have in
common. A checkpoint is kept only with `keep_models`.
"""

import json
import logging
from pathlib import Path
from typing import Any

from losa.comparison.config import METHODS, SLUGS, Also, CompareConfig, Row
from losa.comparison.rows import check_tasks, measure
from losa.system import distributed
from losa.system.doors import door, read_json
from losa.system.output import claim
from losa.system.progress import progress
from losa.system.writing import replace, to_json
from losa.system.yaml_tree import require

__all__ = ["METHODS", "SLUGS", "Also", "CompareConfig", "Row", "compare", "measure"]

logger = logging.getLogger(__name__)


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Makes every row that is not there yet. Writes the tables after each, and the plots at the end.

    Returns:
        One dict a row: `method`, `target`, `seed`, and what `measure` found.

    Raises:
        ValueError: another command writes to the output, no model, or tasks that cannot be measured.
    """
    hint = "a directory or a name on the hub; give one as the argument MODEL"
    require(bool(config.run.get("model")), "run.model", config.run.get("model"), hint)
    with claim(config.output):
        return _compare(config)


def _compare(config: CompareConfig) -> list[dict[str, Any]]:
    from losa.report.comparison import write_tables
    from losa.report.plots import write_plots

    folder = Path(config.output, "rows")
    folder.mkdir(parents=True, exist_ok=True)
    Path(config.output, ".losa-comparison").touch()  # no text to train on, where it lies among texts (see data/sources.py)
    rows, found = [(row, folder / f"{row.key}.json") for row in config.rows()], []
    _warn_of_changes(rows)
    if not all(file.exists() for _, file in rows):
        check_tasks(rows[0][0])
    for row, file in progress(rows, "comparison"):
        result = _read_row(row, file)
        if result is None:
            kept = Path(config.output, "models", row.model_key)
            result = measure(row, kept if kept.is_dir() or (config.keep_models and row.keepable) else None)
            logger.info("%s %s, seed %d: %.2f", row.name, row.target, row.seed, result["perplexity"])
            text = to_json(result, file.name)
            if distributed.is_main():
                replace(file, text)
            result = json.loads(text)
            distributed.wait()
        entry = {"method": row.name, "target": row.target, "seed": row.seed}
        found.append(entry | result)
        if distributed.is_main():
            write_tables(Path(config.output, config.name), found)
    if distributed.is_main():
        write_plots(Path(config.output, config.name), found)
    return found


def _warn_of_changes(rows: list[tuple[Row, Path]]) -> None:
    """Says which models and texts were written to after a row that is there: it is of what they held before."""
    made: dict[str, list[Path]] = {}
    for row, file in rows:
        config = row.config
        for source in {config.model, config.train.data, config.calibration.data, config.eval.data} - {None, ""}:
            if file.exists():
                made.setdefault(str(source), []).append(file)
    for source, files in made.items():
        place = Path(source)
        held = [place, *(place.rglob("*") if place.is_dir() else [])] if place.exists() else []
        newest = max((path.stat().st_mtime for path in held if path.is_file()), default=0.0)
        old = {file.name for file in files if file.stat().st_mtime < newest}
        if old:
            logger.warning("%s was written to after %s; remove what is to be made again", source, ", ".join(sorted(old)))


def _read_row(row: Row, file: Path) -> dict[str, Any] | None:
    """What was found before, or None; of a file that cannot be used, with a warning."""
    from losa.report.comparison import markdown

    if not file.exists():
        return None
    try:
        found = read_json(file)
        with door(file, "use"):
            markdown([{"method": row.name, "target": row.target, "seed": row.seed} | found])
    except ValueError as error:
        logger.warning("%s; the row is made again", error)
        return None
    return found
