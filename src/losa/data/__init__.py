"""Text, wherever it is, to blocks of tokens.

A source is a local file, a directory, or the name of a hub dataset, written `name`, `name:config` or `name:config:split`
(`files.py`). Its records are texts, or conversations in one of several forms (`records.py`), which the tokenizer's chat template
renders (`chat.py`). Documents are cut and packed in `blocks.py`, measured on in `evaluation.py`, and all that a run reads is read
in `prepare.py`.
"""

from losa.data.blocks import (
    PIECE,
    Packed,
    Samples,
    calibration_windows,
    pack,
    padded_samples,
    pieces,
    training_blocks,
    windows,
)
from losa.data.chat import Document, Marked
from losa.data.evaluation import (
    NAMED,
    EvaluationText,
    evaluation_documents,
    evaluation_text,
    hold_out,
    is_wikitext,
    named_text,
    read_evaluation,
    wikitext_pages,
)
from losa.data.files import json_lines
from losa.data.prepare import (
    RunData,
    check_sources,
    held_out_record,
    load_documents,
    prepare,
    read_held_out,
    read_run,
    show_example,
    training_source,
)

__all__ = [
    "NAMED",
    "PIECE",
    "Document",
    "EvaluationText",
    "Marked",
    "Packed",
    "RunData",
    "Samples",
    "calibration_windows",
    "check_sources",
    "evaluation_documents",
    "evaluation_text",
    "held_out_record",
    "hold_out",
    "is_wikitext",
    "json_lines",
    "load_documents",
    "named_text",
    "pack",
    "padded_samples",
    "pieces",
    "prepare",
    "read_evaluation",
    "read_held_out",
    "read_run",
    "show_example",
    "training_blocks",
    "training_source",
    "wikitext_pages",
    "windows",
]
