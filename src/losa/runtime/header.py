"""The header of a packed checkpoint: `quantization_config` in its `config.json`, checked before anything is believed.

    {"quant_method": "losa", "version": 1, "values": "bfloat16", "layers": {"model.layers.0.mlp.up_proj": 151552, ...}}

`layers` names every packed linear layer with the number of its stored values. Shapes are the model's; together they fix the
dtype and shape of every packed tensor, which `check_files` compares with what the safetensors files say before one is read.
transformers makes `SparseConfig` of this dictionary; so it is also what a user passes to pack a checkpoint while it is opened:

    AutoModelForCausalLM.from_pretrained(directory, quantization_config=losa.SparseConfig())
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from losa.runtime.linear import SparseLinear

METHOD = "losa"
VERSION = 1
VALUES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
_DTYPES = {torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8", torch.int64: "I64", torch.float32: "F32"}


class SparseConfig(QuantizationConfigMixin):
    """How linear layers are packed.

    Args:
        values: `bfloat16`, nothing is lost; or `int8`, rounded with a scale per row.
        layers: stored values by the name of the layer, in a packed checkpoint; empty to pack a dense one while it is opened.
        version: of the format.

    Raises:
        ValueError: anything else, with what was found.
    """

    def __new__(cls, values: str = "bfloat16", *args: Any, **kwargs: Any) -> Self:
        """A class for every type of values. A packed checkpoint that is opened with another configuration than its own is refused
        by transformers only if the two classes have different names; else it takes the checkpoint's, and warns."""
        own = type(f"SparseConfig of {values} values", (cls,), {"__module__": cls.__module__}) if cls is SparseConfig else cls
        return super().__new__(own)

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles, which look for a class by its name."""
        return SparseConfig, (self.values, self.layers, self.version)

    def __init__(
        self, values: str = "bfloat16", layers: Mapping[str, int] | None = None, version: int = VERSION, **unknown: Any
    ) -> None:
        method = unknown.pop("quant_method", METHOD)
        if method != METHOD:
            raise ValueError(f"quant_method is {method!r}, expected {METHOD!r}: this is no packed LoSA checkpoint")
        if version != VERSION or isinstance(version, bool):
            raise ValueError(f"packed format {version!r}, expected {VERSION}; update losa, or pack the model again")
        if values not in VALUES:
            raise ValueError(f"packed values are {values!r}, expected one of {', '.join(VALUES)}")
        if unknown:
            raise ValueError(f"unknown keys in the packed header: {', '.join(sorted(map(str, unknown)))}")
        if not isinstance(layers or {}, Mapping):
            raise ValueError(f"layers is a {type(layers).__name__}, expected names and numbers of stored values")
        for name, count in (layers or {}).items():
            if not isinstance(name, str) or isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"layer {name!r} claims {count!r} stored values, expected a number of at least 0")
        self.quant_method = METHOD
        self.version = version
        self.values = values
        self.layers = dict(layers or {})

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored values."""
        return VALUES[self.values]


def swap_in(model: nn.Module, config: SparseConfig) -> dict[str, SparseLinear]:
    """Replaces the layers that the header names by empty `SparseLinear`s, on the model's (meta) device; returns them.

    Raises:
        ValueError: a name that the model has no linear layer for, or more values than the layer has weights.
    """
    modules = dict(model.named_modules())
    made = {}
    for name, count in config.layers.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = f"a {type(linear).__name__}" if linear is not None else "nothing of that name"
            raise ValueError(f"the packed header names {name}, where {type(model).__name__} has {found}")
        if count > linear.weight.numel():
            raise ValueError(f"{name}: {count} stored values, more than its {linear.weight.numel()} weights")
        with torch.device("meta"):
            made[name] = SparseLinear(linear.in_features, linear.out_features, count, config.dtype, linear.bias is not None)
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
        try:
            with safe_open(file, "pt") as tensors:
                for key in expected.keys() & set(tensors.keys()):
                    found = tensors.get_slice(key)
                    if (found.get_dtype(), found.get_shape()) != expected[key]:
                        shape = f"{found.get_dtype()} {found.get_shape()}"
                        raise ValueError(f"{key} is {shape}, expected {expected[key][0]} {expected[key][1]}; the file is damaged")
                    del expected[key]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {Path(file).name}: {error}; the file is damaged, pack the model again") from error
    if expected:
        raise ValueError(f"the packed checkpoint lacks {min(expected)} and {len(expected) - 1} more tensors")
