"""The loop around the compiled step: what transformers' own puts out, and only where one text is continued."""

import copy

import pytest
import torch
from test_decode import make, step_of
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import StoppingCriteria

from losa.runtime import dispatch, loop
from losa.runtime.decode import road
from losa.runtime.loop import BETWEEN
from losa.runtime.sampling import for_generation

pytestmark = pytest.mark.skipif(len(dispatch.available()) == 1, reason="the CPU kernels were not built")


class Streamer:
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def put(self, value):
        self.told.append(value.tolist())

    def end(self):
        self.told.append("end")


class Contains(StoppingCriteria):
    """Stops after a token, as no criterion that the loop knows."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.fixture
def model(tmp_path):
    packed, _ = make(tmp_path)
    packed.generation_config.pad_token_id = 0
    return packed


@pytest.fixture
def taken(monkeypatch):
    """How often the loop took over."""
    taken, own = [], loop._decode
    monkeypatch.setattr(loop, "_decode", lambda *args, **kwargs: taken.append(1) or own(*args, **kwargs))
    return taken


def both(model, ids, **options):
    """What the loop and transformers' own say, in text and to a streamer, from the same seed."""
    found = []
    for generate in (model.generate, lambda *args, **kwargs: type(model).generate(model, *args, **kwargs)):
        torch.manual_seed(0)
        streamer = Streamer()
        found.append((generate(ids, streamer=streamer, **options).tolist(), streamer.told))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"generation_config": GenerationConfig(max_new_tokens=24, do_sample=True, temperature=2.0)},
        {"do_sample": False, "logits_processor": LogitsProcessorList([MinNewTokensLengthLogitsProcessor(8, 30, 5)])},
        {"do_sample": False, "max_time": 100.0},
    ],
)
def test_it_says_what_transformers_says(options, model, taken, token_ids):
    ids = token_ids(1, 8).clamp(min=1)
    options = {"max_new_tokens": 24, "attention_mask": torch.ones_like(ids)} | options
    both(model, ids, **options)  # the compiled step proves itself on its first text, by transformers' logits
    ours, theirs = both(model, ids, **options)
    assert ours == theirs and len(taken) == 2 and step_of(model).head_alone and step_of(model).verified
    assert len(ours[0][0]) == 32 and ours[1][-1] == "end"


def test_it_stops_where_transformers_stops(model, taken, token_ids):
    ids = token_ids(1, 8).clamp(min=1)
    said = model.generate(ids, max_new_tokens=24, do_sample=False)[0, 8:].tolist()
    ends = said[10]
    first = said.index(ends) + 1
    for options in ({"eos_token_id": [ends, 1]}, {"stopping_criteria": StoppingCriteriaList([Contains(ends)])}):
        ours, theirs = both(model, ids, max_new_tokens=24, do_sample=False, **options)
        assert ours == theirs and ours[0][0][8:] == said[:first]
    ours, theirs = both(model, ids, max_length=20, do_sample=False)
    assert ours == theirs and len(ours[0][0]) == 20
    assert len(taken) == 4


def test_beyond_the_positions_of_the_model_the_criteria_are_asked_for_they_warn(tmp_path, token_ids, monkeypatch):
    packed, _ = make(tmp_path, max_position_embeddings=16)
    asked, own = [], MaxLengthCriteria.__call__
    monkeypatch.setattr(
        MaxLengthCriteria, "__call__", lambda self, ids, *rest: asked.append(ids.shape[1]) or own(self, ids, *rest)
    )
    packed.generate(token_ids(1, 8).clamp(min=1), max_new_tokens=12, do_sample=False)
    assert asked == [16, 17, 18, 19, 20]


def test_whatever_is_more_than_one_text_goes_the_old_way(model, taken, token_ids):
    ids, plain = token_ids(2, 8).clamp(min=1), {"max_new_tokens": 3, "do_sample": False}
    one, padded = ids[:1], ids[:1].clone()
    padded[0, 0] = 0
    model.generate(ids, **plain)
    model.generate(padded, **plain)
    model.generate(one, attention_mask=(padded != 0).long(), **plain)
    model.generate(one, num_beams=2, **plain)
    model.generate(one, num_return_sequences=2, max_new_tokens=3, do_sample=True)
    model.generate(one, return_dict_in_generate=True, output_scores=True, **plain)
    model.generate(one, past_key_values=DynamicCache(config=model.config), **plain)
    model.generate(one, cache_implementation="static", **plain)
    model.generate(one, use_cache=False, **plain)
    model.generate(one, prompt_lookup_num_tokens=2, eos_token_id=1, **plain)
    model.generate(one, custom_generate=lambda model, input_ids, **_: input_ids, **plain)
    model.generate(inputs_embeds=model.get_input_embeddings()(one), **plain)
    model.generation_config.num_beams = 2
    model.generate(one, **plain)
    assert not taken
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(one, max_new_token=3)


def test_logits_that_are_more_than_the_heads_product_are_kept(model, taken, token_ids, monkeypatch):
    own = type(model).forward

    def turned(*args, **kwargs):
        outputs = own(*args, **kwargs)
        outputs.logits = outputs.logits.flip(-1)
        return outputs

    monkeypatch.setattr(type(model), "forward", turned)
    ours, theirs = both(model, token_ids(1, 8).clamp(min=1), max_new_tokens=12, do_sample=False)
    assert ours == theirs and step_of(model).head_alone is False and taken


BLOCK = ("", ".self_attn", ".mlp", ".mlp.act_fn", ".self_attn.q_proj", ".input_layernorm")
PLACES = ("", "model", "model.norm", "model.embed_tokens", "lm_head", *(f"model.layers.1{name}" for name in BLOCK))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("place", PLACES)
def test_who_listens_to_a_module_hears_every_token(place, kind, model, token_ids):
    ids, heard = token_ids(1, 8).clamp(min=1), []
    model.generate(ids, max_new_tokens=3, do_sample=False)
    getattr(model.get_submodule(place), kind)(lambda *_: heard.append(1))
    model.generate(ids, max_new_tokens=6, do_sample=False)
    assert len(heard) == 6


def test_who_listens_to_every_module_hears_every_token(model, token_ids):
    """As profilers do."""
    ids, heard = token_ids(1, 8).clamp(min=1), []
    model.generate(ids, max_new_tokens=3, do_sample=False)
    inner = model.model.layers[1].mlp.up_proj
    handle = register_module_forward_hook(lambda module, *_: heard.append(1) if module is inner else None)
    try:
        model.generate(ids, max_new_tokens=6, do_sample=False)
    finally:
        handle.remove()
    assert len(heard) == 6


def test_hidden_states_that_were_asked_for_once_change_nothing_afterwards(model, taken, token_ids):
    """transformers leaves hooks behind, which note nothing unless they are asked."""
    ids = token_ids(1, 8).clamp(min=1)
    assert len(model(ids, output_hidden_states=True).hidden_states) == len(model.model.layers) + 1
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert taken and road(model) == "compiled step"


@pytest.mark.parametrize("name", BETWEEN)
def test_what_somebody_else_prepares_between_tokens_is_asked_for_every_token(name, model, token_ids, monkeypatch):
    ids, asked, own = token_ids(1, 8).clamp(min=1), [], getattr(model, name)
    monkeypatch.setattr(model, name, lambda *args, **kwargs: asked.append(1) or own(*args, **kwargs), raising=False)
    model.generate(ids, max_new_tokens=6, do_sample=False)
    assert len(asked) >= 6


def test_a_single_token_that_ends_texts(model, taken, token_ids):
    """As a number of no dimensions, which transformers' criterion takes too."""
    ids = token_ids(1, 8).clamp(min=1)
    ends = EosTokenCriteria(torch.tensor(3))
    ends.eos_token_id = torch.tensor(3)
    ours, theirs = both(model, ids, max_new_tokens=5, do_sample=False, stopping_criteria=StoppingCriteriaList([ends]))
    assert ours == theirs and taken


def test_copies_generate_by_their_own_configuration(model, taken, token_ids):
    ids = token_ids(1, 8).clamp(min=1)
    twin = for_generation(model, GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0))
    assert twin.generate(ids).shape == (1, 11)
    deep = copy.deepcopy(model)
    deep.generation_config.max_new_tokens = 5
    assert deep.generate(ids, do_sample=False).shape == (1, 13)
    assert [one.generate.model is one for one in (deep, twin, model)] == [True] * 3
    assert len(taken) == 2
    vars(model)["generate"] = somebodys = lambda *_: None
    assert for_generation(model).generate is somebodys


def test_a_model_without_the_step_keeps_its_generate(tmp_path):
    packed, _ = make(tmp_path, "gemma")
    assert "generate" not in vars(packed)
