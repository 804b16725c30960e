"""Weights as integers times scales: what types of values that round store.

    W = scale * q                  a scale for each row: int8
    W = scale * level(byte) * q    a power of two for each row, and a byte for each group of its columns: int4
    level(byte) = 2^(byte / 16 - 15) * (1 + byte % 16 / 16)

Integers of fewer than eight bits are codes without a zero, for zeros are not stored: of four bits -8 ... -1, 1 ... 8. A level has
five significant bits and those at most three, so that W is a bfloat16 exactly: what kernels compute with and what is unpacked are
the same numbers. Pure functions; the order in memory is `format`'s.

Legend: O rows, I columns, G groups of columns.
"""

import functools
import operator

import torch
from torch import Tensor

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


def quantize(W_OI: Tensor, largest: int, group: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The nearest integers, with scales that leave little error: none, where weights lie on such a grid already.

    Args:
        W_OI: `[O, I]`, finite.
        largest: magnitude of an integer.
        group: columns of a row that share a byte; None: there are only the rows' scales.

    Returns:
        q `[O, I]` int8, scale `[O]` float32, groups `[O, G]` uint8 or None.
    """
    if group is None:
        return *_by_rows(W_OI.float(), largest), None
    step = max(1, PANEL // max(1, W_OI.shape[1]))
    parts = [_by_groups(W_OI[start : start + step].float(), largest, group) for start in range(0, max(1, W_OI.shape[0]), step)]
    q_OI, scale_O, groups_OG = (torch.cat(part) for part in zip(*parts, strict=True))
    return q_OI, scale_O, groups_OG


def _by_rows(W_OI: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Scales of max |row| / largest. A row whose weights are whole multiples of a power of two, no larger than `largest` of it,
    keeps them exactly: that is then its scale."""
    most_O = W_OI.abs().amax(1) if W_OI.shape[1] else W_OI.new_zeros(W_OI.shape[0])
    mantissa_O, exponent_O = torch.frexp(most_O / largest)
    power_O = torch.ldexp(torch.ones_like(most_O), exponent_O - (mantissa_O == 0.5).int())  # the smallest that reaches
    exact_O = ((W_OI / power_O[:, None]).frac() == 0).all(1)
    scale_O = torch.where(exact_O, power_O, most_O / largest).where(most_O > 0, 1.0)
    return (W_OI / scale_O[:, None]).round().to(torch.int8), scale_O


def _exact(ratio_OGC: Tensor, most_OG: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """For groups all of whose values are a whole multiple of one level already: that level's byte, and where that is so. The
    largest weight is 1, 2, ... or `largest` times the level."""
    groups_OG = torch.zeros_like(most_OG, dtype=torch.int32)
    found_OG = torch.zeros_like(most_OG, dtype=torch.bool)
    for multiple in range(largest, 0, -1):
        byte_OG = _nearest_above(most_OG / multiple)
        level_OG1 = levels(byte_OG)[:, :, None]
        exact_OG = (_rounded(ratio_OGC, level_OG1, largest) * level_OG1 == ratio_OGC).all(2) & ~found_OG
        groups_OG, found_OG = torch.where(exact_OG, byte_OG, groups_OG), found_OG | exact_OG
        if found_OG.all():
            break
    return groups_OG, found_OG


def _by_groups(W_OI: Tensor, largest: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = W_OI.shape
    W_OGC = torch.nn.functional.pad(W_OI, (0, -columns % group)).view(rows, -1, group)
    most_OG = W_OGC.abs().amax(2)
    most_O = most_OG.amax(1) if columns else W_OI.new_zeros(rows)
    # A power of two for each row, such that the ratio of the largest group falls into [0.5, 1); 1 for rows of zeros. float32
    # holds the smallest bfloat16 divided by 8 as a subnormal: not below 2^-126, then.
    exponent_O = torch.frexp(most_O / largest).exponent.clamp(min=-126)
    scale_O = torch.where(most_O > 0, torch.ldexp(torch.ones_like(most_O), exponent_O), 1.0)
    ratio_OGC = W_OGC / scale_O[:, None, None]
    first_OG = _nearest_above(most_OG / largest / scale_O[:, None])
    groups_OG, exact_OG = _exact(ratio_OGC, most_OG / scale_O[:, None], largest)
    best_OG = torch.full_like(most_OG, torch.inf).masked_fill_(exact_OG, 0.0)
    for below in range(0 if exact_OG.all() else TRIED):
        byte_OG = (first_OG + ABOVE - below).clamp(0, 255)
        level_OG1 = levels(byte_OG)[:, :, None]
        error_OG = (_rounded(ratio_OGC, level_OG1, largest) * level_OG1 - ratio_OGC).square().sum(2)
        better_OG = error_OG < best_OG
        groups_OG = torch.where(better_OG, byte_OG, groups_OG)
        best_OG = torch.where(better_OG, error_OG, best_OG)
    q_OGC = _rounded(ratio_OGC, levels(groups_OG)[:, :, None], largest)
    return q_OGC.reshape(rows, -1)[:, :columns].to(torch.int8), scale_O, groups_OG.to(torch.uint8)


def _rounded(ratio: Tensor, level: Tensor, largest: int) -> Tensor:
    return (ratio / level).round_().clamp_(-largest, largest)


def to_codes(q: Tensor, bits: int) -> Tensor:
    """`[count]` int8 without zeros -> uint8, as many codes of `bits` in each as it has room for, the first one lowest."""
    half, shared = 1 << (bits - 1), 8 // bits
    code = torch.nn.functional.pad(q + (half - (q > 0).to(torch.int8)), (0, -q.numel() % shared)).to(torch.uint8)
    return functools.reduce(operator.or_, (code[place::shared] << place * bits for place in range(shared)))


def to_numbers(codes: Tensor, bits: int, count: int) -> Tensor:
    """The `[count]` int8 of `to_codes`."""
    apart = [codes >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    code = torch.stack(apart, 1).flatten()[:count].to(torch.int8)
    return code - (1 << (bits - 1)) + (code >> (bits - 1))
