"""What comes from outside: every file that cannot be used ends in one sentence that names it."""

import json
import os

import pytest
import torch
import yaml
from safetensors.torch import save_file

from losa.config import LosaConfig
from losa.system.doors import (
    INDEX,
    JSON_BYTES,
    check_links,
    door,
    out_of_memory,
    printable,
    read_json,
    read_tensors,
    read_yaml,
    shown,
    tensor_heads,
    weight_files,
)
from losa.system.yaml_tree import read_config


class Panic(BaseException):
    """As Rust libraries raise it: no Exception."""


Panic.__module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("vocab"), "it has no 'vocab'"),
        (TypeError("no\nint"), "TypeError: no int"),
        (RecursionError("maximum"), "it is nested too deeply"),
        (MemoryError(), "it takes more memory than there is"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            "more memory than there is",
        ),
        (Panic("called unwrap on None"), "Panic: called unwrap on None"),
        (FileNotFoundError(2, "No such file or directory", "x"), "cannot read the thing: No such file or directory; do this"),
    ],
)
def test_whatever_a_file_causes_is_a_sentence(error, message):
    with pytest.raises(ValueError) as raised, door("the thing", hint="; do this"):
        raise error
    assert message in str(raised.value)
    assert str(raised.value).startswith("cannot read the thing: ")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_request_to_stop_goes_through(error):
    with pytest.raises(error), door("the thing"):
        raise error


def test_a_door_behind_a_door_says_it_once():
    with pytest.raises(ValueError, match=r"^cannot read it: why$"), door("it"), door("it"):
        raise ValueError("why")


def test_memory_that_runs_out_is_recognised():
    assert out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not out_of_memory(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a": ' * 100_000, "it is nested too deeply"),
        (b"\xff\xfe", "codec"),
        (b"{", "Expecting"),
        (b"[1]", "holds a list, expected an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300"),
        (b" " * (JSON_BYTES + 1), "expected at most"),
    ],
)
def test_json_that_is_none(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_json(tmp_path / "x.json")
    assert "x.json" in str(raised.value)


def test_what_is_no_ordinary_file_is_not_opened(tmp_path):
    """A pipe without a writer would be waited for."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "nothing")
    for name, message in (("pipe.json", "no ordinary file"), ("link.json", "a link to nothing"), ("none.json", "does not exist")):
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / name)


def alias_bomb(levels: int, merge: bool) -> str:
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        many = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{many}]}}" if merge else f"{{y: [{many}]}}"))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (alias_bomb(12, False), "its aliases make"),
        (alias_bomb(12, True), "its aliases make"),
        ("a: &a [*a]", "stands for what holds it"),
        ("a: &a {b: *a}", "stands for what holds it"),
        ("[" * 5000, "nested too deeply"),
        ("a: *b", "undefined alias"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    ],
)
def test_yaml_that_means_harm(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        read_config(str(tmp_path / "x.yaml"))
    assert str(raised.value).startswith("cannot read the config ")


def test_aliases_of_reasonable_size_are_read():
    text = "train: &t {tokens: 5}\nmore: *t\nmerged: {<<: *t, lr: 1}"
    assert read_yaml(text, yaml.SafeLoader, "it")["merged"] == {"tokens": 5, "lr": 1}
    assert read_yaml("", yaml.SafeLoader, "it") is None


@pytest.mark.parametrize("value", [10**400, "1e400", "nan", 2**63, 1e300, [1], "x" * 10_000])
def test_absurd_numbers_are_refused_in_a_short_sentence(value):
    with pytest.raises(ValueError, match=r"train\.tokens is .*expected a whole number") as raised:
        LosaConfig.from_dict({"train": {"tokens": value}})
    assert len(str(raised.value)) < 1000


def test_whole_numbers_are_kept_to_the_last_digit():
    assert LosaConfig.from_dict({"seed": 2**53 + 1}).seed == 2**53 + 1
    assert LosaConfig.from_dict({"seed": str(2**53 + 1)}).seed == 2**53 + 1
    assert LosaConfig.from_dict({"train": {"tokens": "1e6"}}).train.tokens == 10**6


def save_shards(folder, **names: str):
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors"} | names}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/two.safetensors", "none.safetensors", "one.bin", ""]
)
def test_an_index_names_files_beside_it(tmp_path, name):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "two.safetensors"):
        save_file({"b": torch.zeros(2)}, place)
    save_shards(folder)
    assert [file.name for file in weight_files(folder)] == ["one.safetensors"]
    save_shards(folder, b=name)
    with pytest.raises(ValueError, match=r"expected a \.safetensors file beside it"):
        weight_files(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "{"])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=INDEX):
        weight_files(tmp_path)


def test_damaged_safetensors_are_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x10" + bytes(100))
    for read in (tensor_heads, lambda file: list(read_tensors(file))):
        with pytest.raises(ValueError, match=r"cannot read a\.safetensors: .*damaged"):
            read(tmp_path / "a.safetensors")


def test_links_that_lead_out_are_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "b.json").symlink_to("a.json")
    check_links(folder)
    (tmp_path / "linked").symlink_to(folder)
    check_links(tmp_path / "linked")  # the directory itself may be one
    for target, message in (
        (secret, "a link out of the directory"),
        (tmp_path / "none", "a link to nothing"),
        (tmp_path, "out of"),
    ):
        link = folder / "additional_chat_templates" / "x.jinja"
        link.symlink_to(target)
        with pytest.raises(ValueError, match=message):
            check_links(folder)
        link.unlink()


def test_a_snapshot_of_the_hubs_cache_is_let_through(tmp_path):
    snapshot, blob = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs" / "ff"
    for path in (snapshot, blob.parent):
        path.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/ff")
    check_links(snapshot)
    (snapshot / "secret").symlink_to("../../../secret")
    (tmp_path / "secret").write_text("key")
    with pytest.raises(ValueError, match="a link out of the directory"):
        check_links(snapshot)


def test_what_is_printed_cannot_command_a_terminal():
    assert printable("👩\N{ZERO WIDTH JOINER}🚀 naïve\t你好\r\n") == "👩\N{ZERO WIDTH JOINER}🚀 naïve\t你好\n"
    assert printable("\udcff").encode() == "\N{REPLACEMENT CHARACTER}".encode()
    assert printable("a\x1b[31mb\nc\x07") == "a\N{REPLACEMENT CHARACTER}[31mb\nc\N{REPLACEMENT CHARACTER}"
    assert len(shown("x" * 10_000)) < 500
