"""Promised: a run that cannot be is refused before it costs anything, and one that goes wrong saves nothing."""

import math

import pytest
import torch
from helpers import (
    file_bytes,
    record_of,
    set_up,
    tensors,
    toy_config,
    toy_run,
)
from transformers import GenerationConfig

from losa.api import prune, run
from losa.models import load
from losa.session.checks import warn_of_little_text
from losa.session.samples import answer, opening

pytestmark = pytest.mark.usefixtures("no_figures")


def test_each_stage_replaces_the_one_before(done):
    folder, _, look = done
    assert look.stages == [["01-pruned"], ["02-pruned"], ["03-pruned"]]
    assert not (folder / "sparse" / ".losa").exists()


def test_float16_is_not_trained_in(tmp_path):
    folder = set_up(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match="gradients underflow in float16"):
        toy_run(folder, dtype="float16")


def test_offloaded_run_is_the_same_run(done):
    folder, model, _ = done
    offloaded = toy_run(folder, output=None, offload=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, offloaded.state_dict()[name])


def test_output_that_is_the_model_is_refused(done):
    folder, _, _ = done
    before = file_bytes(folder / "model")
    for output in (str(folder / "model"), str(folder / "sparse" / ".." / "model")):
        with pytest.raises(ValueError, match="is the model itself; choose another directory"):
            toy_run(folder, output=output)
    assert file_bytes(folder / "model") == before


def test_output_with_files_of_others_is_refused(done, tmp_path):
    folder, _, _ = done
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and not an earlier run"):
        toy_run(folder, output=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_output_that_is_a_file_is_refused(done, tmp_path):
    folder, _, _ = done
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="is a file; choose another directory"):
        toy_run(folder, output=str(tmp_path / "file"))


def test_empty_output_directory_is_fine(done, tmp_path):
    folder, _, _ = done
    (tmp_path / "sparse").mkdir()
    toy_run(folder, output=str(tmp_path / "sparse"), steps=1)
    assert (tmp_path / "sparse" / "config.json").exists()


def test_pattern_that_does_not_divide_is_refused_at_once(tmp_path):
    folder = set_up(tmp_path, intermediate_size=66)
    with pytest.raises(ValueError, match=r"down_proj has 66 inputs, not a multiple of 4; pattern 2:4 cannot be applied"):
        toy_run(folder, pattern="2:4", sparsity=None)
    assert not (folder / "sparse").exists()


@pytest.mark.parametrize("train", [{"data": None}, {"data": "nowhere.txt"}, {"length": 65}])
def test_bad_requests_leave_nothing_behind(done, tmp_path, train):
    folder, _, _ = done
    with pytest.raises(ValueError, match=r"--data|nowhere\.txt|train\.length is 65"):
        toy_run(folder, output=str(tmp_path / "sparse"), train=train)
    assert not (tmp_path / "sparse").exists()


def test_offload_gives_the_same_model(done, tmp_path):
    folder, _, _ = done
    toy_run(folder, output=str(tmp_path / "sparse"), offload=True)
    expected = tensors(folder / "sparse")
    assert all(torch.equal(value, expected[name]) for name, value in tensors(tmp_path / "sparse").items())
    assert record_of(tmp_path / "sparse")["perplexity"] == pytest.approx(record_of(folder / "sparse")["perplexity"], rel=1e-6)


@pytest.mark.parametrize("where", ["model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dense_model_that_says_nothing_is_refused(tmp_path, where, value):
    """NaN outside of the layers that are pruned."""
    folder = set_up(tmp_path)
    config = toy_config(folder, steps=1)
    for make in (run, prune):
        model, tokenizer = load(config)
        model.get_parameter(where).data[0] = value
        with pytest.raises(ValueError, match=r"the dense model's perplexity is (nan|inf): its weights or their dtype"):
            make(model, tokenizer, config)
        assert not (folder / "sparse").exists()


def test_a_result_that_says_nothing_is_not_saved(done, tmp_path, monkeypatch):
    folder, _, _ = done
    values = iter([40.0, math.nan])
    monkeypatch.setattr("losa.session.session.perplexity", lambda *_, **__: next(values))
    config = toy_config(folder, output=str(tmp_path / "sparse"), calibration={"data": str(folder / "text.txt")})
    with pytest.raises(FloatingPointError, match=r"perplexity is nan \(pruned\), a finite number when dense"):
        prune(*load(config), config)
    assert [path.name for path in (tmp_path / "sparse").iterdir()] == [".losa"]  # what pruning left, and no model


@pytest.mark.parametrize("changes", [{"steps": 1}, {"shard": True}, {"offload": True}])
def test_movement_without_training_to_come_is_refused(tmp_path, changes):
    set_up(tmp_path)
    with pytest.raises(ValueError, match="pruner is 'movement'"):
        toy_run(tmp_path, pruner="movement", **changes)
    config = toy_config(tmp_path, pruner="movement")
    with pytest.raises(ValueError, match="pruner is 'movement'"):
        prune(*load(config), config)


def test_a_model_that_is_sparse_already_is_noticed(tmp_path, caplog):
    model = toy_run(set_up(tmp_path), output=None)
    caplog.clear()
    config = toy_config(tmp_path, output=None)
    prune(model, load(config)[1], config)
    assert "zeros already" in caplog.text


@pytest.mark.parametrize(("rows", "most", "told"), [(1, None, True), (3, 64, True), (4, None, False), (2, 2, False)])
def test_a_perplexity_of_little_text_is_called_noisy(caplog, rows, most, told):
    warn_of_little_text(torch.zeros(rows, 32), most)
    assert ("a noisy figure; --eval-data" in caplog.text) == told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protect": [2]}, "expected block numbers below 2"),
        ({"protect": [-1]}, "expected block numbers, 0 being the first"),
        ({"protect": [0], "sparsity": 0.6}, "target is 0.6, expected less than 0.5"),
        ({"protect": [0], "pattern": "2:4", "sparsity": None}, "2:4 fixes all rates"),
    ],
)
def test_protection_that_cannot_be_is_refused(tmp_path, changes, message):
    set_up(tmp_path)
    with pytest.raises(ValueError, match=message):
        toy_run(tmp_path, **changes)


def test_samples_are_greedy_whatever_the_model_says_of_generation(done):
    folder, _, _ = done
    model, tokenizer = load(str(folder / "sparse"))
    _, ids = opening(tokenizer, 64)
    expected = answer(model, tokenizer, ids)
    for change in ({"num_beams": 3}, {"return_dict_in_generate": True}, {"stop_strings": ["a"]}, {"repetition_penalty": 9.0}):
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, **change)
        assert answer(model, tokenizer, ids) == expected


def test_curves_go_to_a_service_that_is_there(tmp_path):
    set_up(tmp_path)
    with pytest.raises(ValueError, match=r"train.report_to is 'nowhere', expected one of those installed here: none, all"):
        toy_run(tmp_path, train={"report_to": "nowhere"})


def test_samples_before_and_after_are_in_the_record_and_on_the_card(done):
    folder, _, _ = done
    found = record_of(folder / "sparse")["samples"]
    assert list(found) == ["prompt", "dense", "pruned", "losa"]
    model, tokenizer = load(str(folder / "sparse"))
    _, ids = opening(tokenizer, 64)
    assert answer(model, tokenizer, ids) == found["losa"]
    card = (folder / "sparse" / "README.md").read_text()
    assert "## Samples" in card and found["prompt"] in card
    assert "llama.cpp" in card and "vLLM" in card
