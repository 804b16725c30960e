"""What the method is compared with, made of its own parts, so that a row of a comparison differs in one thing at a time.

Both start from a model pruned once at one rate (`method.sparsify`) and are trained, merged and verified like any other.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from losa.adapter import masked_linears
from losa.bits import pack_bits

FULL_RATE = 0.3  # learning rate of full fine-tuning over that of adapters: 0.3 and 1 tied, 0.1 was worse (docs/experiments.md)


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
def train_whole_weights(model: PreTrainedModel) -> None:
    """Full fine-tuning under the mask: the adapter's `A` becomes the identity and stays it, so that `M * (W + B)` is trained.

    Weight decay pulls towards the pruned weights, not towards zero.
    """
    for layer in masked_linears(model).values():
        identity_II = torch.eye(layer.in_features, dtype=layer.lora_A.dtype, device=layer.weight.device)
        layer.lora_A = nn.Parameter(identity_II, requires_grad=False)
        layer.lora_B = nn.Parameter(torch.zeros_like(layer.weight, dtype=layer.lora_B.dtype))
        layer.rank, layer.scale = layer.in_features, 1.0


@torch.no_grad()
def mask_again(model: PreTrainedModel, masks: dict[str, Tensor]) -> None:
    """Sets what `masks` prune to zero again, in a model after its merge."""
    for name, keep_OI in masks.items():
        model.get_parameter(name).masked_fill_(~keep_OI.to(model.device), 0)
