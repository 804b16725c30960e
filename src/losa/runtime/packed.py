"""The packed weight: one bit for every weight, one number for every weight that is not zero.

A `[O, I]` weight is cut into strips of 16 rows. Inside a strip a *word* covers 16 rows x g columns, g = 2 for bfloat16 values
and 4 for int8: 32 or 64 mask bits, and expanded exactly one 64-byte register in the order the dot product instructions of
today's CPUs want. Values follow in the order of words and bits, so that a strip is read once, front to back:

    mask     [strips, words * 2g] uint8   bit r * g + c of a word (little endian): row r, column c of the word is stored
    values   [count] bfloat16 or int8
    offsets  [strips + 1] int64           first value of each strip; the last entry is `count`
    scale    [O] float32                  int8 only: W = scale * values

Bytes per weight at density d: 1/8 + 2d for bfloat16, 1/8 + d for int8 (plus 4 bytes a row). This file is the reference in plain
torch: any device, any shape. The kernels in csrc/ read the same tensors.

Legend: O out_features, I in_features, S strips, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from losa.bits import pack_bits, unpack_bits

STRIP = 16  # rows of a strip
GROUPS = {torch.bfloat16: 2, torch.int8: 4}  # columns of a word, by the values' type
CHUNK = 128  # mask bytes of a chunk: 1,024 weights, 16 rows x 64 columns for either type of values


class PackedWeight(NamedTuple):
    """One packed weight; the fields are described at the top of this file. A tuple, because every call of a layer makes one."""

    mask: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    scale: torch.Tensor | None
    rows: int
    columns: int


def mask_shape(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Shape of the mask bytes of a `[rows, columns]` weight with values of `dtype`."""
    group = GROUPS[dtype]
    return -(-rows // STRIP), -(-columns // group) * 2 * group


def bytes_per_weight(density: float, values: torch.dtype) -> float:
    """Mean bytes of a packed weight, where `density` (ratio) of the weights are not zero; without padding, offsets and scales."""
    return 1 / 8 + density * values.itemsize


def _by_words(W_OI: torch.Tensor, group: int) -> torch.Tensor:
    """`[O, I]`, padded with zeros, as `[strips, words, 16 * group]`: the order of the values."""
    padded = torch.nn.functional.pad(W_OI, (0, -W_OI.shape[1] % group, 0, -W_OI.shape[0] % STRIP))
    strips, words = padded.shape[0] // STRIP, padded.shape[1] // group
    return padded.view(strips, STRIP, words, group).transpose(1, 2).reshape(strips, words, STRIP * group)


def quantize(W_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to int8 with one float32 scale per row: W ~ scale * q, q in [-127, 127], scale = max |row| / 127."""
    W = W_OI.float()
    largest = W.abs().amax(1) if W.shape[1] else W.new_zeros(W.shape[0])
    scale_O = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (W / scale_O[:, None]).round().to(torch.int8), scale_O


def pack(W_OI: torch.Tensor, values: torch.dtype = torch.bfloat16) -> PackedWeight:
    """Pack a bfloat16 weight; with bfloat16 values nothing is lost (but the sign of a negative zero, which losa never writes).

    Args:
        W_OI: `[O, I]` bfloat16.
        values: `torch.bfloat16`, or `torch.int8` for half the size: rounded with one scale per row.

    Raises:
        ValueError: another dtype, or NaN or infinity in a weight to be rounded to int8.
    """
    if W_OI.dtype != torch.bfloat16 or W_OI.dim() != 2:
        raise ValueError(f"pack takes a 2-dimensional bfloat16 weight, found {W_OI.dtype} of shape {tuple(W_OI.shape)}")
    if values not in GROUPS:
        raise ValueError(f"packed values are torch.bfloat16 or torch.int8, found {values}")
    scale_O = None
    if values == torch.int8:
        if not torch.isfinite(W_OI).all():
            raise ValueError("a weight to be rounded to int8 holds NaN or infinity")
        W_OI, scale_O = quantize(W_OI)
    words = _by_words(W_OI, GROUPS[values])
    keep = words != 0  # for int8, a weight that rounds to zero is a zero from here on
    counts = keep.flatten(1).sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    mask = pack_bits(keep).view(mask_shape(W_OI.shape[0], W_OI.shape[1], values))
    return PackedWeight(mask=mask, values=words[keep], offsets=offsets, scale=scale_O, rows=W_OI.shape[0], columns=W_OI.shape[1])


def unpack(packed: PackedWeight) -> torch.Tensor:
    """The dense `[O, I]` bfloat16 weight: bitwise the packed one for bfloat16 values, `scale * q` rounded for int8."""
    group = GROUPS[packed.values.dtype]
    strips = packed.mask.shape[0]
    keep = unpack_bits(packed.mask.flatten(), (strips, packed.mask.shape[1] // (2 * group), STRIP * group))
    words = torch.zeros(keep.shape, dtype=packed.values.dtype, device=keep.device)
    words[keep] = packed.values
    W = words.view(strips, -1, STRIP, group).transpose(1, 2).reshape(strips * STRIP, -1)[: packed.rows, : packed.columns]
    if packed.scale is not None:
        W = (W.float() * packed.scale[:, None]).bfloat16()
    return W.contiguous()


def check(packed: PackedWeight, name: str = "packed weight") -> None:
    """Compare shapes, dtypes, offsets and the population counts of the masks; the file they came from is not trusted.

    Raises:
        ValueError: anything that disagrees, with what was found and what was expected.
    """
    values, offsets = packed.values, packed.offsets
    if values.dtype not in GROUPS or values.dim() != 1:
        raise ValueError(
            f"{name}: values are {values.dtype} of shape {tuple(values.shape)}, expected bfloat16 or int8 of one dimension"
        )
    shape = mask_shape(packed.rows, packed.columns, values.dtype)
    if packed.mask.dtype != torch.uint8 or tuple(packed.mask.shape) != shape:
        raise ValueError(f"{name}: mask is {packed.mask.dtype} of shape {tuple(packed.mask.shape)}, expected uint8 of {shape}")
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != (shape[0] + 1,):
        raise ValueError(
            f"{name}: offsets are {offsets.dtype} of shape {tuple(offsets.shape)}, expected int64 of ({shape[0] + 1},)"
        )
    if (values.dtype == torch.int8) != (packed.scale is not None):
        raise ValueError(f"{name}: int8 values come with a scale per row and bfloat16 values with none")
    if packed.scale is not None and (packed.scale.dtype != torch.float32 or tuple(packed.scale.shape) != (packed.rows,)):
        raise ValueError(
            f"{name}: scale is {packed.scale.dtype} of shape {tuple(packed.scale.shape)}, expected float32 of ({packed.rows},)"
        )
    counts = np.bitwise_count(packed.mask.cpu().numpy()).sum(1, dtype=np.int64)
    expected = np.concatenate([[0], counts.cumsum()])
    if not np.array_equal(offsets.cpu().numpy(), expected):
        raise ValueError(f"{name}: the offsets do not count the bits of the masks; the file is damaged, pack the model again")
    if values.numel() != expected[-1]:
        raise ValueError(f"{name}: the masks mark {expected[-1]} weights, found {values.numel()} values")


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
    if not torch.equal(ends[:, -1], lengths) or packed.offsets[0] != 0 or packed.offsets[-1] != packed.values.numel():
        raise ValueError("the offsets do not count the bits of the masks; the file is damaged, pack the model again")
    return (ends - counts).int()


def linear(x_TI: torch.Tensor, packed: PackedWeight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`x W^T + b` by unpacking, in the type of `x`: what every kernel is tested against."""
    return torch.nn.functional.linear(x_TI, unpack(packed).to(x_TI.dtype), None if bias_O is None else bias_O.to(x_TI.dtype))
