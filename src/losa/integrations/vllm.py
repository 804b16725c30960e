"""The plug-in for vLLM: `pip install ".[vllm]"` in the sources, then `vllm serve DIRECTORY`.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in every process. From then on

    vllm serve llama-packed                               a packed checkpoint is opened by its own `quant_method`
    vllm serve llama-sparse --quantization losa           a dense one with zeros is packed while it loads, bfloat16 values
    vllm serve llama-sparse --quantization losa_int8      the same with int8 values, and losa_int4

A name of its own for each type of values, as vLLM's own online methods have them (`fp8_per_tensor`, ...). What else a header may
say is given as everywhere in vLLM:

    --hf-overrides '{"quantization_config": {"quant_method": "losa", "values": "int8", "head": "int4"}}'

This module is imported by vLLM only.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from losa.integrations.layers import PackedAfterLoading, PackedBefore
from losa.runtime.header import KEEP, METHOD, Packing
from losa.runtime.memory import HugePages
from losa.runtime.values import BFLOAT16


class PackWhileLoading(PackedAfterLoading, LinearMethodBase):
    """`PackedAfterLoading`, as vLLM knows a linear method."""


class OpenPacked(PackedBefore, LinearMethodBase):
    """`PackedBefore`, as vLLM knows a linear method."""


class SparseQuantization(QuantizationConfig):
    """`Packing` as vLLM takes it: `--quantization losa`."""

    name: ClassVar[str] = METHOD
    values: ClassVar[str] = BFLOAT16.name  # where no header says it

    def __init__(self, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing(self.values)
        self.pages = HugePages()

    def __repr__(self) -> str:
        return f"{self.name}({self.packing.values} values, head {self.packing.head})"

    def get_name(self) -> str:
        """What stands behind `--quantization`."""
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The packed values are bfloat16's, or were rounded from them."""
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: bfloat16 in tensor cores."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the header is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SparseQuantization":
        """Of a packed checkpoint's header, or of `--hf-overrides`.

        Raises:
            ValueError: as `Packing`.
        """
        return cls(Packing.of(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """The header's layers, by the names that the model has in vLLM."""
        self.packing.layers = hf_to_vllm_mapper.apply_dict(self.packing.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer's weight is loaded and multiplied; None for what is left to vLLM.

        Raises:
            ValueError: the header names a part of a merged layer only.
        """
        is_head = isinstance(layer, ParallelLMHead)
        if not is_head and not isinstance(layer, LinearBase):
            return None
        dense = UnquantizedEmbeddingMethod if is_head else UnquantizedLinearMethod
        kind = self.packing.type_of(is_head)
        if not self.packing.layers:
            return dense() if is_head and self.packing.head == KEEP else PackWhileLoading(kind, self.pages, dense)
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(leaf, [leaf])]
        if prefix in self.packing.layers:  # merged in the checkpoint, too
            names = [prefix]
        missing = [name for name in names if name not in self.packing.layers]
        if len(missing) == len(names):
            return dense()
        if missing:
            raise ValueError(f"the packed header names a part of {prefix}, but not {missing[0]}; vLLM needs all packed, or none")
        return OpenPacked(kind, self.pages, names, [self.packing.layers[name] for name in names])


class SparseInt8(SparseQuantization):
    """`--quantization losa_int8`."""

    name, values = f"{METHOD}_int8", "int8"


class SparseInt4(SparseQuantization):
    """`--quantization losa_int4`."""

    name, values = f"{METHOD}_int4", "int4"


def register() -> None:
    """Makes the methods known to vLLM; any number of times."""
    for method in (SparseQuantization, SparseInt8, SparseInt4):
        register_quantization_config(method.name)(method)
