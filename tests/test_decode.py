"""The compiled decoding step: the same tokens and cache as transformers', for the models it is for, and nothing else."""

import copy
import gc
from inspect import signature

import pytest
import torch
from conftest import make_tiny_model
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from losa import SparseConfig, SparseLinear
from losa.models import find_decoder
from losa.runtime import dispatch
from losa.runtime.cache import RoomyLayer
from losa.runtime.decode import TOLERANCE, DecodeStep
from losa.runtime.values import TYPES

pytestmark = pytest.mark.skipif(len(dispatch.available()) == 1, reason="the CPU kernels were not built")

FULL = {"sliding_window": None, "use_sliding_window": False}
FAMILIES = {
    "llama": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": None},
    "qwen2": FULL,
    "qwen3": FULL,
    "smollm3": {"no_rope_layers": [1, 1, 1]},
}


def make(directory, family="llama", values="bfloat16", activations="bfloat16", **sizes):
    """A sparse model, packed while it is opened, and the dense one in float64."""
    model = make_tiny_model(family, **(FAMILIES.get(family, {}) | sizes)).bfloat16()
    for parameter in model.parameters():  # biases and norms that a fresh model has at zero and one
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    for linear in find_decoder(model).linears().values():
        linear.weight.data[torch.rand(linear.weight.shape) < 0.5] = 0
        linear.weight.data *= 8
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    packed = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=SparseConfig(values, activations=activations)
    ).eval()
    exact = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    for name, layer in packed.named_modules():
        if isinstance(layer, SparseLinear):  # the rounding to int8 is not the step's error
            exact.get_submodule(name).weight.data = layer.to_linear().weight.data.double()
    return packed, exact


def step_of(model):
    return vars(model.model).get("forward")


@torch.no_grad()
def decode(model, ids, compiled=True):
    """Logits of every token after the first four, one at a time, and the cache."""
    step = step_of(model)
    step.verified = compiled
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
    logits = [model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(4, ids.shape[1])]
    assert all((type(layer) is RoomyLayer) == compiled for layer in cache.layers)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("values", list(TYPES))
def test_logits_and_cache_err_at_most_twice_as_much_as_transformers(family, values, tmp_path, token_ids):
    packed, exact = make(tmp_path, family, values)
    ids = token_ids(1, 40)
    want = exact(ids).logits[:, 4:]
    (ours, cache), (theirs, general) = decode(packed, ids), decode(packed, ids, compiled=False)
    assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max()
    for layer, other in zip(cache.layers, general.layers, strict=True):
        assert layer.keys.shape == other.keys.shape
        torch.testing.assert_close(layer.keys, other.keys, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kernel", dispatch.available()[1:])
def test_every_instruction_set_computes_it(kernel, tmp_path, token_ids, monkeypatch):
    monkeypatch.setenv("LOSA_KERNELS", kernel)
    for values in TYPES:
        packed, exact = make(tmp_path, values=values, head_dim=24, intermediate_size=41)
        ids = token_ids(1, 24)
        want, ours, theirs = exact(ids).logits[:, 4:], decode(packed, ids)[0], decode(packed, ids, compiled=False)[0]
        assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max()


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_activations_that_may_be_rounded_are_rounded_alike_by_both_roads(values, tmp_path, token_ids):
    """Where a kernel rounds them; a difference that comes before may fall on the other side of a step of that rounding."""
    packed, exact = make(tmp_path, values=values, activations="int8", hidden_size=128, intermediate_size=256)
    ids = token_ids(1, 24)
    want, ours, theirs = exact(ids).logits[:, 4:].float(), decode(packed, ids)[0], decode(packed, ids, compiled=False)[0]
    allowed = 2 * (theirs.float() - want).norm()
    assert (ours.float() - want).norm() <= allowed
    assert (ours.float() - theirs.float()).norm() <= allowed
    assert allowed <= 0.1 * want.norm()


def test_threads_do_not_change_bits(tmp_path, token_ids):
    packed, _ = make(tmp_path, hidden_size=256, intermediate_size=512, head_dim=64)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(decode(packed, token_ids(1, 12))[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.no_grad()
def test_generate_takes_it_and_checks_it_on_the_first_token(tmp_path, token_ids):
    """Greedy texts part at most where two tokens are so near that the allowed error decides between them."""
    packed, exact = make(tmp_path)
    step = step_of(packed)
    assert isinstance(step, DecodeStep) and step.verified is None
    ids = token_ids(1, 8)
    ours = packed.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert step.verified
    step.verified = False
    theirs = packed.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    if parted := (ours != theirs)[0].nonzero().flatten().tolist():
        common = theirs[:, : parted[0]]
        want_V, general_V = exact(common).logits[0, -1], decode(packed, common, compiled=False)[0][0, -1]
        gap = (want_V[ours[0, parted[0]]] - want_V[theirs[0, parted[0]]]).abs()
        assert (
            gap <= 4 * (general_V - want_V).abs().max()
        )  # twice that of transformers, upwards of one and downwards of the other


def test_a_model_that_computes_something_else_keeps_its_own_road(tmp_path, token_ids, caplog):
    packed, _ = make(tmp_path)
    norm = packed.model.layers[1].post_attention_layernorm

    class TripleRMSNorm(type(norm)):
        def forward(self, x):
            return 3 * super().forward(x)

    norm.__class__ = TripleRMSNorm  # what structure does not show
    ids = token_ids(1, 8)
    packed.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert step_of(packed).verified is False and "decodes through transformers" in caplog.text


GRANITE = {"residual_multiplier": 0.3, "attention_multiplier": 0.2}
LATE = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 16}
OTHERS = {
    "gemma": {},
    "opt": {},
    "phi": {},
    "gemma2": {},
    "granite": GRANITE,
    "granite, multiplied once": {"embedding_multiplier": 3.0, "residual_multiplier": 1.0, "attention_multiplier": 0.25},
    "helium": {"num_key_value_heads": 4},  # neighbours make a pair that positions turn
    "ernie4_5": {},  # as well, in float32
    "smollm3": {"no_rope_layers": [1, 0, 1]},  # positions turn nothing in one block
    "mistral": {"sliding_window": 6},
    "ministral3": {"rope_parameters": LATE},  # queries are scaled by how late they are
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("first", [1, 12])
def test_other_models_are_left_alone(name, first, tmp_path, token_ids):
    """However little the first text shows, and with the cache as transformers alone leaves it."""
    packed, _ = make(tmp_path, name.partition(",")[0], **OTHERS[name])
    ids, found = token_ids(1, first + 6), []
    steps = [step for module in packed.modules() if isinstance(step := vars(module).get("forward"), DecodeStep)]
    for verified in (None, False):
        for step in steps:
            step.verified = verified
        cache = DynamicCache()
        with torch.no_grad():
            logits = packed(input_ids=ids[:, :first], past_key_values=cache, use_cache=True).logits[:, -1:]
            for at in range(first, first + 6):
                more = packed(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
                logits = torch.cat([logits, more], 1)
        found.append((logits, cache))
        assert not any(step.verified for step in steps)
    (ours, cache), (theirs, general) = found
    assert torch.equal(ours, theirs)
    for layer, other in zip(cache.layers, general.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def test_a_trial_leaves_the_model_and_the_random_numbers_alone(tmp_path, token_ids):
    packed, _ = make(tmp_path)
    before, state = {name: id(module) for name, module in packed.named_modules()}, torch.get_rng_state()
    step = step_of(packed)
    step.plan.lay_out()
    assert step._try("past_key_values") <= TOLERANCE / 2
    assert {name: id(module) for name, module in packed.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in packed.modules())


@torch.no_grad()
def test_tensors_that_were_put_in_place_of_others_are_noticed(tmp_path, token_ids):
    packed, _ = make(tmp_path)
    ids = token_ids(1, 8)
    decode(packed, ids)
    packed.load_state_dict(
        {name: 2 * tensor if "norm" in name else tensor for name, tensor in packed.state_dict().items()}, assign=True
    )
    assert not step_of(packed).plan.holds()
    norm = make(tmp_path / "other")[0]
    plan = step_of(norm).plan
    assert plan.holds()
    norm.model.norm.weight = torch.nn.Parameter(2 * norm.model.norm.weight)
    assert not plan.holds()


def swap_blocks(layers, decoder):
    layers[0], layers[2] = layers[2], layers[0]


CHANGES = {
    "blocks in another order": swap_blocks,
    "fewer blocks": lambda layers, decoder: setattr(decoder, "layers", layers[:1]),
    "the last block gone": lambda layers, decoder: layers.__delitem__(2),
    "one block more": lambda layers, decoder: layers.append(layers[0]),
    "attention": lambda layers, decoder: setattr(layers[1], "self_attn", copy.deepcopy(layers[1].self_attn)),
    "mlp": lambda layers, decoder: setattr(layers[1], "mlp", copy.deepcopy(layers[1].mlp)),
    "activation": lambda layers, decoder: setattr(layers[1].mlp, "act_fn", torch.nn.GELU()),
    "last norm": lambda layers, decoder: setattr(decoder, "norm", copy.deepcopy(decoder.norm)),
    "epsilon": lambda layers, decoder: setattr(layers[1].input_layernorm, "variance_epsilon", 9.0),
    "scaling": lambda layers, decoder: setattr(layers[1].self_attn, "scaling", 9.0),
    "positions": lambda layers, decoder: setattr(decoder, "rotary_emb", copy.deepcopy(decoder.rotary_emb)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_was_changed_is_decoded_as_it_is_now(name, tmp_path, token_ids):
    """Copies of it as well, whose step was made for the copy."""
    packed, ids = make(tmp_path)[0], token_ids(1, 8)
    decode(packed, ids)
    packed = copy.deepcopy(packed)
    assert step_of(packed).plan.holds()
    CHANGES[name](packed.model.layers, packed.model)
    assert not step_of(packed).plan.holds()
    packed.generate(ids, max_new_tokens=4, pad_token_id=0)  # also where the cache has more layers than are filled


@torch.no_grad()
def test_frequencies_of_the_positions_may_change_between_texts(tmp_path, token_ids):
    packed, ids = make(tmp_path)[0], token_ids(1, 8)
    decode(packed, ids)
    packed.model.rotary_emb.inv_freq.mul_(0.25)
    torch.testing.assert_close(decode(packed, ids)[0], decode(packed, ids, compiled=False)[0], rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_cache_whose_layers_are_not_of_one_length_goes_the_general_road(tmp_path, token_ids):
    packed, ids = make(tmp_path)[0], token_ids(1, 8)
    decode(packed, ids)
    cache = DynamicCache(config=packed.config)
    packed(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.layers[2].reset()
    packed(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert not any(isinstance(layer, RoomyLayer) for layer in cache.layers)


def test_a_cache_that_inference_mode_began_goes_on_without_it(tmp_path, token_ids):
    packed, _ = make(tmp_path)
    ids = token_ids(1, 12)
    options = {"do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        begun = packed.generate(ids, max_new_tokens=4, past_key_values=(cache := DynamicCache()), **options)
    more = packed.generate(begun, max_new_tokens=4, past_key_values=cache, **options)
    assert more.shape == (1, 20)


def test_what_is_no_single_token_goes_the_general_road(tmp_path, token_ids, monkeypatch):
    packed, _ = make(tmp_path)
    step = step_of(packed)
    step.verified = True
    monkeypatch.setattr(DecodeStep, "_step", lambda *_: pytest.fail("the compiled step ran"))
    ids = token_ids(2, 8)
    left = torch.ones_like(ids)
    left[0, :3] = 0
    packed.generate(ids, attention_mask=left, max_new_tokens=3, do_sample=False)  # two sequences
    packed.generate(ids[:1], attention_mask=left[:1], max_new_tokens=3, do_sample=False)  # padding
    packed.generate(ids[:1], attention_mask=left[1:], max_new_tokens=3, cache_implementation="static", do_sample=False)
    packed(ids[:1, :1])
    packed.generate(ids[:1], max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True, do_sample=False)
    handle = packed.model.layers[0].register_forward_hook(lambda *_: None)
    packed.generate(ids[:1], attention_mask=left[1:], max_new_tokens=3, do_sample=False)
    handle.remove()
    packed.model.layers[0].mlp.up_proj = packed.model.layers[0].mlp.up_proj.to_linear()
    packed.generate(ids[:1], attention_mask=left[1:], max_new_tokens=3, do_sample=False)


def test_the_cache_goes_on_after_more_text_and_after_forgetting(tmp_path, token_ids):
    packed, _ = make(tmp_path)
    ids = token_ids(1, 30)
    whole, _ = decode(packed, ids)
    _, cache = decode(packed, ids[:, :12])
    with torch.no_grad():
        packed(input_ids=ids[:, 12:20], past_key_values=cache, use_cache=True)  # several tokens at once
        cache.crop(-5)
        assert cache.get_seq_length() == 15
        last = packed(input_ids=ids[:, 15:16], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(last[:, 0], whole[:, 11], rtol=0.05, atol=0.05)
    if "max_length" in signature(DynamicLayer.crop).parameters:  # transformers 5.0
        cache.crop(3)
        assert cache.get_seq_length() == 3
        return
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.layers[0].crop(3)


def test_a_roomy_layer_equals_transformers(token_ids):
    layer, plain = RoomyLayer(*torch.randn(2, 1, 2, 3, 4)), None
    plain = copy.deepcopy(layer.keys), copy.deepcopy(layer.values)
    for tokens in (1, 5, 300, 1):
        states = torch.randn(2, 1, 2, tokens, 4)
        keys, values = layer.update(*states)
        plain = tuple(torch.cat([held, new], 2) for held, new in zip(plain, states, strict=True))
        assert torch.equal(keys, plain[0]) and torch.equal(values, plain[1])
    layer.reorder_cache(torch.tensor([0, 0]))
    assert layer.keys.shape == (2, 2, 310, 4)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys is None and layer.values is None
    assert torch.equal(layer.update(*states)[0], states[0])


@torch.no_grad()
def test_neither_copies_nor_views_of_a_cache_are_written_over(tmp_path, token_ids):
    packed, ids = make(tmp_path)[0], token_ids(1, 10)
    _, cache = decode(packed, ids)
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    view, kept = cache.layers[0].keys, cache.layers[0].keys.clone()
    one, other = ((3, cache), (5, twin))
    for token, branch in (one, other):
        packed(input_ids=torch.tensor([[token]]), past_key_values=branch, use_cache=True)
    assert not torch.equal(cache.layers[0].keys, twin.layers[0].keys)
    cache.crop(-5)
    packed(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    assert torch.equal(view, kept) and torch.equal(twin.layers[0].keys[:, :, :10], kept)
    cache.reset()
    assert [keys for keys, *_ in cache] == [None] * 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "return_dict", "use_cache"])
def test_what_the_configuration_or_the_call_wants_is_transformers_to_give(name, tmp_path, token_ids, monkeypatch):
    packed, ids = make(tmp_path)[0], token_ids(1, 10)
    packed.set_attn_implementation("eager")  # the only one with attentions
    _, cache = decode(packed, ids)
    monkeypatch.setattr(DecodeStep, "_step", lambda *_: pytest.fail("the compiled step ran"))
    wanted = name.startswith("output")
    found = [packed.model(input_ids=ids[:, :1], past_key_values=cache, **{name: wanted})]
    setattr(packed.config, name, wanted)
    found.append(packed.model(input_ids=ids[:, :1], past_key_values=cache))
    assert name != "return_dict" or all(type(one) is tuple for one in found)
    assert not wanted or all(one[name.removeprefix("output_")] is not None for one in found)


@torch.no_grad()
def test_what_is_asked_once_a_text_is_asked_again_after_another_road(tmp_path, token_ids, monkeypatch):
    packed, _ = make(tmp_path)
    ids, asked, heard = token_ids(1, 30), [], []
    holds = type(step_of(packed).plan).holds
    monkeypatch.setattr(type(step_of(packed).plan), "holds", lambda plan: asked.append(1) or holds(plan))
    _, cache = decode(packed, ids[:, :20])
    assert len(asked) == 1
    packed.model.layers[0].register_forward_hook(lambda *_: heard.append(1))
    packed(input_ids=ids[:, 20:25], past_key_values=cache, use_cache=True)
    packed(input_ids=ids[:, 25:26], past_key_values=cache, use_cache=True)
    assert len(asked) == len(heard) == 2


def test_a_copy_has_a_step_of_its_own(tmp_path, token_ids):
    packed, _ = make(tmp_path)
    other = copy.deepcopy(packed)
    assert step_of(other).decoder is other.model
    assert torch.equal(decode(other, token_ids(1, 8))[0], decode(packed, token_ids(1, 8))[0])


@torch.no_grad()
def test_layers_that_were_moved_are_looked_at_again(tmp_path, token_ids):
    """The plan holds addresses: neither weights in another place nor a model that is gone may leave them dangling."""
    packed, _ = make(tmp_path)
    plan = step_of(packed).plan
    want, first = decode(packed, token_ids(1, 8))[0], plan.laid
    packed.to("cpu")  # not a move
    decode(packed, token_ids(1, 8))
    assert plan.laid is first
    for layer in packed.model.modules():
        if isinstance(layer, SparseLinear):
            layer.weight.data = layer.weight.data.clone()
    assert torch.equal(decode(packed, token_ids(1, 8))[0], want) and plan.laid is not first
    other = copy.deepcopy(packed)
    assert not step_of(other).plan.laid.values
    for layer in other.model.modules():
        if isinstance(layer, SparseLinear):
            layer.weight.zero_()
    ours = decode(other, token_ids(1, 8))[0]
    assert torch.equal(decode(packed, token_ids(1, 8))[0], want) and not torch.equal(ours, want)
    del packed, plan, first
    gc.collect()
    assert torch.equal(decode(other, token_ids(1, 8))[0], ours)


def test_the_operators_refuse_what_does_not_fit(tmp_path, token_ids):
    packed, _ = make(tmp_path)
    plan = step_of(packed).plan
    x, half = torch.zeros(1, 1, 32).bfloat16(), torch.zeros(1, 1, 8).bfloat16()
    keys, values = ([torch.zeros(1, 4, 8, 8).bfloat16() for _ in range(3)] for _ in range(2))

    def laid(tensors=plan.tensors, shape=plan.shape, values=plan.values):
        return torch.ops.losa.decode_plan(tensors, shape, values)

    def call(x=x, plan_bytes=laid(), keys=keys, values=values, cosine=half, position=0):  # noqa: B008 - the same for all
        rest = (plan.epsilon, plan.scaling, position, plan.kernel)
        return torch.ops.losa.decode_step(x, plan_bytes, keys, values, cosine, half, *rest)

    assert call().shape == (1, 1, 32)
    wrong = [
        {"tensors": plan.tensors[:-1]},
        {"tensors": plan.tensors[1:] + plan.tensors[:1]},
        {"tensors": plan.tensors[-1:]},
        {"shape": [32, 4, 3, 8, 48]},
        {"shape": [32, 4, 4, 8]},
        {"shape": [32, 4, 4, 8, 64]},
        {"values": 1},
        {"values": 9},
    ]
    for change in wrong:
        with pytest.raises(RuntimeError, match="losa::"):
            laid(**change)
    wrong = [
        {"x": x[..., :31]},
        {"x": x.float()},
        {"plan_bytes": laid()[:-1]},
        {"plan_bytes": laid()[:8]},
        {"plan_bytes": laid().float()},
        {"plan_bytes": torch.zeros_like(laid())},
        {"keys": keys[:2]},
        {"keys": [key.float() for key in keys]},
        {"keys": [key[..., :4] for key in keys]},
        {"position": 8},
        {"position": -1},
        {"cosine": half[..., :7]},
        {"cosine": half[..., :0]},
    ]
    for change in wrong:
        with pytest.raises(RuntimeError, match="losa::"):
            call(**change)
