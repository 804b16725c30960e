"""Pruning solvers: what to remove from one linear layer, given what its inputs look like.

Nothing here knows models, adapters or files. `PRUNERS` has the `PRUNER` of every module of this folder that defines one, so that
a solver is one file: nothing else lists it.
"""

from importlib import import_module
from pkgutil import iter_modules

from losa.pruning.masks import Pattern
from losa.pruning.pruner import Pruner, Solution, by_mask, second_order
from losa.system.lookup import look_up

__all__ = ["PRUNERS", "Pattern", "Pruner", "Solution", "by_mask", "get_pruner", "second_order"]

_modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
PRUNERS: dict[str, Pruner] = {module.PRUNER.name: module.PRUNER for module in _modules if hasattr(module, "PRUNER")}


def get_pruner(name: str) -> Pruner:
    """The solver called `name`.

    Raises:
        ValueError: no such solver.
    """
    return look_up(PRUNERS, name, "pruner")
