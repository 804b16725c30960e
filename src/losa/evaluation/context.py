"""How much a model makes of what it has read: perplexity by the amount of context, and of a passage that it meets again.

A mean over windows hides both. Models that lost their long-range attention still score well on the first tokens of a window,
and a model that can copy predicts the second copy of a passage almost for free.

Legend: `S` windows, `T` tokens of each, `V` vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from losa.evaluation.perplexity import exp, logits

SHORTEST = 16  # tokens of context that end the first band; every band after it is twice as long as the one before


@torch.no_grad()
def loss_by_position(model: PreTrainedModel, ids_ST: Tensor, batch_size: int = 4, device: torch.device | None = None) -> Tensor:
    """Mean negative log-likelihood, nats, of the token after `c` tokens of its window, for `c = 1..T-1`; float64 `(T - 1,)`.

    Args:
        device: as in `perplexity`.
    """
    total_T = torch.zeros(ids_ST.shape[1] - 1, dtype=torch.float64)
    for ids_BT, logits_BTV in logits(model, ids_ST, batch_size, device):
        loss_BT = cross_entropy(logits_BTV[:, :-1].float().transpose(1, 2), ids_BT[:, 1:].to(logits_BTV.device), reduction="none")
        total_T += loss_BT.double().sum(0).cpu()
    return total_T / len(ids_ST)


def bands(length: int) -> list[tuple[int, int]]:
    """Ranges of context, both ends included, that double: 1-15, 16-31, 32-63, ... up to `length - 1` tokens."""
    edges = [1]
    while (edge := SHORTEST << (len(edges) - 1)) < length:
        edges.append(edge)
    return [(first, last - 1) for first, last in zip(edges, [*edges[1:], length], strict=True)]


def context_use(model: PreTrainedModel, ids_ST: Tensor, device: torch.device | None = None) -> dict[str, Any]:
    """Perplexity by context, and of a passage read twice.

    Args:
        ids_ST: windows of a text. The first half of each, twice, is the repeated passage.
        device: as in `perplexity`.

    Returns:
        `by_context`: `[fewest tokens of context, most, perplexity]` of each band.
        `passage`, `passage_again`: perplexity of the same tokens the first and the second time; a passage's first token, which
        nothing announces, is not counted.
    """
    loss_T = loss_by_position(model, ids_ST, device=device)
    by_context = [[first, last, exp(float(loss_T[first - 1 : last].mean()))] for first, last in bands(ids_ST.shape[1])]
    half = ids_ST.shape[1] // 2
    twice_T = loss_by_position(model, ids_ST[:, :half].repeat(1, 2), device=device)
    once, again = twice_T[: half - 1].mean(), twice_T[half:].mean()
    return {"by_context": by_context, "passage": exp(float(once)), "passage_again": exp(float(again))}
