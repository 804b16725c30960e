"""Every kind of data is read, or refused in a sentence with its place; docs/supported.md says which.

`python tests/test_data_kinds.py` writes the table.
"""

import gzip
import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from pyarrow import parquet

from losa.data import Marked, load_documents

PAGE = Path(__file__).parents[1] / "docs" / "supported.md"
BEGIN, END = "<!-- data:begin -->", "<!-- data:end -->"

ABOUT = {"README.md": b"About.", "SOURCE.txt": b"Where."}
QUESTION, ANSWER = {"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, QUESTION, ANSWER]}
SHARED = {"conversations": [{"from": "human", "value": "Add 1 and 2."}, {"from": "gpt", "value": "3"}]}
GOOD = json.dumps({"text": "One."})


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def table(*rows: dict) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


def answered(answer: object) -> bytes:
    return GOOD.encode() + b"\n" + lines({"instruction": "Add 1 and 2.", "output": answer})


# What it is, what the file is called, what is in it; a dict is a directory.
KINDS: list[tuple[str, str, bytes | dict[str, bytes]]] = [
    ("prose", "novel.txt", b"One.\nTwo."),
    ("Markdown", "notes.md", b"# One"),
    ("WikiText as its authors ship it", "wiki.raw", b" = One = \n"),
    ("a suffix in capitals", "NOVEL.TXT", b"One."),
    ("gzip on top", "novel.txt.gz", gzip.compress(b"One.")),
    ("Zstandard on top", "texts.jsonl.zst", zst(lines({"text": "One."}, {"text": "Two."}))),
    ("text, a record a line", "texts.jsonl", lines({"text": "One.", "id": 1}, "Two.")),
    ("the same, blank texts passed over", "texts.ndjson", lines({"text": "One."}, {"text": " "})),
    ("a JSON list", "texts.json", json.dumps([{"text": "One."}, "Two."], indent=1).encode()),
    ("one JSON object", "text.json", json.dumps({"text": "One."}, indent=1).encode()),
    ("records a line, called .json", "texts.json", lines({"text": "One."}, {"text": "Two."})),
    ("turns, `role` and `content`", "chat.jsonl", lines(CHAT, CHAT)),
    ("turns, `from` and `value`", "sharegpt.json", json.dumps([SHARED]).encode()),
    ("`prompt` and `completion`", "pairs.jsonl", lines({"prompt": "Add 1 and 2.", "completion": "3"})),
    ("the same, as turns", "pairs.jsonl", lines({"prompt": [QUESTION], "completion": [ANSWER]})),
    ("`instruction`, `input`, `output`", "alpaca.json", b'[{"instruction": "Add.", "input": "1, 2", "output": "3"}]'),
    ("`instruction`, `context`, `response`", "dolly.jsonl", lines({"instruction": "Add.", "context": "1, 2", "response": "3"})),
    ("`context` and `response`", "pairs.ndjson", lines({"context": "Add 1 and 2.", "response": "3"})),
    ("columns of text", "pairs.csv", b'instruction,output\n"Add 1, and 2.","3\n"\n'),
    ("columns of text", "texts.parquet", table({"text": "One."}, {"text": "Two."})),
    ("a column of turns", "chat.parquet", table(CHAT)),
    ("a byte-order mark at the beginning", "texts.csv", b"\xef\xbb\xbftext\nOne.\n"),
    ("records, with what is about them", "folder", {"a.jsonl": lines({"text": "One."})} | ABOUT),
    ("prose, with what is about it", "folder", {"one.txt": b"One.", "two.txt": b"Two.", "LICENSE.txt": b"Free."} | ABOUT),
    ("nothing but what is about it", "folder", {"README.md": b"About.", "data.bin": b"\x00"}),
    ("a field that is null", "alpaca.jsonl", answered(None)),
    ("a field that is a number", "alpaca.jsonl", answered(3)),
    ("a field that is a list", "alpaca.jsonl", answered(["3"])),
    ("a field that is an object", "alpaca.jsonl", answered({"value": "3"})),
    ("a text that is null", "texts.jsonl", lines({"text": "One."}, {"text": None})),
    ("an empty answer", "alpaca.jsonl", answered(" ")),
    ("no answer", "chat.jsonl", lines(CHAT, {"messages": [QUESTION]})),
    ("a turn of nobody known", "chat.jsonl", lines({"messages": [QUESTION, {"role": "tool", "content": "3"}, ANSWER]})),
    ("a turn that calls tools", "chat.jsonl", lines({"messages": [QUESTION, ANSWER | {"tool_calls": [{"id": 1}]}]})),
    ("other fields", "rows.jsonl", lines({"text": "One."}, {"title": "One", "id": 1})),
    ("a truncated line", "texts.jsonl", lines({"text": "One."}) + b'{"text": "Tw'),
    ("a truncated list", "texts.json", b'[{"text": "One."},\n {"text": "Tw'),
    ("a lone surrogate", "texts.jsonl", GOOD.encode() + b'\n{"text": "\\ud83d"}\n'),
    ("a byte-order mark in the middle", "texts.jsonl", GOOD.encode() + b"\n\xef\xbb\xbf" + GOOD.encode()),
    ("a row with too few columns", "pairs.csv", b"instruction,output\nAdd.,3\nAdd.\n"),
    ("a quote that nothing ends", "texts.csv", b'text\nOne.\n"Two.\n'),
    ("Latin-1", "novel.txt", "One.\nCafé.".encode("latin-1")),
    ("UTF-16", "novel.txt", "One.".encode("utf-16")),
    ("half of a gzip file", "novel.txt.gz", gzip.compress("".join(map(str, range(999))).encode())[:99]),
    ("half of a Zstandard file", "novel.txt.zst", zst("".join(map(str, range(999))).encode())[:99]),
    ("half of a Parquet file", "texts.parquet", table({"text": "One."})[:50]),
    ("nothing but blanks", "novel.txt", b" \n\n"),
    ("an empty list", "texts.json", b"[]"),
    ("what is no text", "paper.pdf", b"%PDF"),
]  # fmt: skip


def put(folder: Path, name: str, content: bytes | dict[str, bytes]) -> Path:
    path = folder / name
    if isinstance(content, dict):
        path.mkdir()
        for file, inside in content.items():
            (path / file).write_bytes(inside)
    else:
        path.write_bytes(content)
    return path


def outcome(kind: tuple[str, str, bytes | dict[str, bytes]], skip: bool = False) -> str:
    """What becomes of a kind of data, in words that are the same on every machine."""
    with TemporaryDirectory() as folder:
        path = put(Path(folder), *kind[1:])
        try:
            documents = load_documents(str(path), skip=skip)
        except ValueError as error:
            return str(error).replace(f"{folder}/", "")
    texts = sum(isinstance(document, str) for document in documents)
    chats = [document for document in documents if isinstance(document, Marked)]
    answers = sum(len(chat.counted) for chat in chats)
    parts = ((texts, "text"), (len(chats), "conversation"), (answers, "answer"))
    return "works: " + ", ".join(f"{count} {what}" + "s" * (count > 1) for count, what in parts if count)


def written() -> str:
    """The table of all kinds."""
    rows = [f"| {kind[0]} | `{kind[1]}` | {outcome(kind)} |" for kind in KINDS]
    return "\n".join(["| what | as | |", "|---|---|---|", *rows])


def on_page() -> str:
    return re.search(f"{BEGIN}\n(.*)\n{END}", PAGE.read_text("utf-8"), re.DOTALL)[1]


def test_the_page_says_what_happens_to_every_kind():
    assert on_page() == written(), "docs/supported.md is out of date: python tests/test_data_kinds.py"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}, {kind[1]}")
def test_what_is_refused_has_its_place_and_a_way_out(kind):
    """A bad record has a file and a line; where it is skipped, what is good beside it is read."""
    said = outcome(kind)
    if "--skip-bad-records" in said:
        assert re.search(r"\.\w+, line \d+: ", said)
        assert outcome(kind, skip=True).startswith("works") or "no good record" in outcome(kind, skip=True)
    else:
        assert outcome(kind, skip=True) == said


BAD_ANSWERS = [None, 3, True, ["3"], {"value": "3"}, "", " \n"]


@pytest.mark.parametrize("answer", BAD_ANSWERS, ids=repr)
@pytest.mark.parametrize("form", ["instruction", "messages", "conversations", "completion", "response"])
def test_no_form_takes_an_answer_that_is_none(tmp_path, form, answer):
    def turns(name: str, text: str) -> list[dict]:
        return [{name: "user", text: "Add."}, {name: "assistant", text: answer}]

    record = {
        "instruction": {"instruction": "Add.", "output": answer},
        "messages": {"messages": turns("role", "content")},
        "conversations": {"conversations": turns("from", "value")},
        "completion": {"prompt": "Add.", "completion": answer},
        "response": {"context": "Add.", "response": answer},
    }[form]
    (tmp_path / "a.jsonl").write_bytes(b"\n" + lines("One.", record))
    with pytest.raises(ValueError, match=r"^a\.jsonl, line 3: .*; mend it, or leave such records out with --skip-bad-records$"):
        load_documents(str(tmp_path / "a.jsonl"))
    assert load_documents(str(tmp_path / "a.jsonl"), skip=True) == ["One."]


if __name__ == "__main__":
    page = PAGE.read_text("utf-8")
    sys.stdout.write(written() + "\n")
    PAGE.write_text(page.replace(f"{BEGIN}\n{on_page()}\n{END}", f"{BEGIN}\n{written()}\n{END}"), "utf-8")
