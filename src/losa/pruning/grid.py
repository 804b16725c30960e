"""Grids: which values the weights of a group may have, so that a few bits tell which one it is.

    W = step * q,   q a whole number,   low <= q <= low + span

A group is so many neighbouring columns of one row; each has a step of its own, and where `low` is not the same for all groups, a
`low` too. Zero is always one of the values. Steps have few significant bits, so that every value is a bfloat16 exactly: a
checkpoint on a grid is an ordinary bfloat16 checkpoint, and packing it (`runtime/values.py`) loses nothing.

Legend: `O` out_features, `I` in_features, `G` groups of columns, `C` columns of one group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Steps that are tried for a group, as ratios of the one that just reaches its largest weight: a little coarser, down to 0.66.
TRIED = [2 ** ((4 - below) / 16) for below in range(12)]
SHRUNK = [1 - 0.05 * number for number in range(11)]  # the same where the smallest value is free: of the whole range


@dataclass(frozen=True)
class Format:
    """A kind of grid.

    Attributes:
        name: on the command line and in configurations.
        bits: of a stored value.
        span: largest minus smallest `q`.
        low: smallest `q`; None where each group has its own.
        group: columns that share a step; None for a whole row.
        precision: bits of a step after its leading one; with those of `q`, at most the seven that a bfloat16 has.
        side_bits: stored for each group.
        sparse: whether zeros are left out of what is stored, and a bit a weight says where they are.
    """

    name: str
    bits: int
    span: int
    low: int | None
    group: int | None
    precision: int
    side_bits: int
    sparse: bool

    def bits_per_weight(self, density: float) -> float:
        """Stored bits of a weight, where `density` (ratio) of them are not zero; rows' scales and padding left out."""
        side = self.side_bits / self.group if self.group else 0.0
        return (1 + density * self.bits if self.sparse else self.bits) + side


# int8 and int4 are what `losa pack` stores (`runtime/values.py`): int4 has no code for zero, which the mask tells. The others are
# those of dense quantised models, with a zero point, to compare with: 3.25 bits a weight at three bits.
FORMATS = {
    made.name: made
    for made in (
        Format("int8", 8, 254, -127, None, precision=0, side_bits=0, sparse=True),
        Format("int4", 4, 16, -8, 64, precision=4, side_bits=8, sparse=True),
        *(Format(f"dense{bits}", bits, 2**bits - 1, None, 64, precision=7, side_bits=16, sparse=False) for bits in (8, 4, 3, 2)),
    )
}


def snap(W: Tensor, step: Tensor, low: Tensor, span: int) -> Tensor:
    """`step * q` nearest to `W`, of shapes that broadcast."""
    return torch.maximum(torch.minimum((W / step).round_(), low + span), low).mul_(step).add_(0.0)  # -0 + 0 is 0


def choose(W_OC: Tensor, format: Format, weight_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Step and `low` of one group in every row, with the least squared error of what is tried.

    Args:
        W_OC: zeros where nothing is kept.
        weight_C: how much an error counts in each column; alike when None.

    Returns:
        `(O,)` each.
    """
    best_O = W_OC.new_full((len(W_OC),), torch.inf)
    step_O, low_O = torch.ones_like(best_O), torch.zeros_like(best_O)
    for tried_O, from_O in _candidates(W_OC, format):
        error_OC = (snap(W_OC, tried_O[:, None], from_O[:, None], format.span) - W_OC).square_()
        error_O = error_OC.sum(1) if weight_C is None else error_OC @ weight_C
        better_O = error_O < best_O
        step_O, low_O = step_O.where(~better_O, tried_O), low_O.where(~better_O, from_O)
        best_O = best_O.where(~better_O, error_O)
    return step_O, low_O


def _candidates(W_OC: Tensor, format: Format) -> Sequence[tuple[Tensor, Tensor]]:
    if format.low is None:
        least_O, most_O = W_OC.amin(1).clamp(max=0), W_OC.amax(1).clamp(min=0)
        found = []
        for ratio in SHRUNK:
            step_O = _coarse((most_O - least_O) * (ratio / format.span), format.precision)
            found.append((step_O, (ratio * least_O / step_O).round().clamp(-format.span, 0)))
        return found
    low_O = W_OC.new_full((len(W_OC),), float(format.low))
    largest_O = W_OC.abs().amax(1) / -format.low
    return [(_coarse(largest_O * ratio, format.precision), low_O) for ratio in (TRIED if format.precision else [1.0])]


def _coarse(step_O: Tensor, precision: int) -> Tensor:
    """The smallest numbers with so many bits after the leading one that are not below; 1 for 0."""
    mantissa_O, exponent_O = torch.frexp(step_O)
    coarse_O = torch.ldexp((mantissa_O * 2 ** (precision + 1)).ceil_(), exponent_O - (precision + 1))
    return coarse_O.where(step_O > 0, 1.0)
