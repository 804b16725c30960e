"""What training minimises: cross-entropy, mixed with distillation from the dense model.

Distillation tells the sparse model every token's whole distribution, not only which token came. The teacher costs no memory: it
is the same module with its masks and adapters switched off (`adapter.dense_mode`), its weights are the frozen base. It costs a
forward pass, 2 N O I flops a layer on top of training's 6.

With a vocabulary of 32,000 to 150,000 the logits are the largest tensors of a step. Written with torch's own operations, the loss
keeps them three times more in float32. Here loss *and* gradient are computed together, a few rows at a time, so that what is
kept is one tensor of the logits' own dtype.

Legend: `B` batch, `T` tokens, `V` vocabulary, `N` rows of logits, `C` rows of a chunk, `H` hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import mse_loss, pad

CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}  # logits worked on at once: on a CPU 1 MiB of float32, which stays in its cache
IGNORED = -100  # the label of a token without loss, as in transformers


def causal_loss(
    student_BTV: Tensor, labels_BT: Tensor, teacher_BTV: Tensor | None = None, distill: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """`sum_tokens (1 - distill) * cross-entropy + distill * tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`.

    As in Hinton et al. (https://arxiv.org/abs/1503.02531), `tau^2` keeps the gradient's size at any temperature.

    Args:
        student_BTV: logits, any float dtype; sums are float32.
        labels_BT: token ids, -100 where there is no loss. Position `t` predicts label `t + 1`, as in causal training.
        teacher_BTV: logits of the dense model, no gradient; needed when `distill` is not 0.
        distill: weight of the KL.
        temperature: `tau`.

    Returns:
        A scalar in nats, summed over the tokens that have a label. Its backward runs once.
    """
    labels_N = pad(labels_BT[:, 1:], (0, 1), value=IGNORED).flatten()
    teacher_NV = None if teacher_BTV is None or not distill else teacher_BTV.flatten(0, 1)
    loss: Tensor = _FusedLoss.apply(student_BTV.flatten(0, 1), labels_N, teacher_NV, distill, temperature)  # type: ignore[no-untyped-call]
    return loss


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, labels_N: Tensor, teacher_NV: Tensor | None, distill: float, temperature: float
    ) -> Tensor:
        gradient_NV = torch.empty_like(student_NV) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student_NV.device)
        step = max(1, CHUNK.get(student_NV.device.type, CHUNK["cuda"]) // student_NV.shape[1])
        for start in range(0, len(student_NV), step):
            rows = slice(start, start + step)
            teacher_CV = None if teacher_NV is None else teacher_NV[rows]
            into_CV = None if gradient_NV is None else gradient_NV[rows]
            total += _chunk(student_NV[rows], labels_N[rows], teacher_CV, distill, temperature, into_CV)
        ctx.save_for_backward(gradient_NV)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(d_loss), None, None, None, None


def _chunk(
    student_CV: Tensor, labels_C: Tensor, teacher_CV: Tensor | None, distill: float, temperature: float, into_CV: Tensor | None
) -> Tensor:
    """Loss of some rows. The gradient with respect to their logits, `softmax - onehot` and `tau (softmax - softmax)`, goes into
    `into_CV`, if that is given."""
    counted_C1 = (labels_C != IGNORED)[:, None]
    target_C1 = labels_C.clamp(min=0)[:, None]
    logits_CV = student_CV.float()
    log_q_CV = logits_CV.log_softmax(-1)
    hard = 1 - distill if teacher_CV is not None else 1.0
    loss_C1 = -hard * log_q_CV.gather(1, target_C1)
    p_CV = soft_CV = None
    if teacher_CV is not None:
        soft_CV = log_q_CV if temperature == 1 else (logits_CV / temperature).log_softmax(-1)
        log_p_CV = (teacher_CV.float() / temperature).log_softmax(-1)
        p_CV = log_p_CV.exp()
        loss_C1 += distill * temperature**2 * torch.linalg.vecdot(p_CV, log_p_CV.sub_(soft_CV))[:, None]
    if into_CV is not None:
        gradient_CV = log_q_CV.exp()
        if p_CV is not None and soft_CV is not None:
            if temperature == 1:  # hard (q - onehot) + distill (q - p), with hard + distill = 1
                gradient_CV.sub_(p_CV, alpha=distill)
            else:
                gradient_CV.mul_(hard).add_(soft_CV.exp().sub_(p_CV), alpha=distill * temperature)
        gradient_CV.scatter_add_(1, target_C1, torch.full_like(loss_C1, -hard))
        into_CV.copy_(gradient_CV.masked_fill_(~counted_C1, 0.0))
    return loss_C1.where(counted_C1, 0.0).sum(dtype=torch.float64)


def block_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask_BT: Tensor | None) -> Tensor:
    """Mean over blocks of `|Y_dense - Y_sparse|^2 / |Y_dense|^2`, for outputs `(B, T, H)` of each block; padding left out."""
    real = slice(None) if attention_mask_BT is None else attention_mask_BT.bool()
    ratios = [
        mse_loss(y[real], dense[real], reduction="sum").float() / dense[real].float().square().sum().clamp(min=1e-12)
        for y, dense in zip(student, teacher, strict=True)
    ]
    return torch.stack(ratios).mean()
