"""The packed weight: one bit for every weight, one number for every weight that is not zero.

A `[O, I]` weight is cut into strips of 16 rows. Inside a strip a *word* covers 16 rows x g columns, g = 2 for bfloat16 values
and 4 for smaller ones: 32 or 64 mask bits, and expanded exactly one 64-byte register in the order the dot product instructions of
today's CPUs want. Values follow in the order of words and bits, so that a strip is read once, front to back:

    mask     [strips, words * 2g] uint8   bit r * g + c of a word (little endian): row r, column c of the word is stored
    values   [elements] of the type       `losa.runtime.values`; two int4 share a byte, the first in its low half
    offsets  [strips + 1] int64           first value of each strip; the last entry is how many there are
    scale    [O] float32                  types that round: W = scale * values
    groups   [strips, groups, 16] uint8   int4: W = scale * level(groups) * values, a byte for 64 columns of each row

This file is the reference in plain torch: any device, any shape. The kernels in csrc/ read the same tensors.

Legend: O out_features, I in_features, S strips, G scale groups along I, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from losa.bits import pack_bits, unpack_bits
from losa.runtime.integers import levels, quantize, to_codes, to_numbers
from losa.runtime.values import BFLOAT16, ValueType

STRIP = 16  # rows of a strip
CHUNK = 128  # mask bytes of a chunk: 1,024 weights, 16 rows x 64 columns for any type of values
PARTS = {  # tensors in a checkpoint, and the fields of `PackedWeight` that they are
    "weight": "values", "weight_mask": "mask", "weight_offsets": "offsets", "weight_scale": "scale", "weight_groups": "groups"
}  # fmt: skip


class PackedWeight(NamedTuple):
    """One packed weight; the fields are described at the top of this file. A tuple, because every call of a layer makes one."""

    mask: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    scale: torch.Tensor | None
    groups: torch.Tensor | None
    rows: int
    columns: int
    type: ValueType

    @property
    def stored(self) -> int:
        """How many values are stored."""
        return int(self.offsets[-1])

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it, by the names of `PARTS`."""
        found = {part: getattr(self, field) for part, field in PARTS.items()}
        return {part: tensor for part, tensor in found.items() if tensor is not None}


def mask_shape(rows: int, columns: int, values: ValueType) -> tuple[int, int]:
    """Shape of the mask bytes of a `[rows, columns]` weight."""
    return -(-rows // STRIP), -(-columns // values.columns) * 2 * values.columns


def groups_shape(rows: int, columns: int, values: ValueType) -> tuple[int, int, int] | None:
    """Shape of the scales of groups; None for a type without."""
    return (-(-rows // STRIP), -(-columns // values.group), STRIP) if values.group else None


def _by_words(W_OI: torch.Tensor, group: int) -> torch.Tensor:
    """`[O, I]`, padded with zeros, as `[strips, words, 16 * group]`: the order of the values."""
    padded = torch.nn.functional.pad(W_OI, (0, -W_OI.shape[1] % group, 0, -W_OI.shape[0] % STRIP))
    strips, words = padded.shape[0] // STRIP, padded.shape[1] // group
    return padded.view(strips, STRIP, words, group).transpose(1, 2).reshape(strips, words, STRIP * group)


def pack(W_OI: torch.Tensor, values: ValueType = BFLOAT16) -> PackedWeight:
    """Pack a bfloat16 weight; with bfloat16 values nothing is lost (but the sign of a negative zero, which losa never writes).

    Args:
        W_OI: `[O, I]` bfloat16.
        values: the type of the stored values; one that rounds drops the weights that round to zero.

    Raises:
        ValueError: another dtype, or NaN or infinity in a weight to be rounded.
    """
    if W_OI.dtype != torch.bfloat16 or W_OI.dim() != 2:
        raise ValueError(f"pack takes a 2-dimensional bfloat16 weight, found {W_OI.dtype} of shape {tuple(W_OI.shape)}")
    if values.largest is None:
        return compress(W_OI, None, None, values)
    if not torch.isfinite(W_OI).all():
        raise ValueError(f"a weight to be rounded to {values.name} holds NaN or infinity")
    return compress(*quantize(W_OI, values.largest, values.group), values)


def compress(q_OI: torch.Tensor, scale_O: torch.Tensor | None, groups_OG: torch.Tensor | None, values: ValueType) -> PackedWeight:
    """Pack numbers as they are stored; nothing is rounded. What `expand` undoes.

    Args:
        q_OI: `[O, I]` bfloat16, or int8 for values with scales.
        scale_O: `[O]` float32, for values with scales.
        groups_OG: `[O, G]` uint8, for values with scales of groups.
    """
    words = _by_words(q_OI, values.columns)
    keep = words != 0  # a weight that rounds to zero is a zero from here on
    counts = keep.flatten(1).sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows, columns = q_OI.shape
    mask = pack_bits(keep).view(mask_shape(rows, columns, values))
    stored = words[keep]
    if values.bits < 8:
        stored = to_codes(stored, values.bits)
    groups_SGR = None if groups_OG is None else _by_words(groups_OG, 1).contiguous()
    return PackedWeight(mask, stored, offsets, scale_O, groups_SGR, rows, columns, values)


def expand(packed: PackedWeight) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What `compress` takes: the stored numbers in their places, zeros between them, and the scales of rows and groups. Unlike a
    packed weight, all three can be cut into rows and columns (columns by whole groups) and put together."""
    kind, strips = packed.type, packed.mask.shape[0]
    keep = unpack_bits(packed.mask.flatten(), (strips, packed.mask.shape[1] // (2 * kind.columns), STRIP * kind.columns))
    stored = to_numbers(packed.values, kind.bits, packed.stored) if kind.bits < 8 else packed.values
    words = torch.zeros(keep.shape, dtype=stored.dtype, device=keep.device)
    words[keep] = stored
    q = words.view(strips, -1, STRIP, kind.columns).transpose(1, 2).reshape(strips * STRIP, -1)
    groups = packed.groups
    groups_OG = None if groups is None else groups.transpose(1, 2).flatten(0, 1)[: packed.rows]
    return q[: packed.rows, : packed.columns].contiguous(), packed.scale, groups_OG


def unpack(packed: PackedWeight) -> torch.Tensor:
    """The dense `[O, I]` bfloat16 weight: bitwise the packed one for bfloat16 values, what the scales say for others."""
    W_OI, scale_O, groups_OG = expand(packed)
    if scale_O is None:
        return W_OI
    scale = scale_O[:, None]
    if groups_OG is not None and packed.type.group:
        scale = scale * levels(groups_OG).repeat_interleave(packed.type.group, 1)[:, : packed.columns]
    return (W_OI.float() * scale).bfloat16()


def _expected(packed: PackedWeight) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor but the values, by field."""
    shape = mask_shape(packed.rows, packed.columns, packed.type)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "mask": (torch.uint8, shape),
        "offsets": (torch.int64, (shape[0] + 1,)),
    }
    if packed.type.rounds:
        found["scale"] = (torch.float32, (packed.rows,))
    groups = groups_shape(packed.rows, packed.columns, packed.type)
    if groups:
        found["groups"] = (torch.uint8, groups)
    return found


def check(packed: PackedWeight, name: str = "packed weight", claimed: int | None = None) -> None:
    """Compare shapes, dtypes, offsets and the population counts of the masks; the file they came from is not trusted.

    Args:
        claimed: stored values that a header claims, where there is one.

    Raises:
        ValueError: anything that disagrees, with what was found and what was expected.
    """
    values, offsets, kind = packed.values, packed.offsets, packed.type
    if values.dtype != kind.stored or values.dim() != 1:
        found = f"{values.dtype} of shape {tuple(values.shape)}"
        raise ValueError(f"{name}: values are {found}, expected {kind.stored} of one dimension for {kind.name} values")
    expected = _expected(packed)
    for field in ("mask", "offsets", "scale", "groups"):
        tensor = getattr(packed, field)
        if (tensor is None) != (field not in expected):
            raise ValueError(f"{name}: {kind.name} values come {'without' if tensor is not None else 'with'} {field}")
        if tensor is not None and (tensor.dtype, tuple(tensor.shape)) != expected[field]:
            dtype, shape = expected[field]
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name}: {field} is {found}, expected {dtype} of {shape}")
    counts = np.bitwise_count(packed.mask.cpu().numpy()).sum(1, dtype=np.int64)
    ends = np.concatenate([[0], counts.cumsum()])
    if not np.array_equal(offsets.cpu().numpy(), ends):
        raise ValueError(f"{name}: the offsets do not count the bits of the masks; the file is damaged, pack the model again")
    if claimed not in (None, ends[-1]):
        raise ValueError(f"{name}: the header claims {claimed} stored values, the masks mark {ends[-1]}; the file is damaged")
    if values.numel() != kind.elements(int(ends[-1])):
        raise ValueError(f"{name}: the masks mark {ends[-1]} weights, found {values.numel()} elements of {kind.name} values")


def chunk_index(packed: PackedWeight) -> torch.Tensor:
    """How many values of its strip come before each chunk: what lets a GPU begin anywhere. `[S, chunks]` int32, on the device.

    Derived, never stored: 4 bytes for 1,024 weights, 0.5 % of a layer at 70 % zeros.

    Raises:
        ValueError: the population counts of the masks are not what the offsets or the number of values say.
    """
    counts = packed.mask - ((packed.mask >> 1) & 0x55)  # population counts of the bytes: pairs, nibbles, bytes
    counts = (counts & 0x33) + ((counts >> 2) & 0x33)
    counts = (counts + (counts >> 4)) & 0x0F
    counts = torch.nn.functional.pad(counts, (0, -counts.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK)).sum(2)
    ends = counts.cumsum(1)
    lengths = packed.offsets.diff()
    if (
        not torch.equal(ends[:, -1], lengths)
        or packed.offsets[0] != 0
        or packed.type.elements(packed.stored) != packed.values.numel()
    ):
        raise ValueError("the offsets do not count the bits of the masks; the file is damaged, pack the model again")
    before: torch.Tensor = (ends - counts).int()
    return before


def linear(x_TI: torch.Tensor, packed: PackedWeight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`x W^T + b` by unpacking, in the type of `x`: what every kernel is tested against."""
    return torch.nn.functional.linear(x_TI, unpack(packed).to(x_TI.dtype), None if bias_O is None else bias_O.to(x_TI.dtype))
