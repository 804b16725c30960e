"""Perplexity over non-overlapping windows, the figure pruning papers report.

A text is tokenised once and cut into windows; each window is scored on its own, its first token given. Perplexity is
`exp(total negative log-likelihood / predicted tokens)`. A longer window gives a lower number, so it is part of the name:
figures at 2048 and at 4096 never share a column.

Legend: `S` windows, `T` tokens of each, `V` vocabulary.
"""

import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from losa.loss import IGNORED, causal_loss
from losa.models import logits_by_block
from losa.system import distributed
from losa.system.progress import progress

LARGEST = math.log(sys.float_info.max)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    ids_ST: Tensor,
    batch_size: int = 4,
    label: str = "perplexity",
    device: torch.device | None = None,
    counted_ST: Tensor | None = None,
) -> float:
    """Token perplexity of the windows `ids_ST`; log-probabilities in float32, their sum in float64. Of several processes, each
    takes a part of the windows.

    Args:
        counted_ST: bool, which tokens count, as predictions; all when None. Every token is read.
        device: run with one decoder block at a time on this device, for a model whose blocks are on the host.

    Raises:
        ValueError: no windows, or windows of fewer than two tokens.
    """
    if ids_ST.ndim != 2 or ids_ST.shape[0] < 1 or ids_ST.shape[1] < 2:
        raise ValueError(f"windows have shape {tuple(ids_ST.shape)}, expected (windows >= 1, tokens >= 2)")
    was_training = model.training
    model.eval()
    mine_ST = distributed.part(ids_ST)
    labels_ST = ids_ST if counted_ST is None else ids_ST.where(counted_ST, IGNORED)
    labels = distributed.part(labels_ST).split(batch_size)
    batches = logits(model, mine_ST, batch_size, device)
    total = torch.zeros((), dtype=torch.float64, device=device or model.get_input_embeddings().weight.device)
    with progress(None, label, total=len(mine_ST)) as windows:
        for (ids, logits_BTV), labels_BT in zip(batches, labels, strict=True):
            total += causal_loss(logits_BTV, labels_BT.to(ids.device))
            windows.update(len(ids))
    model.train(was_training)
    return exp(distributed.sum_(total).item() / int((labels_ST[:, 1:] != IGNORED).sum()))


def exp(nats: float) -> float:
    """Perplexity of a mean negative log-likelihood; infinite where a float cannot hold it."""
    return math.exp(nats) if nats < LARGEST else math.inf if nats == nats else math.nan


def logits(
    model: PreTrainedModel, ids_ST: Tensor, batch_size: int, device: torch.device | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids `(b, T)` and logits `(b, T, V)` of every batch of windows; `device` as in `perplexity`."""
    if device is not None:
        yield from logits_by_block(model, ids_ST, batch_size, device)
        return
    home = model.get_input_embeddings().weight.device
    for batch in ids_ST.split(batch_size):
        ids = batch.to(home)
        yield ids, model(input_ids=ids, use_cache=False).logits
