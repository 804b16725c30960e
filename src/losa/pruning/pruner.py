"""What a pruning solver is: two functions, and a statement of what they need.

`collect` folds a batch of inputs into a small statistic, `solve` turns weights, masks and statistic into new weights and nested
masks. Every module of this folder that holds a solver ends in its `PRUNER`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from losa.pruning.masks import Pattern


@dataclass(frozen=True)
class Solution:
    """What a solver decided for one linear layer."""

    weight_OI: Tensor  # float32; zeros outside the mask
    keep_OI: Tensor  # bool
    raised_damping: float | None = None  # the ratio with which a Hessian factorised that did not with the usual one


Collect: TypeAlias = Callable[[Tensor | None, Tensor], Tensor]
Solve: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None, Sequence[float], Pattern, float], list[Solution]]


@dataclass(frozen=True)
class Pruner:
    """A named solver, and what it needs; nothing else in the package decides anything by its name.

    Attributes:
        collect: `(statistic or None, X_NI) -> statistic`; None when the solver looks at weights only.
        solve: `(weights, masks, statistic, rates, pattern, share) -> solutions`, for layers that are fed by one tensor and so
            share its statistic: q, k and v, or gate and up. Each layer is pruned to its own rate.
        updates_weights: whether surviving weights change too; where adapters are trained, the dense original is then kept.
        from_training: whether the statistic is each layer's own score from the training before, not of its inputs.
        matrix: whether the statistic is `(I, I)`, not `(I,)`.
        square_copies: float32 matrices `(I, I)` alive at once while it solves.
        weight_bytes: bytes a weight of the layers that share an input, alive while it solves.
    """

    name: str
    collect: Collect | None
    solve: Solve
    updates_weights: bool = False
    from_training: bool = False
    matrix: bool = False
    square_copies: int = 0
    weight_bytes: int = 30  # merged weight, scores, their order, masks

    def calibration_tokens(self, hidden_size: int) -> int:
        """How many tokens its statistic wants; more were not worth their time (docs/LOG.md). A Gram matrix wants 16 for every
        feature of its widest layer, which may be four times the hidden size; at 4096 these are the literature's 128 x 2048."""
        return min(2**18, max(2**14, 64 * hidden_size)) if self.matrix else 2**16

    def statistic_bytes(self, in_features: int) -> int:
        """Bytes of the statistic of one input of this width."""
        if self.collect is None:
            return 0
        return 4 * in_features**2 if self.matrix else 8 * in_features

    def keeps_dense(self, whole: bool) -> bool:
        """Whether dense originals are kept beside the base weights; with `whole`, where all weights are trained, the base itself
        stays dense."""
        return self.updates_weights and not whole


def second_order(name: str, collect: Collect, solve: Solve) -> Pruner:
    """A solver that moves what survives, by the Gram matrix of the inputs and a factorisation of it."""
    return Pruner(name, collect, solve, updates_weights=True, matrix=True, square_copies=5, weight_bytes=32)


def by_mask(choose: Callable[[Tensor, Tensor, Any, float, Pattern, float], Tensor]) -> Solve:
    """The `solve` of a pruner that only chooses masks, one layer at a time.

    Args:
        choose: `(W_OI, keep_OI, statistic, rate, pattern, share) -> keep_OI`.
    """

    def solve(
        weights: Sequence[Tensor],
        masks: Sequence[Tensor],
        statistic: Tensor | None,
        rates: Sequence[float],
        pattern: Pattern,
        share: float,
    ) -> list[Solution]:
        layers = zip(weights, masks, rates, strict=True)
        chosen = [choose(W_OI, keep_OI, statistic, rate, pattern, share) for W_OI, keep_OI, rate in layers]
        return [Solution(W_OI.where(keep_OI, 0), keep_OI) for W_OI, keep_OI in zip(weights, chosen, strict=True)]

    return solve
