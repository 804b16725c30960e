"""Perplexity is exactly what its definition says, whatever the batches, and named by its window length."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import save_text, save_toy, toy_model
from typer.testing import CliRunner

from losa.cli import app
from losa.commands.demo import assets
from losa.commands.toy import toy_tokenizer
from losa.config import LosaConfig
from losa.data import evaluation_text, windows
from losa.evaluation import evaluate_checkpoint, perplexity
from losa.evaluation.checkpoint import check_savable, default_lengths, save_results
from losa.evaluation.perplexity import exp
from losa.models import load
from losa.runtime.files import pack_checkpoint
from losa.system.progress import progress


def reference_perplexity(model, text: str, tokenizer, length: int, most: int | None = None) -> float:
    """The definition, one window and one token at a time, in float64."""
    model = model.double().eval()
    ids = tokenizer(text)["input_ids"]
    count = len(ids) // length if most is None else min(most, len(ids) // length)
    total, predicted = 0.0, 0
    for number in range(count):
        window = ids[number * length : (number + 1) * length]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0]
        for position in range(length - 1):
            scores = logits[position]
            probability = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
            total -= math.log(float(probability[window[position + 1]]))
            predicted += 1
    return math.exp(total / predicted)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.txt", 700)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 21, 50])
@pytest.mark.parametrize("length", [2, 33])
def test_equals_the_definition_in_any_batches(text, length, batch_size):
    document = text.read_text()
    ids = windows(document, toy_tokenizer(), length, 21)
    found = perplexity(toy_model(), ids, batch_size)
    assert found == pytest.approx(reference_perplexity(toy_model(), document, toy_tokenizer(), length, 21), rel=1e-6)


def test_progress_counts_windows(monkeypatch):
    loops = []

    def kept(*arguments, **named):
        loops.append(progress(*arguments, **named))
        return loops[-1]

    monkeypatch.setattr(sys.modules["losa.evaluation.perplexity"], "progress", kept)
    perplexity(toy_model(), torch.zeros(5, 8, dtype=torch.int64), 2)
    assert [(loop.count, loop.total) for loop in loops] == [(5, 5)]


@pytest.mark.parametrize("length", [2, 5, 32, 33, 64])
def test_whole_text_drops_only_the_window_that_is_not_full(text, length):
    document = text.read_text()[:301]
    ids = windows(document, toy_tokenizer(), length)
    assert len(ids) == 301 // length
    expected = reference_perplexity(toy_model(), document, toy_tokenizer(), length)
    assert perplexity(toy_model(), ids) == pytest.approx(expected, rel=1e-6)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    model = toy_model()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, torch.randint(0, 64, (3, 16))) == pytest.approx(64, rel=1e-6)


def test_model_keeps_its_mode():
    model, ids = toy_model(), torch.zeros(1, 4, dtype=torch.int64)
    for mode in (True, False):
        model.train(mode)
        perplexity(model, ids)
        assert model.training is mode


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,), (2, 3, 4)])
def test_no_windows_is_an_error(shape):
    with pytest.raises(ValueError, match="windows have shape"):
        perplexity(toy_model(), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("longest", "lengths"),
    [(64, [64]), (2047, [2047]), (2048, [2048]), (4095, [2048]), (4096, [2048, 4096]), (131_072, [2048, 4096])],
)
def test_default_lengths_are_those_papers_report(longest, lengths):
    assert default_lengths(longest) == lengths


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy") / "model")


def test_checkpoint_rows_name_model_text_and_window(checkpoint, text):
    result = evaluate_checkpoint(LosaConfig(model=str(checkpoint), device="cpu"), str(text), [16, 48], 5)
    assert (result["tasks"], result["mean_acc"], result["lm_eval"]) == ({}, None, None)
    rows = result["perplexity"]
    assert [(row["window"], row["windows"]) for row in rows] == [(16, 5), (48, 5)]
    for row in rows:
        assert (row["model"], row["data"], row["definition"]) == (str(checkpoint), str(text), "token, windowed")
        expected = reference_perplexity(toy_model(), text.read_text(), toy_tokenizer(), row["window"], 5)
        assert row["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_checkpoint_is_read_in_the_dtype_asked(checkpoint, text):
    config = LosaConfig(model=str(checkpoint), device="cpu", dtype="bfloat16")
    (row,) = evaluate_checkpoint(config, str(text), [16], 5)["perplexity"]
    exact = reference_perplexity(toy_model(), text.read_text(), toy_tokenizer(), 16, 5)
    assert row["perplexity"] != pytest.approx(exact, rel=1e-7)
    assert row["perplexity"] == pytest.approx(exact, rel=0.02)


def test_checkpoint_defaults_to_the_longest_window(checkpoint, text):
    (row,) = evaluate_checkpoint(LosaConfig(model=str(checkpoint), device="cpu"), str(text), [], None)["perplexity"]
    assert (row["window"], row["windows"]) == (64, 700 // 64)


@pytest.mark.parametrize(
    ("lengths", "message"), [([16, 65], "window length 65 is beyond the model's 64 tokens"), ([1], "expected")]
)
def test_checkpoint_refuses_impossible_windows(checkpoint, text, lengths, message):
    with pytest.raises(ValueError, match=message):
        evaluate_checkpoint(LosaConfig(model=str(checkpoint), device="cpu"), str(text), lengths, None)


def test_checkpoint_refuses_a_text_shorter_than_a_window(checkpoint, tmp_path):
    short = save_text(tmp_path / "short.txt", 20)
    with pytest.raises(ValueError, match=r"the text has 20 tokens, expected at least one window of 64; .* --length"):
        evaluate_checkpoint(LosaConfig(model=str(checkpoint), device="cpu"), str(short), [], None)


def test_checkpoint_refuses_a_text_of_blanks(checkpoint, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"blank\.txt holds no text"):
        evaluate_checkpoint(LosaConfig(model=str(checkpoint), device="cpu"), str(tmp_path / "blank.txt"), [], None)


def test_unusable_device_is_named(checkpoint, text):
    with pytest.raises(ValueError, match="device is 'abacus', expected auto, cpu or cuda"):
        evaluate_checkpoint(LosaConfig(model=str(checkpoint), device="abacus"), str(text), [], None)


def test_real_model_equals_the_definition():
    """The 4 M parameter Llama that ships with the package, on prose it never saw, in float32."""
    held = str(assets() / "held.txt")
    config = LosaConfig(model=str(assets() / "novels-4m"), device="cpu", dtype="float32")
    (row,) = evaluate_checkpoint(config, held, [256], 4)["perplexity"]
    model, tokenizer = load(config)
    expected = reference_perplexity(model, evaluation_text(held)[:20_000], tokenizer, 256, 4)
    assert row["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert row["perplexity"] < 60  # it is a trained model


RESULT = {"perplexity": [], "tasks": {}, "mean_acc": None, "lm_eval": None, "date": "2026-11-25"}


@pytest.mark.parametrize("content", ["{", "[]", '{"perplexity": 7}', '{"perplexity": [{}], "tasks": {}}', "\udcff"])
def test_a_result_is_kept_beside_a_damaged_one(tmp_path, content):
    (tmp_path / "eval.json").write_text(content, "utf-8", "surrogateescape")
    assert save_results(str(tmp_path), RESULT) == tmp_path / "eval-2.json"
    assert save_results(str(tmp_path), RESULT) == tmp_path / "eval-3.json"
    assert (tmp_path / "eval.json").read_text("utf-8", "surrogateescape") == content
    assert json.loads((tmp_path / "eval-2.json").read_text("utf-8")) == RESULT


def test_what_cannot_be_saved_is_known_before_measuring(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"is not the directory of a finished checkpoint; --save keeps bench\.json in there"):
        check_savable(tmp_path, "bench.json")
    check_savable(checkpoint)
    assert not [path for path in checkpoint.iterdir() if path.name.startswith(".")]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"cannot write to .*: No space left on device; --save keeps eval\.json in there"):
        check_savable(checkpoint)


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_results_are_printed_before_they_are_saved(checkpoint, command, monkeypatch):
    measured = {"eval": RESULT, "bench": {"rows": []}}
    monkeypatch.setattr("losa.evaluation.checkpoint.evaluate_checkpoint", lambda *_: measured["eval"])
    monkeypatch.setattr("losa.runtime.bench.compare", lambda *_: measured["bench"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("losa.evaluation.checkpoint.replace", full)
    monkeypatch.setattr("losa.system.writing.replace", full)
    options = ["--data", "x.txt"] if command == "eval" else []
    result = CliRunner().invoke(app, [command, str(checkpoint), *options, "--save", "--json"])
    assert isinstance(result.exception, OSError)
    assert json.loads(result.stdout) == measured[command]


def test_a_packed_checkpoint_is_measured_with_the_file_of_its_run(checkpoint, text, tmp_path):
    pack_checkpoint(checkpoint, tmp_path / "packed")
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {checkpoint}\noutput: {tmp_path / 'sparse'}\neval: {{data: {text}, length: 16, windows: 2}}\n")
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "packed"), "-c", str(file), "--device", "cpu", "--json"])
    assert result.exception is None
    assert json.loads(result.stdout)["perplexity"][0]["windows"] == 2


def test_a_perplexity_that_no_float_holds_is_infinite():
    assert exp(0.0) == 1.0
    assert exp(1e4) == math.inf
    assert math.isnan(exp(math.nan))
