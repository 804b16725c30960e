"""Documents to rows of tokens, and which of these tokens the loss counts.

Training text is *packed*: documents are tokenised, ended by EOS, joined and cut into full blocks, so no token is padding.

Legend: `S` sequences, `T` tokens of each.
"""

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from losa.data.chat import Document, Marked
from losa.loss import IGNORED

LONGER = "give a longer text, or set eval.length (of losa eval also --length)"
PIECE = 8192  # characters: long documents are cut at line ends near this, so that shuffling mixes books as it mixes web pages

logger = logging.getLogger(__name__)

Samples = Sequence[dict[str, Any]]  # rows of their own lengths: `input_ids`, and `labels` where not every token counts


def pieces(documents: Sequence[Document], seed: int) -> list[Document]:
    """Texts cut near `PIECE` characters, conversations whole, shuffled by `seed`."""
    parts = [part for document in documents for part in cut(document)]
    random.Random(seed).shuffle(parts)
    return parts


def cut(document: Document) -> Iterator[Document]:
    """The pieces of a text, in order; a conversation is one."""
    start = 0
    while isinstance(document, str) and len(document) - start > 2 * PIECE:
        end = document.find("\n", start + PIECE, start + 2 * PIECE) + 1 or start + PIECE
        yield document[start:end]
        start = end
    yield document[start:] if isinstance(document, str) else document


@dataclass(frozen=True)
class Encoded:
    """The tokens of a document.

    Attributes:
        ids: begun and ended as the tokenizer does.
        counted: for each, whether the loss counts it.
        starts: for each, whether a document begins with it. In a text that holds EOS, one also begins after that.
    """

    ids: list[int]
    counted: list[bool]
    starts: list[bool]


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    """Tokenises documents, some at a time.

    Raises:
        ValueError: parts of a document count, and the tokenizer does not tell which characters a token is made of.
    """
    eos = tokenizer.eos_token_id
    for start in range(0, len(documents), 64):
        for complete, group in itertools.groupby(documents[start : start + 64], lambda d: isinstance(d, Marked) and d.complete):
            some = list(group)
            offsets = any(map(_in_parts, some))
            if offsets and not tokenizer.is_fast:
                found = f"{type(tokenizer).__name__} does not tell which characters a token is made of"
                raise ValueError(f"{found}, so answers cannot be told from prompts; set train.loss_on: all")
            texts = [document if isinstance(document, str) else document.text for document in some]
            encoded = tokenizer(texts, verbose=False, add_special_tokens=not complete, return_offsets_mapping=offsets)
            for index, document in enumerate(some):
                ids = encoded["input_ids"][index]
                counted = _counted(document, encoded["offset_mapping"][index]) if _in_parts(document) else [True] * len(ids)
                if not complete and eos is not None and ids[-1:] != [eos]:
                    ids = [*ids, eos]
                    counted.append(isinstance(document, str) or document.counted[-1][1] == len(document.text))
                # An EOS that a document begins with is its BOS.
                inside = [isinstance(document, str) and token == eos for token in ids[1:-1]]
                yield Encoded(ids, counted, [True, False, *inside][: len(ids)])


def _in_parts(document: Document) -> bool:
    return isinstance(document, Marked) and document.counted != ((0, len(document.text)),)


def _counted(document: Document, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """A token counts if any of its characters does: one that begins in the prompt's last space is the answer's first word."""
    assert isinstance(document, Marked)
    counts = np.zeros(len(document.text) + 1, dtype=np.int64)
    for start, end in document.counted:
        counts[start + 1 : end + 1] = 1
    before = np.cumsum(counts)
    pairs = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    counted: list[bool] = (before[pairs[:, 1]] > before[pairs[:, 0]]).tolist()
    return counted


@dataclass(frozen=True, eq=False)
class Packed(Sequence[dict[str, Tensor]]):
    """Packed blocks of which not every token counts. A row has `input_ids`, `labels` and `starts`, each `(T,)`.

    Attributes:
        ids_ST: int64.
        counted_ST: bool, the tokens that the loss counts.
        starts_ST: bool, the first token of each document.
    """

    ids_ST: Tensor
    counted_ST: Tensor
    starts_ST: Tensor

    def __len__(self) -> int:
        return len(self.ids_ST)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> "Packed": ...
    def __getitem__(self, index: int | slice) -> "dict[str, Tensor] | Packed":
        ids, counted, starts = self.ids_ST[index], self.counted_ST[index], self.starts_ST[index]
        if isinstance(index, slice):
            return Packed(ids, counted, starts)
        return {"input_ids": ids, "labels": ids.where(counted, IGNORED), "starts": starts}

    def joined(self) -> "Packed":
        """The same rows with nothing between documents, for a model that cannot keep them apart."""
        return Packed(self.ids_ST, self.counted_ST, torch.zeros_like(self.starts_ST))

    def repeated(self, count: int) -> "Packed":
        """The first `count` rows of these rows, again and again."""
        parts = (self.ids_ST, self.counted_ST, self.starts_ST)
        return Packed(*(part_ST.repeat(-(-count // len(self)), 1)[:count] for part_ST in parts))


def pack_marked(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, count: int | None) -> Packed:
    """The first `count` blocks (all when None) of `length` tokens of the joined documents, with what counts in them. What fills
    no block is dropped."""
    ids: list[int] = []
    counted: list[bool] = []
    starts: list[bool] = []
    for document in encode(documents, tokenizer):
        ids += document.ids
        counted += document.counted
        starts += document.starts
        if count is not None and len(ids) >= count * length:
            break
    rows = len(ids) // length if count is None else min(count, len(ids) // length)
    parts = ((ids, torch.int64), (counted, torch.bool), (starts, torch.bool))
    return Packed(*(torch.tensor(part[: rows * length], dtype=dtype).view(rows, length) for part, dtype in parts))


def pack(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """The ids of `pack_marked`: int64 `(S, T)` with `S <= count`."""
    return pack_marked(documents, tokenizer, length, count).ids_ST


def windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None) -> Tensor:
    """Non-overlapping windows of one text for perplexity, int64 `(S, T)`; the tail that fills no window is dropped.

    Raises:
        ValueError: the text is shorter than one window.
    """
    if most is not None:
        text = text[: most * length * 32]  # no tokenizer averages 32 characters a token
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = min(len(ids) // length, most or len(ids))
    if not rows:
        raise ValueError(f"the text has {len(ids)} tokens, expected at least one window of {length}; {LONGER}")
    return torch.tensor(ids[: rows * length], dtype=torch.int64).view(rows, length)


def calibration_windows(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """`count` calibration sequences of `length` tokens; of conversations all tokens, as a model that answers sees them.

    Raises:
        ValueError: the text is shorter than that.
    """
    ids_ST = pack(documents, tokenizer, length, count)
    if len(ids_ST) < count:
        found = f"the calibration text has {len(ids_ST)} windows of {length} tokens, expected {count}"
        raise ValueError(f"{found}; give more text (--calibration) or set calibration.sequences or calibration.length")
    return ids_ST


def training_blocks(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> Tensor | Packed:
    """`count` packed training blocks; if the text is shorter it is repeated, with a warning that says how often.

    Returns:
        int64 `(S, T)` where every token counts and documents begin behind an EOS, and nowhere else; else with what counts, and
        where they begin.

    Raises:
        ValueError: the text does not fill one block, or the blocks hold nothing that counts.
    """
    rows = pack_marked(documents, tokenizer, length, count)
    if not len(rows):
        raise ValueError(f"the training text does not fill one block of {length} tokens; give more text or set train.length")
    if not rows.counted_ST[:, 1:].any():
        found = f"the first {len(rows)} blocks of {length} tokens hold no answer"
        raise ValueError(f"{found}; give other data, or set train.length or train.loss_on: all")
    if len(rows) < count:
        logger.warning("the training text has %d tokens; seen %.1f times", rows.ids_ST.numel(), count / len(rows))
        rows = rows.repeated(count)
    marked = any(isinstance(document, Marked) for document in documents)
    told = (rows.ids_ST[:, :-1] == tokenizer.eos_token_id) if tokenizer.eos_token_id is not None else torch.tensor(False)
    return rows if marked or (rows.starts_ST[:, 1:] != told).any() else rows.ids_ST


def padded_samples(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Samples:
    """One document a sample, cut at `length` tokens, neither packed nor padded yet: the released recipe. A conversation whose
    answers are all cut off is passed over.

    Raises:
        ValueError: fewer documents than `count`.
    """
    samples: list[dict[str, list[int]]] = []
    marked = any(isinstance(document, Marked) for document in documents)
    for document in encode(documents, tokenizer):
        if len(samples) == count:
            break
        ids, counted = document.ids[:length], document.counted[:length]
        if marked and not any(counted[1:]):
            continue
        labels = {"labels": [token if counts else IGNORED for token, counts in zip(ids, counted, strict=True)]} if marked else {}
        samples.append({"input_ids": ids, **labels})
    if len(samples) < count:
        raise ValueError(f"the training data has {len(samples)} samples, expected {count} (train.samples)")
    return samples
