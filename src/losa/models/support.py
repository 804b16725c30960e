"""Refusing, in one sentence, what LoSA cannot prune honestly. A model's blocks are found in `blocks.py`."""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from losa.models.blocks import find_decoder, try_blocks

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)  # their weights are three-dimensional and no stacks of matrices


def _check_dense(config: Any, name: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised; LoSA prunes bf16, fp16 or fp32 weights, so load the original checkpoint")


def check_supported(model: PreTrainedModel) -> None:
    """Refuses, in one sentence, what LoSA cannot prune honestly.

    Raises:
        ValueError: quantised base, Conv1D, fused experts, encoder-decoder, multi-modal, weights that are not finite or not float,
            blocks that cannot be run alone, layers that share a weight.
    """
    kind = type(model).__name__
    _check_dense(model.config, kind)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder; LoSA supports causal language models")
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"{kind} is multi-modal; LoSA takes text models, so load its language model alone")
    decoder = find_decoder(model)
    for name, module in decoder.blocks.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape[1:]) > 1 and not isinstance(module, CONVOLUTIONS):
                found = f"{decoder.name}.{name}.{own} {tuple(parameter.shape)}"
                what = "fused experts" if "expert" in found else "a stack of matrices"
                raise ValueError(f"{kind} keeps {what} in {found}; LoSA needs one nn.Linear per matrix")
    owners: dict[int, str] = {}
    for name, linear in decoder.linears().items():
        if (owner := owners.setdefault(id(linear.weight), name)) != name:
            raise ValueError(f"{name} and {owner} are one weight; LoSA needs one for each layer, as each gets a mask of its own")
        if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
            raise ValueError(f"{name} is a {type(linear).__name__} of {linear.weight.dtype}, expected a plain float nn.Linear")
        real = linear.weight.device.type != "meta" and not isinstance(linear.weight.data, FakeTensor)
        if real and not torch.isfinite(linear.weight).all():
            raise ValueError(f"{name} holds NaN or infinite weights; the checkpoint is damaged")
    try_blocks(model)
    for name, module in decoder.blocks.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise ValueError(f"{kind} is an encoder: in {decoder.name}.{name}, tokens see later ones; LoSA needs a causal model")


def max_length(config: Any) -> int:
    """Longest window the model allows, in tokens (`max_position_embeddings`), or 2048 where it does not say."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2048)
