"""The rate of zeros of every layer: the model is walked for what a rule (`rules.py`) needs to know, and the rule decides.

`measure` walks the model once, as it is now, masks and adapters on. `allot` turns what was measured into rates; it is cheap.

Legend: `S` sequences, `T` tokens, `O` out_features, `I` in_features.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from losa.adapter import MaskedLinear
from losa.calibration import block_grams, input_norms
from losa.models import block_linears, find_decoder, on_device
from losa.pruning import wanda
from losa.rules import Layer, Measured, Request, Rule, alike, get_rule


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
    if rule.needs == "nothing":
        return rule.value(len(find_decoder(model).blocks))
    if ids_ST is None or not len(ids_ST):
        raise ValueError(f"rule {rule.name} needs calibration sequences, found none")
    if rule.needs == "grams":
        return rule.value(block_grams(model, ids_ST, batch_size, device))
    return rule.value(_scores_by_block(model, ids_ST, batch_size, device))


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
        return dict(zip(names, alike((), request), strict=True))
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


def _scores_by_block(
    model: PreTrainedModel, ids_ST: Tensor, batch_size: int, device: torch.device | None
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of each block, for each of its layers: Wanda's scores `(O, I)` of the merged weight, and the mask they have now."""
    norms = input_norms(model, ids_ST, batch_size, device)
    for index, block in enumerate(find_decoder(model).blocks):
        with on_device(block, device):
            yield [_scored(layer, norms[f"{index}.{name}"]) for name, layer in block_linears(block).items()]


def _scored(layer: nn.Linear, sq_I: Tensor) -> tuple[Tensor, Tensor]:
    sq_I = sq_I.to(layer.weight.device)
    if isinstance(layer, MaskedLinear):
        return wanda.scores(layer.merged(), sq_I), layer.keep_OI
    return wanda.scores(layer.weight, sq_I), torch.ones_like(layer.weight, dtype=torch.bool)
