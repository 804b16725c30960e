"""Generating: what is drawn depends on the seed alone, and what a file or a user got wrong is a sentence."""

import json
import shutil
import threading

import pytest
import torch
from helpers import save_toy
from transformers import set_seed

from losa.models import load
from losa.runtime.generate import generate
from losa.runtime.sampling import for_generation, settings


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("generate") / "model", torch.bfloat16)


@pytest.fixture(scope="module")
def loaded(saved):
    return load(saved)


def draw(loaded, seed: int, **options) -> str:
    return generate(*loaded, "THE QUICK", lambda piece: None, 24, 1.0, seed, **options).text


def test_threads_that_share_a_model_draw_what_each_would_alone(loaded):
    alone = [draw(loaded, seed) for seed in range(6)]
    assert len(set(alone)) == 6
    found: dict[int, str] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: draw(loaded, seed)})) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(6)] == alone


def test_the_draw_is_transformers_own_and_leaves_the_callers_randomness_alone(loaded):
    model, tokenizer = loaded
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ours = draw(loaded, 5)
    assert torch.equal(before, torch.get_rng_state())
    set_seed(5)
    inputs = tokenizer("THE QUICK", return_tensors="pt")["input_ids"]
    theirs = model.generate(inputs, max_new_tokens=24, do_sample=True, temperature=1.0)
    assert tokenizer.decode(theirs[0, inputs.shape[1] :], skip_special_tokens=True) == ours


@pytest.mark.parametrize("temperature", [1e-40, float("nan"), float("inf"), -1.0, 1e40])
def test_temperatures_that_overflow(loaded, temperature):
    with pytest.raises(ValueError, match=r"temperature is .*, expected 0, or a number in \[0.001, 1000\]"):
        generate(*loaded, "THE", lambda piece: None, 2, temperature)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_no_generator_takes(loaded, seed):
    with pytest.raises(ValueError, match=r"expected a number in \[0, 2\^63\)"):
        generate(*loaded, "THE", lambda piece: None, 2, 1.0, seed)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eos_token_id", [None]), ("eos_token_id", "x"), ("top_p", 7), ("repetition_penalty", -1), ("bos_token_id", [1, 2])],
)
def test_a_damaged_generation_config_is_named(saved, tmp_path, name, value):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({name: value}), "utf-8")
    with pytest.raises(ValueError, match=f"{name}|cannot open the model"):
        generate(*load(folder), "THE", lambda piece: None, 2, 1.0)


def test_nothing_else_of_a_generation_config_is_obeyed(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    content = {"num_beams": 7, "max_time": 0, "eos_token_id": [63, 900], "pad_token_id": -1, "top_k": 3}
    (folder / "generation_config.json").write_text(json.dumps(content), "utf-8")
    model, tokenizer = load(folder)
    found = settings(model)
    assert (found.eos_token_id, found.pad_token_id, found.top_k, found.num_beams) == ([63, 900], None, 3, None)
    assert for_generation(model).lm_head is model.lm_head
    assert generate(model, tokenizer, "THE", lambda piece: None, 4).tokens == 4


def test_weights_that_make_nan_are_named(saved):
    model, tokenizer = load(saved)
    model.model.norm.weight.data[:] = torch.nan
    with pytest.raises(FloatingPointError, match="its weights are damaged"):
        generate(model, tokenizer, "THE", lambda piece: None, 2, 1.0)
