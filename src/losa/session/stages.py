"""Stages, which a killed run resumes from.

A stage is a directory that appears whole or not at all: it is written under a temporary name, its files are flushed to disk,
its manifest, with a checksum of every file and of itself, is written last, and only then is it renamed. It holds masks (a bit a
weight), adapters, the base weights that differ from the source checkpoint, and the run's record so far. The newest stage replaces
the one before it, which is set aside: where the newest is damaged, a run goes on from that.

What is inside of a phase is a stage too, and builds on the newest other one: a position in a training (`training/position.py`),
which the next position replaces; and blocks that a walk is through with (`walk.BlockKeeping`), those since the last time.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from losa.adapter import MaskedLinear, masked_linears
from losa.config import LosaConfig
from losa.models import find_decoder
from losa.system.output import MANIFEST, PREVIOUS, stages, work_dir
from losa.system.writing import sync, to_json, writing
from losa.system.yaml_tree import differences
from losa.training.position import Position

FORMAT = 2
STATE = "state.safetensors"
UPDATE, BLOCK = "-update-", "-block-"  # in the name of what is inside of a phase: the stage it builds on, and how much is done

logger = logging.getLogger(__name__)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    """Checksum of a manifest as JSON gives it back."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_stage(root: Path, name: str, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    temporary, final = root / f"tmp-{name}", root / name
    for stale in (temporary, final):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        with writing(final):
            temporary.mkdir(parents=True)
            save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary / STATE)
            sync(temporary / STATE)
            content = {"format": FORMAT, "name": name, **manifest, "files": {STATE: _digest(temporary / STATE)}}
            content = json.loads(to_json(content, MANIFEST))
            (temporary / MANIFEST).write_text(to_json(content | {"sha256": _seal(content)}, MANIFEST), encoding="utf-8")
            sync(temporary / MANIFEST)
            sync(temporary)
            temporary.rename(final)
            sync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_stage(stage: Path) -> None:
    (stage / MANIFEST).unlink(missing_ok=True)  # first, so that a kill on the way leaves no stage that looks complete
    shutil.rmtree(stage)


def save_stage(
    output: Path,
    name: str,
    done: int,
    model: PreTrainedModel,
    config: LosaConfig,
    record: dict[str, Any],
    origin: Mapping[str, str] | None = None,
) -> None:
    """Writes stage `name`, after which `done` phases are complete, atomically; the stage before it is set aside.

    Args:
        origin: see `origin.origin`; compared on resume.

    Raises:
        OSError: it cannot be written; the stages before it are as they were.
    """
    manifest = {
        "done": done,
        "config": config.to_dict(),
        "fingerprint": config.fingerprint(),
        "origin": dict(origin or {}),
        "record": record,
    }
    _write_stage(work_dir(output), name, _tensors(masked_linears(model)), manifest)
    _set_aside(output, work_dir(output) / name, done)


def _tensors(layers: Mapping[str, MaskedLinear]) -> dict[str, Tensor]:
    """What layers hold that the source checkpoint does not."""
    tensors: dict[str, Tensor] = {}
    for key, layer in layers.items():
        tensors[f"{key}.mask"] = layer.keep_bits
        tensors |= {f"{key}.{name}": parameter.data for name, parameter in layer.trained.items()}
        if layer.dense_OI is not None:
            tensors[f"{key}.weight"] = layer.weight.data
        if layer.score_OI is not None:
            tensors[f"{key}.score"] = layer.score_OI
    return tensors


@torch.no_grad()
def _put(tensors: Mapping[str, Tensor], layers: Mapping[str, MaskedLinear], device: torch.device) -> None:
    """The same back into layers as they were attached; scores, which are no part of a model, on the device it will be on."""
    for key, layer in layers.items():
        trained = {name: tensors[f"{key}.{name}"] for name in layer.trained}
        layer.restore(tensors[f"{key}.mask"], tensors.get(f"{key}.weight"), trained)
        score_OI = tensors.get(f"{key}.score")
        layer.score_OI = None if score_OI is None else score_OI.to(device)


def _layers_of(model: PreTrainedModel, blocks: Iterable[int]) -> dict[str, MaskedLinear]:
    of = find_decoder(model).blocks
    return {f"{index}.{name}": layer for index in blocks for name, layer in masked_linears(of[index]).items()}


def save_blocks(output: Path, stage: str, model: PreTrainedModel, first: int, done: int, values: Mapping[str, Any]) -> None:
    """Writes what a walk that follows a stage did to the blocks from `first` up to `done`, atomically.

    Args:
        values: what JSON holds, of the walk until then.

    Raises:
        OSError: it cannot be written; what was saved before is as it was.
    """
    tensors = _tensors(_layers_of(model, range(first, done)))
    _write_stage(work_dir(output), f"{stage}{BLOCK}{done}", tensors, {"first": first, "blocks": done, "values": dict(values)})


def load_blocks(output: Path, stage: str, model: PreTrainedModel, device: torch.device) -> tuple[int, dict[str, Any]]:
    """Puts back what a walk that follows a stage did, into a model as that stage left it.

    Returns:
        The number of blocks that are done, and the `values` with which the last of them were saved.
    """
    done, values = 0, {}
    for path, _ in _inside(output, stage + BLOCK):
        found = _sound_manifest(path)
        if found is None or found["first"] != done:
            logger.warning("%s is damaged; going on from block %d", path, done)
            break
        _put(load_file(path / STATE), _layers_of(model, range(done, found["blocks"])), device)
        done, values = found["blocks"], found["values"]
    return done, values


def _inside(output: Path, prefix: str) -> list[tuple[Path, int]]:
    """What was saved inside of a phase, and how much was done then, in that order."""
    parts = [(stage, stage.name.removeprefix(prefix)) for stage in stages(output) if stage.name.startswith(prefix)]
    return sorted(((stage, int(part)) for stage, part in parts if part.isdecimal()), key=lambda pair: pair[1])


def _is_inside(stage: Path) -> bool:
    return UPDATE in stage.name or BLOCK in stage.name


def save_position(output: Path, stage: str, position: Position, seconds: float) -> None:
    """Writes a position inside the training that follows a stage, atomically; then removes the position before it.

    Args:
        seconds: that the training took so far.

    Raises:
        OSError: it cannot be written; the position before it is as it was.
    """
    name = f"{stage}{UPDATE}{position.update}"
    _write_stage(work_dir(output), name, position.tensors, {"values": position.values, "seconds": seconds})
    for other in stages(output):
        if _is_inside(other) and other.name != name:
            _remove_stage(other)


def _set_aside(output: Path, newest: Path, done: int) -> None:
    """Keeps the stage before the newest for the case that the newest is damaged. All others go, what is inside of phases too."""
    others = [stage for stage in stages(output) if stage != newest]
    older = [stage for stage in others if not _is_inside(stage) and 0 <= _done(stage) < done]
    before = max(older, key=_done, default=None)
    kept = None if before is None else work_dir(output) / PREVIOUS / before.name
    if before is not None and kept is not None and before != kept:
        kept.parent.mkdir(exist_ok=True)
        shutil.rmtree(kept, ignore_errors=True)
        before.rename(kept)
    for stage in others:
        if stage not in (before, kept):
            _remove_stage(stage)


def _done(stage: Path) -> int:
    """Phases that are complete after a stage; -1 where it does not say."""
    found = _load_manifest(stage) or {}
    count = found.get("done")
    return count if isinstance(count, int) else -1


def _load_manifest(stage: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((stage / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _sound_manifest(stage: Path) -> dict[str, Any] | None:
    """The manifest of a stage whose files are, bit by bit, what was written; or None."""
    manifest = _load_manifest(stage) or {}
    seal = manifest.pop("sha256", None)
    try:
        if seal != _seal(manifest) or manifest["name"] != stage.name:
            return None
        return manifest if all(_digest(stage / name) == digest for name, digest in manifest["files"].items()) else None
    except (OSError, KeyError, TypeError, AttributeError):
        return None


def latest_stage(output: Path, config: LosaConfig) -> dict[str, Any] | None:
    """The manifest of the newest complete stage of `output`, or None. Damaged ones are passed over, with a warning.

    Raises:
        ValueError: it was written with another configuration; the message lists the differences.
    """
    found = [(stage, _load_manifest(stage) or {}) for stage in stages(output) if not _is_inside(stage)]
    for stage, manifest in found:
        if isinstance(manifest.get("format"), int) and manifest["format"] != FORMAT:
            where = f"{stage} has format {manifest['format']}, expected {FORMAT}"
            raise ValueError(f"{where}; delete {work_dir(output)} to start anew")
    counts = {stage: math.inf if (count := _done(stage)) < 0 else count for stage, _ in found}  # what says nothing is damaged
    for stage, manifest in sorted(found, key=lambda pair: (pair[0].parent.name == PREVIOUS, -counts[pair[0]])):
        sound = _sound_manifest(stage)
        old = manifest.get("config")
        other = isinstance(old, dict) and manifest.get("fingerprint") != config.fingerprint()
        if isinstance(old, dict) and other and (sound or "sha256" not in manifest):
            lines = "\n  ".join(differences(old, config.to_dict() | {"output": old.get("output")}))
            way_out = f"restore it, or delete {work_dir(output)} to start anew"
            raise ValueError(f"cannot resume {output}: the configuration changed\n  {lines}\n{way_out}")
        if sound:
            return sound | {"path": str(stage)}
        logger.warning("the stage %s is damaged; going on from the one before it, or from the beginning", stage)
    return None


def latest_position(output: Path, manifest: Mapping[str, Any], processes: int) -> tuple[Position, float] | None:
    """The newest position inside the training that follows a stage, and the seconds it took until then; None where there is none.
    Damaged ones, and those of another number of processes, are passed over, with a warning."""
    for stage, _ in reversed(_inside(output, manifest["name"] + UPDATE)):
        found = _sound_manifest(stage)
        if found is None:
            logger.warning("%s is damaged and passed over", stage)
        elif found["values"]["processes"] != processes:
            saved = found["values"]["processes"]
            logger.warning("%s was saved by %d processes, not %d, and is passed over", stage, saved, processes)
        else:
            return Position(load_file(stage / STATE), found["values"]), found["seconds"]
    return None


def load_stage(manifest: Mapping[str, Any], model: PreTrainedModel, device: torch.device) -> None:
    """Puts a stage's masks, adapters, changed weights and scores into a freshly attached model."""
    _put(load_file(Path(manifest["path"]) / STATE), masked_linears(model), device)


def clear_stages(output: Path) -> None:
    """Forgets an earlier run in `output`. The directory of its stages stays, which tells that the output is losa's."""
    for stage in stages(output):
        _remove_stage(stage)
    shutil.rmtree(work_dir(output) / PREVIOUS, ignore_errors=True)
