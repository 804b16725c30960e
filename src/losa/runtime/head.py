"""An output head that stays dense: one token at a time, as fast as memory delivers the weight.

torch's product of one token with a bfloat16 matrix takes up to three and a half times as long as reading that matrix does, and
that is half of a small model's step (docs/LOG.md). `attach` gives a head of plain bfloat16 weights another `forward`: one token
goes through `losa::dense_linear`, which reads rows front to back; anything else goes the way it always went. The weight stays
where it is, shared with the embedding or not.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from losa.runtime import dispatch

SLOWER = ("portable",)  # than torch


class DenseHead:
    """The `forward` of an `nn.Linear`: one token by the compiled product where that is possible, else as before."""

    def __init__(self, head: nn.Linear, kernel: int) -> None:
        self.head, self.kernel = head, kernel

    def __call__(self, x: Tensor) -> Tensor:
        """As the head's own."""
        weight_VH = self.head.weight
        if not self._takes(x, weight_VH):
            return nn.Linear.forward(self.head, x)
        logits_V: Tensor = torch.ops.losa.dense_linear(x, weight_VH, self.kernel)
        return logits_V.view(*x.shape[:-1], -1)

    def _takes(self, x: Tensor, weight_VH: Tensor) -> bool:
        """Whether this is one token, of what the kernels know, and nobody wants gradients."""
        plain = x.dtype == weight_VH.dtype == torch.bfloat16 and self.head.bias is None and weight_VH.is_contiguous()
        one = x.shape[-1] == weight_VH.shape[1] and x.numel() == weight_VH.shape[1]
        return plain and one and x.device.type == weight_VH.device.type == "cpu" and not torch.is_grad_enabled()


def attach(model: PreTrainedModel) -> bool:
    """Gives a model's dense head the compiled product; False where it has none, or the machine is not faster by it."""
    head: Any = model.get_output_embeddings()
    kernel = dispatch.choose()
    if type(head) is not nn.Linear or kernel not in dispatch.COMPILED or kernel in SLOWER:
        return False
    vars(head)["forward"] = DenseHead(head, dispatch.COMPILED.index(kernel))
    return True
