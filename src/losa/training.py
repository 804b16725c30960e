"""Training of the adapters in one dynamic step: `transformers.Trainer`, three guards and a progress bar.

The Trainer brings schedules, accumulation, clipping, mixed devices and reporting. What it lacks here: it hides NaN (it goes on
and finishes with loss 0.0), so loss and gradients are checked before every update; its checkpoints are pickles and not atomic, so
it writes none (`position.py` says what is saved, and `checkpoint.py` does it).

Legend: `S` rows, `T` tokens of each.
"""

import inspect
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from losa import distributed
from losa.adapter import (
    dense_mode,
    dense_weights_on_device,
    masked_linears,
    outdate_effective_weights,
    reuse_effective_weights,
)
from losa.config import TrainConfig
from losa.data.blocks import Packed, Samples
from losa.loss import IGNORED, block_loss, causal_loss
from losa.models import find_decoder
from losa.position import Keeping, Position, capture, put_optimizer, put_own
from losa.progress import progress
from losa.signals import Noted

logger = logging.getLogger(__name__)


class Rows(Dataset):
    """Training rows: packed blocks `(S, T)`, with what counts in them, or samples of their own lengths."""

    def __init__(self, rows: Tensor | Packed | Samples) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row} if isinstance(row, Tensor) else row


def collate(rows: list[dict[str, Any]], eos: int | None = None) -> dict[str, Tensor]:
    """Stacks rows. Shorter ones are padded on the right, with no loss and no attention there.

    Packed rows hold several documents, each ended by `eos`, or begun where a row says that it `starts`. Positions start again
    with every document: transformers then lets no token attend to another document, and none is predicted from one.
    """
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = [torch.as_tensor(row.get("labels", row["input_ids"]), dtype=torch.int64) for row in rows]
    labels_BT = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(i) for i in ids])
    if (lengths != input_ids.shape[1]).any():
        real = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return {"input_ids": input_ids, "labels": labels_BT, "attention_mask": real.long()}
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    if "starts" in rows[0]:
        starts[:, 1:] = torch.stack([row["starts"] for row in rows])[:, 1:]  # a row's first token has place 0 in any case
    elif eos is not None:
        starts[:, 1:] = input_ids[:, :-1] == eos
    batch = {"input_ids": input_ids, "labels": labels_BT.masked_fill(starts, IGNORED)}
    if starts.any():  # without positions, attention takes the faster path of whole rows
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        batch["position_ids"] = place - place.where(starts, 0).cummax(1).values
    return batch


@torch.no_grad()
def separates_documents(model: PreTrainedModel) -> bool:
    """Whether positions that start again keep a document from seeing the one before it in its row. Most families do that, some
    (OPT) do not; found by changing a token of one document and looking at the logits of the next."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(2, 8, dtype=torch.int64, device=device)
    ids[1, 0] = 1
    positions = torch.arange(4, device=device).repeat(2).expand(2, 8)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    change = (logits[0] - logits[1]).abs()
    return bool(change[4:].max() <= 1e-3 * change[:4].max())


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
        if not torch.isfinite(total.full_tensor() if isinstance(total, DTensor) else total):
            where = f"{self.name}, update {state.global_step + 1}"
            raise FloatingPointError(
                f"{where}: loss or gradient is not finite; lower train.lr (now {self.lr:g}) or set dtype: float32"
            )


class _Outdate(TrainerCallback):
    """Forgets effective weights that an update has outdated."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an update."""
        outdate_effective_weights(kwargs["model"])


class _Curve(TrainerCallback):
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


class _Keeper(TrainerCallback):
    """Saves the position every so many minutes, and when a signal asks the process to end; then it stops the training."""

    trainer: "LosaTrainer"

    def __init__(self, keeping: Keeping, noted: Noted) -> None:
        self.keeping, self.noted, self.saved = keeping, noted, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All processes do the same: the first one's clock counts, and a signal that any of them got."""
        due = distributed.is_main() and time.monotonic() - self.saved >= 60 * self.keeping.minutes
        asked = distributed.max_(torch.tensor([int(due), self.noted.number]))
        due, self.noted.number = bool(asked[0]), int(asked[1])
        if due or self.noted.number:
            position = capture(self.trainer, self.trainer.curve.losses, self.trainer.curve.points)
            if distributed.is_main():
                self.keeping.save(position)
            distributed.wait()
            self.saved = time.monotonic()
        control.should_training_stop |= bool(self.noted.number)


class _Bar(TrainerCallback):
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


class LosaTrainer(Trainer):
    """A Trainer whose loss may be distilled from the dense model (see `loss.py`), whose guard sees every loss, and whose
    checkpoints are positions."""

    guard: _Guard
    curve: _Curve
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
        with _block_outputs(model, bool(config.distill_blocks)) as sparse:
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
        with torch.no_grad(), dense_mode(dense), _block_outputs(dense, bool(self.config.distill_blocks)) as blocks:
            logits_BTV = dense(**inputs, use_cache=False).logits
        dense.train()
        return logits_BTV, blocks

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, then hands the loss to the guard (no host synchronisation here)."""
        loss = super().training_step(*args, **kwargs)
        self.guard.loss = loss.detach()
        self.curve.losses += loss.detach()
        return loss


@contextmanager
def activation_checkpointing(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Checkpoints activations block by block while it lasts. Nothing when not `on`."""
    if not on:
        yield
        return
    layers = masked_linears(model).values()
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # newer and older transformers
    getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    for layer in layers:
        layer.keep_effective = True
    try:
        yield
    finally:
        getattr(model, f"{word}_checkpointing_disable")()
        for layer in layers:
            layer.keep_effective = False


@contextmanager
def every_block(model: nn.Module) -> Iterator[None]:
    """While it lasts, no block is left out at random (layerdrop): what is trained must have a gradient in every update."""
    dropping = {module: module.layerdrop for module in model.modules() if getattr(module, "layerdrop", 0)}
    try:
        for module in dropping:
            vars(module)["layerdrop"] = 0.0
        yield
    finally:
        for module, rate in dropping.items():
            vars(module)["layerdrop"] = rate


@contextmanager
def _block_outputs(model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects the output of every decoder block while it lasts. Nothing when not wanted."""
    outputs: list[Tensor] = []

    def note(block: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(note) for block in (find_decoder(model).blocks if wanted else [])]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _arguments(config: TrainConfig, device: torch.device, name: str, seed: int, work_dir: Path) -> TrainingArguments:
    assert config.lr is not None, "resolve the configuration first"
    args = TrainingArguments(
        output_dir=str(work_dir),
        num_train_epochs=1,
        per_device_train_batch_size=config.batch_size // distributed.world_size(),
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
    if (eos is not None or isinstance(rows, Packed)) and not separates_documents(model):
        logger.warning("%s attends across the documents packed in one row; it is trained that way", type(model).__name__)
        eos, rows = None, rows.joined() if isinstance(rows, Packed) else rows
    args = _arguments(config, device, name, seed, work_dir)
    guard, curve, noted = _Guard(name, config.lr), _Curve(device), Noted()
    keepers = [_Keeper(keeping, noted)] if keeping else []
    use_cache = model.config.use_cache  # the Trainer sets it to False when it is made
    trainer = LosaTrainer(
        model=model,
        args=args,
        train_dataset=Rows(rows),
        data_collator=partial(collate, eos=eos),
        callbacks=[guard, curve, *keepers, _Outdate(), _Bar(name), *callbacks],
    )
    trainer.guard, trainer.curve, trainer.config = guard, curve, config
    for keeper in keepers:
        keeper.trainer, trainer.position = trainer, keeper.keeping.position
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
