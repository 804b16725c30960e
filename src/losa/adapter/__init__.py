"""The masked low-rank adapter: one autograd function, one layer, and how a model gets and loses them."""

from losa.adapter.layer import (
    MaskedLinear,
    attach,
    collect_scores,
    dense_mode,
    dense_weights_on_device,
    masked_linears,
    masked_sparsity,
    merge,
    outdate_effective_weights,
    reuse_effective_weights,
    whole_weights,
)

__all__ = [
    "MaskedLinear",
    "attach",
    "collect_scores",
    "dense_mode",
    "dense_weights_on_device",
    "masked_linears",
    "masked_sparsity",
    "merge",
    "outdate_effective_weights",
    "reuse_effective_weights",
    "whole_weights",
]
