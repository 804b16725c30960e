"""Wanda (https://arxiv.org/abs/2306.11695): the score of a weight is its size times the size of what it multiplies.

`S_oi = |W_oi| * ||X_i||_2`, compared within each output row. One pass, no weight update, and the only statistic is one
number an input feature.

Legend: `O` out_features, `I` in_features, `N` tokens.
"""

import torch
from torch import Tensor

from losa.pruning.masks import Pattern, select
from losa.pruning.pruner import Pruner, by_mask


def collect(sq_I: Tensor | None, X_NI: Tensor) -> Tensor:
    """Adds a batch to `sum_n X_ni^2`, float32 within the batch and float64 across batches.

    Args:
        sq_I: the sum so far, `(I,)` float64, or None at first.
        X_NI: inputs of the linear layer, any float dtype.
    """
    batch_I = X_NI.float().square().sum(0).double()
    return batch_I if sq_I is None else sq_I + batch_I


def scores(W_OI: Tensor, sq_I: Tensor) -> Tensor:
    """`|W_oi| * ||X_i||_2`, float32, shape `(O, I)` (Wanda, equation 1)."""
    return W_OI.abs().float() * sq_I.sqrt().float()


def prune(W_OI: Tensor, keep_OI: Tensor, sq_I: Tensor, rate: float, pattern: Pattern, share: float = 1.0) -> Tensor:
    """Keep-mask by Wanda's score; see `masks` for `rate`, `pattern` and `share`.

    Raises:
        ValueError: the statistic is not finite.
    """
    if not torch.isfinite(sq_I).all():
        raise ValueError("calibration met non-finite activations; check the model's weights and dtype")
    return select(scores(W_OI, sq_I), keep_OI, rate, pattern, share)


PRUNER = Pruner("wanda", collect, by_mask(prune))
