"""A file is written whole or not at all, and whatever goes wrong is one message."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

HALF = ".losa-partial"  # ends the hidden name of a file that is being written; see `replace`


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Has one message for all the ways in which libraries say that a file cannot be written.

    Raises:
        OSError: that message.
    """
    try:
        yield
    except Exception as error:  # Rust's libraries raise plain exceptions
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):
            raise
        raise OSError(f"cannot write {path}: {' '.join(str(error).split())}") from error


def to_json(value: Any, name: str) -> str:
    """JSON as every program reads it.

    Raises:
        ValueError: a number that is not finite, which JSON cannot hold.
    """
    try:
        return json.dumps(value, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{name} would hold a number that is not finite: {error}") from error


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    half = path.with_name(f".{path.name}{HALF}")
    with writing(path):
        try:
            half.write_text(text, encoding="utf-8")
            sync(half)
            half.rename(path)
        except OSError:
            half.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Flushes a file, or a directory's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
