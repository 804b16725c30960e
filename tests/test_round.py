"""Promised: a float32 result that is rounded later is the one that a run with these values makes, to the bit (one of bfloat16 was
rounded to that in between); other directories are refused, and what they hold stays."""

import json
import shutil

import pytest
import torch
from helpers import record_of, save_text, set_up, tensors, toy_config, toy_run
from rich.console import Console
from test_cli import losa_main

from losa import prune
from losa.cli.tables import summary
from losa.commands.round import round_result
from losa.models import load
from losa.runtime.files import pack_checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = set_up(tmp_path_factory.mktemp("round"))
    toy_run(folder, steps=1)
    return folder


def test_rounding_later_is_rounding_in_the_run(folder, tmp_path):
    toy_run(folder, steps=1, output=str(tmp_path / "at-once"), values="int4")
    made = round_result(folder / "sparse", tmp_path / "later", {"values": "int4"})
    at_once, later = tensors(tmp_path / "at-once"), tensors(tmp_path / "later")
    assert at_once.keys() == later.keys()
    assert all(torch.equal(at_once[name], later[name]) for name in at_once)
    expected, found = record_of(tmp_path / "at-once"), record_of(tmp_path / "later")
    assert found == made
    for part in ("kind", "perplexity", "sparsity", "evaluation", "steps", "text_sha256"):
        assert found[part] == pytest.approx(expected[part]) if part == "perplexity" else found[part] == expected[part]
    assert found["config"] == expected["config"] | {"output": str(tmp_path / "later")}
    assert found["seconds"].keys() == expected["seconds"].keys()
    assert found["samples"].keys() == expected["samples"].keys()
    assert "before rounding" in (tmp_path / "later" / "report.html").read_text()


def test_what_pruning_left_is_rounded_too(folder, tmp_path):
    config = toy_config(folder, output=str(tmp_path / "pruned"), steps=1, rates="uniform", pruner="wanda")
    prune(*load(config), config)
    found = round_result(tmp_path / "pruned", tmp_path / "int8", {"values": "int8"})
    assert found["kind"] == "prune" and list(found["perplexity"]) == ["dense", "unrounded", "pruned"]
    done = pack_checkpoint(tmp_path / "int8", tmp_path / "packed", head="keep")
    assert (done["values"], done["lossless"]) == ("int8", True), "what the weights were rounded to"
    assert not done["roundable"]
    assert pack_checkpoint(tmp_path / "int8", tmp_path / "wide", "bfloat16")["values"] == "bfloat16"
    with pytest.raises(ValueError, match=r"values is 'int8', expected none: its weights are rounded already"):
        round_result(tmp_path / "int8", tmp_path / "again", {"values": "int4"})


@pytest.mark.parametrize("kind", ["not rounded", "rounded", "no record"])
def test_pack_advises_to_round_only_what_can_be(folder, tmp_path, monkeypatch, capsys, kind):
    directory = shutil.copytree(folder / ("model" if kind == "no record" else "sparse"), tmp_path / "made")
    if kind == "rounded":
        record = record_of(directory)
        record["config"]["values"] = "int4"
        (directory / "losa.json").write_text(json.dumps(record))
    code, out, err = losa_main(monkeypatch, capsys, "pack", directory, tmp_path / "packed", "--values", "int8")
    assert code == 0 and "weights were rounded" in out, err
    card = (tmp_path / "packed" / "README.md").read_text()
    assert ("losa round --values int8 first" in out, "rounds with less loss" in card) == (kind == "not rounded",) * 2


def test_a_result_of_scores_from_training_is_rounded(folder, tmp_path):
    toy_run(folder, steps=2, pruner="movement", rates="uniform", output=str(tmp_path / "moved"))
    assert round_result(tmp_path / "moved", tmp_path / "int8", {"values": "int8"})["config"]["pruner"] == "movement"


def test_what_several_processes_made_is_rounded_by_one(folder, tmp_path):
    shutil.copytree(folder / "sparse", tmp_path / "sharded")
    record = record_of(folder / "sparse")
    record["config"]["shard"], record["processes"] = True, 2
    (tmp_path / "sharded" / "losa.json").write_text(json.dumps(record))
    found = round_result(tmp_path / "sharded", tmp_path / "out", {"values": "int4"})
    round_result(folder / "sparse", tmp_path / "alone", {"values": "int4"})
    assert (found["config"]["shard"], found["config"]["offload"], found["processes"]) == (True, False, 2)
    assert "torchrun --nproc-per-node 2" in (tmp_path / "out" / "report.html").read_text(), "the command that makes it again"
    expected, made = tensors(tmp_path / "alone"), tensors(tmp_path / "out")
    assert all(torch.equal(expected[name], made[name]) for name in expected)


@pytest.mark.parametrize("change", ["text", "windows", "held out"])
def test_perplexities_of_other_windows_are_left_out(folder, tmp_path, caplog, change):
    save_text(tmp_path / "other.txt", seed=1)
    key = {"text": "eval.data", "held out": "train.data"}.get(change, "eval.windows")
    before = record_of(folder / "sparse")
    value = 4 if change == "windows" else str(tmp_path / "other.txt")
    found = round_result(folder / "sparse", tmp_path / "out", {"values": "int4", key: value})
    assert list(found["perplexity"]) == ["unrounded", "losa"] and found == record_of(tmp_path / "out")
    assert (found["evaluation"]["windows"] == 4) == (change == "windows")
    assert found["samples"].keys() == before["samples"].keys() | {"unrounded"}
    assert "sparse are of another text or other windows, and are left out" in caplog.text
    console = Console(record=True, width=300)
    console.print(summary(found))
    for text in (console.export_text(), *((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))):
        assert "before rounding" in text and "gap in log-perplexity" not in text
        assert f"{before['perplexity']['dense']:.2f}" not in text


def test_a_text_that_lies_elsewhere_is_the_same(folder, tmp_path):
    (tmp_path / "moved.txt").write_bytes((folder / "text.txt").read_bytes())
    found = round_result(folder / "sparse", tmp_path / "out", {"values": "int4", "train.data": str(tmp_path / "moved.txt")})
    assert list(found["perplexity"]) == ["dense", "pruned", "unrounded", "losa"]


def test_what_cannot_be_rounded_is_refused(folder, tmp_path):
    before = record_of(folder / "sparse")
    pack_checkpoint(folder / "sparse", tmp_path / "packed")
    (tmp_path / "packed" / "losa.json").write_bytes((folder / "sparse" / "losa.json").read_bytes())
    for directory, changes, error in (
        (folder / "model", {"values": "int4"}, r"has no losa\.json"),
        (tmp_path / "packed", {"values": "int4"}, "losa unpack gives"),
        (folder / "sparse", {}, "values is None, expected int8 or int4; give one with --values"),
        (folder / "sparse", {"values": "int5"}, "expected int8 or int4"),
        (folder / "sparse", {"values": "int4", "train.data": "nowhere.txt"}, r"nowhere\.txt"),
    ):
        with pytest.raises(ValueError, match=error):
            round_result(directory, tmp_path / "out", changes)
    with pytest.raises(ValueError, match="is the model itself"):
        round_result(folder / "sparse", folder / "sparse", {"values": "int4"}, overwrite=True)
    assert not (tmp_path / "out").exists() and record_of(folder / "sparse") == before
