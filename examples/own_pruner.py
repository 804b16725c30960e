"""A pruner of your own beside Wanda, by how much inputs vary instead of how large they are: `python examples/own_pruner.py`."""

from pathlib import Path

import torch
from torch import Tensor

import losa
from losa.pruning import PRUNERS, Pruner, Solution
from losa.pruning.masks import select

ASSETS = Path(losa.__file__).parent / "demo_assets"


def collect(sums_3I: Tensor | None, X_NI: Tensor) -> Tensor:
    """Count, sum and sum of squares of each input feature, over all calibration tokens."""
    X_NI = X_NI.double()
    batch_3I = torch.stack([torch.ones_like(X_NI).sum(0), X_NI.sum(0), X_NI.square().sum(0)])
    return batch_3I if sums_3I is None else sums_3I + batch_3I


def solve(weights, masks, sums_3I, rates, pattern, share):  # noqa: ANN001, ANN201 - as losa.pruning.Pruner says
    """One mask a layer, from the scores; rates, patterns and nested masks are `select`'s."""
    mean_I, square_I = sums_3I[1:] / sums_3I[0]
    variance_I = (square_I - mean_I**2).clamp(min=0).float()
    chosen = [
        select(W_OI.float() ** 2 * variance_I, keep_OI, rate, pattern, share)
        for W_OI, keep_OI, rate in zip(weights, masks, rates, strict=True)
    ]
    return [Solution(W_OI.where(keep_OI, 0), keep_OI) for W_OI, keep_OI in zip(weights, chosen, strict=True)]


if __name__ == "__main__":
    PRUNERS["variance"] = Pruner("variance", collect, solve)
    for name in ("variance", "wanda"):
        keys = {"model": str(ASSETS / "novels-4m"), "pruner": name, "sparsity": 0.5, "eval.windows": 16}
        keys |= {"calibration.sequences": 32}
        keys |= {"calibration.data": str(ASSETS / "train.txt"), "eval.data": str(ASSETS / "held.txt")}
        config = losa.LosaConfig.load(preset="one-shot", overrides=keys)
        print(name, losa.prune(*losa.load(config), config).losa_record["perplexity"])
