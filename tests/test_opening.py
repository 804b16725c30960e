"""Models and tokenizers that nobody vouches for are refused in a sentence, before weights are loaded where that can be known."""

import json
import shutil

import pytest
import torch
from conftest import FAMILIES, make_tiny_model
from helpers import save_toy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import losa
from losa import LosaConfig
from losa.commands.inspect import inspect
from losa.commands.toy import toy_tokenizer
from losa.models import load
from losa.models.opening import open_config
from losa.planning.plan import plan
from losa.runtime.files import pack_checkpoint, unpack_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("opening") / "model", torch.bfloat16)


@pytest.fixture
def model(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def unloaded(monkeypatch):
    """No weight is loaded while the test runs."""

    def fail(*_, **__):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)


def change(model, **values):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def change_weights(model, changes):
    file = model / "model.safetensors"
    tensors = load_file(file)
    changes(tensors)
    save_file(tensors, file, {"format": "pt"})


def every_command_refuses(model, tmp_path, message):
    for name, command in (
        ("load", lambda: losa.load(model)),
        ("plan", lambda: plan(LosaConfig(model=str(model), device="cpu"))),
        ("pack", lambda: pack_checkpoint(model, tmp_path / "out")),
        ("inspect", lambda: inspect(model)),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            command()
        assert str(model) in str(raised.value), name
    assert not (tmp_path / "out").exists()


QUANTISED = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "compressed-tensors", "config_groups": {}},
    {"quant_method": "fp8"},
    {"bits": 4},
]


@pytest.mark.parametrize("quantised", QUANTISED, ids=lambda found: found.get("quant_method", "unnamed"))
def test_quantised_checkpoints(model, tmp_path, unloaded, quantised):
    change(model, quantization_config=quantised)
    every_command_refuses(model, tmp_path, "it is quantised with .*use the original checkpoint")


@pytest.mark.parametrize("found", ["gptq", [1], 7, True])
def test_a_malformed_quantization_config(model, tmp_path, unloaded, found):
    change(model, quantization_config=found)
    every_command_refuses(model, tmp_path, "its quantization_config is a .*, expected an object")


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads", "num_labels"])
def test_numbers_without_end_are_refused_before_lists_are_made(model, tmp_path, unloaded, name):
    change(model, **{name: 2**31})
    every_command_refuses(model, tmp_path, f"its {name} is 2147483648, expected at most")


def test_more_blocks_than_the_files_hold(model, unloaded):
    change(model, num_hidden_layers=60_000, layer_types=None)
    with pytest.raises(ValueError, match=r"config\.json says 60,000 decoder blocks, the files hold 2"):
        losa.load(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 2**40}, "in the files, expected floats of"),
        ({"intermediate_size": 65}, "in the files, expected floats of"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": None}}, "cannot open the model"),
        ({"hidden_act": "nothing"}, "nothing"),
        ({"dtype": "float99"}, "float99"),
        ({"model_type": "nothing"}, "cannot open the model"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers"),
    ],
)
def test_a_configuration_that_does_not_fit_or_run(model, unloaded, values, message):
    change(model, **values)
    with pytest.raises(ValueError, match=message) as raised:
        losa.load(model)
    assert str(raised.value).startswith("cannot open the model ")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"[]", b""])
def test_a_damaged_config_file(model, unloaded, content):
    (model / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot open the model .*config\.json"):
        losa.load(model)


def test_weights_that_are_in_no_file_are_not_made_up(model):
    """transformers would warn, and fill them with random numbers."""
    change_weights(model, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"its files hold no model\.norm\.weight, nor 0 more"):
        losa.load(model)


def test_whole_numbers_are_no_weights(model, unloaded):
    def to_int(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.int16)

    change_weights(model, to_int)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is I16 \[32\] in the files, expected floats of \[32\]"):
        losa.load(model)


def test_an_index_that_leads_out_is_refused_by_every_command(model, tmp_path, unloaded):
    shutil.copy(model / "model.safetensors", tmp_path / "outside.safetensors")
    keys = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "../outside.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    every_command_refuses(model, tmp_path, r"names '\.\./outside\.safetensors', expected a \.safetensors file beside it")


def test_links_are_refused_where_files_are_copied(model, tmp_path):
    (tmp_path / "secret").write_text("key")
    (model / "chat_template.jinja").symlink_to(tmp_path / "secret")
    losa.load(model)
    for copies in (
        lambda: load(LosaConfig(model=str(model), output=str(tmp_path / "out"))),
        lambda: pack_checkpoint(model, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"chat_template\.jinja is a link out of the directory"):
            copies()
    (model / "chat_template.jinja").unlink()
    pack_checkpoint(model, tmp_path / "packed")
    (tmp_path / "packed" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes\.txt is a link out of the directory"):
        unpack_checkpoint(tmp_path / "packed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_refuses_what_it_cannot_prune_before_it_loads(model, tmp_path, unloaded):
    pack_checkpoint(model, tmp_path / "packed")
    with pytest.raises(ValueError, match="it is packed, so quantised; losa unpack"):
        load(LosaConfig(model=str(tmp_path / "packed"), output=str(tmp_path / "out")))
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="Conv1D"):
        load(LosaConfig(model=str(tmp_path / "gpt2"), output=str(tmp_path / "out")))


TOKENIZERS = [
    ("tokenizer.json", lambda found: found["model"].pop("vocab")),
    ("tokenizer.json", lambda found: found["model"].update(vocab={"A": -1})),
    ("tokenizer.json", lambda found: found["model"].update(type="Nothing")),
    ("tokenizer.json", lambda found: found.update(added_tokens=[{"id": 2**40}])),
    (
        "tokenizer.json",
        lambda found: found.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
    ),
    ("tokenizer_config.json", lambda found: found.update(eos_token=7)),
    ("tokenizer_config.json", lambda found: found.update(model_max_length=[])),
]


@pytest.mark.parametrize("number", range(len(TOKENIZERS)))
def test_damaged_tokenizers(model, unloaded, number):
    file, damage = TOKENIZERS[number]
    found = json.loads((model / file).read_text("utf-8"))
    damage(found)
    (model / file).write_text(json.dumps(found), "utf-8")
    try:
        losa.load(model)
    except ValueError as error:
        assert str(error).startswith("cannot open the tokenizer of ")
    except AssertionError:
        assert file == "tokenizer_config.json"  # that it got as far as the weights is a way to read it


def test_tokens_without_a_row_in_the_embedding(model, unloaded):
    path = model / "tokenizer.json"
    found = json.loads(path.read_text("utf-8"))
    token = next(token for token in found["model"]["vocab"] if token.isalpha() and len(token) == 1)
    found["model"]["vocab"][token] = 64
    path.write_text(json.dumps(found), "utf-8")
    with pytest.raises(ValueError, match=r"token '.' has number 64, the model's embedding has 64 rows"):
        losa.load(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_of_every_family_pass(family, tmp_path):
    make_tiny_model(family).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    losa.load(tmp_path)
    assert open_config(str(tmp_path)).model_type == family
