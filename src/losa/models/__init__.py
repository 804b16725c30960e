"""Models of others: opened (`opening.py`, `loading.py`), refused where LoSA cannot prune them honestly (`support.py`), and their
decoder blocks, found by structure and run one by one (`blocks.py`)."""

from losa.models.blocks import (
    BlockInputs,
    Decoder,
    block_inputs,
    block_linears,
    find_decoder,
    logits_by_block,
    on_device,
    place,
)
from losa.models.loading import load
from losa.models.support import check_supported, max_length

__all__ = [
    "BlockInputs",
    "Decoder",
    "block_inputs",
    "block_linears",
    "check_supported",
    "find_decoder",
    "load",
    "logits_by_block",
    "max_length",
    "on_device",
    "place",
]
