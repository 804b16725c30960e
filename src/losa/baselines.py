"""What the method is compared with, made of its own parts, so that a row of a comparison differs in one thing at a time.

Both start from a model pruned once at one rate (`method.sparsify`) and are trained, merged and verified like any other.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from losa.adapter import masked_linears
from losa.bits import pack_bits


@torch.no_grad()
def lift_masks(model: PreTrainedModel) -> dict[str, Tensor]:
    """Plain LoRA on a pruned model: the pruned weights become the base, and adapters are masked no more. What comes out of the
    merge is dense.

    Returns:
        The keep-masks that were lifted, by parameter name.
    """
    masks = {}
    for name, layer in masked_linears(model).items():
        masks[f"{name}.weight"] = layer.keep_OI
        layer.restore(pack_bits(torch.ones_like(masks[f"{name}.weight"])), layer.merged())
    return masks


@torch.no_grad()
def mask_again(model: PreTrainedModel, masks: dict[str, Tensor]) -> None:
    """Sets what `masks` prune to zero again, in a model after its merge."""
    for name, keep_OI in masks.items():
        model.get_parameter(name).masked_fill_(~keep_OI.to(model.device), 0)
