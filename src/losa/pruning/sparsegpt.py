"""SparseGPT (https://arxiv.org/abs/2301.00774): prune column by column, let the later columns make up for the error.

For one linear layer with inputs `X`, minimise `||X W^T - X W'^T||^2` over the mask and the surviving weights. With the
Hessian `H = 2 X^T X`, the optimal brain surgeon says: removing `w_i` costs `w_i^2 / [H^-1]_ii`, and the best answer of the other
weights is `-w_i / [H^-1]_ii * [H^-1]_i,:`. Going through the columns from left to right, `H^-1` of the columns that are left is
always a trailing block, and all of these are rows of one upper Cholesky factor `U` of `H^-1` (paper, section 3.3).

Columns go in blocks of 128: in each, the mask is chosen over all rows at once, then the columns are eliminated one by one, and
the columns after the block get the accumulated error in one matrix product.

Legend: `O` out_features, `I` in_features, `N` tokens, `C` columns of one block.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from losa.pruning.masks import Pattern, keep_n_of_m, pruned_count
from losa.pruning.pruner import Solution, second_order

BLOCK = 128  # columns eliminated together; the paper's value
DAMPING = 0.01  # of the mean diagonal, added to it; the paper's value
DAMPING_TRIES = 4  # x1, x10, x100, x1000

logger = logging.getLogger(__name__)


def collect(H_II: Tensor | None, X_NI: Tensor) -> Tensor:
    """Adds a batch to `H = 2 X^T X`, float32, `(I, I)`. Its scale does not matter: damping is relative."""
    X_NI = X_NI.float()
    if H_II is None:
        return 2 * (X_NI.T @ X_NI)
    return H_II.addmm_(X_NI.T, X_NI, alpha=2)


def inverse_factor(H_II: Tensor) -> tuple[Tensor, float]:
    """Upper Cholesky factor `U` of `H^-1 = U^T U`, and the damping ratio that was needed.

    A feature that never fired has a zero row in `H`; its diagonal is set to 1, so its weights cost nothing to prune. If the
    factorisation fails, damping is multiplied by 10, up to three times, with a warning: never a silent identity.

    Raises:
        ValueError: `H` is not finite, or does not factorise with 1000 times the damping.
    """
    if not torch.isfinite(H_II).all():
        raise ValueError("the Hessian is not finite; check the model's weights and dtype")
    H_II = H_II.clone()
    diagonal_I = torch.diagonal(H_II)  # a view: writing to it writes to H
    mean = diagonal_I.mean().item()
    diagonal_I[diagonal_I == 0] = 1.0
    ratio, added = DAMPING, 0.0
    for attempt in range(DAMPING_TRIES):
        ratio = DAMPING * 10**attempt
        diagonal_I += ratio * mean - added
        added = ratio * mean
        lower, failed = torch.linalg.cholesky_ex(H_II)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            return upper, ratio
        logger.warning("SparseGPT: the Hessian does not factorise with damping %g", ratio)
    raise ValueError(f"the Hessian does not factorise even with damping {ratio:g}; use more calibration text or --pruner wanda")


def _block_mask(score_OC: Tensor, keep_OC: Tensor, count: int) -> Tensor:
    """Prunes the `count` lowest scores of a column block over all its rows; the already pruned count first."""
    score_OC = torch.where(keep_OC, score_OC, -torch.inf)
    lost = score_OC.flatten().argsort(stable=True)[: max(count, int((~keep_OC).sum()))]
    return torch.ones_like(keep_OC).view(-1).index_fill_(0, lost, False).view_as(keep_OC)


def prune(
    weights: Sequence[Tensor], masks: Sequence[Tensor], H_II: Tensor, rates: Sequence[float], pattern: Pattern, share: float = 1.0
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Solves the layers that share one input: one factorisation, and one pass over the columns for all their rows.

    Rows do not depend on each other but for the choice of the mask, which is made layer by layer. Works in float32, or in float64
    when the weights are.

    Args:
        weights: merged weights, `(O, I)` each, zeros outside their masks.
        masks: of the step before; what is False stays False, and its error is passed on like any other.
        H_II: from `collect`.
        rates: ratio of zeros of each layer, in [0, 1); unstructured only.
        share: n:m only, see `masks.keep_n_of_m`; candidates are taken per group of `m` columns.

    Returns:
        For each layer new weights `(O, I)` with zeros outside the new mask, and the nested mask; and the damping ratio used.

    Raises:
        ValueError: `H` does not factorise, or n:m does not divide `I`.
    """
    columns = weights[0].shape[1]
    if pattern.structured and columns % pattern.m:
        raise ValueError(f"in_features is {columns}, expected a multiple of {pattern.m} for pattern {pattern.n}:{pattern.m}")
    heights = [len(W_OI) for W_OI in weights]
    done = [0] * len(heights)  # zeros of each layer so far
    W_OI, keep_OI = torch.cat(list(weights)), torch.cat(list(masks))
    W_OI = W_OI if W_OI.dtype == torch.float64 else W_OI.float()
    new_OI = keep_OI.clone()
    U_II, damping = inverse_factor(H_II.to(W_OI.dtype))
    dead_I = torch.diagonal(H_II) == 0
    block = BLOCK if not pattern.structured else max(pattern.m, BLOCK - BLOCK % pattern.m)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        W_OC, U_CC = W_OI[:, start:stop].clone(), U_II[start:stop, start:stop]
        error_OC = torch.zeros_like(W_OC)
        if not pattern.structured:
            score_OC = (W_OC / torch.diagonal(U_CC)).square().masked_fill(dead_I[start:stop], 0.0)
            for number, (new, score) in enumerate(zip(new_OI.split(heights), score_OC.split(heights), strict=True)):
                later = int((~new[:, stop:]).sum())  # zeros of the step before are not to come on top
                total = pruned_count(len(new) * columns, rates[number]) - later
                count = min(pruned_count(len(new) * stop, rates[number]), total) - done[number]
                new[:, start:stop] = _block_mask(score, new[:, start:stop], count)
                done[number] += int((~new[:, start:stop]).sum())
        for c in range(stop - start):
            i = start + c
            if pattern.structured and i % pattern.m == 0:
                columns_of_group = slice(c, c + pattern.m)
                score_OC = (W_OC[:, columns_of_group] / torch.diagonal(U_CC)[columns_of_group]).square()
                score_OC.masked_fill_(dead_I[i : i + pattern.m], 0.0)
                for new, score in zip(new_OI.split(heights), score_OC.split(heights), strict=True):
                    new[:, i : i + pattern.m] = keep_n_of_m(score, new[:, i : i + pattern.m], pattern, share)
            kept_O = torch.where(new_OI[:, i], W_OC[:, c], 0.0)
            error_OC[:, c] = (W_OC[:, c] - kept_O) / U_CC[c, c]
            W_OC[:, c:] -= error_OC[:, c, None] * U_CC[c, c:]
            W_OC[:, c] = kept_O
        W_OI[:, start:stop] = W_OC
        W_OI[:, stop:] -= error_OC @ U_II[start:stop, stop:]
    return list(zip(W_OI.split(heights), new_OI.split(heights), strict=True)), damping


def _solve(*layers: Any) -> list[Solution]:
    solved, damping = prune(*layers)
    return [Solution(W_OI, keep_OI, damping if damping > DAMPING else None) for W_OI, keep_OI in solved]


PRUNER = second_order("sparsegpt", collect, _solve)
