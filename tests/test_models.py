"""Promised: decoder blocks found by structure in any family; block-by-block execution equal to the model's own forward; models
left as they were; one clear sentence for what is not supported."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, SIZES
from helpers import pruned_names, set_up, tensors, toy_run
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, PreTrainedConfig, PreTrainedModel

from losa.adapter import attach
from losa.models import (
    block_inputs,
    block_linears,
    check_supported,
    find_decoder,
    load,
    logits_by_block,
    max_length,
    place,
)
from losa.models.opening import check_model, open_config


def own_block_outputs(model, ids):
    """What each block puts out in the model's own forward, by hooks."""
    outputs = []

    def hook(_module, _args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(hook) for block in find_decoder(model).blocks]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


def streamed_block_outputs(model, ids, batch_size):
    stream = block_inputs(model, ids, batch_size)
    outputs = []
    with torch.no_grad():
        for index, block in enumerate(find_decoder(model).blocks):
            stream.advance(block, index)
            outputs.append(torch.cat(stream.hidden))
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_all_blocks_are_found(tiny_model, family):
    model = tiny_model(family)
    decoder = find_decoder(model)
    assert len(decoder.blocks) == 3
    assert model.get_submodule(decoder.name) is decoder.blocks
    check_supported(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linears_but_the_head_belong_to_the_blocks(tiny_model, family):
    model = tiny_model(family)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    assert set(find_decoder(model).linears()) == linears - heads


def test_sizes_count_the_weights_of_linears(tiny_model):
    assert find_decoder(tiny_model("llama")).sizes() == [2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48] * 3


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_equals_the_models_own_forward(tiny_model, token_ids, family, batch_size):
    model, ids = tiny_model(family), token_ids(5, 16)
    for got, expected in zip(streamed_block_outputs(model, ids, batch_size), own_block_outputs(model, ids), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_works_after_attaching(tiny_model, token_ids, family):
    model, ids = tiny_model(family), token_ids(5, 16)
    expected = own_block_outputs(model, ids)[-1]
    torch.testing.assert_close(streamed_block_outputs(attach(model), ids, 2)[-1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma3_text", "phi3"])
def test_the_sliding_window_of_the_tiny_models_matters(tiny_model, token_ids, family):
    narrow, wide = tiny_model(family), tiny_model(family, sliding_window=64)
    assert not torch.allclose(own_block_outputs(narrow, token_ids())[-1], own_block_outputs(wide, token_ids())[-1], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_inputs_are_those_of_the_first_block(tiny_model, token_ids, family):
    model, ids = tiny_model(family), token_ids(5, 16)
    seen = []
    handle = (
        find_decoder(model).blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    assert torch.equal(torch.cat(block_inputs(model, ids, 2).hidden), seen[0])


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_a_second_stream_advances_on_its_own(tiny_model, token_ids, count):
    model = tiny_model("llama")
    stream = block_inputs(model, token_ids(5), 2)
    before = [batch.clone() for batch in stream.hidden]
    second = stream.first(count)
    assert torch.equal(torch.cat([torch.empty(0, 16, 32), *second.hidden]), torch.cat(before)[:count])
    with torch.no_grad():
        second.advance(find_decoder(model).blocks[0], 0)
    assert all(torch.equal(a, b) for a, b in zip(stream.hidden, before, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_leaves_no_trace(tiny_model, token_ids, family):
    model = tiny_model(family)
    block_inputs(model, token_ids())
    assert not any("forward" in vars(block) for block in find_decoder(model).blocks)


def test_recording_leaves_no_trace_when_the_forward_fails(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(IndexError):
        block_inputs(model, torch.full((2, 8), 10_000))
    assert not any("forward" in vars(block) for block in find_decoder(model).blocks)


def test_max_length_is_that_of_the_configuration(tiny_model):
    assert max_length(tiny_model("llama").config) == 64
    assert max_length(PreTrainedConfig()) == 2048


# refusals


class NormsOnly(PreTrainedModel):
    """A model whose blocks have no linear layer."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([nn.LayerNorm(4) for _ in range(2)])


def refusal(model):
    with pytest.raises(ValueError) as caught:
        check_supported(model)
    return str(caught.value)


def is_one_sentence(message):
    return "\n" not in message and len(message) < 200


def test_conv1d_is_refused():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    message = refusal(model)
    assert "GPT2LMHeadModel is built of Conv1D" in message and is_one_sentence(message)


def test_fused_experts_are_refused():
    message = refusal(AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=2)))
    assert "MixtralForCausalLM keeps fused experts in model.layers.0.mlp.experts" in message and is_one_sentence(message)


def test_a_weight_of_two_layers_is_refused(tiny_model):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    message = refusal(model)
    assert "layers.1.mlp.up_proj and model.layers.0.mlp.up_proj are one weight" in message and is_one_sentence(message)


def test_quantised_models_are_refused(tiny_model):
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    message = refusal(model)
    assert "is quantised" in message and is_one_sentence(message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny_model, value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    message = refusal(model)
    assert "model.layers.1.mlp.up_proj holds NaN or infinite weights" in message and is_one_sentence(message)


def test_a_model_without_linears_is_refused():
    message = refusal(NormsOnly(PreTrainedConfig()))
    assert "NormsOnly has no list of decoder blocks made of nn.Linear" in message and is_one_sentence(message)


def test_encoder_decoders_are_refused(tiny_model):
    model = tiny_model("llama")
    model.config.is_encoder_decoder = True
    assert "encoder-decoder" in refusal(model)


def test_layers_that_only_look_linear_are_refused(tiny_model):
    class Other(nn.Linear):
        pass

    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = Other(32, 48)
    assert "model.layers.0.mlp.up_proj is a Other" in refusal(model)


def test_attaching_twice_is_refused(tiny_model):
    model = attach(tiny_model("llama"))
    with pytest.raises(ValueError, match="is a MaskedLinear"):
        attach(model)


class Odd(PreTrainedModel):
    """Blocks that are called by position, with an argument that has a part for every sequence, and return a tuple."""

    config_class = PreTrainedConfig

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)

        def forward(self, hidden, scale, extra=None):
            state = self.linear(hidden.flatten(0, 1) * scale).view_as(hidden) + self.unused(hidden)
            return (state if extra is None else state + extra), None, "attentions"

    def __init__(self, change=""):
        super().__init__(PreTrainedConfig(vocab_size=16, hidden_size=8))
        torch.manual_seed(0)
        self.change, self.embed, self.head = change, nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.layers = nn.ModuleList([self.Block() for _ in range(3)])
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None):
        hidden = first = self.embed(input_ids)
        scale = torch.arange(input_ids.shape[1]).repeat(len(input_ids))[:, None] / 8
        for index, layer in enumerate(self.layers):
            if self.change == "between":
                hidden = hidden * 2
            if self.change == "skips" and index == 1:
                continue
            hidden = layer(hidden, scale, first if self.change == "text" else None)[0]
            if self.change == "itself":
                with torch.no_grad():
                    layer.linear.weight.mul_(1)
        return SimpleNamespace(logits=self.head(hidden))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_positions_tuples_and_arguments_by_sequence(batch_size):
    model, ids = Odd().eval(), torch.randint(16, (5, 12))
    check_supported(model)
    found = torch.cat([logits for _, logits in logits_by_block(model, ids, batch_size, torch.device("cpu"))])
    torch.testing.assert_close(found, model(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text", "block 0 (Block) is called with 2, which depends on the text"),
        ("between", "block 1 (Block) is called with something else than what the block before it returns"),
        ("skips", "block 1 (Block) is called 0 times in a forward"),
        ("itself", "changes its own weight layers.0.linear.weight when it runs"),
    ],
)
def test_what_cannot_be_run_block_by_block_is_refused(change, message):
    found = refusal(Odd(change).eval())
    assert message in found and is_one_sentence(found)


def test_a_layer_whose_weight_is_used_behind_its_back_is_refused(monkeypatch):
    monkeypatch.setattr(Odd.Block, "forward", lambda self, hidden, *_: (self.linear(hidden) @ self.unused.weight,))
    assert "never calls its unused as a layer" in refusal(Odd().eval())


def test_trying_leaves_no_trace(tiny_model):
    model = tiny_model("llama").train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    check_supported(model.requires_grad_(False))
    assert model.training and not any(parameter.requires_grad for parameter in model.parameters()) and all(flags)
    assert not any("forward" in vars(block) for block in find_decoder(model).blocks)


def test_the_linears_of_a_block_come_in_order(tiny_model):
    names = list(block_linears(find_decoder(tiny_model("llama")).blocks[0]))
    assert names[:4] == [f"self_attn.{name}_proj" for name in "qkvo"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_block_by_block_equal_the_models_own(family, tiny_model, token_ids):
    model, ids = tiny_model(family), token_ids(5, 16)
    found = torch.cat([logits for _, logits in logits_by_block(model, ids, 2, torch.device("cpu"))])
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [family for family, own in FAMILIES.items() if "sliding_window" in own])
@pytest.mark.parametrize("window", [8, 9, 24])
def test_a_window_longer_than_the_tokens_of_the_trial(tiny_model, family, window):
    """Some families make its mask only where a text is at least as long."""
    model = tiny_model(family, sliding_window=window)
    ids = torch.randint(3, SIZES["vocab_size"], (5, 24), generator=torch.Generator().manual_seed(1))
    made = torch.cat([logits for _, logits in logits_by_block(model, ids, 2, torch.device("cpu"))])
    with torch.no_grad():
        torch.testing.assert_close(made, model(input_ids=ids, use_cache=False).logits)


def test_placing_with_offload_keeps_blocks_on_the_host(tiny_model):
    model = tiny_model("llama")
    place(model, torch.device("meta"), offload=True)
    decoder = find_decoder(model)
    assert {p.device.type for p in decoder.blocks.parameters()} == {"cpu"}
    assert {p.device.type for name, p in model.named_parameters() if not name.startswith(decoder.name)} == {"meta"}


def test_a_multi_modal_model_is_refused(tiny_model, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self, **kwargs: object())
    with pytest.raises(ValueError, match="multi-modal"):
        check_supported(model)


def test_a_checkpoint_of_pickles_is_refused_with_the_way_out(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for opened in (load, lambda path: open_config(str(path))):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle") as caught:
            opened(tmp_path)
    exec(str(caught.value).partition("convert it: ")[2], {"AutoModelForCausalLM": AutoModelForCausalLM})
    assert check_model(open_config(str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sources_of_other_types_in_shards_with_more_rows_than_tokens(tmp_path, dtype):
    folder = set_up(tmp_path, dtype=dtype, shard="20KB", vocab_size=80)
    assert len(list((folder / "model").glob("*.safetensors"))) > 1
    toy_run(folder, steps=1)
    assert tensors(folder / "sparse").keys() == tensors(folder / "model").keys()
    assert all((tensors(folder / "sparse")[name] == 0).float().mean() > 0.4 for name in pruned_names(folder / "sparse"))
