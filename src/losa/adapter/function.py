"""`y = x W_eff^T + b` with `W_eff = M * (W + s B A)`, differentiated by hand. LoSA section 3.1.

Why not let autograd do it: written as `F.linear(x, M * (W + s * (B @ A)))` it keeps `B A`, the sum and the product, three
`O x I` tensors a layer, until backward. (The release runs the base product and a second dense product and recomputes both
under checkpointing: 3 times the large GEMMs of plain LoRA.) Here a layer keeps `x` and its own five parameters, and
`W_eff` is built again in backward, `O I R` flops against the `N O I` of a product.

    forward:   W_eff = M * (W + s B A)         y  = x W_eff^T + b
    backward:  G  = dy^T x      (O x I)        dx = dy W_eff
               dB = s (M * G) A^T              dA = s B^T (M * G)

These gradients are exact. That is 6 N O I flops a layer, 1.5 times plain LoRA's 4 N O I, whose result cannot be merged.

What is not a large product is memory traffic, so it goes by panels of rows: a panel's float32 sum, its mask bits and its result
stay in the cache, and no float32 tensor of the size of the weight exists. Masks are bits; multiplying the *bit pattern* of a
weight by its bit, as integers, keeps it exactly or makes it +0, also where it is NaN or negative.

Legend: `N` tokens, `O` out_features, `I` in_features, `R` rank, `P` rows of a panel.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from losa.bits import byte_table, unpack_bytes

# float32 bytes of a panel: the fastest of 0.5 to 4 MiB on a CPU (docs/LOG.md); on a GPU large enough that launches do not count.
PANEL_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def panels(shape: torch.Size, device: torch.device) -> Iterator[slice]:
    """Slices of rows of an `(O, I)` tensor; each starts at a whole byte of its mask."""
    rows = PANEL_BYTES.get(device.type, PANEL_BYTES["cuda"]) // (4 * shape[1])
    rows = max(8, rows - rows % 8)
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def mask_(values_PI: Tensor, bits: Tensor, rows: slice, table: Tensor) -> Tensor:
    """Makes, in place, every weight outside the mask +0: `rows` of a layer whose whole mask is `bits` (`losa.bits`)."""
    columns = values_PI.shape[1]
    keep = unpack_bytes(bits[rows.start * columns // 8 : -(-rows.stop * columns // 8)], table)[: values_PI.numel()]
    values_PI.view(INTEGERS[values_PI.dtype.itemsize]).mul_(keep.view_as(values_PI))
    return values_PI


def _in_one_kernel(weight: Tensor, A_RI: Tensor) -> bool:
    """Whether `adapter/triton.py` does it: on a GPU, with `LOSA_TRITON=1` set; not the default before it was measured."""
    fits = A_RI.dtype == torch.float32 and A_RI.shape[0] <= 64  # a rank that leaves a tile's sums in registers
    return weight.is_cuda and fits and os.environ.get("LOSA_TRITON") == "1"


def effective_weight(
    W_OI: Tensor,
    bits: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`M * (W + s B A)`, summed in the dtype of the adapters, cast once; +0 (bitwise) wherever the mask is False.

    This is the only place that forms the merged weight: training, calibration, evaluation and the saved file agree.

    Args:
        bits: the keep-mask, packed by `losa.bits`.
        dtype: of the result; that of `W` when None.
    """
    result_OI = torch.empty_like(W_OI, dtype=dtype or W_OI.dtype)
    if _in_one_kernel(W_OI, A_RI):
        from losa.adapter.triton import build

        return build(W_OI, bits, A_RI, B_OR, scale, result_OI)
    table = byte_table(W_OI.device)
    for rows in panels(W_OI.shape, W_OI.device):
        result_OI[rows] = torch.addmm(W_OI[rows].to(A_RI.dtype), B_OR[rows], A_RI, alpha=scale)
        mask_(result_OI[rows], bits, rows, table)
    return result_OI


@torch.no_grad()
def effective_whole(W_OI: Tensor, bits: Tensor, D_OI: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`M * (W + D)`, the same for a layer whose weights are all trained: summed in the dtype of `D`, cast once, +0 outside."""
    result_OI, table = torch.empty_like(W_OI, dtype=dtype or W_OI.dtype), byte_table(W_OI.device)
    for rows in panels(W_OI.shape, W_OI.device):
        torch.add(W_OI[rows], D_OI[rows], out=result_OI[rows])
        mask_(result_OI[rows], bits, rows, table)
    return result_OI


def adapter_gradients(G_OI: Tensor, bits: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`dA = s B^T (M * G)` and `dB = s (M * G) A^T` in the dtype of the adapters. May overwrite `G`."""
    if _in_one_kernel(G_OI, A_RI):
        from losa.adapter.triton import project

        return project(G_OI, bits, A_RI, B_OR, scale)
    dA_RI, dB_OR, table = torch.zeros_like(A_RI), torch.empty_like(B_OR), byte_table(G_OI.device)
    for rows in panels(G_OI.shape, G_OI.device):
        G_PI = mask_(G_OI[rows], bits, rows, table).to(A_RI.dtype)
        dA_RI.addmm_(B_OR[rows].T, G_PI, alpha=scale)
        torch.mm(G_PI, A_RI.T, out=dB_OR[rows])
    return dA_RI, dB_OR.mul_(scale)


def _weight_gradient(dy: Tensor, x: Tensor, W_eff_OI: Tensor | None, score_OI: Tensor | None) -> Tensor:
    """`G = dy^T x`, `(O, I)`, not masked yet; and adds to the movement scores (`pruning/movement.py`) where these are wanted."""
    G_OI = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    if score_OI is not None:
        assert W_eff_OI is not None
        score_OI.addcmul_(W_eff_OI, G_OI, value=-1)
    return G_OI


class MaskedLowRankLinear(torch.autograd.Function):
    """The fused function. Base weight, mask and bias are frozen; gradients go to `x`, `A` and `B`."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        W_OI: Tensor,
        bias_O: Tensor | None,
        bits: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        scale: float,
        keep_effective: bool,
        W_eff_OI: Tensor | None = None,
        score_OI: Tensor | None = None,
    ) -> Tensor:
        # Under activation checkpointing what is saved here is dropped at once and recomputed, for one block, right before its
        # backward: then W_eff may as well be kept until then instead of being built a third time.
        keep_effective = keep_effective or W_eff_OI is not None
        W_eff_OI = effective_weight(W_OI, bits, A_RI, B_OR, scale) if W_eff_OI is None else W_eff_OI
        ctx.save_for_backward(x, W_OI, bits, A_RI, B_OR, W_eff_OI if keep_effective else None)
        ctx.scale, ctx.score_OI = scale, score_OI
        return torch.nn.functional.linear(x, W_eff_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, W_OI, bits, A_RI, B_OR, W_eff_OI = ctx.saved_tensors
        dx = dA_RI = dB_OR = None
        if W_eff_OI is None and (ctx.needs_input_grad[0] or ctx.score_OI is not None):
            W_eff_OI = effective_weight(W_OI, bits, A_RI, B_OR, ctx.scale)
        if ctx.needs_input_grad[0]:
            dx = dy @ W_eff_OI
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            G_OI = _weight_gradient(dy, x, W_eff_OI, ctx.score_OI)
            dA_RI, dB_OR = adapter_gradients(G_OI, bits, A_RI, B_OR, ctx.scale)
        return dx, None, None, None, dA_RI, dB_OR, None, None, None, None


class MaskedWholeLinear(torch.autograd.Function):
    """`y = x W_eff^T + b` with `W_eff = M * (W + D)`: full fine-tuning under the mask. Gradients go to `x` and `D`.

    `D` has a float32 value, a gradient and two moments for every weight, so one more copy of `W_eff`, kept until the backward
    pass, is little; it spares building it twice.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        W_OI: Tensor,
        bias_O: Tensor | None,
        bits: Tensor,
        D_OI: Tensor,
        W_eff_OI: Tensor | None = None,
        score_OI: Tensor | None = None,
    ) -> Tensor:
        W_eff_OI = effective_whole(W_OI, bits, D_OI) if W_eff_OI is None else W_eff_OI
        ctx.save_for_backward(x, bits, W_eff_OI)
        ctx.dtype, ctx.score_OI = D_OI.dtype, score_OI
        return torch.nn.functional.linear(x, W_eff_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, bits, W_eff_OI = ctx.saved_tensors
        dx = dy @ W_eff_OI if ctx.needs_input_grad[0] else None
        dD_OI = None
        if ctx.needs_input_grad[4]:
            G_OI = _weight_gradient(dy, x, W_eff_OI, ctx.score_OI)
            table = byte_table(G_OI.device)
            for rows in panels(G_OI.shape, G_OI.device):
                mask_(G_OI[rows], bits, rows, table)
            dD_OI = G_OI.to(ctx.dtype)
        return dx, None, None, None, dD_OI, None, None
