"""Everything a run reads, tokenised before anything expensive starts.

Legend: `S` sequences, `T` tokens of each.
"""

import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from losa.config import LosaConfig
from losa.data.blocks import Packed, Samples, calibration_windows, padded_samples, pieces, training_blocks
from losa.data.chat import Document, read_documents, text_of
from losa.data.evaluation import EvaluationText, hold_out, read_evaluation
from losa.data.files import readable
from losa.loss import IGNORED
from losa.models import max_length
from losa.models.opening import open_config, open_tokenizer

SHOWN = 1200  # characters of a training example

logger = logging.getLogger(__name__)


def load_documents(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loss_on: str = "assistant",
    skip: bool = False,
    without: str | None = None,
) -> list[Document]:
    """`chat.read_documents` without those that are blank.

    Raises:
        ValueError: as there; nothing but blanks.
    """
    found = read_documents(source, tokenizer, loss_on, skip, without)
    documents = [document for document in found if text_of(document).strip()]
    if not documents:
        raise ValueError(f"{source} holds no text")
    return documents


@dataclass(frozen=True)
class RunData:
    """Everything a run reads.

    Attributes:
        train: packed blocks `(S, T)`, `Packed` where not every token counts, or samples when `train.samples` is set; None when
            nothing is to be trained.
        calibration: `(S, T)`.
        evaluation: `(S, T)`.
        counted: which tokens of `evaluation` perplexity counts, `(S, T)`; all when None.
        held_out: the fingerprint of the evaluation text, if that was held out of the training text.
        seconds: that reading took.
    """

    train: Tensor | Packed | Samples | None
    calibration: Tensor
    evaluation: Tensor
    counted: Tensor | None = None
    held_out: str | None = None
    seconds: float = 0.0

    def fingerprint(self) -> str:
        """SHA-256 of all tokens and of what counts, to recognise a changed text on resume."""
        digest = hashlib.sha256()
        train = (
            (self.train.ids_ST, self.train.counted_ST, self.train.starts_ST) if isinstance(self.train, Packed) else (self.train,)
        )
        for part in (*train, self.calibration, self.evaluation, *([] if self.counted is None else [self.counted])):
            digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else json.dumps(part).encode())
        return digest.hexdigest()

    def step_rows(self, step: int, shares: Sequence[float]) -> Tensor | Packed | Samples:
        """The rows of dynamic step `step` (1-based), at least one; steps share none."""
        assert self.train is not None
        rows, bounds = len(self.train), [0]
        for bound in range(1, len(shares) + 1):  # at least one row each
            stop = round(sum(shares[:bound]) * rows)
            bounds.append(min(max(stop, bounds[-1] + 1), rows - (len(shares) - bound)))
        return self.train[bounds[step - 1] : bounds[step]]


def prepare(config: LosaConfig, tokenizer: PreTrainedTokenizerBase, training: bool = True) -> RunData:
    """Reads and tokenises the training, calibration and evaluation texts of a resolved configuration.

    What is not given is taken from the training text: a part for evaluation (`hold_out`), never trained on, and pieces of the
    rest for calibration.

    Raises:
        ValueError: a text is missing, unreadable, bad or too short.
    """
    calibrating, evaluating = config.calibration, config.eval
    assert calibrating.length is not None and evaluating.length is not None
    began = time.perf_counter()
    how: dict[str, Any] = {"loss_on": config.train.loss_on, "skip": config.skip_bad_records}
    source = training_source(config)
    documents = load_documents(source, tokenizer, **how, without=evaluating.data)
    if evaluating.data is None:
        documents, held = hold_out(documents, config.seed, tokenizer, evaluating.length)
        text = EvaluationText(held)
    else:
        text = read_evaluation(evaluating.data, tokenizer, **how)
    parts = pieces(documents, config.seed)
    train = _training_rows(config, parts, tokenizer) if training else None
    others = parts[::-1]
    if calibrating.data is not None and not _same(calibrating.data, source):
        measured = set(map(text_of, text.documents))  # of a folder that the training text is a part of, or holds
        own = load_documents(calibrating.data, tokenizer, **how, without=evaluating.data)
        others = pieces([document for document in own if text_of(document) not in measured] or own, config.seed)
    evaluation = text.windows(tokenizer, evaluating.length, evaluating.windows)
    return RunData(
        train=train,
        calibration=calibration_windows(others, tokenizer, calibrating.length, config.calibration_sequences),
        evaluation=evaluation.ids_ST,
        counted=evaluation.counted_ST,
        held_out=text.fingerprint() if evaluating.data is None else None,
        seconds=time.perf_counter() - began,
    )


def _same(source: str, other: str) -> bool:
    """Whether two sources are one, perhaps spelt in two ways."""
    paths = Path(source), Path(other)
    return source == other or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def training_source(config: LosaConfig) -> str:
    """The text to train on, or, where nothing is trained, to calibrate on; what is held out comes from it."""
    return str(config.train.data or config.calibration.data)


def read_run(config: LosaConfig, training: bool) -> RunData:
    """The texts of a run, read and tokenised before its model is loaded: only the model's configuration and tokenizer are.

    Raises:
        ValueError: as `prepare`; no such model.
    """
    of_model = open_config(config.model, config.trust_remote_code, packed=False)  # says what is wrong with a path
    tokenizer = open_tokenizer(config.model, config.trust_remote_code)
    return prepare(config.resolve(of_model.get_text_config().hidden_size, max_length(of_model)), tokenizer, training)


def read_held_out(config: LosaConfig, source: str, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> EvaluationText:
    """What a run with this resolved configuration held out of its training text `source`.

    Raises:
        ValueError: the text is not there, or is not the same any more.
    """
    assert config.eval.length is not None
    missing = f"the model was evaluated on a part held out of {source}"
    if looks_like_a_path(source) and not Path(source).exists():
        raise ValueError(f"{missing}, which is not there (a relative path is that of the run); give a text with --data")
    documents = load_documents(source, tokenizer, config.train.loss_on, config.skip_bad_records)
    text = EvaluationText(hold_out(documents, config.seed, tokenizer, config.eval.length)[1])
    if text.fingerprint() != fingerprint:
        raise ValueError(f"{missing}, which has changed since; give a text with --data")
    return text


def held_out_record(config: LosaConfig, fingerprint: str | None) -> dict[str, str] | None:
    """What `losa.json` says of a held-out text, to find it again: `sha256`, and `source`, the training text seen from the output.
    None if none was held out."""
    source = training_source(config)
    if config.output and Path(source).exists():
        source = os.path.relpath(Path(source).resolve(), Path(config.output).resolve())
    return None if fingerprint is None else {"sha256": fingerprint, "source": source}


def _training_rows(
    config: LosaConfig, parts: Sequence[Document], tokenizer: PreTrainedTokenizerBase
) -> Tensor | Packed | Samples:
    length = config.train.length
    assert length is not None
    if config.train.samples is not None:
        return padded_samples(parts, tokenizer, length, config.train.samples)
    return training_blocks(parts, tokenizer, length, max(config.train.tokens // length, config.steps))


def check_sources(config: LosaConfig, training: bool) -> None:
    """Finds a missing text before anything is read. Hub names can only be checked by loading them.

    Raises:
        ValueError: no text given, or a path that does not exist.
    """
    if training and config.train.data is None:
        raise ValueError("no training text; give one with --data: a file, a directory or a hub dataset name")
    if config.train.data is None and config.calibration.data is None:
        raise ValueError("no calibration text; give one with --calibration: a file, a directory or a hub dataset name")
    for source in (config.train.data, config.calibration.data, config.eval.data):
        if source is not None and not Path(source).exists() and looks_like_a_path(source):
            raise ValueError(f"no such file or directory: {source}")


def looks_like_a_path(source: str) -> bool:
    """Whether a source is meant as a local path rather than as a name on the hub."""
    return source.startswith((".", "/", "~")) or readable(Path(source)) or source.count("/") > 1


def show_example(rows: Tensor | Packed | Samples, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first training example as the model sees it, what the loss counts between `>>>` and `<<<`. Of a long one, both ends."""
    row: dict[str, Any] = {"input_ids": rows[0]} if isinstance(rows, Tensor) else rows[0]
    ids = torch.as_tensor(row["input_ids"])
    counts = torch.as_tensor(row.get("labels", ids)) != IGNORED
    first_T = ids.new_zeros(len(ids), dtype=torch.bool)
    if isinstance(rows, Tensor) and tokenizer.eos_token_id is not None:
        first_T[1:] = ids[:-1] == tokenizer.eos_token_id
    bounds = sorted({0, *row.get("starts", first_T).nonzero()[:, 0].tolist(), len(ids)})
    begin, end = next(((a, b) for a, b in itertools.pairwise(bounds) if counts[a:b].any()), (0, len(ids)))
    text = ""
    for counted, run in itertools.groupby(range(begin, end), lambda position: bool(counts[position])):
        part = tokenizer.decode([int(ids[position]) for position in run], clean_up_tokenization_spaces=False)
        text += f">>>{part}<<<" if counted else part
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]}\n[... {len(text) - SHOWN} characters ...]\n{text[-SHOWN // 2 :]}"
    return text
