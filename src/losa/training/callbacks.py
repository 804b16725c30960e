"""What happens between two updates of a training: the guard, the loss curve, the position that is saved, the bar.

A guard, because the Trainer hides NaN: it goes on and finishes with loss 0.0. A curve, because the Trainer's own starts anew on
resume.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from losa.adapter import outdate_effective_weights
from losa.system import distributed
from losa.system.progress import progress
from losa.system.signals import Noted
from losa.training.position import Keeping, Position


class Guard(TrainerCallback):
    """Stops before an update with a loss or gradient that is not finite."""

    def __init__(self, name: str, lr: float) -> None:
        self.name, self.lr = name, lr
        self.loss: Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after clipping."""
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        total = torch.stack(torch._foreach_norm(gradients)).sum()
        if self.loss is not None:
            total = total + self.loss
        if not torch.isfinite(total.full_tensor() if isinstance(total, DTensor) else total):
            where = f"{self.name}, update {state.global_step + 1}"
            raise FloatingPointError(
                f"{where}: loss or gradient is not finite; lower train.lr (now {self.lr:g}) or set dtype: float32"
            )


class Outdate(TrainerCallback):
    """Forgets effective weights that an update has outdated."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an update."""
        outdate_effective_weights(kwargs["model"])


class Curve(TrainerCallback):
    """The loss curve: means since the point before, over all processes. The Trainer's own starts anew on resume."""

    def __init__(self, device: torch.device) -> None:
        self.points: list[list[float]] = []
        self.losses = torch.zeros((), device=device)  # sum since the last point, of this process

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A point where the Trainer logs."""
        update = state.global_step
        if update == 1 or update % args.logging_steps == 0:
            before = self.points[-1][0] if self.points else 0
            self.points.append([update, distributed.gather(self.losses[None]).mean().item() / (update - before)])
            self.losses.zero_()


class Keeper(TrainerCallback):
    """Saves the position every so many minutes, and when a signal asks the process to end; then it stops the training."""

    capture: Callable[[], Position]  # of the trainer, which is made after its callbacks

    def __init__(self, keeping: Keeping, noted: Noted) -> None:
        self.keeping, self.noted, self.saved = keeping, noted, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All processes do the same: the first one's clock counts, and a signal that any of them got."""
        due = distributed.is_main() and time.monotonic() - self.saved >= 60 * self.keeping.minutes
        asked = distributed.max_(torch.tensor([int(due), self.noted.number]))
        due, self.noted.number = bool(asked[0]), int(asked[1])
        if due or self.noted.number:
            position = self.capture()
            if distributed.is_main():
                self.keeping.save(position)
            distributed.wait()
            self.saved = time.monotonic()
        control.should_training_stop |= bool(self.noted.number)


class Bar(TrainerCallback):
    """Progress with loss and ETA."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar."""
        self.bar = progress(None, self.name, total=state.max_steps, done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One update."""
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Shows the loss."""
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        self.bar.close()
