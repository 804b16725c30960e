"""Packed layers in an engine that merges and shards: q, k and v are one product there, gate and up another, and a process has
only its own rows or columns of each.

What an engine cuts and puts together are dense matrices, so a packed format of its own for every shard is not needed:

    a dense checkpoint with zeros   loads as any other; a layer is packed when its weight is complete (`PackedAfterLoading`)
    a packed checkpoint             each matrix comes as numbers and scales (`packed.expand`), which the engine's own loader cuts
                                    and merges; nothing is rounded again, and they are packed when complete (`PackedBefore`)

Both are linear methods as vLLM has them, an object that makes a layer's parameters, finishes them and multiplies. They need
nothing of it: a layer is known by its attributes.

Legend: O out_features, I in_features, G scale groups along I.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from losa.runtime import dispatch
from losa.runtime.format import PARTS, PackedWeight, check, compress, expand, pack
from losa.runtime.linear import SparseLinear
from losa.runtime.memory import HugePages, move_to_huge_pages
from losa.runtime.values import ValueType

MERGED = ("weight", "weight_scale", "weight_groups")  # numbers, and scales of rows and of groups of columns: what `expand` gives
DENSE_BYTES = 2  # of a weight in bfloat16


class _Packs:
    """What the linear methods have in common.

    Args:
        kind: the type of the stored values.
        pages: where packed weights live on a CPU.
    """

    def __init__(self, kind: ValueType, pages: HugePages) -> None:
        self.kind, self.pages = kind, pages

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """A layer's parameters, for this process's share of the weight; `attributes` has the engine's `weight_loader`.

        Raises:
            ValueError: that share cannot be loaded.
        """
        self._create(layer, (sum(output_partition_sizes), input_size_per_partition), input_size, params_dtype, attributes)

    def _create(self, layer: Any, shape: tuple[int, int], columns: int, dtype: torch.dtype, attributes: dict[str, Any]) -> None:
        raise NotImplementedError

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x W^T + b`, `[..., I]` -> `[..., O]`, by the kernel of the device."""
        return multiply(layer, x, bias)


class PackedAfterLoading(_Packs):
    """A linear method that loads a dense weight and packs it, where that makes it smaller.

    Args:
        dense: makes the method that a layer keeps where packing it would not make it smaller.
    """

    def __init__(self, kind: ValueType, pages: HugePages, dense: Callable[[], Any]) -> None:
        super().__init__(kind, pages)
        self.dense = dense

    def _create(self, layer: Any, shape: tuple[int, int], columns: int, dtype: torch.dtype, attributes: dict[str, Any]) -> None:
        _register(layer, "weight", torch.empty(shape, dtype=dtype), **attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Packs, and lets go of the dense weight; one that is tied stays with the other layer that uses it."""
        W_OI = layer.weight.data
        density = (torch.count_nonzero(W_OI) / max(1, W_OI.numel())).item()
        if self.kind.bytes_per_weight(density) >= DENSE_BYTES:
            layer.quant_method = self.dense()
            layer.quant_method.process_weights_after_loading(layer)
            return
        _replace(layer, pack(W_OI.bfloat16(), self.kind), self.pages)


class PackedBefore(_Packs):
    """A linear method that loads the packed matrices which one layer of the engine is made of.

    Args:
        names: of the matrices, as the header has them, in the engine's order.
        counts: their stored values, as the header claims.
    """

    def __init__(self, kind: ValueType, pages: HugePages, names: list[str], counts: list[int]) -> None:
        super().__init__(kind, pages)
        self.names, self.counts = names, counts

    def _create(self, layer: Any, shape: tuple[int, int], columns: int, dtype: torch.dtype, attributes: dict[str, Any]) -> None:
        """A parameter for each part of a packed matrix, all of them empty until their first matrix has come.

        Raises:
            ValueError: columns are cut inside of a group that shares a scale.
        """
        (rows, own), group = shape, self.kind.group
        if group and own != columns and own % group:
            found = f"{self.names[0]} has {columns} columns, {own} for each process"
            raise ValueError(
                f"{found}, and {self.kind.name} values share scales by {group}: pack int8 values, or use fewer processes"
            )
        merged = {"weight": torch.empty(rows, own, dtype=torch.int8 if self.kind.rounds else torch.bfloat16, device="meta")}
        stored = {"weight": self.kind.stored, "weight_mask": torch.uint8, "weight_offsets": torch.int64}
        if self.kind.rounds:
            merged["weight_scale"] = torch.empty(rows, dtype=torch.float32, device="meta")
            stored["weight_scale"] = torch.float32
        if group:
            merged["weight_groups"] = torch.empty(rows, -(-own // group), dtype=torch.uint8, device="meta")
            stored["weight_groups"] = torch.uint8
        gathering = _Gathering(self, layer, columns, merged, set(stored), attributes["weight_loader"])
        for part, kind in stored.items():
            loads = attributes | {"weight_loader": partial(gathering.take, part)}
            _register(layer, part, torch.empty(0, dtype=kind), **loads)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Every matrix has come by now.

        Raises:
            ValueError: one has not.
        """
        if not hasattr(layer, "sparse"):
            raise ValueError(f"the packed checkpoint lacks a part of {self.names[0]}; it is damaged, pack the model again")


@dataclass
class _Gathering:
    """Takes the parts of packed matrices as they come, hands complete ones to the engine's loader, and packs the layer when it is
    complete: of the whole model, one layer at a time is dense."""

    method: PackedBefore
    layer: Any
    columns: int  # of a matrix in the checkpoint
    merged: dict[str, Tensor]  # numbers and scales of the whole layer; on the meta device until the first of them come
    parts: set[str]  # that a matrix comes in
    load: Callable[..., None]  # the engine's
    come: dict[Any, dict[str, Tensor]] = field(default_factory=dict)
    done: int = 0  # matrices

    def take(self, part: str, parameter: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        """As an engine's `weight_loader`, for one part of one matrix; `shard` says which of the layer's.

        Raises:
            ValueError: the parts of a matrix disagree with each other, with the header or with the layer.
        """
        come = self.come.setdefault(shard, {})
        come[part] = tensor
        if come.keys() != self.parts:
            return
        del self.come[shard]
        kind, index = self.method.kind, shard_index(shard)
        fields: dict[str, Any] = {field: come.get(part) for part, field in PARTS.items()}
        packed = PackedWeight(**fields, rows=full_rows(self.layer, shard), columns=self.columns, type=kind)
        check(packed, self.method.names[index], self.method.counts[index])
        for name, found in zip(MERGED, expand(packed), strict=True):
            if found is not None:
                target = getattr(self.layer, name)
                if not target.numel():
                    target.data = torch.zeros_like(self.merged[name], device=target.device)
                self.load(target, found, *(() if shard is None else (shard,)))
        self.done += 1
        if self.done == len(self.method.names):
            numbers, scale, groups = (getattr(self.layer, name).data if name in self.merged else None for name in MERGED)
            assert numbers is not None
            _replace(self.layer, compress(numbers, scale, groups, kind), self.method.pages)


def shard_index(shard: Any) -> int:
    """Which of a merged layer's matrices, by what vLLM's loaders call it: `q`, `k`, `v`, a number, or nothing."""
    return {None: 0, "q": 0, "k": 1, "v": 2}[shard] if shard is None or isinstance(shard, str) else int(shard)


def full_rows(layer: Any, shard: Any) -> int:
    """Rows of a matrix in the checkpoint, whatever this process has of them."""
    if isinstance(shard, str):
        heads = layer.total_num_heads if shard == "q" else layer.total_num_kv_heads
        return int(heads * (getattr(layer, "v_head_size", layer.head_size) if shard == "v" else layer.head_size))
    if shard is not None:
        return int(layer.output_sizes[shard])
    if hasattr(layer, "total_num_heads"):  # fused in the checkpoint; the layer's own size counts shared heads twice
        return sum(full_rows(layer, part) for part in "qkv")
    return int(getattr(layer, "org_vocab_size", None) or layer.output_size)


def multiply(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` of a layer that was packed."""
    sparse = layer.sparse
    return dispatch.linear(x, sparse.packed, bias, sparse.kernel, sparse.index)


def _replace(layer: Any, packed: PackedWeight, pages: HugePages) -> None:
    """Puts a packed weight in the place of what it was made from."""
    for part in PARTS:
        layer._parameters.pop(part, None)
    layer.sparse = SparseLinear.from_packed(packed)
    move_to_huge_pages(layer.sparse, pages)


def _register(layer: Any, name: str, tensor: Tensor, **attributes: Any) -> None:
    """A parameter with what vLLM's loaders look for: which dimension is which, and who loads it."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    dimensions = {"output_dim": 0} if name == "weight_scale" else {"output_dim": 0, "input_dim": 1}
    for key, value in (dimensions | attributes).items():
        setattr(parameter, key, value)
    layer.register_parameter(name, parameter)
