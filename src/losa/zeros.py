"""Keeping the zeros of a sparse model while anything at all fine-tunes it: a plain loop, `transformers.Trainer`, TRL, accelerate.

Two hooks, and no other change of the model: the gradient of a pruned weight is zero, so that neither moments nor the norm that
is clipped by see it; and after every step of any optimizer pruned weights are set to zero, which is what an optimizer that mixes
the entries of a matrix (Muon) needs.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from losa.bits import pack_bits, unpack_bits
from losa.models import find_decoder


class KeptZeros:
    """What `keep_zeros` returns: the hooks, until `remove`, or the end of a `with` block.

    Attributes:
        weights: by name, the parameters whose zeros are kept. Masks are a bit a weight.
    """

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        self.weights = weights
        self._bits = {name: pack_bits(weight != 0) for name, weight in weights.items()}
        handles: list[Any] = [
            weight.register_hook(lambda gradient, name=name: gradient.masked_fill(~self.keep(name, gradient.device), 0))
            for name, weight in weights.items()
            if weight.requires_grad
        ]
        self._handles = [*handles, register_optimizer_step_post_hook(lambda *_: self.apply())]

    def keep(self, name: str, device: torch.device) -> Tensor:
        """The keep-mask of a weight, bool `(O, I)`."""
        return unpack_bits(self._bits[name].to(device), self.weights[name].shape)

    @torch.no_grad()
    def apply(self) -> None:
        """Sets every pruned weight to zero, in place: after something other than an optimizer has changed weights, such as
        merging an adapter of peft's."""
        for name, weight in self.weights.items():
            weight.masked_fill_(~self.keep(name, weight.device), 0)

    def remove(self) -> None:
        """Takes the hooks away; the zeros stay until the next update."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def keep_zeros(model: PreTrainedModel) -> KeptZeros:
    """Has the linear layers of a sparse model's decoder blocks keep the zeros they have now, whatever trains the model.

    Call it before the optimizer's first step; not with FSDP or DeepSpeed, which train other tensors than the model's own.

    Args:
        model: a sparse checkpoint, opened by transformers; or a model of peft's around one.

    Raises:
        ValueError: there are no zeros to keep, or layers that are not trained in place (packed, or with losa's adapters).
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner.config, "quantization_config", None) is not None:
        raise ValueError(f"{type(inner).__name__} is packed, so it is not trained; losa unpack gives the sparse checkpoint")
    decoder = find_decoder(inner)
    wrapped = [name for name, module in inner.named_modules() if hasattr(module, "base_layer")]  # by adapters of peft's
    weights: dict[str, nn.Parameter] = {}
    for name, linear in decoder.linears().items():
        if any(name.startswith(f"{one}.") and not name.startswith(f"{one}.base_layer") for one in wrapped):
            continue  # an adapter's own matrix, whose zeros are where it begins
        if type(linear).__name__ == "MaskedLinear":
            raise ValueError(f"{name} is masked already; losa.merge the model first, or train it as it is")
        if (linear.weight == 0).any():
            weights[f"{name}.weight"] = linear.weight  # type: ignore[assignment]
    if not weights:
        raise ValueError(f"{type(inner).__name__} has no zeros in its decoder's linear layers; expected a sparse checkpoint")
    return KeptZeros(weights)
