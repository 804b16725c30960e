"""One row: its model made, or opened where it was kept, and measured."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from losa.baselines import lift_masks, mask_again, one_shot
from losa.comparison.config import Also, Row
from losa.config import LosaConfig
from losa.cost import decoding_speed, stored_size
from losa.data import read_run
from losa.evaluation.checkpoint import harness, score_tasks
from losa.evaluation.context import context_use
from losa.evaluation.zeroshot import mean_accuracy, task_names
from losa.method import adapt, dynamic_steps, put_on_grid, sparsify
from losa.models import load
from losa.models.opening import open_tokenizer
from losa.models.precision import computing
from losa.report.content import public
from losa.session import Session
from losa.system.doors import door
from losa.system.environment import resolve_device
from losa.system.output import RECORD, claim, read_record, work_dir


def measure(row: Row, kept: Path | None = None) -> dict[str, Any]:
    """Makes one row's model, or opens it where it was kept, and measures it.

    Args:
        kept: the directory of its checkpoint, found or left there; None to keep none.

    Returns:
        `perplexity`; `masked_again`, that of a dense merge with its pruned weights set to zero again, else None; `sparsity`;
        `bits` of a weight of the decoder's blocks and `bytes` of the model, stored as `losa pack` does, or as dense models of few
        bits are; `speed`, what `decoding_speed` says, or None; `context`, what `context_use` says, or None; `tasks`,
        accuracy by task and `mean_accuracy`, or None; `tokens` trained on;
        `seconds` per stage; `evaluation`; `model`, `data`, `date`, `config`.
    """
    made = _reopened(row, kept) if kept and (kept / RECORD).is_file() else _made(row, kept)
    model, config, record = made.model, made.config, made.record
    train, device = config.train, made.device if config.blocks_on_host else None
    with computing(model, made.device, config.dtype):
        context = None
        if row.also.context:
            assert made.evaluation_ST is not None
            context = context_use(model, made.evaluation_ST, device)
        accuracy = _accuracy(model, made.tokenizer, row.also)
    texts = (train.data, config.calibration.data, config.eval.data)
    return {
        "perplexity": record["perplexity"]["made"],
        "masked_again": record["perplexity"].get("masked again"),
        "sparsity": record["sparsity"]["achieved"],
        "bits": made.bits,
        "bytes": made.bytes,
        "context": context,
        "tasks": accuracy,
        "speed": decoding_speed(model, config.values, made.device) if row.also.speed else None,
        "tokens": train.tokens if row.trained else 0,
        "samples": train.samples,
        "seconds": record["seconds"],
        "model": public(config.model),
        "data": [public(text) if text else None for text in texts],
        "evaluation": record["evaluation"],
        "date": datetime.date.today().isoformat(),
        "config": config.to_dict() | {"output": None},
        "steps": record["steps"],
    }


@dataclass(frozen=True)
class _Made:
    """A row's model, with what a run left of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: LosaConfig  # resolved
    record: dict[str, Any]
    evaluation_ST: Tensor | None  # None: of a model that was kept, where nothing is to be measured on it
    device: torch.device
    bits: float  # of a weight of the blocks
    bytes: int


def _made(row: Row, kept: Path | None) -> _Made:
    """Makes the model, and leaves it in `kept` if it is to be kept. One that was killed on the way goes on."""
    config = replace(row.config, output=str(kept) if kept else None)
    with claim(config.output):
        data, resume = read_run(config, training=row.trained), kept is not None and work_dir(kept).is_dir()
        model, tokenizer = load(config)
        kind = "run" if row.trained else "prune"
        session = Session.start(model, tokenizer, config, kind=kind, data=data, resume=resume)
        lifted = MAKERS[row.maker](session)
        session.finish("made")
    stored = stored_size(model, config.values)
    if lifted:
        with computing(model, session.device, config.dtype):
            mask_again(model, lifted)
            session.measure("masked again")
    return _Made(model, tokenizer, session.config, session.record, data.evaluation, session.device, *stored)


def _reopened(row: Row, kept: Path) -> _Made:
    record = read_record(kept)
    evaluation_ST = read_run(row.config, training=row.trained).evaluation if row.also.context else None
    with door(kept / RECORD, "use"):
        config = LosaConfig.from_dict(record["config"])
    model, tokenizer = load(LosaConfig.from_dict({"model": str(kept), "trust_remote_code": config.trust_remote_code}))
    device = resolve_device(config.device)
    stored = stored_size(model.to(device), config.values)
    return _Made(model, tokenizer, config, record, evaluation_ST, device, *stored)


def _dense(session: Session) -> None:
    """Nothing is done to it."""


def _accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, also: Also) -> dict[str, Any] | None:
    if also.tasks is None:
        return None
    found = score_tasks(model, tokenizer, _load_tasks(also), also.limit)
    return {"tasks": {name: score.get("acc") for name, score in found.items()}, "mean": mean_accuracy(found)}


def check_tasks(row: Row) -> None:
    """Before any row is made: what is wrong with the tasks would end the first one after its training.

    Raises:
        ValueError: a task that lm-eval does not know, data that does not load, or a tokenizer that lacks what lm-eval needs.
    """
    if _load_tasks(row.also):
        harness().check_tokenizer(open_tokenizer(row.config.model, row.config.trust_remote_code))


def _load_tasks(also: Also) -> dict[str, Any]:
    """lm-eval's tasks that are measured of every row, by name; none where none are asked for."""
    if also.tasks is None:
        return {}
    tasks: dict[str, Any] = harness().load_tasks(task_names(also.tasks), Path(also.task_data) if also.task_data else None)
    return tasks


def _prune(session: Session) -> None:
    session.go_through(one_shot(session.config)[1:])  # the dense model is a row of its own


def _losa(session: Session) -> None:
    session.go_through(dynamic_steps(session.config))


def _lora(session: Session) -> dict[str, Tensor]:
    """Returns the masks that were lifted."""
    sparsify(session, 1)
    masks = lift_masks(session.model)
    adapt(session, 1)
    return masks


def _train_and_round(session: Session) -> None:
    """Of the dense model, so its masks are full. Each half as in a run."""
    session.record["steps"].append({"step": 1})
    adapt(session, 1)
    put_on_grid(session)


MAKERS: dict[str, Callable[[Session], dict[str, Tensor] | None]] = {
    "dense": _dense,
    "prune": _prune,
    "losa": _losa,
    "lora": _lora,
    "round": put_on_grid,
    "train and round": _train_and_round,
}
