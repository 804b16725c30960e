"""Promised: with all surviving weights trained, gradients are exact under the mask, zeros are bitwise zeros, the base stays
dense, and a block that lends its weights for a while gets back what it learned."""

import pytest
import torch
from conftest import make_tiny_model
from torch import nn

from losa.adapter import attach, collect_scores, dense_mode, masked_linears, merge, whole_weights


def pruned(whole=True, dtype=torch.float64, family="llama"):
    model = attach(make_tiny_model(family).to(dtype), max_rank=4, whole=whole)
    generator = torch.Generator().manual_seed(1)
    for layer in masked_linears(model).values():
        keep = torch.rand(layer.weight.shape, generator=generator) > 0.6
        layer.set_solution(keep, 1.1 * layer.weight.to(layer.exact).where(keep, 0))
    return model


def first(model):
    return next(iter(masked_linears(model).values()))


def test_learns_by_its_own_gradient_and_stays_masked():
    layer = first(pruned())
    x = torch.randn(5, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
    weight = layer.effective().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    nn.functional.linear(twin, weight).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.delta_OI.grad, weight.grad * layer.keep_OI)
    torch.testing.assert_close(x.grad, twin.grad)
    assert layer.delta_OI.grad.dtype == torch.float64


def test_only_deltas_train_and_they_are_float32_over_bfloat16():
    model = pruned(dtype=torch.bfloat16)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(trained) == {f"{key}.delta_OI" for key in masked_linears(model)}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merging_leaves_bitwise_zeros_and_equal_logits(dtype):
    model, ids = pruned(dtype=dtype), torch.arange(24).view(2, 12)
    with torch.no_grad():
        for layer in masked_linears(model).values():
            layer.delta_OI.add_(0.01 * torch.randn_like(layer.delta_OI))  # outside the mask too
        before = model(input_ids=ids).logits
        masks = merge(model)
        assert torch.equal(model(input_ids=ids).logits, before)
    for name, keep in masks.items():
        assert not model.get_parameter(name)[~keep].view(torch.int16 if dtype == torch.bfloat16 else torch.int32).any()


def test_the_base_stays_dense_and_no_copy_is_kept():
    dense, model, ids = make_tiny_model("llama").double(), pruned(), torch.arange(24).view(2, 12)
    assert all(layer.dense_OI is None for layer in masked_linears(model).values())
    with torch.no_grad(), dense_mode(model):
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits)


def test_weights_on_loan_are_absorbed_by_the_base():
    model = pruned(whole=False)
    layer = first(model)
    with torch.no_grad():
        nn.init.normal_(layer.lora_B)
    before, adapter = layer.merged().detach(), [parameter.clone() for parameter in (layer.lora_A, layer.lora_B)]
    with whole_weights(model) as parameters:
        assert len(parameters) == len(masked_linears(model))
        torch.testing.assert_close(layer.merged(), before)
        with torch.no_grad():
            layer.delta_OI.add_(0.5)
    assert layer.delta_OI is None
    torch.testing.assert_close(layer.merged(), (before + 0.5).where(layer.keep_OI, 0))
    assert torch.equal(layer.lora_A, adapter[0]) and torch.equal(layer.lora_B, adapter[1])


def test_weights_that_are_trained_anyway_stay_where_they_are():
    model = pruned()
    kept = [layer.delta_OI for layer in masked_linears(model).values()]
    with whole_weights(model) as parameters:
        assert all(a is b for a, b in zip(parameters, kept, strict=True))
    assert first(model).delta_OI is kept[0]


def test_reset_is_the_layer_it_was_made_from():
    layer = first(pruned())
    layer.reset(torch.full_like(layer.keep_bits, 255))
    assert torch.equal(layer.effective(), layer.weight)


def test_there_is_no_rank_to_set():
    first(pruned()).set_rank(3)


def test_movement_scores_are_collected():
    model = pruned()
    layer = first(model)
    x = torch.randn(4, layer.in_features, dtype=torch.float64)
    with collect_scores(model):
        layer(x).square().sum().backward()
    weight = layer.effective().requires_grad_()
    nn.functional.linear(x, weight).square().sum().backward()
    expected = -(weight * weight.grad).detach()
    torch.testing.assert_close(layer.score_OI.double(), expected, rtol=1e-5, atol=1e-5)
