"""ALPS (https://arxiv.org/abs/2406.07831): mask and weights of a layer solved together, by the alternating direction method.

For one linear layer with dense weight `W_0` and inputs `X`, minimise `||X (W_0 - W)^T||^2` over weights `W` of which only so many
may differ from zero. SparseGPT decides column by column, from left to right, and never looks back. Here the problem is split in
two that are easy alone: `B`, dense, has to fit the outputs, a ridge regression; `D`, sparse, keeps the largest weights. A
multiplier `V` pulls them together, ever harder as the penalty `rho` grows, until the mask stands still:

    B = (G + rho)^-1 (G W_0 - V + rho D)      D = top-k (B + V / rho)      V = V + rho (B - D)

With `G = X^T X = Q L Q^T` factorised once, every `rho` costs two products. Then conjugate gradients find the best weights of that
mask, each row a least-squares problem of its own (paper, section 3.2). Inputs are scaled to `G_ii = 1` first.

Legend: `O` out_features, `I` in_features, `N` tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losa.pruning.masks import Pattern, keep_n_of_m, pruned_count
from losa.pruning.pruner import Solution, second_order
from losa.pruning.sparsegpt import collect

DAMPING = 0.01  # added to the diagonal, which is 1 by then; the paper adds a hundredth of its mean before inputs are scaled
RHO = 0.1  # the first penalty; the paper's value
PATIENCE = 3  # turns between looks at how much of the mask has changed, after which the penalty grows
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # change of the mask above this ratio: the penalty times that
TURNS = 300  # at most; 30 to 40 are usual
REFINE = 10  # turns of conjugate gradients; within 4 % of the least-squares floor on a real model (docs/LOG.md)

Choose = Callable[[Tensor, Tensor], Tensor]


def keep_largest(score_OI: Tensor, keep_OI: Tensor, count: int) -> Tensor:
    """Keeps the `count` highest scores of a whole layer, none of them outside `keep_OI`."""
    score_OI = torch.where(keep_OI, score_OI, -torch.inf)
    if score_OI.device.type == "cpu" and count:  # ten times as fast as torch's topk
        ranked = np.partition(score_OI.numpy().ravel(), score_OI.numel() - count)
        new_OI = score_OI >= float(ranked[score_OI.numel() - count])
        if int(new_OI.sum()) == count:  # else some are equal: topk takes as many of these as are wanted
            return new_OI
    best = score_OI.flatten().topk(count, sorted=False).indices
    return torch.zeros_like(keep_OI).view(-1).index_fill_(0, best, True).view_as(keep_OI)


def refine(W_OI: Tensor, target_OI: Tensor, keep_OI: Tensor, G_II: Tensor, turns: int = REFINE) -> Tensor:
    """Conjugate gradients on `||X (target - W)^T||^2` over the weights of a mask, all rows at once.

    Args:
        W_OI: where to start; zero outside the mask.
        turns: with as many as a row has weights, the exact answer.
    """
    residual_OI = ((target_OI - W_OI) @ G_II).where(keep_OI, 0)
    direction_OI, size_O1 = residual_OI, residual_OI.square().sum(1, keepdim=True)
    tiny = torch.finfo(W_OI.dtype).tiny
    for _ in range(turns):
        turned_OI = (direction_OI @ G_II).where(keep_OI, 0)
        step_O1 = size_O1 / (direction_OI * turned_OI).sum(1, keepdim=True).clamp(min=tiny)
        W_OI = W_OI + step_O1 * direction_OI
        residual_OI = residual_OI - step_O1 * turned_OI
        last_O1, size_O1 = size_O1, residual_OI.square().sum(1, keepdim=True)
        direction_OI = residual_OI + size_O1 / last_O1.clamp(min=tiny) * direction_OI
    return W_OI


def _solve_layer(W_OI: Tensor, keep_OI: Tensor, G_II: Tensor, L_I: Tensor, Q_II: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
    """One layer with scaled inputs: the loop of the module's docstring. Returns its weights and mask."""
    target_OI = W_OI @ G_II
    new_OI = choose(W_OI.abs(), keep_OI)
    seen_OI, kept = new_OI, max(1, int(new_OI.sum()))
    D_OI, V_OI, rho = W_OI.where(new_OI, 0), torch.zeros_like(W_OI), RHO
    for turn in range(1, TURNS + 1):
        B_OI = ((target_OI - V_OI).add_(D_OI, alpha=rho) @ Q_II).div_(L_I + rho) @ Q_II.T
        split_OI = torch.add(B_OI, V_OI, alpha=1 / rho)
        new_OI = choose(split_OI.abs(), keep_OI)
        D_OI = split_OI.where(new_OI, 0)
        V_OI.add_(B_OI.sub_(D_OI), alpha=rho)
        if turn % PATIENCE == 0:
            changed = int((new_OI ^ seen_OI).sum()) / kept
            if not changed:
                break
            seen_OI, rho = new_OI, rho * next(factor for ratio, factor in GROWTH if changed > ratio)
    return refine(D_OI, W_OI, new_OI, G_II), new_OI


def prune(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    G_II: Tensor,
    rates: Sequence[float],
    pattern: Pattern,
    share: float = 1.0,
) -> list[tuple[Tensor, Tensor]]:
    """Solves the layers that share one input: one factorisation for all of them.

    Works in float32, or in float64 when the weights are. Differs from the paper: a weight outside the given mask stays pruned.

    Args:
        weights: merged weights, `(O, I)` each, zeros outside their masks.
        masks: of the step before; what is False stays False.
        G_II: `X^T X` times any number, `(I, I)`, from `sparsegpt.collect`.
        rates: ratio of zeros of each layer, in [0, 1); unstructured only. Weights compete over the whole layer.
        share: n:m only, see `masks.keep_n_of_m`.

    Returns:
        For each layer new weights `(O, I)` with zeros outside the new mask, and the nested mask.

    Raises:
        ValueError: `G` is not finite, or n:m does not divide `I`.
    """
    if not torch.isfinite(G_II).all():
        raise ValueError("the Gram matrix is not finite; check the model's weights and dtype")
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    norm_I = torch.diagonal(G_II).to(dtype).sqrt()
    dead_I = norm_I == 0  # a feature that never fired: its weights cost nothing, and are left as they are where they are kept
    scale_I = norm_I.masked_fill(dead_I, 1.0)
    G_II = G_II.to(dtype) / (scale_I[:, None] * scale_I)
    torch.diagonal(G_II).add_(DAMPING)
    L_I, Q_II = torch.linalg.eigh(G_II)
    solved = []
    for W_OI, keep_OI, rate in zip(weights, masks, rates, strict=True):

        def choose(score_OI: Tensor, keep_OI: Tensor, rate: float = rate) -> Tensor:
            if pattern.structured:
                return keep_n_of_m(score_OI, keep_OI, pattern, share)
            left = score_OI.numel() - pruned_count(score_OI.numel(), rate)
            return keep_largest(score_OI, keep_OI, min(left, int(keep_OI.sum())))

        W_OI = W_OI.to(dtype)
        if choose(W_OI.abs(), keep_OI).all():  # nothing to prune
            solved.append((W_OI, keep_OI))
            continue
        new_OI, mask_OI = _solve_layer(W_OI * norm_I, keep_OI, G_II, L_I, Q_II, choose)
        solved.append(((new_OI / scale_I).where(~dead_I, W_OI).where(mask_OI, 0), mask_OI))
    return solved


def _solve(*layers: Any) -> list[Solution]:
    return [Solution(W_OI, keep_OI) for W_OI, keep_OI in prune(*layers)]


PRUNER = second_order("alps", collect, _solve)
