"""Files: stages a killed run resumes from, and the sparse checkpoint with its proof.

A stage is a directory that appears whole or not at all: it is written under a temporary name, its files are flushed to disk,
its manifest is written last, and only then is it renamed. It holds masks (a bit a weight), adapters, the base weights that
differ from the source checkpoint, and the run's record so far. The newest stage replaces the older ones.

The final checkpoint is written to a hidden directory, re-opened, checked zero by zero against the masks, and moved into place
file by file, `config.json` and `losa.json` last: until then `from_pretrained` refuses the directory.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from losa.adapter import masked_linears
from losa.config import LosaConfig, differences
from losa.doors import read_json

MANIFEST = "stage.json"
RECORD = "losa.json"
EVALUATION, BENCH = "eval.json", "bench.json"  # what `losa eval --save` and `losa bench --save` leave beside the record
FORMAT = 2

logger = logging.getLogger(__name__)


def work_dir(output: Path) -> Path:
    """Where a run keeps what is not its result; removed when the run is complete."""
    return output / ".losa"


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.rename(path)


def save_stage(output: Path, name: str, done: int, model: PreTrainedModel, config: LosaConfig, record: dict[str, Any]) -> None:
    """Writes stage `name`, after which `done` phases are complete, atomically; then removes the stages before it."""
    root = work_dir(output)
    temporary, final = root / f"tmp-{name}", root / name
    for stale in (temporary, final):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for key, layer in masked_linears(model).items():
        tensors[f"{key}.mask"] = layer.keep_bits
        tensors |= {f"{key}.{name}": parameter.data for name, parameter in layer.trained.items()}
        if layer.dense_OI is not None:
            tensors[f"{key}.weight"] = layer.weight.data
        if layer.score_OI is not None:
            tensors[f"{key}.score"] = layer.score_OI
    save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary / "state.safetensors")
    _sync(temporary / "state.safetensors")
    manifest = {
        "format": FORMAT,
        "name": name,
        "done": done,
        "config": config.to_dict(),
        "fingerprint": config.fingerprint(),
        "record": record,
    }
    _write_json(temporary / MANIFEST, manifest)
    _sync(temporary)
    temporary.rename(final)
    _sync(root)
    for old in root.iterdir():
        if old != final and (old / MANIFEST).exists():
            (old / MANIFEST).unlink()
            shutil.rmtree(old)


def latest_stage(output: Path, config: LosaConfig) -> dict[str, Any] | None:
    """The manifest of the newest complete stage of `output`, or None.

    Raises:
        ValueError: it was written with another configuration; the message lists the differences.
    """
    found = [path for path in work_dir(output).glob(f"*/{MANIFEST}") if not path.parent.name.startswith("tmp-")]
    if not found:
        return None
    manifests: list[dict[str, Any]] = [json.loads(path.read_text("utf-8")) for path in found]
    for path, manifest in zip(found, manifests, strict=True):
        if manifest.get("format") != FORMAT:
            where = f"{path.parent} has format {manifest.get('format')!r}, expected {FORMAT}"
            raise ValueError(f"{where}; delete {work_dir(output)} to start anew")
    manifest = max(manifests, key=lambda manifest: manifest["done"])
    if manifest["fingerprint"] != config.fingerprint():
        lines = "\n  ".join(differences(manifest["config"], config.to_dict() | {"output": manifest["config"]["output"]}))
        way_out = f"restore it, or delete {work_dir(output)} to start anew"
        raise ValueError(f"cannot resume {output}: the configuration changed\n  {lines}\n{way_out}")
    return manifest


@torch.no_grad()
def load_stage(output: Path, manifest: dict[str, Any], model: PreTrainedModel) -> None:
    """Puts a stage's masks, adapters and changed weights into a freshly attached model."""
    tensors = load_file(work_dir(output) / manifest["name"] / "state.safetensors")
    for key, layer in masked_linears(model).items():
        trained = {name: tensors[f"{key}.{name}"] for name in layer.trained}
        layer.restore(tensors[f"{key}.mask"], tensors.get(f"{key}.weight"), trained)
        layer.score_OI = tensors.get(f"{key}.score")


def clear_stages(output: Path) -> None:
    """Forgets an earlier run in `output`; manifests first, so that a kill on the way leaves no stage that looks complete."""
    for manifest in work_dir(output).glob(f"*/{MANIFEST}"):
        manifest.unlink()
    shutil.rmtree(work_dir(output), ignore_errors=True)


def shard_size(source: str) -> str | int:
    """Largest shard of the source checkpoint in bytes, so that the result is sharded alike; 50 GB when it is one file."""
    if not source:
        return "50GB"
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return "50GB"
    folder = Path(index).parent
    shards = set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values())
    return max((folder / shard).stat().st_size for shard in shards)


def verify_zeros(directory: Path, masks: dict[str, Tensor]) -> None:
    """Re-opens a saved checkpoint and checks every pruned weight, bit by bit.

    Args:
        masks: keep-mask by parameter name, as `adapter.merge` returns them.

    Raises:
        RuntimeError: a tensor is missing, or a pruned weight is not bitwise zero.
    """
    missing = set(masks)
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in missing & set(tensors.keys()):
                pruned = tensors.get_tensor(key).masked_select(~masks[key])
                wrong = int((pruned.view(-1, 1).view(torch.uint8) != 0).any(1).sum())  # bytes: a negative zero is not zero
                if wrong:
                    raise RuntimeError(f"{key} in {file.name}: {wrong} pruned weights are not zero; the result is void")
                missing.discard(key)
    if missing:
        raise RuntimeError(f"the saved checkpoint lacks {sorted(missing)[0]} and {len(missing) - 1} more pruned tensors")


def write_verified(
    output: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, masks: dict[str, Tensor], source: str
) -> None:
    """Saves the merged model beside the stages of `output`, and verifies the re-opened files.

    Args:
        source: the dense checkpoint, whose sharding is kept.

    Raises:
        RuntimeError: a pruned weight of the saved file is not zero; `output` then holds no loadable model.
    """
    staging = work_dir(output) / "final"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(staging, max_shard_size=shard_size(source))
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    verify_zeros(staging, masks)


def publish(output: Path, record: dict[str, Any], documents: Mapping[str, str]) -> None:
    """Moves what `write_verified` left into place, with record and documents, and removes the stages and what was measured of an
    earlier result.

    `config.json` and `losa.json` go last: until then, `from_pretrained` refuses the directory.
    """
    staging = work_dir(output) / "final"
    for name, text in documents.items():
        (staging / name).write_text(text, encoding="utf-8")
    _write_json(staging / RECORD, record)
    last, readable = ["config.json", RECORD], (staging / "config.json").stat().st_mode
    for name in (*last, EVALUATION, BENCH):
        (output / name).unlink(missing_ok=True)
    for stale in output.glob("*.safetensors*"):
        stale.unlink()
    for file in sorted(staging.iterdir(), key=lambda file: (last.index(file.name) if file.name in last else -1, file.name)):
        if file.is_file():
            file.chmod(readable)  # safetensors writes its files for their owner alone
        _sync(file)
        if (output / file.name).is_dir():
            shutil.rmtree(output / file.name)
        file.rename(output / file.name)
    _sync(output)
    clear_stages(output)


def read_record(directory: Path) -> dict[str, Any]:
    """The `losa.json` of a finished run.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = directory / RECORD
    if not path.is_file():
        raise ValueError(f"{directory} has no {RECORD}; it is not a finished LoSA run")
    return read_json(path)
