"""Perplexity over non-overlapping windows, the figure pruning papers report.

A text is tokenised once and cut into windows; each window is scored on its own, its first token given. Perplexity is
`exp(total negative log-likelihood / predicted tokens)`. A longer window gives a lower number, so it is part of the name:
figures at 2048 and at 4096 never share a column.

Legend: `S` windows, `T` tokens of each, `V` vocabulary.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from losa.progress import progress


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids_ST: Tensor, batch_size: int = 4, label: str = "perplexity") -> float:
    """Token perplexity of the windows `ids_ST`; log-probabilities in float32, their sum in float64.

    Raises:
        ValueError: no windows, or windows of fewer than two tokens.
    """
    if ids_ST.ndim != 2 or ids_ST.shape[0] < 1 or ids_ST.shape[1] < 2:
        raise ValueError(f"windows have shape {tuple(ids_ST.shape)}, expected (windows >= 1, tokens >= 2)")
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    total = 0.0
    for batch in progress(ids_ST.split(batch_size), label):
        ids = batch.to(device)
        logits_BTV = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        total += loss.double().sum().item()
    model.train(was_training)
    return math.exp(total / (ids_ST.shape[0] * (ids_ST.shape[1] - 1)))
