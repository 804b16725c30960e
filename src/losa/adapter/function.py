"""`y = x W_eff^T + b` with `W_eff = M * (W + s B A)`, differentiated by hand. LoSA section 3.1.

Why not let autograd do it: written as `F.linear(x, M * (W + s * (B @ A)))` it keeps `B A`, the sum and the product, three
`O x I` tensors a layer, until backward. (The release runs the base product and a second dense product and recomputes both
under checkpointing: 3 times the large GEMMs of plain LoRA.) Here a layer keeps `x` and its own five parameters, and
`W_eff` is built again in backward, `O I R` flops against the `N O I` of a product.

    forward:   W_eff = M * (W + s B A)         y  = x W_eff^T + b
    backward:  G  = dy^T x      (O x I)        dx = dy W_eff
               dB = s (M * G) A^T              dA = s B^T (M * G)

These gradients are exact. That is 6 N O I flops a layer, 1.5 times plain LoRA's 4 N O I, whose result cannot be merged.

Legend: `N` tokens, `O` out_features, `I` in_features, `R` rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def merged_weight(W_OI: Tensor, M_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """`M * (W + s B A)` in the dtype of the adapters; +0 (bitwise) wherever the mask is False.

    This is the only place that forms the merged weight: training, calibration, evaluation and the saved file agree.
    """
    return torch.addmm(W_OI.to(A_RI.dtype), B_OR, A_RI, alpha=scale).masked_fill_(~M_OI, 0.0)


def effective_weight(W_OI: Tensor, M_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """The merged weight, cast once to the dtype of `W`."""
    return merged_weight(W_OI, M_OI, A_RI, B_OR, scale).to(W_OI.dtype)


class MaskedLowRankLinear(torch.autograd.Function):
    """The fused function. Base weight, mask and bias are frozen; gradients go to `x`, `A` and `B`."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, W_OI: Tensor, bias_O: Tensor | None, M_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, W_OI, M_OI, A_RI, B_OR)
        ctx.scale = scale
        return torch.nn.functional.linear(x, effective_weight(W_OI, M_OI, A_RI, B_OR, scale), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, W_OI, M_OI, A_RI, B_OR = ctx.saved_tensors
        dx = dA_RI = dB_OR = None
        if ctx.needs_input_grad[0]:
            dx = dy @ effective_weight(W_OI, M_OI, A_RI, B_OR, ctx.scale)
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            G_OI = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            G_OI = G_OI.masked_fill_(~M_OI, 0.0).to(A_RI.dtype)
            dA_RI = ctx.scale * (B_OR.T @ G_OI)
            dB_OR = ctx.scale * (G_OI @ A_RI.T)
        return dx, None, None, None, dA_RI, dB_OR, None
