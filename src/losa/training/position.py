"""Where a training is, update by update: what has to be saved so that it goes on as if it had never stopped.

That is what is trained, the optimizer's moments, the schedule, the generators of random numbers, the loss curve and movement
scores so far. Parts that are spread over processes (FSDP2) are put together, parts that each process has of its own are stacked.
Tensors are saved as safetensors and the rest as JSON (`session/stages.py`). transformers' own checkpoints are pickles, and not
atomic.
"""

import dataclasses
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from losa.adapter import masked_linears
from losa.system import distributed


@dataclass(frozen=True)
class Position:
    """Of a training between two updates.

    Attributes:
        tensors: on the host; empty on all processes but the first when captured.
        values: what JSON holds.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def update(self) -> int:
        """Updates that are done."""
        return int(self.values["trainer"]["global_step"])


@dataclass(frozen=True)
class Keeping:
    """How a training keeps its position.

    Attributes:
        minutes: between two times.
        save: called by the first process.
        position: of an earlier process, to go on from.
    """

    minutes: float
    save: Callable[[Position], None]
    position: Position | None = None


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def capture(trainer: Trainer, losses: Tensor, curve: list[list[float]]) -> Position:
    """Called by all processes, at the end of an update.

    Args:
        losses: sum of this process's losses that the curve does not have yet.
        curve: what `training.train` returns, so far.
    """
    tensors: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        if distributed.is_main():
            tensors[name] = value.detach().cpu()

    for name, parameter in _parameters(trainer.model).items():
        keep(f"parameter.{name}", distributed.whole(parameter.detach()))
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            keep(f"optimizer.{name}.{key}", distributed.whole(value))
    for name, value in _own(trainer.model, losses).items():
        keep(f"own.{name}", distributed.gather(value[None]))
    values = {
        "trainer": dataclasses.asdict(trainer.state),
        "schedule": trainer.lr_scheduler.state_dict(),
        "rates": [group["lr"] for group in trainer.optimizer.param_groups],
        "curve": curve,
        "processes": distributed.world_size(),
    }
    return Position(tensors, json.loads(json.dumps(values, default=float)))


def _own(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    """What each process has of its own."""
    found = {"losses": losses, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    found["python"] = torch.tensor(random.getstate()[1], dtype=torch.int64)
    numbers: Any = np.random.get_state(legacy=True)
    found["numpy"] = torch.tensor([*numbers[1].tolist(), *numbers[2:4]], dtype=torch.int64)
    found["gauss"] = torch.tensor(numbers[4], dtype=torch.float64)
    scores = {name: layer.score_OI for name, layer in masked_linears(model).items() if layer.scored}
    return found | {f"score.{name}": score for name, score in scores.items() if score is not None}


@torch.no_grad()
def put_parameters(position: Position, model: nn.Module) -> None:
    """What was trained, out of the position into a whole model."""
    for name, parameter in _parameters(model).items():
        parameter.copy_(position.tensors.pop(f"parameter.{name}"))


def put_optimizer(position: Position, trainer: Trainer) -> None:
    """Moments and schedule, out of the position into what the trainer has just made."""
    names = {parameter: name for name, parameter in _parameters(trainer.model).items()}
    moments: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in position.tensors if key.startswith("optimizer.")]:
        name, _, part = key.removeprefix("optimizer.").rpartition(".")
        moments.setdefault(name, {})[part] = position.tensors.pop(key).clone()  # the file they are mapped from may go
    state = trainer.optimizer.state_dict()
    ordered = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    state["state"] = {
        index: {part: distributed.spread_like(value, parameter) for part, value in moments[names[parameter]].items()}
        for index, parameter in enumerate(ordered)
        if names[parameter] in moments
    }
    for group, rate in zip(state["param_groups"], position.values["rates"], strict=True):
        group["lr"] = rate
    trainer.optimizer.load_state_dict(state)
    trainer.lr_scheduler.load_state_dict(position.values["schedule"])


def put_own(position: Position, trainer: Trainer, losses: Tensor) -> None:
    """Random numbers, scores and, into `losses`, their sum: what this process had of its own."""
    mine = {
        key.partition(".")[2]: value[distributed.rank()].clone()
        for key, value in position.tensors.items()
        if key.startswith("own.")
    }
    torch.set_rng_state(mine["torch"])
    if "cuda" in mine and torch.cuda.is_available():
        torch.cuda.set_rng_state(mine["cuda"])
    random.setstate((3, tuple(mine["python"].tolist()), None))
    *words, place, has_gauss = mine["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), place, has_gauss, mine["gauss"].item()))
    losses.copy_(mine["losses"])
    for name, layer in masked_linears(trainer.model).items():
        if f"score.{name}" in mine and layer.score_OI is not None:
            layer.score_OI.copy_(mine[f"score.{name}"])
