"""A run under way: its model, texts, resolved configuration, clock and record. Everything in a run that is not the method.

`Session.go_through` does the phases of the method one after the other, and leaves a stage on disk after each, to resume from.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from losa.adapter import attach, merge
from losa.config import LosaConfig
from losa.data import RunData, held_out_record, prepare, show_example
from losa.data.evaluation import Windows
from losa.evaluation import perplexity
from losa.models import Decoder, block_linears, find_decoder, max_length, place
from losa.models.precision import cast_, computing, computing_dtype, name_of, widen_
from losa.planning.work import evaluations, remaining, stage_flops
from losa.rotation import rotate_values
from losa.session import result, stages
from losa.session.checks import (
    check_architecture,
    check_parts,
    check_precision,
    check_request,
    warn_of_little_text,
    warn_of_zeros,
)
from losa.session.origin import changed, origin
from losa.session.samples import answer, opening
from losa.system import distributed
from losa.system.environment import resolve_device, return_freed_memory, versions
from losa.system.output import work_dir
from losa.system.progress import Whole, duration, whole_run
from losa.training.position import Keeping, Position, put_parameters
from losa.training.sharding import copy_trained, sharded
from losa.walk import BlockKeeping

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A piece of a run that is done whole or not at all: the name of the stage it leaves, what it does, and which ratio of the
    work that `planning.work.stage_flops` counts that is."""

    name: str
    work: Callable[["Session"], None]
    part_of: Mapping[str, float] = field(default_factory=dict)


Documents = Callable[[dict[str, Any], str], Mapping[str, str]]


def no_documents(record: dict[str, Any], name: str) -> dict[str, str]:
    """None beside the checkpoint but its record."""
    return {}


@dataclass
class Session:
    """See the module's docstring; made by `start`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: LosaConfig
    data: RunData
    device: torch.device
    callbacks: Sequence[TrainerCallback]
    record: dict[str, Any]
    stored: torch.dtype  # of the checkpoint, that the model came as and is returned as
    widened: Sequence[str]  # parameters and buffers that compute in more bits than that (`models/precision.py`)
    origin: dict[str, str] = field(default_factory=dict)  # `origin.origin`, where stages are saved
    done: int = 0  # complete phases
    stage: str | None = None  # the last that was saved
    position: Position | None = None  # inside the training that comes next, to go on from
    spent: float = 0.0  # seconds of that training until then
    phase: Mapping[str, float] = field(default_factory=dict)  # what the phase under way does of each stage
    whole: Whole | None = None
    documents: Documents = no_documents

    @classmethod
    def start(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: LosaConfig,
        *,
        kind: str,
        data: RunData | None = None,
        resume: bool = False,
        overwrite: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
        documents: Documents = no_documents,
    ) -> "Session":
        """Checks everything, reads the texts, attaches the masked layers and, to resume, restores the last stage. The output, if
        there is one, is claimed (`output.claim`).

        Args:
            kind: "run"; "prune", without training; or "round", of a model that is sparse already.
            data: the texts (`data.read_run`); read here when None.
            overwrite: replace what an earlier command left in the output.
            documents: what people read about the result, by file name, of its record and its name.

        Raises:
            ValueError: something in the request is wrong.
        """
        check_request(config, training=kind == "run", pruning=kind != "round", resume=resume, overwrite=overwrite)
        device = resolve_device(config.device)
        distributed.join(device, alone=streams(config, device))
        decoder = check_architecture(model, config, training=kind == "run")
        if kind != "round":
            warn_of_zeros(decoder)
        if kind == "run":
            check_precision(model)
        hidden_size = model.config.get_text_config().hidden_size
        config = config.resolve(hidden_size, max_length(model.config), distributed.world_size())
        output = Path(config.output) if config.output else None
        manifest = stages.latest_stage(output, config) if output and resume else None
        if resume and manifest is None:
            logger.warning("there is nothing to resume in %s; starting anew", output)
        if manifest and manifest["record"]["kind"] != kind:
            interrupted = manifest["record"]["kind"]
            raise ValueError(f"cannot resume {output}: it is losa {interrupted} that was interrupted, not losa {kind}")
        data = data or prepare(config, tokenizer, training=kind == "run")
        warn_of_little_text(data.evaluation, config.eval.windows)
        return_freed_memory()
        logger.info("configuration:\n%s", config.to_yaml())
        if data.train is not None:
            example = show_example(data.train, tokenizer)
            logger.info("a training example; the loss counts what is between >>> and <<<:\n%s", example)
        seconds = {"reading text": round(data.seconds, 3)}
        record: dict[str, Any] = {"kind": kind, "steps": [], "perplexity": {}, "seconds": seconds}
        record["text_sha256"] = data.fingerprint()
        check_parts(config, distributed.world_size(), len(data.evaluation))
        stored, dtype = model.dtype, computing_dtype(model.dtype, device, config.dtype)
        come_from = origin(model, tokenizer, record["text_sha256"], dtype) if output and distributed.is_main() else {}
        if output and manifest and (different := changed(manifest["origin"], come_from)):
            what, way_out = ", ".join(different), f"restore it, or delete {work_dir(output)} to start anew"
            raise ValueError(f"cannot resume {output}: the {what} changed; {way_out}")
        if widened := widen_(model, device, config.dtype):
            logger.info("this processor has no instructions for 16-bit floats: computing in float32, saving %s", name_of(stored))
        record["computed_in"] = name_of(dtype)
        if config.rotate:  # again on resume, and the same again: stages hold what differs from the turned weights
            began = time.perf_counter()
            model.eval()
            record["rotation"] = rotate_values(model, data.calibration[: config.calibration.error_sequences], device=device)
            seconds["rotation"] = round(time.perf_counter() - began, 3)
        session = cls(model, tokenizer, config, data, device, callbacks, record, stored, widened, come_from, documents=documents)
        attach(model, config.adapter.max_rank, config.adapter.scale, config.seed, whole=kind == "run" and config.train.whole)
        if output and manifest:
            session._restore(output, manifest)
        elif output and distributed.is_main():
            stages.clear_stages(output)
        distributed.wait()  # all have read what is in the output before anything is written there
        model.eval()
        place(model, device, config.blocks_on_host)
        return session

    def _restore(self, output: Path, manifest: dict[str, Any]) -> None:
        """Goes back to where a stage was saved: masks, adapters, changed base weights, ranks and record."""
        stages.load_stage(manifest, self.model, self.device)
        self.record, self.done, self.stage = manifest["record"], manifest["done"], manifest["name"]
        if self.record["steps"] and not self.config.train.whole:
            self.set_ranks(self.record["steps"][-1]["ranks"])
        found = stages.latest_position(output, manifest, distributed.world_size())
        if found is None:
            logger.info("resuming after %s", self.stage)
            return
        self.position, self.spent = found
        put_parameters(self.position, self.model)
        self.record["seconds"]["training"] = round(self.record["seconds"].get("training", 0.0) + self.spent, 3)
        logger.info("resuming after %s, update %d of the training that follows", self.stage, self.position.update)

    def keeping(self) -> Keeping | None:
        """How the training that comes next keeps its position: in a run with an output, after a stage."""
        if self.config.output is None or self.stage is None:
            return None
        output, stage, began = Path(self.config.output), self.stage, time.perf_counter() - self.spent
        position, self.position, self.spent = self.position, None, 0.0

        def save(now: Position) -> None:
            try:
                stages.save_position(output, stage, now, time.perf_counter() - began)
                logger.info("saved after update %d", now.update)
            except OSError as error:
                logger.warning("%s; the training goes on, and is saved again later", error)

        return Keeping(self.config.train.save_minutes, save, position)

    def keeping_blocks(self, stage: str, notes: dict[str, Any] | None = None) -> BlockKeeping | None:
        """How the walk that comes next keeps what it does to the blocks: in a run with an output, after a stage. What an earlier
        process did is put back into the model.

        Args:
            stage: that the walk is timed as; it gets the seconds of the earlier process.
            notes: kept too; gets those of the earlier process.
        """
        if self.config.output is None or self.stage is None:
            return None
        output, after, notes = Path(self.config.output), self.stage, {} if notes is None else notes
        done, values = stages.load_blocks(output, after, self.model, self.device)
        spent = values.get("seconds", 0.0)
        if done:
            logger.info("resuming %s after block %d", stage, done - 1)
            notes |= values["notes"]
            self.record["seconds"][stage] = round(self.record["seconds"].get(stage, 0.0) + spent, 3)
        start = time.perf_counter() - spent

        def save(begin: int, end: int) -> bool:
            try:
                if distributed.is_main():
                    values = {"notes": notes, "seconds": time.perf_counter() - start}
                    stages.save_blocks(output, after, self.model, begin, end, values)
                    logger.info("saved after block %d", end - 1)
            except OSError as error:
                logger.warning("%s; %s goes on, and is saved again later", error, stage)
                return False
            return True

        return BlockKeeping(save, self.config.train.save_minutes, done)

    @property
    def kind(self) -> str:
        """What `start` was told."""
        kind: str = self.record["kind"]
        return kind

    @property
    def decoder(self) -> Decoder:
        """The model's decoder blocks."""
        return find_decoder(self.model)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall-clock seconds of a piece of work to `record["seconds"][stage]`."""
        start = time.perf_counter()
        ratio = 1 / evaluations(self.config, self.kind == "run") if stage == "evaluation" else self.phase.get(stage, 0.0)
        with self.whole.inside(stage, ratio) if self.whole else nullcontext():
            yield
        seconds = self.record["seconds"]
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 3)

    @contextmanager
    def whole_model(self) -> Iterator[PreTrainedModel]:
        """The model as training needs it: all of it on the device, or a twin whose weights are spread over all devices or stream
        in from the host."""
        on_host = streams(self.config, self.device)
        if self.config.shard or on_host:
            twin = sharded(self.model, self.device, on_host)
            yield twin
            copy_trained(twin, self.model)
            return
        self.model.to(self.device)
        yield self.model
        place(self.model, self.device, self.config.blocks_on_host)

    def go_through(self, phases: Sequence[Phase]) -> None:
        """Does the phases that a resumed run does not have behind it, in order, and saves a stage after each."""
        work = self._work()
        behind = self._done(work, phases)
        with whole_run(Whole(work, behind, self.record["seconds"], remaining)) as self.whole:
            self._go_through(phases)
        self.whole = None

    def _go_through(self, phases: Sequence[Phase]) -> None:
        for index, phase in enumerate(phases, 1):
            if index <= self.done:
                continue
            self.phase = phase.part_of
            phase.work(self)
            self.done = index
            logger.info("%s", self.progress(phases))
            if self.config.output:
                self.stage = phase.name
                if distributed.is_main():
                    with self.timed("saving"):
                        self._save(Path(self.config.output))

    def _save(self, output: Path) -> None:
        assert self.stage is not None
        stages.save_stage(output, self.stage, self.done, self.model, self.config, self.record, self.origin)

    def progress(self, phases: Sequence[Phase]) -> str:
        """One line about the phases that are done, the time they took and, where their pace tells, the time that is left."""
        work = self._work()
        left = remaining(work, self._done(work, phases), self.record["seconds"]) if self.done < len(phases) else None
        so_far = duration(sum(self.record["seconds"].values()))
        ahead = "" if left is None else f", about {duration(left)} left"
        return f"{phases[self.done - 1].name} done (phase {self.done} of {len(phases)}), {so_far} so far{ahead}"

    def _work(self) -> dict[str, float]:
        text_config = self.model.config.get_text_config()
        return stage_flops(self.config, self.decoder, text_config, len(self.data.evaluation), self.kind == "run")

    def _done(self, work: Mapping[str, float], phases: Sequence[Phase]) -> dict[str, float]:
        """Ratio of each stage that is behind."""
        return {stage: sum(phase.part_of.get(stage, 0.0) for phase in phases[: self.done]) for stage in work}

    def measure(self, name: str) -> None:
        """Perplexity of the model as it is, into `record["perplexity"][name]`.

        Raises:
            ValueError: that of the dense model is not finite.
            FloatingPointError: that of another is not.
        """
        device = self.device if self.config.blocks_on_host else None
        with self.timed("evaluation"):
            label = f"perplexity ({name})"
            value = perplexity(self.model, self.data.evaluation, label=label, device=device, counted_ST=self.data.counted)
        if name == "dense" and not math.isfinite(value):
            raise ValueError(f"the dense model's perplexity is {value}: its weights or their dtype are damaged; nothing to prune")
        if not math.isfinite(value):
            raise FloatingPointError(f"the model's perplexity is {value} ({name}), a finite number when dense; nothing is saved")
        self.record["perplexity"][name] = value
        logger.info("perplexity, %s: %.3f", name, self.record["perplexity"][name])
        if self.config.output and device is None:  # from the host, every token would take as long as a window
            with self.timed("samples"):
                words, ids_1T = opening(self.tokenizer, max_length(self.model.config))
                samples = self.record.setdefault("samples", {"prompt": words})
                samples[name] = answer(self.model, self.tokenizer, ids_1T)

    def measured_on(self) -> dict[str, Any]:
        """What perplexities are of: `data`, the text; `window`, its tokens; `windows`, how many; `counts`, which tokens of them;
        and `held_out`, where to find it again (`data.held_out_record`)."""
        windows, tokens = self.data.evaluation.shape
        return {
            "data": self.config.eval.data or "held out of the training text",
            "window": tokens,
            "windows": windows,
            "counts": Windows(self.data.evaluation, self.data.counted).counts,
            "held_out": held_out_record(self.config, self.data.held_out),
        }

    def set_ranks(self, ranks: Sequence[int]) -> None:
        """Gives all adapters of each block that block's rank."""
        for block, rank in zip(self.decoder.blocks, ranks, strict=True):
            for layer in block_linears(block).values():
                layer.set_rank(rank)  # type: ignore[operator]

    def finish(self, measure: str) -> PreTrainedModel:
        """Merges, measures, saves and verifies. Record and masks become the attributes `losa_record` and `losa_masks`."""
        masks = merge(self.model)
        cast_(self.model, self.widened, self.stored)
        return_freed_memory()  # what training held; writing and re-opening the checkpoint need some
        with computing(self.model, self.device, self.config.dtype):
            self.measure(measure)
        pruned = sum(int((~keep).sum()) for keep in masks.values())
        total = sum(keep.numel() for keep in masks.values())
        self.record |= {
            "sparsity": {"asked": self.config.sparsity, "achieved": pruned / total, "weights": total},
            "evaluation": self.measured_on(),
            "config": self.config.to_dict(),
            "versions": versions(),
            "processes": self.record.get("processes", distributed.world_size()),  # of a result that is rounded, the run's
        }
        if self.config.output and distributed.is_main():
            output = Path(self.config.output)
            with self.timed("saving"):
                new = result.write_verified(output, self.model, self.tokenizer, masks, self.config.model)
            result.commit_result(output, new, self.record, self.documents(self.record, output.resolve().name))
        distributed.wait()  # the checkpoint is there
        vars(self.model).update(losa_record=self.record, losa_masks=masks)
        return self.model


def streams(config: LosaConfig, device: torch.device) -> bool:
    """Whether weights come from the host block by block in training too."""
    return config.offload and device.type != "cpu"
