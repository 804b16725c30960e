"""Training under the mask in one dynamic step: `transformers.Trainer`, and what it lacks.

The Trainer brings schedules, accumulation, clipping, mixed devices and reporting. It hides NaN (it goes on and finishes with loss
0.0), so loss and gradients are checked before every update (`callbacks.py`); its checkpoints are pickles and not atomic, so it
writes none (`position.py` says what is saved, and `session/stages.py` does it).

Legend: `S` rows, `T` tokens of each.
"""

import json
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from losa.adapter import dense_mode, dense_weights_on_device, reuse_effective_weights
from losa.config import TrainConfig
from losa.data.blocks import Packed, Samples
from losa.loss import IGNORED, block_loss, causal_loss
from losa.system import distributed
from losa.system.signals import Noted
from losa.training.callbacks import Bar, Curve, Guard, Keeper, Outdate
from losa.training.modes import activation_checkpointing, block_outputs, every_block
from losa.training.position import Keeping, Position, capture, put_optimizer, put_own
from losa.training.rows import Rows, collate, separates_documents

logger = logging.getLogger(__name__)


class LosaTrainer(Trainer):
    """A Trainer whose loss may be distilled from the dense model (see `loss.py`), whose guard sees every loss, and whose
    checkpoints are positions."""

    guard: Guard
    curve: Curve
    config: TrainConfig
    position: Position | None = None

    def go(self) -> None:
        """Trains, from the position on if there is one."""
        if self.position is None:
            self.train()
            return
        self.curve.points = self.position.values["curve"]
        with TemporaryDirectory() as folder:
            Path(folder, "trainer_state.json").write_text(json.dumps(self.position.values["trainer"]), encoding="utf-8")
            self.train(resume_from_checkpoint=folder)

    def capture(self) -> Position:
        """Where the training is; asked of all processes at the end of an update."""
        return capture(self, self.curve.losses, self.curve.points)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The parameters are in the model already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.position is not None:
            put_optimizer(self.position, self)
            put_own(self.position, self, self.curve.losses)  # also where no update is left, and no batch asks for it

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Once the batches that were seen are skipped."""
        if self.position is not None:
            put_own(self.position, self, self.curve.losses)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """The mean over the tokens of the whole update: of all accumulated batches, on all processes."""
        config, labels_BT = self.config, inputs["labels"]
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        teacher_BTV, dense = self._teacher(model, inputs) if config.distill or config.distill_blocks else (None, [])
        with block_outputs(model, bool(config.distill_blocks)) as sparse:
            outputs = model(**inputs, use_cache=False)  # a cache would also make packed documents see each other
        counted = (labels_BT[:, 1:] != IGNORED).sum()
        tokens = torch.as_tensor(counted if num_items_in_batch is None else num_items_in_batch).clamp(min=1)  # 0: only prompts
        loss = causal_loss(outputs.logits, labels_BT, teacher_BTV, config.distill, config.temperature) / tokens
        if config.distill_blocks:
            ratio = block_loss(sparse, dense, inputs.get("attention_mask"))
            loss = loss + config.distill_blocks * ratio * counted / tokens
        if num_items_in_batch is not None:  # DDP and FSDP average gradients over processes; `tokens` are those of all
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _teacher(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """What the dense model says: logits, and the outputs of its blocks if they are wanted. Before the sparse model's forward,
        so that no activation of that one is alive yet."""
        dense = self.accelerator.unwrap_model(model)
        dense.eval()  # no dropout in the teacher
        blocks: list[Tensor]
        with torch.no_grad(), dense_mode(dense), block_outputs(dense, bool(self.config.distill_blocks)) as blocks:
            logits_BTV = dense(**inputs, use_cache=False).logits
        dense.train()
        return logits_BTV, blocks

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, then hands the loss to the guard (no host synchronisation here)."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self.guard.loss = loss.detach()
        self.curve.losses += loss.detach()
        return loss


def _arguments(config: TrainConfig, device: torch.device, name: str, seed: int, work_dir: Path, rows: int) -> TrainingArguments:
    assert config.lr is not None and config.batch_size is not None, "resolve the configuration first"
    updates = math.ceil(math.ceil(rows / config.batch_size) / config.accumulation)
    args = TrainingArguments(
        output_dir=str(work_dir),
        num_train_epochs=1,
        per_device_train_batch_size=config.batch_size // distributed.world_size(),
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=min(math.ceil(config.warmup * updates), updates - 1),  # the first has a learning rate of 0
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
        ddp_backend="gloo" if device.type == "cpu" and distributed.world_size() > 1 else None,
        ddp_broadcast_buffers=False,  # masks are the same everywhere
        ddp_find_unused_parameters=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # one device: DataParallel would copy the model to every visible GPU
    return args


def train(
    model: PreTrainedModel,
    rows: Tensor | Packed | Samples,
    config: TrainConfig,
    *,
    name: str,
    seed: int,
    work_dir: Path,
    eos: int | None = None,
    dense_on_host: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    keeping: Keeping | None = None,
) -> list[list[float]]:
    """Trains whatever of `model` requires gradients on `rows`, once through.

    Args:
        rows: packed blocks `(S, T)`, with what counts in them (`data.Packed`), or samples (`data.padded_samples`).
        name: shown on the progress bar and in errors.
        seed: of the row order.
        work_dir: for what callbacks write.
        eos: the token that ends a document in packed blocks; documents then do not see each other. None: no such token.
        dense_on_host: leave dense originals that differ from the base there; a distilling teacher fetches them layer by layer.
        callbacks: passed to the Trainer.
        keeping: where the position is saved. SIGTERM and SIGINT then end the training after the update that is under way, with
            its position saved; without it they do what they did before.

    Returns:
        The loss curve, `[update, loss in nats per token]`.

    Raises:
        FloatingPointError: a loss or gradient is not finite; nothing was updated with it.
        torch.OutOfMemoryError: with the knobs to turn.
    """
    assert config.lr is not None, "resolve the configuration first"
    device = next(model.parameters()).device
    if not isinstance(rows, Tensor | Packed):
        eos = None  # a row is one document, whatever ends its turns
    if (eos is not None or isinstance(rows, Packed)) and not separates_documents(model):
        logger.warning("%s attends across the documents packed in one row; it is trained that way", type(model).__name__)
        eos, rows = None, rows.joined() if isinstance(rows, Packed) else rows
    args = _arguments(config, device, name, seed, work_dir, len(rows))
    guard, curve, noted = Guard(name, config.lr), Curve(device), Noted()
    keepers = [Keeper(keeping, noted)] if keeping else []
    use_cache = model.config.use_cache  # the Trainer sets it to False when it is made
    trainer = LosaTrainer(
        model=model,
        args=args,
        train_dataset=Rows(rows),
        data_collator=partial(collate, eos=eos),
        callbacks=[guard, curve, *keepers, Outdate(), Bar(name), *callbacks],
    )
    trainer.guard, trainer.curve, trainer.config = guard, curve, config
    for keeper in keepers:
        keeper.capture, trainer.position = trainer.capture, keeper.keeping.position
    trainer.pop_callback(PrinterCallback)
    fetched = not dense_on_host and bool(config.distill or config.distill_blocks)
    try:
        with (
            activation_checkpointing(model, config.gradient_checkpointing),
            every_block(model),
            dense_weights_on_device(model) if fetched else nullcontext(),
            reuse_effective_weights(model) if config.reuse_weights else nullcontext(),
            noted.listening() if keeping else nullcontext(),
        ):
            trainer.go()
    except torch.OutOfMemoryError as error:
        knobs = f"train.batch_size ({config.batch_size}), train.length, or set train.gradient_checkpointing: true"
        raise torch.OutOfMemoryError(f"{name} ran out of memory; lower {knobs}. {error}") from error
    finally:
        model.config.use_cache = use_cache
        model.eval()
    return curve.points
