"""Promised: a run leaves a plain sparse checkpoint, exact to the bit, with its whole story beside it."""

import math

import pytest
import torch
import yaml
from helpers import (
    Look,
    comparable,
    file_bytes,
    pruned_names,
    record_of,
    set_up,
    tensors,
    toy_config,
    toy_run,
)
from processes import call, open_without_losa
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from losa.adapter import masked_linears
from losa.allocation import cubic_sparsity
from losa.api import run
from losa.config import LosaConfig
from losa.models import load
from losa.system.output import read_record

pytestmark = pytest.mark.usefixtures("no_figures")


def test_opens_with_transformers_alone(done, tmp_path):
    folder, model, _ = done
    ids = torch.arange(60).view(2, 30)
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(path) for path in (folder / "sparse", tmp_path / "ids.pt", tmp_path / "logits.pt")]
    assert call(tmp_path / "log", open_without_losa, *arguments) == 0, (tmp_path / "log").read_text()
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(input_ids=ids).logits)


def test_returned_model_has_no_trace_of_the_package(done):
    folder, model, _ = done
    assert not masked_linears(model)
    assert all(type(module).__module__.partition(".")[0] in ("torch", "transformers") for module in model.modules())
    file = tensors(folder / "sparse")
    assert model.state_dict().keys() == file.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, file[name])
    source = AutoModelForCausalLM.from_pretrained(folder / "model")
    reopened = AutoModelForCausalLM.from_pretrained(folder / "sparse")
    assert reopened.config.to_dict() == source.config.to_dict() | {"_name_or_path": reopened.config.name_or_path}


def test_generates(done):
    _, model, _ = done
    ids = model.generate(input_ids=torch.tensor([[33, 34]]), max_new_tokens=5, do_sample=False)
    assert ids.shape[1] > 2


def test_record_tells_the_whole_story(done):
    folder, model, _ = done
    record = read_record(folder / "sparse")
    assert record["kind"] == "run"
    assert LosaConfig.from_dict(record["config"]) == toy_config(folder).resolve(32, 64)
    assert {"losa", "torch", "transformers", "accelerate", "safetensors", "python", "machine"} <= record["versions"].keys()
    assert record["config"]["seed"] == 0
    held_out = record["evaluation"].pop("held_out")
    assert len(held_out.pop("sha256")) == 64 and held_out == {"source": "../text.txt"}
    assert record["evaluation"] == {
        "data": "held out of the training text",
        "window": 32,
        "windows": 16,
        "counts": "all tokens",
    }
    assert list(record["perplexity"]) == ["dense", "pruned", "losa"]
    assert {"importance", "pruning", "training", "evaluation", "baseline", "saving", "reading text"} <= record["seconds"].keys()
    assert all(seconds >= 0 for seconds in record["seconds"].values())
    assert [step["step"] for step in record["steps"]] == [1, 2, 3]
    for step in record["steps"]:
        assert step["target"] == cubic_sparsity(step["step"], 3, 0.6)
        assert sum(step["rates"]) / 2 == pytest.approx(step["target"], abs=1e-12)
        assert max(abs(rate - step["target"]) for rate in step["rates"]) <= 0.02 + 1e-12
        assert len(step["importance"]) == len(step["errors"]) == len(step["ranks"]) == 2
        assert all(error > 0 for error in step["errors"])
        assert all(math.isfinite(loss) and update > 0 for update, loss in step["loss"])
    assert model.losa_record["perplexity"] == record["perplexity"]


def test_all_but_the_pruned_layers_is_bitwise_the_source(done):
    folder, _, _ = done
    source, result = tensors(folder / "model"), tensors(folder / "sparse")
    assert source.keys() == result.keys()
    for name in source.keys() - set(pruned_names(folder / "sparse")):
        assert torch.equal(source[name].view(torch.uint8), result[name].view(torch.uint8)), name
    assert all(source[name].dtype == result[name].dtype for name in source)


def test_tokenizer_and_generation_configuration_come_along(done):
    folder, _, _ = done
    tokenizer = AutoTokenizer.from_pretrained(folder / "sparse")
    assert tokenizer("FOX")["input_ids"] == AutoTokenizer.from_pretrained(folder / "model")("FOX")["input_ids"]
    generation = GenerationConfig.from_pretrained(folder / "sparse")
    assert (generation.do_sample, generation.temperature) == (True, 0.25)


def test_model_card_says_what_was_done(done):
    folder, _, _ = done
    card = (folder / "sparse" / "README.md").read_text()
    front, body = card.split("---\n")[1:3]
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["sparse", "losa", "wanda"],
    }
    assert str(folder) not in card  # a card is published, directories are private
    found = record_of(folder / "sparse")
    for text in (
        "# sparse",
        f"{found['sparsity']['achieved']:.2%}",
        *(f"{value:.3f}" for value in found["perplexity"].values()),
        "from_pretrained",
    ):
        assert text in body
    assert f"{found['sparsity']['weights']:,}" in body


def test_equal_runs_give_equal_bytes(done, tmp_path):
    folder, _, _ = done
    values = {"output": str(tmp_path / "sparse")}
    toy_run(folder, **values)
    assert file_bytes(tmp_path / "sparse") == file_bytes(folder / "sparse")
    assert comparable(tmp_path / "sparse") == comparable(folder / "sparse")


def test_another_seed_gives_another_result(done, tmp_path):
    folder, _, _ = done
    toy_run(folder, output=str(tmp_path / "sparse"), seed=20_250_101, steps=1)
    assert record_of(tmp_path / "sparse")["perplexity"] != record_of(folder / "sparse")["perplexity"]


def test_without_output_nothing_is_written(done, tmp_path, monkeypatch):
    folder, model, _ = done
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = sorted(folder.rglob("*"))
    in_memory = toy_run(folder, output=None)
    assert list(here.iterdir()) == []
    assert sorted(folder.rglob("*")) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, in_memory.state_dict()[name])
    assert in_memory.losa_record["perplexity"] == model.losa_record["perplexity"]


def test_model_made_in_memory_can_be_saved(done, tmp_path, monkeypatch):
    """A configuration without `model`, as `losa doctor` uses it."""
    folder, _, _ = done
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load(toy_config(folder))
    run(model, tokenizer, toy_config(folder, model="", output=str(tmp_path / "sparse"), steps=1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_half_precision_base_is_trained_and_saved_in_bfloat16(tmp_path, source):
    folder, dtype = set_up(tmp_path, dtype=source), torch.bfloat16
    look = Look(folder / "sparse")
    toy_run(folder, callbacks=(look,), steps=2)
    file = tensors(folder / "sparse")
    assert {value.dtype for value in file.values()} == {dtype}
    for name, keep in look.masks[-1].items():
        pruned = file[f"{name}.weight"][~keep]
        assert not pruned.view(torch.uint8).any()
    assert record_of(folder / "sparse")["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-3)


def test_tied_embeddings_stay_tied(tmp_path):
    folder = set_up(tmp_path, tie_word_embeddings=True)
    model = toy_run(folder, steps=2)
    assert "lm_head.weight" not in tensors(folder / "sparse")
    reopened = AutoModelForCausalLM.from_pretrained(folder / "sparse")
    assert reopened.lm_head.weight is reopened.model.embed_tokens.weight
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(reopened(input_ids=ids).logits, model(input_ids=ids).logits)


def test_biases_come_along(tmp_path):
    folder = set_up(tmp_path, attention_bias=True)
    source = tensors(folder / "model")
    for name in source:
        if name.endswith("bias"):
            source[name] = torch.linspace(-1, 1, source[name].numel())
    save_file(source, folder / "model" / "model.safetensors", {"format": "pt"})
    toy_run(folder, steps=1)
    result = tensors(folder / "sparse")
    assert sum(name.endswith("bias") for name in result) == 8
    assert all(torch.equal(source[name], result[name]) for name in result if name.endswith("bias"))
