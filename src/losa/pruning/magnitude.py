"""Magnitude pruning: the smallest `|W|` of each output row go. The floor every other method is measured from."""

from torch import Tensor

from losa.pruning.masks import Pattern, select
from losa.pruning.pruner import Pruner, by_mask


def prune(W_OI: Tensor, keep_OI: Tensor, rate: float, pattern: Pattern, share: float = 1.0) -> Tensor:
    """Keep-mask by `|W|`; see `masks` for `rate`, `pattern` and `share`."""
    return select(W_OI.abs(), keep_OI, rate, pattern, share)


PRUNER = Pruner("magnitude", None, by_mask(lambda W_OI, keep_OI, _, *how: prune(W_OI, keep_OI, *how)))
