"""What a model costs to keep and to run: bits a weight, bytes, tokens per second."""

import copy
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from losa.integrations.transformers import pack_model
from losa.models import find_decoder
from losa.pruning.grid import FORMATS
from losa.runtime.bench import take_turns
from losa.runtime.header import Packing
from losa.system.environment import machine

DENSE_BITS = 16.0
PROMPT, NEW, ROUNDS = 32, 32, 5  # tokens, and turns of every model, that speed is measured with


def stored_size(model: PreTrainedModel, values: str | None) -> tuple[float, int]:
    """Bits of a weight of the decoder's blocks, and bytes of the model, all else in bfloat16.

    Args:
        values: the grid that the weights are on; None: bfloat16, packed where that is smaller.
    """
    weights = [linear.weight for linear in find_decoder(model).linears().values()]
    count = sum(weight.numel() for weight in weights)
    density = sum(int(weight.count_nonzero()) for weight in weights) / count
    bits = FORMATS[values].bits_per_weight(density) if values else min(DENSE_BITS, 1 + 16 * density)
    rest = sum(parameter.numel() for parameter in model.parameters()) - count
    return bits, round((bits * count + 16 * rest) / 8)


def decoding_speed(model: PreTrainedModel, values: str | None, device: torch.device) -> dict[str, Any] | None:
    """Tokens per second of a packed copy where the model has zeros, and of what it is when dense, in turns; None for dense
    models of few bits, which this package does not run. The head is packed as `losa pack` does it: in int8 where values round."""
    kind = FORMATS[values] if values else None
    if kind is not None and not kind.sparse:
        return None
    model = model.to(torch.bfloat16).eval()
    models = {"dense": model}
    if stored_size(model, values)[0] < DENSE_BITS:
        models["packed"] = copy.deepcopy(model)
        pack_model(models["packed"], Packing(values or "bfloat16"))
    clocks = take_turns(models, device, PROMPT, NEW, ROUNDS)
    rates = {name: median(clock.rate for clock in mine) for name, mine in clocks.items()}
    own = rates["packed" if "packed" in rates else "dense"]
    return {"tokens_per_second": own, "of_dense": own / rates["dense"], "machine": machine(device.type)}
