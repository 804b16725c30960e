"""Magnitude pruning: the smallest `|W|` of each output row go. The floor every other method is measured from."""

from torch import Tensor

from losa.pruning.masks import Pattern, select


def prune(W_OI: Tensor, keep_OI: Tensor, rate: float, pattern: Pattern, share: float = 1.0) -> Tensor:
    """Keep-mask by `|W|`; see `masks` for `rate`, `pattern` and `share`."""
    return select(W_OI.abs(), keep_OI, rate, pattern, share)
