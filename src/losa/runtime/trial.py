"""A trial of the compiled step on made-up numbers: what a model's structure does not show, they do.

Two models of the same parts may differ in how positions turn queries and keys, in a multiplier, in whether a norm adds one to
its weight. A first token hardly tells: it has little to look back at, and what goes past a block outweighs what the block adds.
So every block is given vectors of its own, too small to outweigh that, `TOKENS` of them, of which the last is computed by the
block's own modules and by the step. What comes before, between and behind the blocks is looked at as well: nothing but
embedding and norm.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from losa.runtime.cache import RoomyLayer

TOKENS = 64
SIZE = 0.1  # of the vectors' numbers: their square is far above what norms add to it


class _Fed(nn.Module):
    """Stands in for a block, which computes with vectors of its own whatever comes.

    Attributes:
        given: `[1, T, H]`, what the block is to have at its next call.
        came: what it would have had, `[1, T, H]`, which goes past it.
        found: what it made of the last of them, `[1, 1, H]`.
    """

    given: Tensor
    came: Tensor
    found: Tensor

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        vars(self)["block"] = block  # not a part of this one

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["block"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the block's, but for the numbers."""
        self.came = hidden_states
        out = self.block(self.given, *args, **kwargs)
        self.found = (out[0] if isinstance(out, tuple) else out)[:, -1:]
        return (hidden_states, *out[1:]) if isinstance(out, tuple) else hidden_states


@torch.no_grad()
def difference(
    decoder: Any, blocks: Sequence[nn.Module], word: str, compute: Callable[[int, Tensor, RoomyLayer], Tensor]
) -> float:
    """The largest difference between what the modules of a decoder make and what the compiled step does: of what goes into the
    first block, of what every block puts out, behind the last norm, and of what the decoder does, each relative to its size.

    The modules of the decoder are used, none is changed: other threads may go on with them.

    Args:
        decoder: with its blocks in a list of modules.
        blocks: those of the list.
        word: what the installed transformers calls the cache.
        compute: `(block's number, x [1, 1, H], the block's cache) -> [1, 1, H]`, the compiled step of one block.
    """
    tokens = max(2, min(TOKENS, getattr(decoder.config, "max_position_embeddings", None) or TOKENS))
    fed = [_Fed(block) for block in blocks]
    mock, cache, weight = _with(decoder, blocks, fed), DynamicCache(), decoder.embed_tokens.weight
    numbers = torch.Generator().manual_seed(0)
    x_BTH = [SIZE * torch.randn(1, tokens, weight.shape[1], generator=numbers).to(weight) for _ in fed]
    ids_BT = torch.randint(len(weight), (1, tokens), generator=numbers)
    for part in (slice(0, tokens - 1), slice(tokens - 1, tokens)):
        for one, x_TH in zip(fed, x_BTH, strict=True):
            one.given = x_TH[:, part]
        out = type(decoder).forward(mock, input_ids=ids_BT[:, part], use_cache=True, **{word: cache})
    embedded = decoder.embed_tokens(ids_BT[:, -1:])
    differences = [relative(embedded, fed[0].came), relative(decoder.norm(embedded), out.last_hidden_state)]
    for number, (one, layer) in enumerate(zip(fed, cache.layers, strict=True)):
        roomy = RoomyLayer(layer.keys, layer.values)
        roomy.crop(-1)
        differences.append(relative(compute(number, one.given, roomy), decoder.norm(one.found)))
    return max(differences, key=lambda difference: math.inf if math.isnan(difference) else difference)


def relative(found: Tensor, expected: Tensor) -> float:
    """Their difference, relative to the size of what was expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _with(decoder: Any, blocks: Sequence[nn.Module], fed: list[_Fed]) -> Any:
    """A decoder that shares everything with `decoder` but the list of its blocks."""
    made = copy.copy(decoder)
    made.__dict__ = vars(decoder) | {"_modules": dict(decoder._modules)}
    for name, module in decoder._modules.items():
        if isinstance(module, nn.ModuleList) and len(module) and module[0] is blocks[0]:
            made._modules[name] = nn.ModuleList(fed)
    return made
