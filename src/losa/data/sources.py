"""Which files of a directory are somebody's text, and how much of a compressed one is read."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FREE_BYTES = 64 << 20  # a compressed file may expand to this,
EXPANSION = 100  # or to this many times its size; text does to four
CHUNK = 1 << 20
MODEL_FILES = {"config.json", "adapter_config.json", "losa.json"}


def ordinary_files(folder: Path) -> list[Path]:
    """All files at any depth, in order, but for what is no text of the user's: hidden files and folders, and the directories of
    models and results, such as an output that lies inside.

    Links to files are followed, links to folders are not. Pipes, devices and links to nothing are among the files, so that
    whoever reads one says so.
    """
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        here = Path(place)
        if here != folder and (MODEL_FILES & set(files) or any(name.startswith(".losa") for name in (*folders, *files))):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (here / name for name in files if not name.startswith("."))


def expand(stream: Any, size: int) -> bytes:
    """All of a stream that expands `size` compressed bytes, but not out of all proportion.

    Args:
        stream: with `read(count)`, as `gzip.GzipFile` has it.

    Raises:
        ValueError: it is a bomb.
    """
    most = max(FREE_BYTES, EXPANSION * size)
    pieces, found = [], 0
    while piece := stream.read(CHUNK):
        pieces.append(piece)
        found += len(piece)
        if found > most:
            raise ValueError(f"it expands to more than {most:,} bytes, {EXPANSION} times its size; expand it yourself first")
    return b"".join(pieces)
