"""`losa round`: what `losa run --values` does last, done to a result that was made without it."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from losa.config import LosaConfig
from losa.data import read_run
from losa.method import put_on_grid
from losa.models import find_decoder, load
from losa.report.content import result_name
from losa.report.page import documents
from losa.runtime.files import is_packed
from losa.session import Session, check_request
from losa.system.doors import door
from losa.system.output import RECORD, claim, read_record
from losa.system.yaml_tree import merge, nested, require

logger = logging.getLogger(__name__)


def round_result(directory: Path, output: Path, overrides: Mapping[str, Any], overwrite: bool = False) -> dict[str, Any]:
    """Rounds the surviving weights of a finished run with the error made up for; its zeros, texts and record are kept.

    Args:
        directory: a sparse checkpoint of `losa run`, `losa prune` or `losa compare`.
        overrides: dotted keys of `LosaConfig` to change: `values`, and texts that are not where they were.
        overwrite: replace what losa wrote in the output earlier.

    Returns:
        The record, as of a run that had these values.

    Raises:
        ValueError: not such a checkpoint, one that is rounded already, or a text that is missing.
    """
    record = read_record(directory)
    if is_packed(directory):
        raise ValueError(f"{directory} is packed; losa unpack gives the sparse checkpoint, which can be rounded")
    with door(directory / RECORD, "use"):
        made, last = LosaConfig.from_dict(record["config"]), result_name(record["perplexity"])
    require(made.values is None, "values", made.values, "none: its weights are rounded already, which losa pack keeps")
    values = made.to_dict()
    merge(values, nested(dict(overrides) | {"model": str(directory), "output": str(output), "rotate": False}))
    if made.shard:  # which needs several processes, to train; one that does not train holds as little of the model by offloading
        values |= {"shard": False, "offload": True}
    config = LosaConfig.from_dict(values)
    require(config.values is not None, "values", config.values, "int8 or int4; give one with --values")
    with claim(config.output):
        check_request(config, training=False, pruning=False, overwrite=overwrite)
        data = read_run(config, training=False)
        model, tokenizer = load(config)
        linears = find_decoder(model).linears().items()
        vars(model)["losa_masks"] = {f"{name}.weight": linear.weight != 0 for name, linear in linears}
        session = Session.start(model, tokenizer, config, kind="round", data=data, overwrite=overwrite, documents=documents)
        put_on_grid(session)
        session.config = replace(session.config, model=made.model, rotate=made.rotate)
        if made.shard:
            session.config = replace(session.config, shard=True, offload=made.offload)
        if not _comparable(record["evaluation"], session.measured_on()):
            logger.warning("perplexities in %s are of another text or other windows, and are left out", directory)
            record["perplexity"] = {}
        session.record = _continued(record, session.record, last)
        session.finish(last)
    return session.record


def _comparable(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether perplexities of a record and of now are of the same windows; a text that was held out may lie elsewhere now."""
    held_out = [(found.get("held_out") or {}).get("sha256") for found in (before, now)]
    same = all(before.get(key, now[key]) == now[key] for key in ("data", "window", "windows", "counts"))
    return same and held_out[0] == held_out[1]


def _continued(before: dict[str, Any], now: dict[str, Any], last: str) -> dict[str, Any]:
    """The record of a run, with what was done to its result since; what it measured `last` is measured anew."""
    record = deepcopy(before)
    for measured in ("perplexity", "samples"):
        kept = {name: value for name, value in record.get(measured, {}).items() if name != last}
        record[measured] = kept | now.get(measured, {})
    for stage, seconds in now["seconds"].items():
        record["seconds"][stage] = round(record["seconds"].get(stage, 0.0) + seconds, 3)
    return record
