"""`losa pack` and `losa unpack`: from a sparse checkpoint to a packed one and back, file by file, without building the model.

A packed checkpoint is an ordinary directory: `config.json` with the header (`losa.runtime.header`), and safetensors files in
which the weight of every linear layer of the decoder is four small tensors instead of one large one. Everything else, from
embeddings to tokenizer, is as it was. The directory appears under its name only when it is complete.
"""

import json
import logging
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from losa.config import LosaConfig
from losa.models import check_supported, find_decoder
from losa.models.opening import check_model, open_config
from losa.models.precision import name_of
from losa.runtime.card import BETTER, NOTE, ROUNDING, write_note
from losa.runtime.format import PARTS, PackedWeight, check, pack, unpack
from losa.runtime.header import KEEP, METHOD, Packing, check_files, head_of, swap_in
from losa.runtime.values import ValueType
from losa.system.doors import INDEX, check_links, door, read_json, read_tensors, shown, tensor_heads, weight_files
from losa.system.output import BENCH, EVALUATION, LIST, RECORD, check_free, claim, commit, fresh, place
from losa.system.progress import progress
from losa.system.writing import writing

logger = logging.getLogger(__name__)


def pack_checkpoint(
    source: str | Path,
    output: str | Path,
    values: str | None = None,
    trust_remote_code: bool = False,
    head: str | None = None,
    overwrite: bool = False,
    activations: str = "bfloat16",
) -> dict[str, Any]:
    """Packs the linear layers of the decoder's blocks of a checkpoint, and its output head.

    Args:
        source: directory of a checkpoint, sparse or not.
        output: a directory that does not exist yet.
        values: a name of `losa.runtime.values`. None: what the run that made the checkpoint rounded to; bfloat16 if nothing.
        head: `int8`, `int4`, or `keep`; see `Packing`.
        overwrite: the output may be what losa wrote earlier; it is replaced.
        activations: `bfloat16`, or `int8` to allow kernels to round them; see `Packing`.

    Returns:
        `layers`, `sparsity` (ratio), `values`, `lossless`, whether all layers but the head unpack to themselves; `roundable`,
        whether `losa round` takes the source; `dense_bytes` and `packed_bytes` of the blocks' layers, `ratio` of the two; `head`,
        its values, and `head_bytes`, 0 for a head that stays as it was.

    Raises:
        ValueError: nothing to pack there, a layer's weight is not in the files, or the output exists.
    """
    source, output = Path(source), Path(output)
    config = Packing(values or _rounded_to(source) or "bfloat16", head=head, activations=activations)
    with claim(output):
        return _pack_claimed(source, output, config, trust_remote_code, overwrite, needs_head=head is not None)


def _pack_claimed(
    source: Path, output: Path, config: Packing, trust_remote_code: bool, overwrite: bool, needs_head: bool
) -> dict[str, Any]:
    _check(source, output, overwrite)
    if is_packed(source):
        raise ValueError(f"{source} is packed already; losa unpack gives its dense checkpoint back")
    model = _skeleton(source, trust_remote_code)
    check_links(source)
    check_supported(model)
    linears = dict(find_decoder(model).linears())
    total = sum(linear.weight.numel() for linear in linears.values())
    sizes: dict[str, Any] = {
        "layers": len(linears),
        "sparsity": 0.0,
        "values": config.values,
        "dense_bytes": 2 * total,
        "packed_bytes": 0,
        "head_bytes": 0,
        "lossless": True,
        "roundable": _roundable(source),
    }
    places, last = {name: name for name in linears}, head_of(model)  # layer -> whose weight it is in the files
    home = _home_of_head(model, source)
    if home is not None and not any(f"{home[0]}.weight" in tensor_heads(file) for file in weight_files(source)):
        home = None  # a family whose files call it something else
    if config.head != KEEP and home is None and needs_head:
        raise ValueError(f"{type(model).__name__} has no linear output head that losa can pack; use --head keep")
    if config.head != KEEP and home is not None:
        linears |= last
        home_name, config.tied = home
        places |= dict.fromkeys(last, home_name)
    else:
        config.head = KEEP
    partial, cast = fresh(output), Counter[torch.dtype]()
    with writing(output), progress(None, "packing", total=len(linears)) as bar:

        def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            made = {}
            for key, tensor in tensors.items():
                here = [name for name, place in places.items() if f"{place}.weight" == key]
                repeated = config.tied and key.removesuffix(".weight") in last  # the embedding, once more
                if (not here and not repeated) or (config.tied and here == list(last)):
                    made[key] = tensor
                for name in here:
                    cast[tensor.dtype] += 1
                    packed, same = _pack_layer(name, tensor, linears[name].weight.shape, config.type_of(name in last))
                    sizes["lossless"] &= same or name in last
                    parts = packed.tensors()
                    made |= {f"{name}.{part}": found for part, found in parts.items()}
                    config.layers[name] = packed.stored
                    sizes["head_bytes" if name in last else "packed_bytes"] += sum(found.nbytes for found in parts.values())
                    bar.update()
            return made

        _convert_files(source, partial, convert)
        missing = sorted(linears.keys() - config.layers.keys())
        if missing:
            raise ValueError(
                f"the files of {source} hold no {missing[0]}.weight, nor {len(missing) - 1} more of the model's layers"
            )
        for dtype in cast.keys() - {torch.bfloat16}:
            logger.info("%d layers rounded from %s to bfloat16", cast[dtype], name_of(dtype))
        changes: dict[str, Any] = {"dtype": "bfloat16", "torch_dtype": None, "quantization_config": config.to_dict()}
        if config.tied:
            changes["tie_word_embeddings"] = False
        note = ("" if sizes["lossless"] else ROUNDING) + NOTE
        note = note.format(name=output.name, values=config.values, better=BETTER if sizes["roundable"] else "")
        _finish(source, partial, changes, note, output.name)
        commit(output)
    sizes["sparsity"] = 1 - sum(count for name, count in config.layers.items() if name not in last) / total
    return sizes | {"head": config.head, "ratio": sizes["packed_bytes"] / sizes["dense_bytes"]}


def _rounded_to(source: Path) -> str | None:
    """The values that a run of losa, by its record, put the weights of its result on the grid of."""
    record = source / RECORD
    with door(record, "use", "; say what to store with --values"):
        values: str | None = LosaConfig.from_dict(read_json(record)["config"]).values if record.is_file() else None
    return values


def _roundable(source: Path) -> bool:
    """Whether there is a record of a run that did not round; one that is damaged says nothing."""
    with suppress(ValueError):
        return (source / RECORD).is_file() and _rounded_to(source) is None
    return False


def _pack_layer(name: str, W_OI: Tensor, shape: torch.Size, kind: ValueType) -> tuple[PackedWeight, bool]:
    """The packed weight, and whether it unpacks to itself."""
    if W_OI.shape != shape or not W_OI.is_floating_point():
        raise ValueError(f"{name}.weight is {W_OI.dtype} {tuple(W_OI.shape)} in the file, expected floats of {tuple(shape)}")
    rounded = W_OI.bfloat16()
    if not torch.isfinite(rounded).all():
        raise ValueError(f"{name}.weight holds NaN or infinity in bfloat16; the checkpoint is damaged")
    packed = pack(rounded, kind)
    same = torch.equal(unpack(packed), rounded)
    if not kind.rounds and not same:
        raise RuntimeError(f"{name}: what was packed does not unpack to itself; the result is void")
    return packed, same


def _home_of_head(model: PreTrainedModel, source: Path) -> tuple[str, bool] | None:
    """Whose weight the head's is in the files, and whether it is the embedding's. None: there is no linear head, or it is tied by
    a configuration inside the configuration, which would have to be taken apart."""
    embedding = model.get_input_embeddings()
    head = next(iter(head_of(model)), None)
    if head is None or not getattr(model.config, "tie_word_embeddings", False):
        return (head, False) if head else None
    if "text_config" in read_json(source / "config.json"):
        return None
    return next(name for name, module in model.named_modules() if module is embedding), True


def unpack_checkpoint(source: str | Path, output: str | Path, trust_remote_code: bool = False, overwrite: bool = False) -> int:
    """Writes the dense checkpoint, with its zeros, that any software opens: bitwise the packed one for bfloat16 values.

    Returns:
        The number of layers unpacked.

    Raises:
        ValueError: `source` is not a packed checkpoint, is damaged, or the output exists.
    """
    source, output = Path(source), Path(output)
    with claim(output):
        return _unpack_claimed(source, output, trust_remote_code, overwrite)


def _unpack_claimed(source: Path, output: Path, trust_remote_code: bool, overwrite: bool) -> int:
    _check(source, output, overwrite)
    config = read_header(source)
    check_links(source)
    model = _skeleton(source, trust_remote_code)
    linears, head = dict(find_decoder(model).linears()), head_of(model)
    if config.head != KEEP:
        linears |= head
    shapes = {name: linear.weight.shape for name, linear in linears.items()}
    wrong = config.layers.keys() - shapes.keys()
    if wrong:
        raise ValueError(f"the packed header names {shown(min(wrong))}, which is no linear layer of the model")
    homes = {key: file for file in weight_files(source) for key in tensor_heads(file)}
    unpacked = set()
    partial = fresh(output)
    with writing(output), progress(None, "unpacking", total=len(config.layers)) as bar:

        def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            packed = {f"{name}.{part}" for name in config.layers for part in PARTS}
            made = {key: tensor for key, tensor in tensors.items() if key not in packed}
            for name in config.layers:
                if f"{name}.weight" in tensors:
                    parts = _parts_of(name, tensors, homes)
                    W_OI = _unpack_layer(name, parts, shapes[name], config.type_of(name in head), config.layers[name])
                    if not (config.tied and name in head):  # the embedding is its dense weight
                        made[f"{name}.weight"] = W_OI
                    unpacked.add(name)
                    bar.update()
            return made

        _convert_files(source, partial, convert)
        missing = sorted(config.layers.keys() - unpacked)
        if missing:
            raise ValueError(
                f"the files of {source} hold no {missing[0]}.weight, nor {len(missing) - 1} more that its header names"
            )
        changes = {"quantization_config": None} | ({"tie_word_embeddings": True} if config.tied else {})
        _finish(source, partial, changes, "", output.name)
        commit(output)
    return len(config.layers) - (config.head != KEEP)


def _parts_of(name: str, tensors: dict[str, Tensor], homes: dict[str, Path]) -> dict[str, Tensor]:
    """The tensors of a packed layer: of the file at hand, and of those where `save_pretrained` may have put some of them."""
    wanted = {f"{name}.{part}" for part in PARTS}
    found = {key: tensors[key] for key in wanted & tensors.keys()}
    elsewhere = (wanted & homes.keys()) - found.keys()
    for file in {homes[key] for key in elsewhere}:
        found |= dict(read_tensors(file, lambda key, _: key in elsewhere))
    return found


def _unpack_layer(name: str, tensors: dict[str, Tensor], shape: torch.Size, kind: ValueType, claimed: int) -> Tensor:
    found: dict[str, Any] = {field: tensors.get(f"{name}.{part}") for part, field in PARTS.items()}
    if any(found[field] is None for field in ("values", "mask", "offsets")):
        raise ValueError(f"the packed checkpoint lacks a part of {name}; it is damaged, pack the model again")
    packed = PackedWeight(**found, rows=shape[0], columns=shape[1], type=kind)
    check(packed, name, claimed)
    return unpack(packed)


def is_packed(directory: Path) -> bool:
    """Whether `config.json` has a header of ours."""
    path = directory / "config.json"
    found = read_json(path).get("quantization_config") if path.is_file() else None
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def packed_layers(directory: Path) -> dict[str, tuple[int, int]]:
    """Stored values and weights of every packed layer of the blocks, in the model's order: the bits of the masks, counted.

    Raises:
        ValueError: a header that does not fit the model, its files or the masks.
    """
    config, model = read_header(directory), _skeleton(directory, False)
    weights = {name: linear.weight.numel() for name, linear in find_decoder(model).linears().items()}
    files = weight_files(directory)
    check_files(files, swap_in(model, config), model.base_model_prefix)
    counts: dict[str, int] = {}
    for file in files:
        for key, mask in read_tensors(file, lambda key, _: key.endswith(".weight_mask")):
            name = key.removesuffix(".weight_mask")
            if name not in config.layers:
                raise ValueError(f"the files hold {shown(name)} packed, which the header does not name; pack the model again")
            counts[name] = int(np.bitwise_count(mask.numpy()).sum(dtype=np.int64))
            if counts[name] != config.layers[name]:
                raise ValueError(f"{name}: the masks mark {counts[name]:,} weights, the header says {config.layers[name]:,}")
    return {name: (counts[name], numel) for name, numel in weights.items() if name in counts}


def read_header(directory: Path) -> Packing:
    """The header of a packed checkpoint.

    Raises:
        ValueError: not a packed checkpoint, or a header that cannot be believed.
    """
    if not is_packed(directory):
        raise ValueError(f"{directory} is not packed: its config.json has no quantization_config of losa")
    return Packing.of(read_json(directory / "config.json")["quantization_config"])


def _skeleton(source: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The dense model without weights."""
    if not source.is_dir():
        raise ValueError(f"{source} is not a directory; expected one with config.json and safetensors files")
    return check_model(open_config(str(source), trust_remote_code), str(source), trust_remote_code)


def _check(source: Path, output: Path, overwrite: bool) -> None:
    """Refuses an output that is there, unless losa wrote it and `overwrite` is set; and the source itself."""
    final = place(output)
    if final == place(source):
        raise ValueError(f"{output} is what would be read and exists; choose another directory")
    if final.exists() and not overwrite:
        more = ", or add --overwrite to replace it" if (final / LIST).exists() else ""
        raise ValueError(f"{output} exists; choose another directory, or remove it first{more}")
    check_free(output, overwrite)


def _convert_files(source: Path, output: Path, convert: Any) -> None:
    """Rewrites every safetensors file; what is in memory is one of them."""
    files = weight_files(source)
    if not files:
        raise ValueError(f"{source} has no .safetensors file; only safetensors checkpoints are read")
    weight_map: dict[str, str] = {}
    size = 0
    for file in files:
        if not (made := convert(dict(read_tensors(file)))):  # but parts of layers whose values are in another file
            continue
        save_file({key: tensor.contiguous() for key, tensor in made.items()}, output / file.name, metadata={"format": "pt"})
        (output / file.name).chmod(file.stat().st_mode)
        weight_map |= dict.fromkeys(made, file.name)
        size += sum(tensor.nbytes for tensor in made.values())
    if (source / INDEX).is_file():
        _write_json(output / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _finish(source: Path, output: Path, changes: dict[str, Any], note: str, name: str) -> None:
    """Copies what is neither weights nor measured on them, the card with a new `note`, config.json with `changes` (None removes a
    key). `name` is what the output will be called."""
    for file in source.iterdir():
        if (
            file.is_file()
            and not file.name.startswith(".")
            and file.suffix != ".safetensors"
            and file.name not in (INDEX, EVALUATION, BENCH, LIST, "config.json")
        ):
            shutil.copy2(file, output / file.name)
    for file in (source / CHAT_TEMPLATE_DIR).glob("*.jinja"):
        (output / CHAT_TEMPLATE_DIR).mkdir(exist_ok=True)
        shutil.copy2(file, output / CHAT_TEMPLATE_DIR / file.name)
    config = read_json(source / "config.json") | changes
    _write_json(output / "config.json", {key: value for key, value in config.items() if value is not None or key not in changes})
    write_note(output, note, name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
