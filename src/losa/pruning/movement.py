"""First-order movement (https://arxiv.org/abs/2005.07683): weights that training moves towards zero are the ones to lose.

`S_oi = -sum over updates of W_oi * dL/dW_oi`, the first-order change of `|W_oi|` under gradient descent. `W` is the merged weight
and `dL/dW` the full product `dy^T x`, which the backward pass of the masked adapter forms anyway: collecting costs one
multiply-add a weight and a float32 number to keep. Before any training there is no score: then magnitudes decide.

Legend: `O` out_features, `I` in_features.
"""

import torch
from torch import Tensor

from losa.pruning import magnitude
from losa.pruning.masks import Pattern, select
from losa.pruning.pruner import Pruner, by_mask


def prune(W_OI: Tensor, keep_OI: Tensor, score_OI: Tensor | None, rate: float, pattern: Pattern, share: float = 1.0) -> Tensor:
    """Keep-mask by movement; see `masks` for `rate`, `pattern` and `share`.

    Args:
        score_OI: collected by `adapter.MaskedLinear`, `(O, I)` float32; None or all zero before any training.

    Raises:
        ValueError: a score is not finite.
    """
    if score_OI is None or not score_OI.any():
        return magnitude.prune(W_OI, keep_OI, rate, pattern, share)
    if not torch.isfinite(score_OI).all():
        raise ValueError("training left a movement score that is not finite; lower train.lr")
    return select(score_OI, keep_OI, rate, pattern, share)


PRUNER = Pruner("movement", None, by_mask(prune), from_training=True)
