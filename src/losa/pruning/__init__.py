"""Pruning solvers: what to remove from one linear layer, given what its inputs look like.

A solver is two functions: `collect` folds a batch of inputs into a small statistic, `solve` turns weights, mask and
statistic into new weights and a nested mask. Nothing here knows models, adapters or files.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from losa.pruning import magnitude, sparsegpt, wanda
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
        solve: `(W_OI, keep_OI, statistic, rate, pattern, share) -> Solution`.
        updates_weights: whether surviving weights change too.
    """

    name: str
    collect: Callable[[Tensor | None, Tensor], Tensor] | None
    solve: Callable[[Tensor, Tensor, Tensor | None, float, Pattern, float], Solution]
    updates_weights: bool = False


def _magnitude(W_OI: Tensor, keep_OI: Tensor, _: Tensor | None, rate: float, pattern: Pattern, share: float) -> Solution:
    keep_OI = magnitude.prune(W_OI, keep_OI, rate, pattern, share)
    return Solution(W_OI.where(keep_OI, 0), keep_OI)


def _wanda(W_OI: Tensor, keep_OI: Tensor, sq_I: Tensor | None, rate: float, pattern: Pattern, share: float) -> Solution:
    assert sq_I is not None, "wanda needs input statistics"
    keep_OI = wanda.prune(W_OI, keep_OI, sq_I, rate, pattern, share)
    return Solution(W_OI.where(keep_OI, 0), keep_OI)


def _sparsegpt(W_OI: Tensor, keep_OI: Tensor, H_II: Tensor | None, rate: float, pattern: Pattern, share: float) -> Solution:
    assert H_II is not None, "sparsegpt needs input statistics"
    return Solution(*sparsegpt.prune(W_OI, keep_OI, H_II, rate, pattern, share))


PRUNERS: dict[str, Pruner] = {
    "magnitude": Pruner("magnitude", None, _magnitude),
    "wanda": Pruner("wanda", wanda.collect, _wanda),
    "sparsegpt": Pruner("sparsegpt", sparsegpt.collect, _sparsegpt, updates_weights=True),
}


def get_pruner(name: str) -> Pruner:
    """The solver called `name`.

    Raises:
        ValueError: no such solver.
    """
    if name not in PRUNERS:
        raise ValueError(f"pruner is {name!r}, expected one of {', '.join(PRUNERS)}")
    return PRUNERS[name]
