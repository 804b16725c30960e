"""Pruning solvers: what to remove from one linear layer, given what its inputs look like.

A solver is two functions: `collect` folds a batch of inputs into a small statistic, `solve` turns weights, mask and
statistic into new weights and a nested mask. Nothing here knows models, adapters or files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from losa.pruning import alps, magnitude, movement, sparsegpt, wanda
from losa.pruning.masks import Pattern

__all__ = ["PRUNERS", "ROUNDING_LIKE", "Pattern", "Pruner", "Solution", "get_pruner"]


@dataclass(frozen=True)
class Solution:
    """What a solver decided for one linear layer."""

    weight_OI: Tensor  # float32; zeros outside the mask
    keep_OI: Tensor  # bool
    damping: float | None = None  # SparseGPT: the damping ratio that made the Hessian factorise


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
    collect: Callable[[Tensor | None, Tensor], Tensor] | None
    solve: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None, Sequence[float], Pattern, float], list[Solution]]
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


Choice = Callable[[Tensor, Tensor, float], Tensor]


def _by_mask(choose: Choice, weights: Sequence[Tensor], masks: Sequence[Tensor], rates: Sequence[float]) -> list[Solution]:
    """Solutions of a solver that only chooses a mask, `(W_OI, keep_OI, rate) -> keep_OI`."""
    chosen = [choose(W_OI, keep_OI, rate) for W_OI, keep_OI, rate in zip(weights, masks, rates, strict=True)]
    return [Solution(W_OI.where(keep_OI, 0), keep_OI) for W_OI, keep_OI in zip(weights, chosen, strict=True)]


def _magnitude(
    weights: Sequence[Tensor], masks: Sequence[Tensor], _: Tensor | None, rates: Sequence[float], pattern: Pattern, share: float
) -> list[Solution]:
    return _by_mask(lambda W_OI, keep_OI, rate: magnitude.prune(W_OI, keep_OI, rate, pattern, share), weights, masks, rates)


def _wanda(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    sq_I: Tensor | None,
    rates: Sequence[float],
    pattern: Pattern,
    share: float,
) -> list[Solution]:
    assert sq_I is not None, "wanda needs input statistics"
    return _by_mask(lambda W_OI, keep_OI, rate: wanda.prune(W_OI, keep_OI, sq_I, rate, pattern, share), weights, masks, rates)


def _sparsegpt(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    H_II: Tensor | None,
    rates: Sequence[float],
    pattern: Pattern,
    share: float,
) -> list[Solution]:
    assert H_II is not None, "sparsegpt needs input statistics"
    solved, damping = sparsegpt.prune(weights, masks, H_II, rates, pattern, share)
    return [Solution(W_OI, keep_OI, damping) for W_OI, keep_OI in solved]


def _alps(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    G_II: Tensor | None,
    rates: Sequence[float],
    pattern: Pattern,
    share: float,
) -> list[Solution]:
    assert G_II is not None, "alps needs input statistics"
    return [Solution(W_OI, keep_OI) for W_OI, keep_OI in alps.prune(weights, masks, G_II, rates, pattern, share)]


def _movement(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    score_OI: Tensor | None,
    rates: Sequence[float],
    pattern: Pattern,
    share: float,
) -> list[Solution]:
    return _by_mask(
        lambda W_OI, keep_OI, rate: movement.prune(W_OI, keep_OI, score_OI, rate, pattern, share), weights, masks, rates
    )


_SECOND_ORDER: dict[str, Any] = {
    "updates_weights": True,
    "matrix": True,
    "square_copies": 5,
    "weight_bytes": 32,
}
PRUNERS: dict[str, Pruner] = {
    pruner.name: pruner
    for pruner in (
        Pruner("alps", sparsegpt.collect, _alps, **_SECOND_ORDER),
        Pruner("sparsegpt", sparsegpt.collect, _sparsegpt, **_SECOND_ORDER),
        Pruner("wanda", wanda.collect, _wanda),
        Pruner("magnitude", None, _magnitude),
        Pruner("movement", None, _movement, from_training=True),
    )
}
ROUNDING_LIKE = PRUNERS["sparsegpt"]  # whose statistic `rounding.py` takes, and whose memory: the same pass over the columns


def get_pruner(name: str) -> Pruner:
    """The solver called `name`.

    Raises:
        ValueError: no such solver.
    """
    if name not in PRUNERS:
        raise ValueError(f"pruner is {name!r}, expected one of {', '.join(PRUNERS)}")
    return PRUNERS[name]
