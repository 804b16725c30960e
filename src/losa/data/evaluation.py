"""Texts to measure perplexity on: the literature's by name, any source, and what a run held out of its training text.

Perplexity of a conversation counts the tokens that training counts: by default those of the answers, given their prompts.

Legend: `S` windows, `T` tokens of each.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from losa.data.blocks import LONGER, cut, pack_marked, windows
from losa.data.chat import Document, Marked, read_documents, text_of
from losa.data.files import suffix

ONE_IN = 50  # one in so many characters is held out, or as much as a window takes


@dataclass(frozen=True)
class NamedText:
    """A text to measure perplexity on, read from the hub as the pruning literature reads it.

    Attributes:
        source: arguments of `datasets.load_dataset`.
        field: of a row, that holds its text.
        joint: put between rows.
        rows: only so many, from the beginning.
        windows: at most so many windows, however long.
    """

    source: dict[str, Any]
    field: str
    joint: str
    rows: int | None = None
    windows: int | None = None


NAMED = {
    "wikitext2": NamedText({"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}, "text", "\n\n"),
    "ptb": NamedText(
        {
            "path": "parquet",  # the data set itself is a script, which datasets no longer runs
            "data_files": {"test": "hf://datasets/ptb-text-only/ptb_text_only@~parquet/penn_treebank/test/0000.parquet"},
            "split": "test",
        },
        "sentence",
        " ",
    ),
    "c4": NamedText(
        {
            "path": "allenai/c4",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
        },
        "text",
        " ",
        rows=1100,
        windows=256,
    ),
}


@dataclass(frozen=True)
class EvaluationText:
    """A text as it was read, to be cut into windows of any length.

    Attributes:
        documents: rows, blank ones too.
        joint: put between rows, where all are texts.
        most: windows at most, unless more or fewer are asked for.
    """

    documents: Sequence[Document]
    joint: str = "\n\n"
    most: int | None = None

    def windows(self, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None) -> "Windows":
        """Windows that do not overlap.

        Raises:
            ValueError: the text is shorter than one window, or nothing in it counts.
        """
        most = most or self.most
        if all(isinstance(document, str) for document in self.documents):
            return Windows(windows(self.joint.join(map(text_of, self.documents)), tokenizer, length, most))
        rows = pack_marked([document for document in self.documents if text_of(document).strip()], tokenizer, length, most)
        if not rows.counted_ST[:, 1:].any():
            found = f"the text has {len(rows)} windows of {length} tokens and no answer in them"
            raise ValueError(f"{found}, expected at least one with an answer; {LONGER}")
        return Windows(rows.ids_ST, rows.counted_ST)

    def fingerprint(self) -> str:
        """SHA-256 of all rows, to recognise a text."""
        return hashlib.sha256(self.joint.join(map(text_of, self.documents)).encode()).hexdigest()


@dataclass(frozen=True)
class Windows:
    """Tokens to measure perplexity on, `(S, T)`, and which of them count: all when None."""

    ids_ST: Tensor
    counted_ST: Tensor | None = None

    @property
    def counts(self) -> str:
        """What counts, in a word or two."""
        return "all tokens" if self.counted_ST is None or bool(self.counted_ST.all()) else "answers"


def named_text(source: str) -> NamedText | None:
    """The entry of `NAMED`, unless a local file or directory has that name."""
    return None if Path(source).exists() else NAMED.get(source)


def read_evaluation(
    source: str, tokenizer: PreTrainedTokenizerBase | None = None, loss_on: str = "assistant", skip: bool = False
) -> EvaluationText:
    """The rows of a source, blank ones too, joined by a blank line; a `NAMED` one as its papers join it.

    A `.raw` file is WikiText as its authors ship it. It is read as the hub data set is, one row a line and blank lines empty, so
    that its figures are those of the literature.

    Raises:
        ValueError: as `load_documents`.
    """
    if named := named_text(source):
        return EvaluationText(_read_named(source, named), named.joint, named.windows)
    rows = read_documents(source, tokenizer, loss_on, skip)
    if not any(text_of(row).strip() for row in rows):
        raise ValueError(f"{source} holds no text")
    if suffix(Path(source)) == ".raw":
        lines = re.findall(r"[^\n]*\n|[^\n]+$", "".join(map(text_of, rows)))
        rows = [line if line.strip() else "" for line in lines]
    return EvaluationText(rows)


def evaluation_text(source: str) -> str:
    """`read_evaluation` as one text, conversations in their plain form."""
    text = read_evaluation(source)
    return text.joint.join(map(text_of, text.documents))


def evaluation_documents(source: str, text: EvaluationText | None = None) -> list[str]:
    """The same text as whole documents, none of them blank, for word perplexity: of WikiText its pages."""
    rows = [text_of(row) for row in (text or read_evaluation(source)).documents]
    if is_wikitext(source):
        rows = wikitext_pages("".join(row or " \n" for row in rows))
    return [row for row in rows if row.strip()]


def is_wikitext(source: str) -> bool:
    """Whether a source is WikiText in its raw form, with spaces around punctuation and ` = Title = ` headings."""
    return suffix(Path(source)) == ".raw" or (source == "wikitext2" and named_text(source) is not None)


def wikitext_pages(text: str) -> list[str]:
    """The pages of a raw WikiText file, cut before every ` = Title = `: the documents of EleutherAI/wikitext_document_level."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()  # deeper headings have more signs
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def _read_named(name: str, text: NamedText) -> list[str]:
    from datasets import load_dataset  # slow to import, and local text does not need it

    try:
        rows = load_dataset(**text.source)
        return list(rows[: text.rows][text.field])
    except Exception as error:
        raise ValueError(
            f"{name!r} does not load from the hub: {error}; give a local copy of the text with --eval-data"
        ) from error


def hold_out(
    documents: Sequence[Document], seed: int, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[list[Document], list[Document]]:
    """Documents to learn from, and a part to measure on: 2 % of the text, or as much as one window of `length` tokens takes.

    Whole documents, in an order that `seed` decides; of a text longer than what is left to hold out, only its end.

    Raises:
        ValueError: that would be more than half of the text.
    """
    shuffled = random.Random(seed).sample(documents, len(documents))
    total = sum(len(text_of(document)) for document in documents)
    enough = length + length // 8  # tokens; of pieces there are a few more than of the text that they make
    held: list[Document] = []
    rest: list[Document] = []
    characters = tokens = 0
    for index, document in enumerate(shuffled):
        parts, taken = list(cut(document)), []
        while parts and (tokens < enough or (characters + len(text_of(parts[-1]))) * ONE_IN <= total):
            part = text_of(parts[-1])
            characters += len(part)
            if tokens < enough:
                tokens += len(tokenizer(part, verbose=False, add_special_tokens=False)["input_ids"])
            taken.append(parts.pop())
        if index == 0 and isinstance(document, Marked):
            enough += tokens  # so that its answers are in whole windows
        held += taken[::-1] if parts else [document]
        if parts:
            rest = [*parts, *shuffled[index + 1 :]]
            break
    if 2 * characters > total:
        found = f"the training text, {total} characters, is too short to hold a part out"
        raise ValueError(f"{found}; give a text to evaluate on with --eval-data, or set eval.length")
    return rest, held
