"""The header of a packed checkpoint: `quantization_config` in its `config.json`, checked before anything is believed.

    {"quant_method": "losa", "version": 1, "values": "bfloat16", "layers": {"model.layers.0.mlp.up_proj": 151552, ...}}

`layers` names every packed linear layer with the number of its stored values. Shapes are the model's; together they fix the
dtype and shape of every packed tensor, which `check_files` compares with what the safetensors files say before one is read.
Where the output head is packed as well, `head` says with which values, and `tied` whether it was the embedding; `activations` is
there where they may be rounded.
`Packing` is this dictionary, checked. transformers and vLLM each make a class of their own of it (`losa.integrations`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from losa.runtime.dispatch import ACTIVATIONS
from losa.runtime.linear import SparseLinear
from losa.runtime.values import HEADS, TYPES, ValueType
from losa.system.doors import shown, tensor_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "losa"
KEEP = "keep"
VERSION = 1
_DTYPES = {torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32"}


@dataclass
class Packing:
    """How linear layers are packed: plain data, which `losa.integrations` hands to other software as each wants it.

    Attributes:
        values: `bfloat16`, nothing is lost; `int8`, rounded with a scale per row; or `int4`, with one for 64 columns as well.
        layers: stored values by the name of the layer, in a packed checkpoint; empty to pack a dense one while it is opened.
        version: of the format.
        head: values of the output head, `int8` or `int4`, or `keep`, which leaves it dense. None: `int8` if values are rounded,
            else `keep`.
        tied: whether the dense model uses its embedding as its head; only in a packed checkpoint with a packed head.
        activations: `int8`: kernels that are faster for it may round the inputs of the blocks' layers to eight bits, with a scale
            for 64 columns. `bfloat16`: none does.
        quant_method: always `losa`.

    Raises:
        ValueError: anything else, with what was found.
    """

    values: str = "bfloat16"
    layers: dict[str, int] = field(default_factory=dict)
    version: int = VERSION
    head: str | None = None
    tied: bool = False
    activations: str = "bfloat16"
    quant_method: str = METHOD

    def __post_init__(self) -> None:
        if self.quant_method != METHOD:
            found = shown(self.quant_method)
            raise ValueError(f"quant_method is {found}, expected {METHOD!r}: this is no packed LoSA checkpoint")
        if type(self.version) is not int or self.version != VERSION:
            raise ValueError(f"packed format {shown(self.version)}, expected {VERSION}; update losa, or pack the model again")
        if not isinstance(self.values, str) or self.values not in TYPES:
            raise ValueError(f"packed values are {shown(self.values)}, expected one of {', '.join(TYPES)}")
        if self.head is not None and (not isinstance(self.head, str) or self.head not in (KEEP, *HEADS)):
            raise ValueError(f"values of the head are {shown(self.head)}, expected one of {', '.join((*HEADS, KEEP))}")
        if not isinstance(self.tied, bool):
            raise ValueError(f"tied is {shown(self.tied)}, expected true or false")
        if not isinstance(self.activations, str) or self.activations not in ACTIVATIONS:
            raise ValueError(f"activations are {shown(self.activations)}, expected one of {', '.join(ACTIVATIONS)}")
        if self.activations != "bfloat16" and not TYPES[self.values].rounds:
            raise ValueError(
                f"activations are {self.activations} with {self.values} values, expected int8 or int4 values with them"
            )
        if not isinstance(self.layers, Mapping):
            raise ValueError(f"layers is a {type(self.layers).__name__}, expected names and numbers of stored values")
        for name, count in self.layers.items():
            if not isinstance(name, str) or isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"layer {shown(name)} claims {shown(count)} stored values, expected a number of at least 0")
        self.layers = dict(self.layers)
        self.head = self.head or ("int8" if TYPES[self.values].rounds and not self.layers else KEEP)

    @classmethod
    def of(cls, header: Mapping[Any, Any]) -> "Packing":
        """From `quantization_config` of a `config.json`.

        Raises:
            ValueError: unknown keys, or what the values themselves are refused for.
        """
        unknown = sorted(map(str, header.keys() - {known.name for known in fields(Packing)}))
        if unknown:
            raise ValueError(f"unknown keys in the packed header: {', '.join(unknown)[:200]}")
        return Packing(**header)

    def type_of(self, is_head: bool) -> ValueType:
        """Of the stored values of a packed layer, a block's or the output head."""
        return TYPES[self.head if is_head and self.head and self.head != KEEP else self.values]

    def activations_of(self, is_head: bool) -> str:
        """Of the inputs of a packed layer; those of the head stay as they are."""
        return "bfloat16" if is_head else self.activations

    def to_dict(self) -> dict[str, Any]:
        """The header; nothing of a head that is not packed."""
        found = {"quant_method": self.quant_method, "version": self.version, "values": self.values, "layers": dict(self.layers)}
        found |= {} if self.head == KEEP else {"head": self.head, "tied": self.tied}
        return found | ({} if self.activations == "bfloat16" else {"activations": self.activations})


def head_of(model: "PreTrainedModel") -> dict[str, nn.Linear]:
    """The linear layer that makes logits, by its name; empty where there is none."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if module is head and isinstance(module, nn.Linear)}


def swap_in(model: "PreTrainedModel", config: Packing) -> dict[str, SparseLinear]:
    """Replaces the layers that the header names by empty `SparseLinear`s, on the model's (meta) device; returns them by the names
    that they have there. The header then has those that they have in the model.

    Raises:
        ValueError: a name that the model has no linear layer for, or more values than the layer has weights.
    """
    modules, head = dict(model.named_modules()), head_of(model)
    made, names = {}, _names(model, config)
    for stored, name in names.items():
        count = config.layers[stored]
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = f"a {type(linear).__name__}" if linear is not None else "nothing of that name"
            raise ValueError(f"the packed header names {shown(name)}, where {type(model).__name__} has {found}")
        if count > linear.weight.numel():
            raise ValueError(f"{name}: {count} stored values, more than its {linear.weight.numel()} weights")
        with torch.device("meta"):
            sizes, is_head = (linear.in_features, linear.out_features, count), name in head
            kinds = (config.type_of(is_head), linear.bias is not None, config.activations_of(is_head))
            made[stored] = SparseLinear(*sizes, *kinds)
        model.set_submodule(name, made[stored])
    config.layers = {name: config.layers[stored] for stored, name in names.items()}
    return made


def _names(model: "PreTrainedModel", config: Packing) -> dict[str, str]:
    """The packed layers' names in the header, and in the model. One without a head, as `AutoModel` opens and saves, has them
    without the prefix that they have in others. A packed head that the model has none for is left out, of the header as well."""
    prefix, modules = f"{model.base_model_prefix}.", dict(model.named_modules())
    names = {}
    for stored in config.layers:
        options = (stored, prefix + stored, stored.removeprefix(prefix))
        names[stored] = next((name for name in options if name in modules), stored)
    if config.head == KEEP or head_of(model):
        return names
    if config.tied:  # what is saved without it has a head again where it is opened with one
        model.config.tie_word_embeddings = True
    config.head, config.tied = KEEP, False
    return {stored: name for stored, name in names.items() if name in modules or name.startswith(prefix)}


def check_files(files: Iterable[str | Path], layers: Mapping[str, SparseLinear], prefix: str) -> None:
    """Compares the safetensors files' own headers with what the packed layers need. No tensor is read.

    Args:
        files: of the checkpoint.
        layers: by their names in the header.
        prefix: of the model's inner one, which names in the files may have where those in the header do not, or the reverse.

    Raises:
        ValueError: a file that is not safetensors or was cut short, a tensor that is missing, of another dtype or shape.
    """
    expected = {
        f"{name}.{key}": (_DTYPES[parameter.dtype], list(parameter.shape))
        for name, layer in layers.items()
        for key, parameter in layer.named_parameters()
        if key != "bias"
    }
    bare = {key.removeprefix(f"{prefix}."): key for key in expected}
    for file in files:
        heads = {bare.get(key.removeprefix(f"{prefix}."), key): head for key, head in tensor_heads(Path(file)).items()}
        for key in expected.keys() & heads.keys():
            if heads[key] != expected[key]:
                found = f"{heads[key][0]} {heads[key][1]}"
                raise ValueError(f"{key} is {found}, expected {expected[key][0]} {expected[key][1]}; the file is damaged")
            del expected[key]
    if expected:
        raise ValueError(f"the packed checkpoint lacks {min(expected)} and {len(expected) - 1} more tensors")
