"""Rounding to a grid with the error made up for: GPTQ (https://arxiv.org/abs/2210.17323) under a mask, then exact descent.

For one linear layer with weights `W` on their mask and inputs `X`, find `W'` of the grid on the same mask with the least
`||X (W - W')^T||^2`. Column by column from left to right, as SparseGPT goes (`sparsegpt.py`): a kept weight is rounded, a pruned
one is zero, and the columns to the right make up for the error of both. Where `W` is the least-squares answer of its mask, as
ALPS's is, errors add as in Pythagoras, `||X (W_0 - W')||^2 = ||X (W_0 - W)||^2 + ||X (W - W')||^2`: so this is the joint problem.

What a column could have done for those to its left is then found by coordinate descent: every weight in turn takes
the value of the grid that is best given all others, `w - R_i / G_ii` rounded, with `R = (W' - W) G`.

Legend: `O` out_features, `I` in_features, `C` columns of one block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losa.pruning.grid import Format, choose, snap
from losa.pruning.sparsegpt import BLOCK, DAMPING, PRUNER, inverse_factor

NEEDS = PRUNER  # the statistic that this takes and the memory are SparseGPT's: the same pass over the columns
SWEEPS = 2  # of coordinate descent; more change the error by less than a hundredth (docs/LOG.md)


class Rounded(NamedTuple):
    """A layer on a grid: weights `(O, I)`, and in float32 the step and `low` of each group, `(O, G)`."""

    weight_OI: Tensor
    step_OG: Tensor
    low_OG: Tensor


def round_to(
    weights: Sequence[Tensor], masks: Sequence[Tensor], G_II: Tensor, format: Format, sweeps: int = SWEEPS
) -> list[Rounded]:
    """Rounds the layers that share one input: one factorisation for all of them.

    Works in float32, or in float64 when the weights are.

    Args:
        weights: `(O, I)` each, zeros outside their masks.
        masks: True keeps; a kept weight may round to zero.
        G_II: `X^T X` times any number, `(I, I)`.

    Returns:
        For each layer its weights, and on which grid they are.

    Raises:
        ValueError: `G` does not factorise.
    """
    heights = [len(W_OI) for W_OI in weights]
    keep_OI, W_OI = torch.cat(list(masks)), torch.cat(list(weights))
    W_OI = W_OI if W_OI.dtype == torch.float64 else W_OI.float()
    G_II = G_II.to(W_OI.dtype)
    U_II, _ = inverse_factor(G_II)
    new_OI, step_OG, low_OG = _eliminate(W_OI, keep_OI, U_II, format)
    G_II = G_II.clone()
    diagonal_I = torch.diagonal(G_II)
    diagonal_I += DAMPING * diagonal_I.mean() + torch.finfo(G_II.dtype).tiny
    for _ in range(sweeps):
        _descend(new_OI, W_OI, keep_OI, G_II, step_OG, low_OG, format)
    parts = (part.split(heights) for part in (new_OI, step_OG.float(), low_OG.float()))
    return [Rounded(*found) for found in zip(*parts, strict=True)]


def _eliminate(W_OI: Tensor, keep_OI: Tensor, U_II: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ's pass under the mask. Returns the rounded weight and the steps and `low` of its groups."""
    columns = W_OI.shape[1]
    group = format.group or columns
    W_OI, new_OI = W_OI.clone(), torch.empty_like(W_OI)
    costs_I = torch.diagonal(U_II).square().reciprocal()  # what an error costs, once the columns to its right have answered
    grids: list[tuple[Tensor, Tensor]] = []
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        W_OC, U_CC = W_OI[:, start:stop].clone(), U_II[start:stop, start:stop]
        error_OC = torch.zeros_like(W_OC)
        for c, i in enumerate(range(start, stop)):
            if i % group == 0:
                known_OC = W_OC[:, c : c + group] if format.group else W_OI
                last = i + known_OC.shape[1]
                grids.append(choose(known_OC.where(keep_OI[:, i:last], 0), format, costs_I[i:last]))
            step_O, low_O = grids[-1]
            new_OI[:, i] = snap(W_OC[:, c], step_O, low_O, format.span).where(keep_OI[:, i], 0)
            error_OC[:, c] = (W_OC[:, c] - new_OI[:, i]) / U_CC[c, c]
            W_OC[:, c + 1 :] -= error_OC[:, c, None] * U_CC[c, c + 1 :]
        W_OI[:, stop:] -= error_OC @ U_II[start:stop, stop:]
    step_OG, low_OG = (torch.stack(parts, 1) for parts in zip(*grids, strict=True))
    return new_OI, step_OG, low_OG


def _descend(
    new_OI: Tensor, W_OI: Tensor, keep_OI: Tensor, G_II: Tensor, step_OG: Tensor, low_OG: Tensor, format: Format
) -> None:
    """One sweep of coordinate descent over the columns, in place."""
    columns = new_OI.shape[1]
    group = format.group or columns
    residual_OI = (new_OI - W_OI) @ G_II
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        before_OC, R_OC = new_OI[:, start:stop].clone(), residual_OI[:, start:stop].clone()
        for c, i in enumerate(range(start, stop)):
            best_O = new_OI[:, i] - R_OC[:, c] / G_II[i, i]
            best_O = snap(best_O, step_OG[:, i // group], low_OG[:, i // group], format.span).where(keep_OI[:, i], 0)
            R_OC += (best_O - new_OI[:, i])[:, None] * G_II[i, start:stop]
            new_OI[:, i] = best_O
        residual_OI += (new_OI[:, start:stop] - before_OC) @ G_II[start:stop]
