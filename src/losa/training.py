"""Training of the adapters in one dynamic step: `transformers.Trainer`, three guards and a progress bar.

The Trainer brings schedules, accumulation, clipping, mixed devices and reporting. What it lacks here: it hides NaN (it goes on
and finishes with loss 0.0), so loss and gradients are checked before every update; its checkpoints are not atomic, so it writes
none (`checkpoint.py` does, between dynamic steps).

Legend: `S` rows, `T` tokens of each.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from losa.adapter import dense_mode, dense_weights_on_device
from losa.config import TrainConfig
from losa.distillation import kl_divergence
from losa.progress import progress

Samples = Sequence[dict[str, list[int]]]


class Rows(Dataset):
    """Training rows: packed blocks `(S, T)`, or samples of their own lengths."""

    def __init__(self, rows: Tensor | Samples) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row} if isinstance(row, Tensor) else row


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stacks rows; shorter ones are padded on the right, with no loss and no attention there."""
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(i) for i in ids])
    if (lengths == input_ids.shape[1]).all():
        return {"input_ids": input_ids, "labels": input_ids}
    real = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(~real, -100), "attention_mask": real.long()}


class _Guard(TrainerCallback):
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
        if not torch.isfinite(total):
            where = f"{self.name}, update {state.global_step + 1}"
            raise FloatingPointError(
                f"{where}: loss or gradient is not finite; lower train.lr (now {self.lr:g}) or set dtype: float32"
            )


class _Bar(TrainerCallback):
    """Progress with loss and ETA."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar."""
        self.bar = progress(None, self.name, total=state.max_steps)

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


class LosaTrainer(Trainer):
    """A Trainer whose guard sees every loss, and whose loss may be distilled from the dense model."""

    guard: _Guard | None = None
    distill: float = 0.0
    temperature: float = 1.0

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """`(1 - distill) * cross-entropy + distill * KL to the dense model`, each a mean over the update's tokens."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.distill:
            unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
            model.eval()  # no dropout in the teacher
            with torch.no_grad(), dense_mode(model):
                teacher_BTV = model(**unlabelled).logits
            model.train()
            tokens = kwargs.get("num_items_in_batch")
            tokens = (inputs["labels"][:, 1:] != -100).sum() if tokens is None else tokens
            kl = kl_divergence(outputs["logits"], teacher_BTV, inputs["labels"], self.temperature) / tokens
            loss = (1 - self.distill) * loss + self.distill * kl
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, then hands the loss to the guard (no host synchronisation here)."""
        loss = super().training_step(*args, **kwargs)
        assert self.guard is not None
        self.guard.loss = loss.detach()
        return loss


def train(
    model: PreTrainedModel,
    rows: Tensor | Samples,
    config: TrainConfig,
    *,
    name: str,
    seed: int,
    work_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[list[float]]:
    """Trains whatever of `model` requires gradients on `rows`, once through.

    Args:
        rows: packed blocks `(S, T)`, or samples (`data.padded_samples`).
        name: shown on the progress bar and in errors.
        seed: of the row order.
        work_dir: for what callbacks write.
        callbacks: passed to the Trainer.

    Returns:
        The loss curve, `[update, loss in nats per token]`.

    Raises:
        FloatingPointError: a loss or gradient is not finite; nothing was updated with it.
        torch.OutOfMemoryError: with the knobs to turn.
    """
    assert config.lr is not None, "resolve the configuration first"
    device = next(model.parameters()).device
    args = TrainingArguments(
        output_dir=str(work_dir),
        num_train_epochs=1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,  # below 1, a ratio
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        seed=seed,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_steps=10,
        logging_first_step=True,
        disable_tqdm=True,
        report_to=config.report_to,
        run_name=name,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    args._n_gpu = min(args.n_gpu, 1)  # one device: DataParallel would copy the model to every visible GPU
    guard = _Guard(name, config.lr)
    use_cache = model.config.use_cache  # the Trainer sets it to False when it is made
    trainer = LosaTrainer(
        model=model,
        args=args,
        train_dataset=Rows(rows),
        data_collator=collate,
        callbacks=[guard, _Bar(name), *callbacks],
    )
    trainer.guard, trainer.distill, trainer.temperature = guard, config.distill, config.temperature
    trainer.pop_callback(PrinterCallback)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        with dense_weights_on_device(model) if config.distill else nullcontext():
            trainer.train()
    except torch.OutOfMemoryError as error:
        knobs = f"train.batch_size ({config.batch_size}), train.length, or set train.gradient_checkpointing: true"
        raise torch.OutOfMemoryError(f"{name} ran out of memory; lower {knobs}. {error}") from error
    finally:
        model.config.use_cache = use_cache
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()
    return [[entry["step"], float(entry["loss"])] for entry in trainer.state.log_history if "loss" in entry]
