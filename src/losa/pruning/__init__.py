"""Pruning solvers: what to remove from one linear layer, given what its inputs look like.

A solver is two functions: `collect` folds a batch of inputs into a small statistic, `solve` turns weights, mask and
statistic into new weights and a nested mask. Nothing here knows models, adapters or files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from losa.pruning import magnitude, movement, sparsegpt, wanda
from losa.pruning.masks import Pattern

__all__ = ["PRUNERS", "Pattern", "Pruner", "Solution", "get_pruner"]


@dataclass(frozen=True)
class Solution:
    """What a solver decided for one linear layer."""

    weight_OI: Tensor  # float32; zeros outside the mask
    keep_OI: Tensor  # bool
    damping: float | None = None  # SparseGPT: the damping ratio that made the Hessian factorise


@dataclass(frozen=True)
class Pruner:
    """A named solver.

    Attributes:
        collect: `(statistic or None, X_NI) -> statistic`; None when the solver looks at weights only.
        solve: `(weights, masks, statistic, rate, pattern, share) -> solutions`, for layers that are fed by one tensor and so
            share its statistic: q, k and v, or gate and up. Each layer is pruned to `rate` on its own.
        updates_weights: whether surviving weights change too.
        from_training: whether the statistic is each layer's own score from the training before, not of its inputs.
    """

    name: str
    collect: Callable[[Tensor | None, Tensor], Tensor] | None
    solve: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None, float, Pattern, float], list[Solution]]
    updates_weights: bool = False
    from_training: bool = False


def _by_mask(choose: Callable[[Tensor, Tensor], Tensor], weights: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Solution]:
    """Solutions of a solver that only chooses a mask, `(W_OI, keep_OI) -> keep_OI`."""
    chosen = [choose(W_OI, keep_OI) for W_OI, keep_OI in zip(weights, masks, strict=True)]
    return [Solution(W_OI.where(keep_OI, 0), keep_OI) for W_OI, keep_OI in zip(weights, chosen, strict=True)]


def _magnitude(
    weights: Sequence[Tensor], masks: Sequence[Tensor], _: Tensor | None, rate: float, pattern: Pattern, share: float
) -> list[Solution]:
    return _by_mask(lambda W_OI, keep_OI: magnitude.prune(W_OI, keep_OI, rate, pattern, share), weights, masks)


def _wanda(
    weights: Sequence[Tensor], masks: Sequence[Tensor], sq_I: Tensor | None, rate: float, pattern: Pattern, share: float
) -> list[Solution]:
    assert sq_I is not None, "wanda needs input statistics"
    return _by_mask(lambda W_OI, keep_OI: wanda.prune(W_OI, keep_OI, sq_I, rate, pattern, share), weights, masks)


def _sparsegpt(
    weights: Sequence[Tensor], masks: Sequence[Tensor], H_II: Tensor | None, rate: float, pattern: Pattern, share: float
) -> list[Solution]:
    assert H_II is not None, "sparsegpt needs input statistics"
    solved, damping = sparsegpt.prune(weights, masks, H_II, rate, pattern, share)
    return [Solution(W_OI, keep_OI, damping) for W_OI, keep_OI in solved]


def _movement(
    weights: Sequence[Tensor], masks: Sequence[Tensor], score_OI: Tensor | None, rate: float, pattern: Pattern, share: float
) -> list[Solution]:
    return _by_mask(lambda W_OI, keep_OI: movement.prune(W_OI, keep_OI, score_OI, rate, pattern, share), weights, masks)


PRUNERS: dict[str, Pruner] = {
    "magnitude": Pruner("magnitude", None, _magnitude),
    "wanda": Pruner("wanda", wanda.collect, _wanda),
    "sparsegpt": Pruner("sparsegpt", sparsegpt.collect, _sparsegpt, updates_weights=True),
    "movement": Pruner("movement", None, _movement, from_training=True),
}


def get_pruner(name: str) -> Pruner:
    """The solver called `name`.

    Raises:
        ValueError: no such solver.
    """
    if name not in PRUNERS:
        raise ValueError(f"pruner is {name!r}, expected one of {', '.join(PRUNERS)}")
    return PRUNERS[name]
