"""Files, directories and hub datasets to records, each with the place it was found at.

A file is read by its suffix, in any case, `.gz` and `.zst` on top of any: prose (`.txt`, `.md`, `.raw`) is one record, a text;
`.json`, `.jsonl`, `.ndjson`, `.csv` and `.parquet` hold many. What a record must look like is not said here but in `records.py`.
"""

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losa.data.sources import expand, ordinary_files
from losa.system.doors import regular

TEXT_SUFFIXES = {".txt", ".md", ".raw"}
MAX_HUB_ROWS = 50_000  # of a hub dataset
SHOWN = 20  # files of a directory that are listed
ABOUT = re.compile(r"(readme.*|sources?|(data_)?licen[cs]e|copying|notice|changelog|citation|authors)(\.|$)", re.IGNORECASE)
SPACE = re.compile(r"[ \t\n\r]*")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What was read at one place.

    Attributes:
        place: the file and the line in it, the row where rows are not lines: `chats.jsonl, line 3`.
        value: a text, a dict of fields, or whatever else the file holds there.
        problem: why nothing could be read there; None if something was.
    """

    place: str
    value: Any
    problem: str | None = None


def read(source: str, without: str | None = None) -> list[Record]:
    """All records of a local file or directory or a hub dataset, in a fixed order.

    Args:
        without: another source; its files are left out of a directory that they are a part of.

    Raises:
        ValueError: nothing there, or a file that cannot be read at all.
    """
    path = Path(source)
    if path.is_file():
        return read_file(path, path.name)
    if path.is_dir():
        return _read_directory(path, without)
    return _read_hub(source)


def suffix(path: Path) -> str:
    """What a file is, by its name: the suffix below a compression's, in lower case."""
    return (Path(path.stem) if path.suffix.lower() in DECOMPRESS else path).suffix.lower()


def readable(path: Path) -> bool:
    """Whether a file has a suffix that is read."""
    return suffix(path) in READERS


def kinds() -> str:
    """The suffixes that are read, as a message lists them."""
    *first, last = READERS
    return ", ".join(first) + f" or {last}"


def directory_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of a directory, at any depth: those that are its data, and those left out, which are about it.

    Left out are files named README, LICENSE, SOURCE and the like, and prose in a folder that has files of records.
    """
    files = [file for file in ordinary_files(folder) if readable(file)]
    with_records = {file.parent for file in files if suffix(file) not in TEXT_SUFFIXES}

    def about(file: Path) -> bool:
        return suffix(file) in TEXT_SUFFIXES and (file.parent in with_records or ABOUT.match(file.name) is not None)

    return [file for file in files if not about(file)], [file for file in files if about(file)]


def _read_directory(folder: Path, without: str | None) -> list[Record]:
    taken, left = directory_files(folder)
    measured = Path(without).resolve() if without else None
    others = taken if measured is None else [file for file in taken if not file.resolve().is_relative_to(measured)]
    if 0 < len(others) < len(taken):
        taken = others
        logger.warning("%s: left out, as perplexity is measured on it: %s", folder, without)
    if not taken:
        beside = f"; {', '.join(file.name for file in left)} looks like a file about the data" if left else ""
        raise ValueError(f"no {kinds()} file in {folder}{beside}")
    found = {str(file.relative_to(folder)): file for file in taken}
    records = {name: read_file(file, name) for name, file in found.items()}
    listed = [f"  {name}: {_count(found[name], len(of_file))}" for name, of_file in records.items()]
    if len(listed) > SHOWN:
        listed[SHOWN:] = [f"  and {len(listed) - SHOWN} more"]
    total = sum(map(len, records.values()))
    logger.info("%s: %d files, %d records\n%s", folder, len(taken), total, "\n".join(listed))
    if left:
        names = ", ".join(str(file.relative_to(folder)) for file in left)
        logger.warning("%s: left out, as prose about the data or beside records: %s; name a file to read it", folder, names)
    return [record for of_file in records.values() for record in of_file]


def _count(file: Path, records: int) -> str:
    return "a text" if suffix(file) in TEXT_SUFFIXES else f"{records} record" + "s" * (records != 1)


def read_file(path: Path, name: str) -> list[Record]:
    """All records of a file.

    Args:
        name: of the file, in places and messages.

    Raises:
        ValueError: of a kind that is not read, damaged, or not UTF-8.
    """
    if not readable(path):
        raise ValueError(f"cannot read {name}; expected {kinds()}, each also .gz or .zst")
    return list(READERS[suffix(path)](_content(path, name), name))


def _content(path: Path, name: str) -> bytes:
    compression = path.suffix.lower()
    raw = regular(path).read_bytes()
    if compression not in DECOMPRESS:
        return raw
    try:
        return DECOMPRESS[compression](raw)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{name} is not a whole {compression} file: {error}") from error


def _decompress_zst(raw: bytes) -> bytes:
    import pyarrow as pa  # comes with datasets, and has the codec; slow to import

    with pa.CompressedInputStream(pa.BufferReader(raw), "zstd") as stream:
        return expand(stream, len(raw))


def _decompress_gz(raw: bytes) -> bytes:
    with gzip.open(io.BytesIO(raw)) as stream:
        return expand(stream, len(raw))


def decode(raw: bytes, place: str, first_line: int = 1) -> str:
    """UTF-8 text, without the byte-order mark that some editors begin a file with.

    Raises:
        ValueError: it is not UTF-8; the message says on which line, counted from `first_line`.
    """
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "begins as UTF-16 does" if wide else f"byte 0x{raw[error.start]:02x}, {error.reason}"
        raise ValueError(f"{place}, line {line}: not UTF-8 text ({found}); save it as UTF-8") from error


def _text(raw: bytes, name: str) -> Iterator[Record]:
    yield Record(name, decode(raw, name))


def json_lines(text: str) -> list[Any]:
    """Not `splitlines`, which also ends lines at U+2028 and others that JSON strings may hold."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _lines(raw: bytes, name: str) -> Iterator[Record]:
    """One JSON value a line. A line that is none is a record with a problem; the others are read all the same."""
    for number, line in enumerate(raw.split(b"\n"), 1):
        place = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
            yield Record(place, json.loads(text.removeprefix("\ufeff") if number == 1 else text))
        except UnicodeDecodeError as error:
            yield Record(place, None, f"not UTF-8 text (byte 0x{line[error.start]:02x}, {error.reason})")
        except (ValueError, RecursionError) as error:
            yield Record(place, None, f"not valid JSON ({_reason(error)})")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json(raw: bytes, name: str) -> Iterator[Record]:
    """A JSON list or object, or one object a line: files named .json hold either."""
    text = decode(raw, name)
    try:
        if text.lstrip().startswith("["):
            yield from _elements(text, name)
            return
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            head, _, rest = text.strip().partition("\n")
            if not text.strip() or (error.msg != "Extra data" and not (rest.strip() and _is_json(head))):
                raise
            yield from _lines(raw, name)
            return
        line = 1 + text.count("\n", 0, len(text) - len(text.lstrip()))
        yield Record(f"{name}, line {line}", value)
    except (ValueError, RecursionError) as error:
        place = f"{name}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else name
        raise ValueError(f"{place}: not valid JSON ({_reason(error)})") from error


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _elements(text: str, name: str) -> Iterator[Record]:
    """The elements of a JSON list, each with the line that it begins on, which `json.loads` would not tell."""
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _skip(text, text.index("[") + 1)
    while text[position : position + 1] != "]":
        value, end = decoder.raw_decode(text, position)
        line, counted = line + text.count("\n", counted, position), position
        yield Record(f"{name}, line {line}", value)
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']'", text, position)
    if _skip(text, position + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, _skip(text, position + 1))


def _skip(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _csv(raw: bytes, name: str) -> list[Record]:
    """Rows below a header, separated by commas, as RFC 4180 has it. pandas would make numbers and NaN of some texts."""
    text = decode(raw, name)
    records: list[Record] = []
    header: list[str] | None = None
    limit = csv.field_size_limit(max(1, len(text)))  # 131,072 characters otherwise; there is no other way to say it
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        while True:
            place = f"{name}, line {reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return records
            except csv.Error as error:
                records.append(Record(place, None, f"not valid CSV ({error})"))
                continue
            if header is None:
                header = row
            elif len(row) == len(header):
                records.append(Record(place, dict(zip(header, row, strict=True))))
            elif row:
                records.append(Record(place, None, f"{len(row)} columns, expected the header's {len(header)}"))
    finally:
        csv.field_size_limit(limit)


def _parquet(raw: bytes, name: str) -> Iterator[Record]:
    import pyarrow as pa  # comes with datasets; slow to import
    from pyarrow import parquet

    try:
        rows = parquet.read_table(pa.BufferReader(raw)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} is not a whole Parquet file: {' '.join(str(error).split())}") from error
    for number, row in enumerate(rows, 1):
        yield Record(f"{name}, row {number}", row)


DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": _decompress_gz, ".zst": _decompress_zst}
READERS: dict[str, Callable[[bytes, str], Any]] = {
    **dict.fromkeys((".txt", ".md", ".raw"), _text),
    ".json": _json,
    **dict.fromkeys((".jsonl", ".ndjson"), _lines),
    ".csv": _csv,
    ".parquet": _parquet,
}


def _read_hub(source: str) -> list[Record]:
    from datasets import load_dataset  # slow to import, and local text does not need it

    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        # Streamed: C4 is 300 GB, and no run needs more than its first rows.
        rows = list(load_dataset(name, config or None, split=split or "train", streaming=True).take(MAX_HUB_ROWS))
    except Exception as error:
        raise ValueError(f"{source!r} is neither a local file or directory nor a hub dataset that loads: {error}") from error
    return [Record(f"{name}, row {number}", row) for number, row in enumerate(rows, 1)]
