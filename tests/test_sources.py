"""Which files of a directory are read as text, and how much of a compressed one."""

import gzip
import os

import pytest

from losa.data import load_documents
from losa.data.sources import FREE_BYTES, ordinary_files


def test_hidden_folders_models_and_results_are_no_text(tmp_path):
    for name in (
        "a.txt",
        "deep/er/b.txt",
        ".hidden/c.txt",
        ".d.txt",
        "sparse/README.md",
        "other/notes.md",
        "compared/rows/e.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "sparse" / ".losa").mkdir()  # an interrupted run
    (tmp_path / "other" / "config.json").write_text("{}")  # a model
    (tmp_path / "compared" / ".losa-comparison").touch()
    assert [str(file.relative_to(tmp_path)) for file in ordinary_files(tmp_path)] == ["a.txt", "deep/er/b.txt"]
    assert load_documents(str(tmp_path)) == ["a.txt", "deep/er/b.txt"]
    assert [file.name for file in ordinary_files(tmp_path / "other")] == ["config.json", "notes.md"]  # asked for by name


def test_pipes_and_links_to_nothing_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"b\.txt is no ordinary file"):
        load_documents(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").symlink_to(tmp_path / "none")
    with pytest.raises(ValueError, match=r"b\.txt is a link to nothing"):
        load_documents(str(tmp_path))


def test_a_gzip_bomb_is_refused_and_plain_repetition_is_not(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"word " * 100_000))
    assert load_documents(str(tmp_path)) == ["word " * 100_000]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(FREE_BYTES + 1), 1))
    with pytest.raises(ValueError, match=r"expands to more than .* times its size"):
        load_documents(str(tmp_path))


def test_nested_json_is_named(tmp_path):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text("[" * 100_000)
        with pytest.raises(ValueError, match=rf"{name}.*: not valid JSON \(nested too deeply\)"):
            load_documents(str(tmp_path / name))
