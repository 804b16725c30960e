"""Distillation from the dense model: the sparse one is told every token's whole distribution, not only which token came.

The teacher costs no memory: it is the same module with its masks and adapters switched off (`adapter.dense_mode`), its weights
are the frozen base. It costs a forward pass, 2 N O I flops a layer on top of training's 6.

Legend: `B` batch, `T` tokens, `V` vocabulary.
"""

import torch
from torch import Tensor


def kl_divergence(student_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """`tau^2 sum_tokens KL(softmax(teacher / tau) || softmax(student / tau))` over the tokens that have a label.

    As in Hinton et al. (https://arxiv.org/abs/1503.02531), `tau^2` keeps the gradient's size at any temperature.

    Args:
        student_BTV: logits, any float dtype; the sum is float32.
        teacher_BTV: logits of the dense model, no gradient.
        labels_BT: token ids, -100 where there is no loss. Position `t` predicts label `t + 1`, as in causal training.

    Returns:
        A scalar in nats, summed over tokens.
    """
    counted = labels_BT[:, 1:] != -100
    student = (student_BTV[:, :-1][counted].float() / temperature).log_softmax(-1)
    teacher = (teacher_BTV[:, :-1][counted].float() / temperature).log_softmax(-1)
    return temperature**2 * torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
