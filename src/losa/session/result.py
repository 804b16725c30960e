"""The sparse checkpoint, with its proof.

It is written to a directory beside the output, re-opened, checked zero by zero against the masks, and only then takes its place
(`system/output.py`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from losa.data.prepare import looks_like_a_path
from losa.system.output import RECORD, commit, fresh
from losa.system.writing import to_json, writing


def shard_size(source: str) -> str | int:
    """Largest shard of the source checkpoint in bytes, so that the result is sharded alike; 50 GB when it is one file."""
    if not source or (looks_like_a_path(source) and not Path(source).exists()):
        return "50GB"
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return "50GB"
    folder = Path(index).parent
    shards = set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values())
    return int(max((folder / shard).stat().st_size for shard in shards))


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
) -> Path:
    """Saves the merged model beside `output`, which is claimed, and verifies the re-opened files. Returns where they are.

    Args:
        source: the dense checkpoint, whose sharding is kept.

    Raises:
        RuntimeError: a pruned weight of the saved file is not zero; `output` is as it was.
        OSError: the files cannot be written.
    """
    new = fresh(output)
    with writing(new):
        model.save_pretrained(new, max_shard_size=shard_size(source))
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
    verify_zeros(new, masks)
    return new


def commit_result(output: Path, new: Path, record: dict[str, Any], documents: Mapping[str, str]) -> None:
    """Puts what `write_verified` left in the output's place, with record and documents. Stages, an earlier result and what was
    measured of it go."""
    readable = (new / "config.json").stat().st_mode
    for file in new.glob("*.safetensors"):
        file.chmod(readable)  # safetensors writes its files for their owner alone
    with writing(output):
        for name, text in documents.items():
            (new / name).write_text(text, encoding="utf-8")
        (new / RECORD).write_text(to_json(record, RECORD), encoding="utf-8")
        commit(output)
