"""Rules of layer rates, by name: which blocks or layers lose more than others. Pure functions; `rates.py` walks the model.

| rule | more is taken from | one rate a | looks at |
|---|---|---|---|
| `rmi` | blocks that tell what others tell (LoSA section 3.2) | block | Gram matrices of block inputs |
| `depth` | late blocks; the control of `rmi` | block | nothing |
| `uniform` | all alike | model | nothing |
| `owl` | blocks with few outliers (https://arxiv.org/abs/2310.05175) | block | norms of layer inputs |
| `dlp` | blocks whose median score is high (https://arxiv.org/abs/2505.23807) | block | norms of layer inputs |
| `error` | layers that lose the smallest share of their output with the next rate | layer | norms of layer inputs |

A rule is two functions and a width. `value` says one number of every block, or one cost curve of every layer, from what it needs
of the model; `allot` turns that into rates, none further from the mean than `band`. The scores of `owl`, `dlp` and `error` are
Wanda's, `|W_oi| * ||X_i||_2`.

Legend: `O` out_features, `I` in_features.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from losa.allocation import default_delta, equal_slope_rates, layer_rates, spread
from losa.importance import cka_matrix, rmi_importance
from losa.system.lookup import look_up

OUTLIER = 5.0  # M of OWL: a score so many times the block's mean is an outlier
POINTS = 201  # of a cost curve: a rate every half percent

Measured: TypeAlias = Sequence[float] | Sequence[Sequence[float]]
Scored: TypeAlias = Iterable[Sequence[tuple[Tensor, Tensor]]]  # of each block, its layers' scores `(O, I)` and masks


@dataclass(frozen=True)
class Layer:
    """One linear layer of a decoder: its name (`block.layer`), its block's number, and how many weights it has."""

    name: str
    block: int
    size: int


@dataclass(frozen=True)
class Request:
    """What rates must satisfy.

    Attributes:
        layers: all prunable layers, in the model's order.
        target: mean sparsity over all their weights, in [0, 1).
        delta: how far a rate may leave the mean, >= 0.
        previous: rates applied in the step before, one a layer: lower bounds.
        protected: blocks that keep all weights.
    """

    layers: Sequence[Layer]
    target: float
    delta: float
    previous: Sequence[float]
    protected: frozenset[int] = frozenset()

    def protected_layers(self) -> frozenset[int]:
        """Positions in `layers` of those in protected blocks."""
        return frozenset(position for position, layer in enumerate(self.layers) if layer.block in self.protected)


@dataclass(frozen=True)
class Rule:
    """A named way to set layer rates.

    Attributes:
        band: how far a rate may leave the mean, by final sparsity: what its authors use.
        needs: what `value` is given: "nothing", the number of blocks; "grams", of block inputs; or "norms", `Scored` by the
            norms of every linear layer's input. With "nothing", calibration text is not read.
        value: one number of every block, or one cost curve of every layer.
        allot: turns that into one rate a layer.
        by_layer: whether layers of one block may differ.
    """

    name: str
    band: Callable[[float], float]
    needs: Literal["nothing", "grams", "norms"]
    value: Callable[[Any], Measured]
    allot: Callable[[Measured, Request], list[float]]
    by_layer: bool = False


# What a block or a layer is worth: pure functions of Wanda's scores.


def outlier_share(scores: Sequence[Tensor], multiple: float = OUTLIER) -> float:
    """Share of scores above `multiple` times their mean: the layerwise outlier distribution (LOD), OWL equation 1.

    Args:
        scores: of all layers of a block, any shapes; the mean is over all of them together, in float64.

    Returns:
        A ratio in [0, 1 / `multiple`); 0 without scores.
    """
    count = sum(score.numel() for score in scores)
    if not count:
        return 0.0
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    return sum(int((score > multiple * mean).sum()) for score in scores) / count


def median_score(scores: Sequence[Tensor]) -> float:
    """Median over all layers of a block, the lower one of two: what DLP calls a block's unimportance.

    The median does not see outliers; where it is high, the weights are alike and the block has few that stand out.

    Args:
        scores: of all layers of a block, any shapes.

    Returns:
        A number >= 0; 0 without scores.
    """
    flat = torch.cat([score.flatten() for score in scores])
    return flat.median().item() if len(flat) else 0.0


def removal_curve(score_OI: Tensor, points: int = POINTS) -> list[float]:
    """Share of a layer's output energy that is lost with its lowest scores: at rates `0, 1/n, ..., 1`, with `n = points - 1`.

    Removing weights costs `||X (W - W')^T||_F^2`. With inputs taken as uncorrelated, so that only the diagonal of `X^T X` counts,
    that is the sum of the squared Wanda scores of what was removed, and `||X W^T||_F^2` is the sum of all. As Wanda compares
    scores within a row, every row loses equally many; between whole weights a row, the curve is linear.

    Args:
        score_OI: Wanda's scores, 0 where a weight is already gone; sums are float64.

    Returns:
        `points` values, convex, from 0 to 1; all 0 for a layer without energy.
    """
    columns = score_OI.shape[1]
    lost_I = score_OI.square().sort(dim=1).values.sum(0, dtype=torch.float64).cpu()
    curve = torch.cat([lost_I.new_zeros(1), lost_I.cumsum(0)])
    if curve[-1] > 0:
        curve /= curve[-1].clone()
    at = torch.linspace(0, columns, points, dtype=torch.float64)
    left = at.long().clamp(max=columns - 1)
    values: list[float] = (curve[left] + (at - left) * (curve[left + 1] - curve[left])).tolist()
    return values


# What a rule says of the model: one number of every block, or one curve of every layer.


def _mutual_information(grams: Any) -> list[float]:
    values: list[float] = rmi_importance(cka_matrix(grams)).tolist()
    return values


def _earliness(blocks: int) -> list[float]:
    return [1 - block / blocks for block in range(blocks)]


def _sameness(blocks: int) -> list[float]:
    return [0.0] * blocks


# Of a model that is already sparse, OWL and DLP look at the weights that are left: with the zeros, the median of most blocks
# would be 0, and the mean would tell how much was pruned before. Their papers prune once and do not meet the question.


def _outlier_shares(blocks: Scored) -> list[float]:
    return [outlier_share([score_OI[keep_OI] for score_OI, keep_OI in block]) for block in blocks]


def _negative_medians(blocks: Scored) -> list[float]:
    """DLP's relative importance is `1 - U_l / sum(U)`: linear in minus the median, and scaled to the band anyway."""
    return [-median_score([score_OI[keep_OI] for score_OI, keep_OI in block]) for block in blocks]


def _removal_curves(blocks: Scored) -> list[list[float]]:
    return [removal_curve(score_OI) for block in blocks for score_OI, _ in block]


# Allotting: from numbers to rates.


def _numbers(measured: Measured) -> list[float]:
    return [float(value) for value in measured]  # type: ignore[arg-type]


def _by_order(measured: Measured, request: Request) -> list[float]:
    """LoSA's linear programme over blocks. Where the layers of a block had different rates before, the highest is its bound."""
    importance = _numbers(measured)
    sizes, previous = [0] * len(importance), [0.0] * len(importance)
    for layer, past in zip(request.layers, request.previous, strict=True):
        sizes[layer.block] += layer.size
        previous[layer.block] = max(previous[layer.block], past)
    of_blocks = layer_rates(importance, sizes, request.target, request.delta, previous, sorted(request.protected))
    return [of_blocks[layer.block] for layer in request.layers]


def _by_value(measured: Measured, request: Request) -> list[float]:
    """`spread` over layers, each with the number of its block: layers of a block differ only if previous rates force them."""
    of_blocks, sizes = _numbers(measured), [layer.size for layer in request.layers]
    values = [of_blocks[layer.block] for layer in request.layers]
    return spread(values, sizes, request.target, request.delta, request.previous, request.protected_layers())


def _by_curve(measured: Measured, request: Request) -> list[float]:
    """Least mean over all weights of the share of energy lost. Were every layer's share to count alike, whatever its size, the
    small k and v projections would be kept at the cost of the large ones; measured, that is worse than uniform rates."""
    curves: list[Sequence[float]] = list(measured)  # type: ignore[arg-type]
    sizes = [layer.size for layer in request.layers]
    costs = [[size / max(sizes) * lost for lost in curve] for size, curve in zip(sizes, curves, strict=True)]
    return equal_slope_rates(costs, sizes, request.target, request.delta, request.previous, request.protected_layers())


def alike(_: Measured, request: Request) -> list[float]:
    """One rate for all layers that are not protected, except those that had a higher one before."""
    values, sizes = [0.0] * len(request.layers), [layer.size for layer in request.layers]
    return spread(values, sizes, request.target, 0.0, request.previous, request.protected_layers())


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("rmi", default_delta, "grams", _mutual_information, _by_order),
        Rule("depth", default_delta, "nothing", _earliness, _by_order),
        Rule("uniform", lambda sparsity: 0.0, "nothing", _sameness, alike),
        Rule("owl", lambda sparsity: 0.08, "norms", _outlier_shares, _by_value),  # its paper's lambda
        Rule("dlp", lambda sparsity: 0.15, "norms", _negative_medians, _by_value),  # its release's alpha at 70 %
        Rule("error", lambda sparsity: 0.10, "norms", _removal_curves, _by_curve, by_layer=True),
    )
}


def get_rule(name: str) -> Rule:
    """The rule called `name`.

    Raises:
        ValueError: no such rule.
    """
    return look_up(RULES, name, "rule of layer rates")
