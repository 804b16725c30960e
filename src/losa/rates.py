"""Which layer loses how much: rules, by name, that turn a model and calibration text into a rate of zeros for every layer.

| rule | more is taken from | one rate a | looks at |
|---|---|---|---|
| `rmi` | blocks that tell what others tell (LoSA section 3.2) | block | Gram matrices of block inputs |
| `depth` | late blocks; the control of `rmi` | block | nothing |
| `uniform` | all alike | model | nothing |
| `owl` | blocks with few outliers (https://arxiv.org/abs/2310.05175) | block | norms of layer inputs |
| `dlp` | blocks whose median score is high (https://arxiv.org/abs/2505.23807) | block | norms of layer inputs |
| `error` | layers that lose the smallest share of their output with the next rate | layer | norms of layer inputs |

A rule is two functions. `measure` walks the model once, as it is now (masks and adapters on), and says one number of every
block, or one cost curve of every layer. `allot` turns that into rates; it is cheap and knows no model. The scores of `owl`, `dlp`
and `error` are Wanda's, `|W_oi| * ||X_i||_2`.

Legend: `S` sequences, `T` tokens, `O` out_features, `I` in_features.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from losa.adapter import MaskedLinear
from losa.allocation import equal_slope_rates, layer_rates, spread
from losa.calibration import block_grams, input_norms
from losa.importance import cka_matrix, rmi_importance
from losa.models import block_linears, find_decoder, on_device
from losa.pruning import wanda

OUTLIER = 5.0  # M of OWL: a score so many times the block's mean is an outlier
POINTS = 201  # of a cost curve: a rate every half percent

Measured: TypeAlias = Sequence[float] | Sequence[Sequence[float]]


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
    """A named way to set layer rates. The band it is used with is in `allocation.BANDS`.

    Attributes:
        needs: what `measure` collects: "nothing", "grams" (of block inputs) or "norms" (of every linear layer's input). With
            "nothing", calibration text is not read.
        measure: `(model, ids_ST, batch_size, device)` -> one number of every block, or one cost curve of every layer.
        allot: turns that into one rate a layer.
        by_layer: whether layers of one block may differ.
    """

    name: str
    needs: Literal["nothing", "grams", "norms"]
    measure: Callable[[PreTrainedModel, Tensor | None, int, torch.device | None], Measured]
    allot: Callable[[Measured, Request], list[float]]
    by_layer: bool = False


def rates(
    model: PreTrainedModel,
    ids_ST: Tensor | None,
    rule: str | Rule,
    target: float,
    delta: float,
    previous: Mapping[str, float] | None = None,
    protected: Collection[int] = (),
    device: torch.device | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """The rate of zeros of every linear layer: `measure`, then `allot`.

    Args:
        model: dense, or after `adapter.attach`; looked at as it is, with its masks and adapters.
        ids_ST: calibration sequences; of several processes, each takes a part. None is enough for rules that need nothing.
        rule: or its name.
        target, delta, previous, protected: as of `allot`.
        device: where blocks run, if not where the model is.

    Returns:
        Rates in [0, 1) by layer name (`block.layer`), whose weighted mean is `target`, none below its previous rate.

    Raises:
        ValueError: as `get_rule`, `measure` and `allot`.
    """
    rule = get_rule(rule) if isinstance(rule, str) else rule
    measured = None if delta == 0 else measure(model, ids_ST, rule, device, batch_size)
    return allot(model, rule, measured, target, delta, previous, protected)


@torch.no_grad()
def measure(
    model: PreTrainedModel, ids_ST: Tensor | None, rule: Rule, device: torch.device | None = None, batch_size: int = 8
) -> Measured:
    """What the rule says of the model as it is: one number of every block, or, of a rule by layer, one cost curve of every layer.

    For `rmi` and `depth` the number is an importance, for `owl` the share of outliers, for `dlp` minus the median score: the
    higher, the less is pruned.

    Raises:
        ValueError: no sequences where the rule needs them; no calibration token reached a layer; activations are not finite.
    """
    if rule.needs != "nothing" and (ids_ST is None or not len(ids_ST)):
        raise ValueError(f"rule {rule.name} needs calibration sequences, found none")
    return rule.measure(model, ids_ST, batch_size, device)


def allot(
    model: PreTrainedModel,
    rule: Rule,
    measured: Measured | None,
    target: float,
    delta: float,
    previous: Mapping[str, float] | None = None,
    protected: Collection[int] = (),
) -> dict[str, float]:
    """Rates from what `measure` said. With a `delta` of 0 every rule is `uniform`, and nothing needs to be measured.

    Args:
        target: mean sparsity over all weights, in [0, 1).
        delta: how far a rate may leave the mean, >= 0; the band is cut to [0, 1).
        previous: rates applied in the step before, by layer name; lower bounds, because masks are nested.
        protected: numbers of blocks that keep all weights; the others lose more, to the same total.

    Raises:
        ValueError: `previous` names other layers than the model has; as `allocation.layer_rates`, `spread`, `equal_slope_rates`.
    """
    layers = decoder_layers(model)
    names = [layer.name for layer in layers]
    if previous is not None and set(previous) != set(names):
        wrong = sorted(set(previous) ^ set(names))
        raise ValueError(f"previous rates and the model name different layers: {', '.join(wrong[:3])}")
    past = [0.0 if previous is None else previous[name] for name in names]
    request = Request(layers, target, delta, past, frozenset(protected))
    if delta == 0:
        return dict(zip(names, _alike((), request), strict=True))
    if measured is None:
        raise ValueError(f"rule {rule.name} has measured nothing, which is enough for delta 0 only; delta is {delta}")
    return dict(zip(names, rule.allot(measured, request), strict=True))


def decoder_layers(model: PreTrainedModel) -> list[Layer]:
    """All linear layers of all blocks, in the model's order."""
    blocks = find_decoder(model).blocks
    return [
        Layer(f"{index}.{name}", index, linear.weight.numel())
        for index, block in enumerate(blocks)
        for name, linear in block_linears(block).items()
    ]


def block_means(model: PreTrainedModel, rates: Mapping[str, float]) -> list[float]:
    """The mean rate of each block, weighted by the sizes of its layers."""
    zeros, sizes = Counter[int](), Counter[int]()
    for layer in decoder_layers(model):
        sizes[layer.block] += layer.size
        zeros[layer.block] += layer.size * rates[layer.name]  # type: ignore[assignment]
    return [zeros[block] / sizes[block] for block in sizes]


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


# Measuring: one walk of the model.


def _scores_by_block(
    model: PreTrainedModel, ids_ST: Tensor | None, batch_size: int, device: torch.device | None
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of each block, for each of its layers: Wanda's scores `(O, I)` of the merged weight, and the mask they have now."""
    assert ids_ST is not None
    norms = input_norms(model, ids_ST, batch_size, device)
    for index, block in enumerate(find_decoder(model).blocks):
        with on_device(block, device):
            yield [_scored(layer, norms[f"{index}.{name}"]) for name, layer in block_linears(block).items()]


def _scored(layer: nn.Linear, sq_I: Tensor) -> tuple[Tensor, Tensor]:
    sq_I = sq_I.to(layer.weight.device)
    if isinstance(layer, MaskedLinear):
        return wanda.scores(layer.merged(), sq_I), layer.keep_OI
    return wanda.scores(layer.weight, sq_I), torch.ones_like(layer.weight, dtype=torch.bool)


def _mutual_information(
    model: PreTrainedModel, ids_ST: Tensor | None, batch_size: int, device: torch.device | None
) -> list[float]:
    assert ids_ST is not None
    values: list[float] = rmi_importance(cka_matrix(block_grams(model, ids_ST, batch_size, device))).tolist()
    return values


def _earliness(model: PreTrainedModel, *_: object) -> list[float]:
    count = len(find_decoder(model).blocks)
    return [1 - block / count for block in range(count)]


def _sameness(model: PreTrainedModel, *_: object) -> list[float]:
    return [0.0] * len(find_decoder(model).blocks)


# Of a model that is already sparse, OWL and DLP look at the weights that are left: with the zeros, the median of most blocks
# would be 0, and the mean would tell how much was pruned before. Their papers prune once and do not meet the question.


def _outlier_shares(model: PreTrainedModel, ids_ST: Tensor | None, batch_size: int, device: torch.device | None) -> list[float]:
    blocks = _scores_by_block(model, ids_ST, batch_size, device)
    return [outlier_share([score_OI[keep_OI] for score_OI, keep_OI in block]) for block in blocks]


def _negative_medians(model: PreTrainedModel, ids_ST: Tensor | None, batch_size: int, device: torch.device | None) -> list[float]:
    """DLP's relative importance is `1 - U_l / sum(U)`: linear in minus the median, and scaled to the band anyway."""
    blocks = _scores_by_block(model, ids_ST, batch_size, device)
    return [-median_score([score_OI[keep_OI] for score_OI, keep_OI in block]) for block in blocks]


def _removal_curves(
    model: PreTrainedModel, ids_ST: Tensor | None, batch_size: int, device: torch.device | None
) -> list[list[float]]:
    blocks = _scores_by_block(model, ids_ST, batch_size, device)
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


def _alike(_: Measured, request: Request) -> list[float]:
    """One rate for all layers that are not protected, except those that had a higher one before."""
    values, sizes = [0.0] * len(request.layers), [layer.size for layer in request.layers]
    return spread(values, sizes, request.target, 0.0, request.previous, request.protected_layers())


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("rmi", "grams", _mutual_information, _by_order),
        Rule("depth", "nothing", _earliness, _by_order),
        Rule("uniform", "nothing", _sameness, _alike),
        Rule("owl", "norms", _outlier_shares, _by_value),
        Rule("dlp", "norms", _negative_medians, _by_value),
        Rule("error", "norms", _removal_curves, _by_curve, by_layer=True),
    )
}


def get_rule(name: str) -> Rule:
    """The rule called `name`.

    Raises:
        ValueError: no such rule.
    """
    if name not in RULES:
        raise ValueError(f"rule of layer rates is {name!r}, expected one of {', '.join(RULES)}")
    return RULES[name]
