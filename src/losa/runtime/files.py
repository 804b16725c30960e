"""`losa pack` and `losa unpack`: from a sparse checkpoint to a packed one and back, file by file, without building the model.

A packed checkpoint is an ordinary directory: `config.json` with the header (`losa.runtime.header`), and safetensors files in
which the weight of every linear layer of the decoder is four small tensors instead of one large one. Everything else, from
embeddings to tokenizer, is as it was. The directory appears under its name only when it is complete.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from losa.checkpoint import BENCH, EVALUATION
from losa.models import check_supported, find_decoder, skeleton
from losa.progress import progress
from losa.report.card import CARD, PACKED
from losa.runtime.header import METHOD, SparseConfig
from losa.runtime.packed import PackedWeight, check, pack, unpack

INDEX = "model.safetensors.index.json"
PARTS = ("weight", "weight_mask", "weight_offsets", "weight_scale")
NOTE = (
    PACKED + "This directory holds the model packed, with {values} values. It opens with the package `losa`:\n\n"
    '```python\nimport losa\n\nmodel, tokenizer = losa.load("{name}")\n```\n\n'
    "`losa unpack` writes the checkpoint that transformers opens alone, as the example above shows.\n"
)

logger = logging.getLogger(__name__)


def pack_checkpoint(
    source: str | Path, output: str | Path, values: str = "bfloat16", trust_remote_code: bool = False
) -> dict[str, Any]:
    """Packs the linear layers of the decoder's blocks of a checkpoint.

    Args:
        source: directory of a checkpoint, sparse or not.
        output: a directory that does not exist yet.
        values: `bfloat16` or `int8`.

    Returns:
        `layers`, `sparsity` (ratio), `dense_bytes` and `packed_bytes` of the packed layers, `ratio` of the two.

    Raises:
        ValueError: nothing to pack there, a layer's weight is not in the files, or the output exists.
    """
    source, output = Path(source), Path(output)
    config = SparseConfig(values)
    if is_packed(source):
        raise ValueError(f"{source} is packed already; losa unpack gives its dense checkpoint back")
    model = _skeleton(source, trust_remote_code)
    check_supported(model)
    linears = find_decoder(model).linears()
    total = sum(linear.weight.numel() for linear in linears.values())
    sizes = {"layers": len(linears), "sparsity": 0.0, "dense_bytes": 2 * total, "packed_bytes": 0}
    with _appearing(output) as partial, progress(None, "packing", total=len(linears)) as bar:

        def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            made = {}
            for key, tensor in tensors.items():
                name = key.removesuffix(".weight")
                if name not in linears or name == key:
                    made[key] = tensor
                    continue
                parts = _pack_layer(name, tensor, linears[name].weight.shape, config)
                made |= parts
                config.layers[name] = parts[f"{name}.weight"].numel()
                sizes["packed_bytes"] += sum(part.nbytes for part in parts.values())
                bar.update()
            return made

        _convert_files(source, partial, convert)
        missing = sorted(linears.keys() - config.layers.keys())
        if missing:
            raise ValueError(
                f"the files of {source} hold no {missing[0]}.weight, nor {len(missing) - 1} more of the model's layers"
            )
        changes = {"dtype": "bfloat16", "quantization_config": config.to_dict()}
        _finish(source, partial, changes, NOTE.format(name=output.name, values=values))
    sizes["sparsity"] = 1 - sum(config.layers.values()) / total
    return sizes | {"ratio": sizes["packed_bytes"] / sizes["dense_bytes"]}


def _pack_layer(name: str, W_OI: Tensor, shape: torch.Size, config: SparseConfig) -> dict[str, Tensor]:
    if W_OI.shape != shape or not W_OI.is_floating_point():
        raise ValueError(f"{name}.weight is {W_OI.dtype} {tuple(W_OI.shape)} in the file, expected floats of {tuple(shape)}")
    if W_OI.dtype != torch.bfloat16:
        logger.info("%s: %s rounded to bfloat16", name, W_OI.dtype)
    rounded = W_OI.bfloat16()
    packed = pack(rounded, config.dtype)
    if config.dtype == torch.bfloat16 and not torch.equal(unpack(packed), rounded):
        raise RuntimeError(f"{name}: what was packed does not unpack to itself; the result is void")
    parts = dict(zip(PARTS, (packed.values, packed.mask, packed.offsets, packed.scale), strict=True))
    return {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}


def unpack_checkpoint(source: str | Path, output: str | Path, trust_remote_code: bool = False) -> int:
    """Writes the dense checkpoint, with its zeros, that any software opens: bitwise the packed one for bfloat16 values.

    Returns:
        The number of layers unpacked.

    Raises:
        ValueError: `source` is not a packed checkpoint, is damaged, or the output exists.
    """
    source, output = Path(source), Path(output)
    config = read_header(source)
    shapes = {name: linear.weight.shape for name, linear in find_decoder(_skeleton(source, trust_remote_code)).linears().items()}
    wrong = config.layers.keys() - shapes.keys()
    if wrong:
        raise ValueError(f"the packed header names {min(wrong)}, which is no linear layer of the model")
    unpacked = set()
    with _appearing(output) as partial, progress(None, "unpacking", total=len(config.layers)) as bar:

        def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            packed = {f"{name}.{part}" for name in config.layers for part in PARTS}
            made = {key: tensor for key, tensor in tensors.items() if key not in packed}
            for name in config.layers:
                if f"{name}.weight" in tensors:
                    made[f"{name}.weight"] = _unpack_layer(name, tensors, shapes[name])
                    unpacked.add(name)
                    bar.update()
            return made

        _convert_files(source, partial, convert)
        missing = sorted(config.layers.keys() - unpacked)
        if missing:
            raise ValueError(
                f"the files of {source} hold no {missing[0]}.weight, nor {len(missing) - 1} more that its header names"
            )
        _finish(source, partial, {"quantization_config": None}, "")
    return len(config.layers)


def _unpack_layer(name: str, tensors: dict[str, Tensor], shape: torch.Size) -> Tensor:
    values, mask, offsets, scale = (tensors.get(f"{name}.{part}") for part in PARTS)
    if values is None or mask is None or offsets is None:
        raise ValueError(f"the packed checkpoint lacks a part of {name}; it is damaged, pack the model again")
    packed = PackedWeight(mask=mask, values=values, offsets=offsets, scale=scale, rows=shape[0], columns=shape[1])
    check(packed, name)
    return unpack(packed)


def is_packed(directory: Path) -> bool:
    """Whether `config.json` has a header of ours."""
    path = directory / "config.json"
    found = _read_json(path).get("quantization_config") if path.is_file() else None
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def packed_layers(directory: Path) -> dict[str, tuple[int, int]]:
    """Stored values and weights of every packed layer, in the model's order, from the header alone.

    Raises:
        ValueError: a header that does not fit the model.
    """
    counts = read_header(directory).layers
    linears = find_decoder(_skeleton(directory, False)).linears()
    unknown = counts.keys() - linears.keys()
    if unknown:
        raise ValueError(f"the packed header names {min(unknown)}, which is no linear layer of the model")
    return {name: (counts[name], linear.weight.numel()) for name, linear in linears.items() if name in counts}


def read_header(directory: Path) -> SparseConfig:
    """The header of a packed checkpoint.

    Raises:
        ValueError: not a packed checkpoint, or a header that cannot be believed.
    """
    if not is_packed(directory):
        raise ValueError(f"{directory} is not packed: its config.json has no quantization_config of losa")
    return SparseConfig(**_read_json(directory / "config.json")["quantization_config"])


def _skeleton(source: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The dense model without weights."""
    if not source.is_dir():
        raise ValueError(f"{source} is not a directory; expected one with config.json and safetensors files")
    return skeleton(source, trust_remote_code)


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A directory to fill, renamed to `output` at the end; gone if that is not reached."""
    if output.exists():
        raise ValueError(f"{output} exists; choose another directory, or remove it first")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert_files(source: Path, output: Path, convert: Any) -> None:
    """Rewrites every safetensors file; what is in memory is one of them."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source} has no .safetensors file; only safetensors checkpoints are read")
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {file.name}: {error}; the file is damaged") from error
        made = convert(tensors)
        save_file({key: tensor.contiguous() for key, tensor in made.items()}, output / file.name, metadata={"format": "pt"})
        (output / file.name).chmod(file.stat().st_mode)
        weight_map |= dict.fromkeys(made, file.name)
        size += sum(tensor.nbytes for tensor in made.values())
    if (source / INDEX).is_file():
        _write_json(output / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _finish(source: Path, output: Path, changes: dict[str, Any], note: str) -> None:
    """Copies what is neither weights nor measured on them, the card with a new `note`, config.json with `changes` (None removes a
    key). Flushes it all."""
    for file in source.iterdir():
        if (
            file.is_file()
            and not file.name.startswith(".")
            and file.suffix != ".safetensors"
            and file.name not in (INDEX, EVALUATION, BENCH, "config.json")
        ):
            shutil.copy2(file, output / file.name)
    config = _read_json(source / "config.json") | changes
    _write_json(output / "config.json", {key: value for key, value in config.items() if value is not None or key not in changes})
    _note_on_card(output, note)
    for file in [*output.iterdir(), output]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _note_on_card(directory: Path, note: str) -> None:
    """Replaces what the model card says of packing, where there is a card."""
    card = directory / CARD
    if card.is_file():
        card.write_text(card.read_text("utf-8").split(PACKED)[0] + note, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
