"""The header of a packed checkpoint: `quantization_config` in its `config.json`, checked before anything is believed.

    {"quant_method": "losa", "version": 1, "values": "bfloat16", "layers": {"model.layers.0.mlp.up_proj": 151552, ...}}

`layers` names every packed linear layer with the number of its stored values. Shapes are the model's; together they fix the
dtype and shape of every packed tensor, which `check_files` compares with what the safetensors files say before one is read.
Where the output head is packed as well, `head` says with which values, and `tied` whether it was the embedding.
transformers makes `SparseConfig` of this dictionary; so it is also what a user passes to pack a checkpoint while it is opened:

    AutoModelForCausalLM.from_pretrained(directory, quantization_config=losa.SparseConfig())
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from losa.runtime.linear import SparseLinear
from losa.runtime.values import HEADS, TYPES, ValueType
from losa.system.doors import shown, tensor_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "losa"
KEEP = "keep"
VERSION = 1
_DTYPES = {torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32"}


class SparseConfig(QuantizationConfigMixin):
    """How linear layers are packed.

    Args:
        values: `bfloat16`, nothing is lost; `int8`, rounded with a scale per row; or `int4`, with one for 64 columns as well.
        layers: stored values by the name of the layer, in a packed checkpoint; empty to pack a dense one while it is opened.
        version: of the format.
        head: values of the output head, `int8` or `int4`, or `keep`, which leaves it dense. None: `int8` if values are rounded,
            else `keep`.
        tied: whether the dense model uses its embedding as its head; only in a packed checkpoint with a packed head.

    Raises:
        ValueError: anything else, with what was found.
    """

    def __new__(cls, values: str = "bfloat16", *args: Any, **kwargs: Any) -> Self:
        """A class for every type of values. A packed checkpoint that is opened with another configuration than its own is refused
        by transformers only if the two classes have different names; else it takes the checkpoint's, and warns."""
        own = type(f"SparseConfig of {values} values", (cls,), {"__module__": cls.__module__}) if cls is SparseConfig else cls
        made: Self = super().__new__(own)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which look for a class by its name."""
        return SparseConfig, (self.values, self.layers, self.version)

    def __init__(
        self,
        values: str = "bfloat16",
        layers: Mapping[str, int] | None = None,
        version: int = VERSION,
        head: str | None = None,
        tied: bool = False,
        **unknown: Any,
    ) -> None:
        method = unknown.pop("quant_method", METHOD)
        if method != METHOD:
            raise ValueError(f"quant_method is {shown(method)}, expected {METHOD!r}: this is no packed LoSA checkpoint")
        if type(version) is not int or version != VERSION:
            raise ValueError(f"packed format {shown(version)}, expected {VERSION}; update losa, or pack the model again")
        if not isinstance(values, str) or values not in TYPES:
            raise ValueError(f"packed values are {shown(values)}, expected one of {', '.join(TYPES)}")
        if head is not None and (not isinstance(head, str) or head not in (KEEP, *HEADS)):
            raise ValueError(f"values of the head are {shown(head)}, expected one of {', '.join((*HEADS, KEEP))}")
        if not isinstance(tied, bool):
            raise ValueError(f"tied is {shown(tied)}, expected true or false")
        if unknown:
            raise ValueError(f"unknown keys in the packed header: {', '.join(sorted(map(str, unknown)))[:200]}")
        layers = {} if layers is None else layers
        if not isinstance(layers, Mapping):
            raise ValueError(f"layers is a {type(layers).__name__}, expected names and numbers of stored values")
        for name, count in layers.items():
            if not isinstance(name, str) or isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"layer {shown(name)} claims {shown(count)} stored values, expected a number of at least 0")
        self.quant_method = METHOD
        self.version = version
        self.values = values
        self.layers = dict(layers)
        self.head = head or ("int8" if TYPES[values].rounds and not layers else KEEP)
        self.tied = tied

    def type_of(self, is_head: bool) -> ValueType:
        """Of the stored values of a packed layer, a block's or the output head."""
        return TYPES[self.head if is_head and self.head != KEEP else self.values]

    def to_dict(self) -> dict[str, Any]:
        """The header; nothing of a head that is not packed."""
        found = super().to_dict()
        return {key: value for key, value in found.items() if key not in ("head", "tied") or self.head != KEEP}


def head_of(model: "PreTrainedModel") -> dict[str, nn.Linear]:
    """The linear layer that makes logits, by its name; empty where there is none."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if module is head and isinstance(module, nn.Linear)}


def swap_in(model: "PreTrainedModel", config: SparseConfig) -> dict[str, SparseLinear]:
    """Replaces the layers that the header names by empty `SparseLinear`s, on the model's (meta) device; returns them.

    Raises:
        ValueError: a name that the model has no linear layer for, or more values than the layer has weights.
    """
    modules, head = dict(model.named_modules()), head_of(model)
    made = {}
    for name, count in config.layers.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = f"a {type(linear).__name__}" if linear is not None else "nothing of that name"
            raise ValueError(f"the packed header names {shown(name)}, where {type(model).__name__} has {found}")
        if count > linear.weight.numel():
            raise ValueError(f"{name}: {count} stored values, more than its {linear.weight.numel()} weights")
        with torch.device("meta"):
            made[name] = SparseLinear(
                linear.in_features, linear.out_features, count, config.type_of(name in head), linear.bias is not None
            )
        model.set_submodule(name, made[name])
    return made


def check_files(files: Iterable[str | Path], layers: Mapping[str, SparseLinear]) -> None:
    """Compares the safetensors files' own headers with what the packed layers need. No tensor is read.

    Raises:
        ValueError: a file that is not safetensors or was cut short, a tensor that is missing, of another dtype or shape.
    """
    expected = {
        f"{name}.{key}": (_DTYPES[parameter.dtype], list(parameter.shape))
        for name, layer in layers.items()
        for key, parameter in layer.named_parameters()
        if key != "bias"
    }
    for file in files:
        heads = tensor_heads(Path(file))
        for key in expected.keys() & heads.keys():
            if heads[key] != expected[key]:
                found = f"{heads[key][0]} {heads[key][1]}"
                raise ValueError(f"{key} is {found}, expected {expected[key][0]} {expected[key][1]}; the file is damaged")
            del expected[key]
    if expected:
        raise ValueError(f"the packed checkpoint lacks {min(expected)} and {len(expected) - 1} more tensors")
