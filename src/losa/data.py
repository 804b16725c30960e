"""Text, wherever it is, to blocks of tokens.

A source is a local file (`.txt`, `.md`, `.raw`, `.json`, `.jsonl`, each also `.gz`), a directory of such files, or the name of
a hub dataset, written `name`, `name:config` or `name:config:split`. A document is a string; an instruction record
(`instruction`, `input`, `output`) becomes the Alpaca prompt followed by its answer.

Training text is *packed*: documents are tokenised, ended by EOS, joined and cut into full blocks, so no token is padding.

Legend: `S` sequences, `T` tokens of each.
"""

import gzip
import hashlib
import json
import logging
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from losa.config import LosaConfig
from losa.doors import regular, shown
from losa.sources import expand, ordinary_files

TEXT_SUFFIXES = {".txt", ".md", ".raw"}
RECORD_SUFFIXES = {".json", ".jsonl"}
MAX_HUB_ROWS = 50_000  # of a hub dataset
PIECE = 8192  # characters: long documents are cut at line ends near this, so that shuffling mixes books as it mixes web pages

PROMPT = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}{input}\n\n### Response:\n{output}"
)

logger = logging.getLogger(__name__)


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


def load_documents(source: str) -> list[str]:
    """All documents of a source that are not blank, in a fixed order.

    Raises:
        ValueError: nothing there, nothing readable in it, a record without text, or nothing but blanks.
    """
    documents = [document for document in _read(source) if document.strip()]
    if not documents:
        raise ValueError(f"{source} holds no text")
    return documents


def _read(source: str) -> list[str]:
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        files = sorted(file for file in ordinary_files(path) if _suffix(file) in TEXT_SUFFIXES | RECORD_SUFFIXES)
        if not files:
            raise ValueError(f"no .txt, .md, .raw, .json or .jsonl file in {source}")
        return [document for file in files for document in _read_file(file)]
    return _read_hub(source)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _read_file(path: Path) -> list[str]:
    if _suffix(path) not in TEXT_SUFFIXES | RECORD_SUFFIXES:
        raise ValueError(f"cannot read {path.name}; expected .txt, .md, .raw, .json or .jsonl, each also .gz")
    try:
        if path.suffix == ".gz":
            with gzip.open(regular(path)) as stream:
                raw = expand(stream, path.stat().st_size)
        else:
            raw = regular(path).read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name} is not a gzip file: {error}") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text: {error}") from error
    if _suffix(path) in TEXT_SUFFIXES:
        return [text]
    try:
        records = json_lines(text) if _suffix(path) == ".jsonl" else _json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from error
    return [_document(record, path.name) for record in records]


def json_lines(text: str) -> list[Any]:
    """Not `splitlines`, which also ends lines at U+2028 and others that JSON strings may hold."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _json(text: str) -> list[Any]:
    """A JSON list or object, or one object a line: files named .json hold either."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = json_lines(text)
    return value if isinstance(value, list) else [value]


def _document(record: Any, where: str) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if isinstance(record, dict) and "instruction" in record and "output" in record:
        extra = record.get("input") or ""
        return PROMPT.format(
            with_input=", paired with an input that provides further context" if extra else "",
            instruction=record["instruction"],
            input=f"\n\n### Input:\n{extra}" if extra else "",
            output=record["output"],
        )
    keys = shown(sorted(record)) if isinstance(record, dict) else type(record).__name__
    raise ValueError(f"a record of {where} has {keys}; expected 'text', or 'instruction' and 'output'")


def _read_hub(source: str) -> list[str]:
    from datasets import load_dataset  # slow to import, and local text does not need it

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        # Streamed: C4 is 300 GB, and no run needs more than its first rows.
        rows = list(load_dataset(name, config or None, split=split or "train", streaming=True).take(MAX_HUB_ROWS))
    except Exception as error:
        raise ValueError(f"{source!r} is neither a local file or directory nor a hub dataset that loads: {error}") from error
    return [_document(row, name) for row in rows]


def pieces(documents: Sequence[str], seed: int) -> list[str]:
    """Documents cut near `PIECE` characters, shuffled by `seed`."""
    parts = [part for document in documents for part in _cut(document)]
    random.Random(seed).shuffle(parts)
    return parts


def _cut(document: str) -> Iterator[str]:
    start = 0
    while len(document) - start > 2 * PIECE:
        end = document.find("\n", start + PIECE, start + 2 * PIECE) + 1 or start + PIECE
        yield document[start:end]
        start = end
    yield document[start:]


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """The first `count` blocks of `length` tokens of the joined documents; each is begun and ended as the tokenizer does.

    Returns:
        int64 `(S, T)` with `S <= count`; the rest that fills no block is dropped.
    """
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for start in range(0, len(documents), 64):
        for ids in tokenizer(list(documents[start : start + 64]), verbose=False)["input_ids"]:
            stream += ids if ids[-1:] == eos else ids + eos
        if len(stream) >= count * length:
            break
    rows = min(count, len(stream) // length)
    return torch.tensor(stream[: rows * length], dtype=torch.int64).view(rows, length)


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
        raise ValueError(f"the text has {len(ids)} tokens, expected at least one window of {length}; give a longer text")
    return torch.tensor(ids[: rows * length], dtype=torch.int64).view(rows, length)


def calibration_windows(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """`count` calibration sequences of `length` tokens.

    Raises:
        ValueError: the text is shorter than that.
    """
    ids_ST = pack(documents, tokenizer, length, count)
    if len(ids_ST) < count:
        found = f"the calibration text has {len(ids_ST)} windows of {length} tokens, expected {count}"
        raise ValueError(f"{found}; give more text (--calibration) or set calibration.sequences or calibration.length")
    return ids_ST


def training_blocks(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Tensor:
    """`count` packed training blocks; if the text is shorter it is repeated, with a warning that says how often.

    Raises:
        ValueError: the text does not fill one block.
    """
    ids_ST = pack(documents, tokenizer, length, count)
    if not len(ids_ST):
        raise ValueError(f"the training text does not fill one block of {length} tokens; give more text or set train.length")
    if len(ids_ST) < count:
        logger.warning("the training text has %d tokens; seen %.1f times", ids_ST.numel(), count / len(ids_ST))
        ids_ST = ids_ST.repeat(-(-count // len(ids_ST)), 1)[:count]
    return ids_ST


def padded_samples(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> list[dict[str, list[int]]]:
    """One document a sample, cut at `length` tokens, neither packed nor padded yet: the released recipe.

    Raises:
        ValueError: fewer documents than `count`.
    """
    if len(documents) < count:
        raise ValueError(f"the training data has {len(documents)} samples, expected {count} (train.samples)")
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer(list(documents[:count]), verbose=False)["input_ids"]
    return [{"input_ids": (ids if ids[-1:] == eos else ids + eos)[:length]} for ids in encoded]


@dataclass(frozen=True)
class RunData:
    """Everything a run reads, tokenised before anything expensive starts.

    Attributes:
        train: packed blocks `(S, T)`, or samples when `train.samples` is set; None when nothing is to be trained.
        calibration: `(S, T)`.
        evaluation: `(S, T)`.
    """

    train: Tensor | list[dict[str, list[int]]] | None
    calibration: Tensor
    evaluation: Tensor

    def fingerprint(self) -> str:
        """SHA-256 of all tokens, to recognise a changed text on resume."""
        digest = hashlib.sha256()
        for part in (self.train, self.calibration, self.evaluation):
            digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else json.dumps(part).encode())
        return digest.hexdigest()

    def step_rows(self, step: int, shares: Sequence[float]) -> Tensor | list[dict[str, list[int]]]:
        """The rows of dynamic step `step` (1-based), at least one; steps share none."""
        assert self.train is not None
        rows, bounds = len(self.train), [0]
        for bound in range(1, len(shares) + 1):  # at least one row each
            stop = round(sum(shares[:bound]) * rows)
            bounds.append(min(max(stop, bounds[-1] + 1), rows - (len(shares) - bound)))
        return self.train[bounds[step - 1] : bounds[step]]


def prepare(config: LosaConfig, tokenizer: PreTrainedTokenizerBase, training: bool = True) -> RunData:
    """Reads and tokenises the training, calibration and evaluation texts of a resolved configuration.

    What is not given is taken from the training text: 2 % of its documents (or the end of a single one) for evaluation, never
    trained on, and pieces of the rest for calibration.

    Raises:
        ValueError: a text is missing, unreadable or too short.
    """
    calibrating, evaluating = config.calibration, config.eval
    assert calibrating.length is not None and calibrating.sequences is not None and evaluating.length is not None
    source = str(config.train.data or calibrating.data)
    documents = load_documents(source)
    if evaluating.data is None:
        documents, held = hold_out(documents, config.seed)
        evaluation = "\n\n".join(held)
    else:
        evaluation = evaluation_text(evaluating.data)
    parts = pieces(documents, config.seed)
    train = _training_rows(config, parts, tokenizer) if training else None
    own_text = calibrating.data is not None and calibrating.data != source
    text = pieces(load_documents(str(calibrating.data)), config.seed) if own_text else parts[::-1]
    count = max(calibrating.sequences, calibrating.rmi_sequences)
    return RunData(
        train=train,
        calibration=calibration_windows(text, tokenizer, calibrating.length, count),
        evaluation=windows(evaluation, tokenizer, evaluating.length, evaluating.windows),
    )


def hold_out(documents: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Documents to learn from, and 2 % of them (at least one) to measure on; of a single document, its end.

    Raises:
        ValueError: a single document that is too short to be cut.
    """
    if len(documents) > 1:
        shuffled = random.Random(seed).sample(documents, len(documents))
        count = max(1, len(shuffled) // 50)
        return shuffled[count:], shuffled[:count]
    parts = list(_cut(documents[0]))
    if len(parts) < 2:
        raise ValueError("the training text is too short to hold a part out; give a text to evaluate on with --eval-data")
    count = max(1, len(parts) // 50)
    return parts[:-count], parts[-count:]


def _training_rows(
    config: LosaConfig, parts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Tensor | list[dict[str, list[int]]]:
    length = config.train.length
    assert length is not None
    if config.train.samples is not None:
        return padded_samples(parts, tokenizer, length, config.train.samples)
    return training_blocks(parts, tokenizer, length, max(config.train.tokens // length, config.steps))


def check_sources(config: LosaConfig, training: bool) -> None:
    """Finds a missing text before a model is loaded. Hub names can only be checked by loading them.

    Raises:
        ValueError: no text given, or a path that does not exist.
    """
    if training and config.train.data is None:
        raise ValueError("no training text; give one with --data: a file, a directory or a hub dataset name")
    if config.train.data is None and config.calibration.data is None:
        raise ValueError("no calibration text; give one with --calibration: a file, a directory or a hub dataset name")
    for source in (config.train.data, config.calibration.data, config.eval.data):
        if source is not None and not Path(source).exists():
            like_a_path = source.startswith((".", "/", "~")) or _suffix(Path(source)) in TEXT_SUFFIXES | RECORD_SUFFIXES
            if like_a_path or source.count("/") > 1:
                raise ValueError(f"no such file or directory: {source}")


def named_text(source: str) -> NamedText | None:
    """The entry of `NAMED`, unless a local file or directory has that name."""
    return None if Path(source).exists() else NAMED.get(source)


def evaluation_text(source: str) -> str:
    """One text for perplexity: the rows of a source, blank ones too, joined by a blank line; a `NAMED` one as its papers join it.

    A `.raw` file is WikiText as its authors ship it. It is read as the hub data set is, one row a line and blank lines empty, so
    that its figures are those of the literature.
    """
    named = named_text(source)
    return (named.joint if named else "\n\n").join(_evaluation_rows(source))


def evaluation_documents(source: str) -> list[str]:
    """The same text as whole documents, none of them blank, for word perplexity: of WikiText its pages."""
    rows = _evaluation_rows(source)
    if is_wikitext(source):
        rows = wikitext_pages("".join(row or " \n" for row in rows))
    return [row for row in rows if row.strip()]


def is_wikitext(source: str) -> bool:
    """Whether a source is WikiText in its raw form, with spaces around punctuation and ` = Title = ` headings."""
    return _suffix(Path(source)) == ".raw" or (source == "wikitext2" and named_text(source) is not None)


def wikitext_pages(text: str) -> list[str]:
    """The pages of a raw WikiText file, cut before every ` = Title = `: the documents of EleutherAI/wikitext_document_level."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()  # deeper headings have more signs
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


def _evaluation_rows(source: str) -> list[str]:
    if named := named_text(source):
        return _read_named(source, named)
    rows = _read(source)
    if _suffix(Path(source)) == ".raw":
        rows = [line if line.strip() else "" for line in re.findall(r"[^\n]*\n|[^\n]+$", "".join(rows))]
    return rows


def _read_named(name: str, text: NamedText) -> list[str]:
    from datasets import load_dataset  # slow to import, and local text does not need it

    try:
        rows = load_dataset(**text.source)
        return list(rows[: text.rows][text.field])
    except Exception as error:
        raise ValueError(f"{name!r} does not load from the hub: {error}; give a local copy of the text with --data") from error
