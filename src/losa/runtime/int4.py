"""int4 values: sixteen levels without a zero, for zeros are not stored, and a scale of one byte for 64 columns of a row.

    W = scale * level(byte) * q,   q in -8 ... -1, 1 ... 8,   level(byte) = 2^(byte / 16 - 15) * (1 + byte % 16 / 16)

`scale` is a power of two for each row. A level has five significant bits and q at most three, so that W is a bfloat16 exactly:
what kernels compute with and what is unpacked are the same numbers. Pure functions; packing in memory order is `packed`'s.

Legend: O rows, I columns, G groups of columns.
"""

import torch
from torch import Tensor

LARGEST = 8  # magnitude of a stored value
ABOVE = 4  # sixteenths of a power of two: where trying scales of a group begins, above the one that fits its largest weight
TRIED = 12  # scales that are tried, downwards; further ones were never better (docs/LOG.md)
PANEL = 1 << 17  # weights that are rounded at a time: what stays in a cache is twice as fast


def levels(groups: Tensor) -> Tensor:
    """Float32 of the bytes of scales: 2^-15 to 1.94, a sixteenth of a power of two apart."""
    return torch.ldexp(1 + (groups & 15).float() / 16, (groups >> 4).int() - 15)


def _nearest_above(ratios: Tensor) -> Tensor:
    """The byte of the smallest level that is not below; int32, 0 to 255."""
    mantissa, exponent = torch.frexp(ratios)  # ratio = mantissa * 2^exponent, mantissa in [0.5, 1)
    return ((exponent + 14) * 16 + ((mantissa * 2 - 1) * 16).ceil().int()).clamp(0, 255)


def quantize_groups(W_OI: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest levels, with the scales that leave the least squared error: none, where weights lie on such levels already.

    Args:
        W_OI: `[O, I]`, finite.
        group: columns that share a scale.

    Returns:
        q `[O, I]` int8, scale `[O]` float32, groups `[O, G]` uint8.
    """
    step = max(1, PANEL // max(1, W_OI.shape[1]))
    parts = [_quantize(W_OI[start : start + step].float(), group) for start in range(0, max(1, W_OI.shape[0]), step)]
    q_OI, scale_O, groups_OG = (torch.cat(part) for part in zip(*parts, strict=True))
    return q_OI, scale_O, groups_OG


def _exact(ratio_OGC: Tensor, largest_OG: Tensor) -> tuple[Tensor, Tensor]:
    """For groups all of whose values are a whole multiple of one level already: that level's byte, and where that is so. The
    largest is 1, 2, ... or 8 times the level."""
    groups_OG = torch.zeros_like(largest_OG, dtype=torch.int32)
    found_OG = torch.zeros_like(largest_OG, dtype=torch.bool)
    for multiple in range(LARGEST, 0, -1):
        byte_OG = _nearest_above(largest_OG / multiple)
        level_OG1 = levels(byte_OG)[:, :, None]
        exact_OG = (_rounded(ratio_OGC, level_OG1) * level_OG1 == ratio_OGC).all(2) & ~found_OG
        groups_OG, found_OG = torch.where(exact_OG, byte_OG, groups_OG), found_OG | exact_OG
        if found_OG.all():
            break
    return groups_OG, found_OG


def _quantize(W_OI: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = W_OI.shape
    W_OGC = torch.nn.functional.pad(W_OI, (0, -columns % group)).view(rows, -1, group)
    largest_OG = W_OGC.abs().amax(2)
    largest_O = largest_OG.amax(1) if columns else W_OI.new_zeros(rows)
    # A power of two for each row, such that the ratio of the largest group falls into [0.5, 1); 1 for rows of zeros. float32
    # holds the smallest bfloat16 divided by 8 as a subnormal: not below 2^-126, then.
    exponent_O = torch.frexp(largest_O / LARGEST).exponent.clamp(min=-126)
    scale_O = torch.where(largest_O > 0, torch.ldexp(torch.ones_like(largest_O), exponent_O), 1.0)
    ratio_OGC = W_OGC / scale_O[:, None, None]
    first_OG = _nearest_above(largest_OG / LARGEST / scale_O[:, None])
    groups_OG, exact_OG = _exact(ratio_OGC, largest_OG / scale_O[:, None])
    best_OG = torch.full_like(largest_OG, torch.inf).masked_fill_(exact_OG, 0.0)
    for below in range(0 if exact_OG.all() else TRIED):
        byte_OG = (first_OG + ABOVE - below).clamp(0, 255)
        level_OG1 = levels(byte_OG)[:, :, None]
        error_OG = (_rounded(ratio_OGC, level_OG1) * level_OG1 - ratio_OGC).square().sum(2)
        better_OG = error_OG < best_OG
        groups_OG = torch.where(better_OG, byte_OG, groups_OG)
        best_OG = torch.where(better_OG, error_OG, best_OG)
    q_OGC = _rounded(ratio_OGC, levels(groups_OG)[:, :, None])
    return q_OGC.reshape(rows, -1)[:, :columns].to(torch.int8), scale_O, groups_OG.to(torch.uint8)


def _rounded(ratio: Tensor, level: Tensor) -> Tensor:
    return (ratio / level).round_().clamp_(-LARGEST, LARGEST)


def to_nibbles(q: Tensor) -> Tensor:
    """`[count]` int8 without zeros -> `[ceil(count / 2)]` uint8, the first of two in the low half."""
    code = torch.nn.functional.pad(q + (LARGEST - (q > 0).to(torch.int8)), (0, q.numel() % 2)).to(torch.uint8)
    return code[::2] | code[1::2] << 4


def to_numbers(nibbles: Tensor, count: int) -> Tensor:
    """The `[count]` int8 of `to_nibbles`."""
    code = torch.stack([nibbles & 15, nibbles >> 4], 1).flatten()[:count].to(torch.int8)
    return code - LARGEST + (code >> 3)
