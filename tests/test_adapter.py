"""Promised: exact gradients under the mask, little memory, logits unchanged by attaching and by merging, ranks that come
and go without a loss, zeros that stay bitwise zero, and a merged model that is an ordinary one."""

import pytest
import references
import torch
import torch.utils.checkpoint
from torch import nn

from losa.adapter import MaskedLinear, attach, collect_scores, function, masked_linears, merge, reuse_effective_weights
from losa.bits import pack_bits

O, I, R, SCALE = 7, 10, 3, 2.0  # noqa: E741 - the project's legend


def parts(dtype=torch.float64, bias=True, shape=(5, I)):
    """x, W, bias, M, A, B of one layer, all random."""
    torch.manual_seed(3)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    a, b = torch.randn(R, I, dtype=dtype, requires_grad=True), torch.randn(O, R, dtype=dtype, requires_grad=True)
    return (
        x,
        torch.randn(O, I, dtype=dtype),
        torch.randn(O, dtype=dtype) if bias else None,
        torch.rand(O, I) > 0.5,
        a,
        b,
    )


def learned(layer, seed=5):
    """Gives an adapter something to say, in its active rank."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_B[:, : layer.rank] = 0.1 * torch.randn(layer.out_features, layer.rank, generator=generator)


def masked(linear=None, max_rank=8, keep=0.5):
    """A layer with a mask and a trained adapter."""
    torch.manual_seed(3)
    layer = MaskedLinear(linear or nn.Linear(I, O), max_rank, SCALE, torch.Generator().manual_seed(0))
    layer.set_solution(torch.rand_like(layer.weight, dtype=torch.float32) < keep)
    learned(layer)
    return layer


def bits(tensor):
    return tensor.detach().contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()])


def fused(x, W, bias, M, a, b, keep_effective=False):
    """The autograd function, with a bool mask."""
    return function.MaskedLowRankLinear.apply(x, W, bias, pack_bits(M), a, b, SCALE, keep_effective)


def effective_weight(W, M, a, b):
    return function.effective_weight(W, pack_bits(M), a, b, SCALE)


# the autograd function


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(5, I), (2, 3, I), (1, I), (I,)], ids=str)
def test_gradients_are_exact(bias, shape):
    x, W, b_O, M, a, b = parts(bias=bias, shape=shape)
    assert torch.autograd.gradcheck(lambda x, a, b: fused(x, W, b_O, M, a, b), (x, a, b))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(5, I), (2, 3, I)], ids=str)
def test_outputs_and_gradients_equal_autograd_of_the_formula(bias, shape):
    x, W, b_O, M, a, b = parts(torch.float32, bias, shape)
    ours = fused(x, W, b_O, M, a, b)
    plain = references.masked_low_rank_linear(x, W, b_O, M, a, b, SCALE)
    torch.testing.assert_close(ours, plain)
    dy = torch.randn_like(plain)
    for got, expected in zip(torch.autograd.grad(ours, (x, a, b), dy), torch.autograd.grad(plain, (x, a, b), dy), strict=True):
        torch.testing.assert_close(got, expected)


def test_only_what_needs_a_gradient_gets_one():
    x, W, b_O, M, a, b = parts()
    y = fused(x.detach(), W, b_O, M, a, b)
    y.sum().backward()
    assert x.grad is None and a.grad is not None and b.grad is not None


def bfloat16_errors():
    """Largest errors against float64 of y, dx, dA, dB: ours, and F.linear with a weight composed in bf16, base in bf16."""
    torch.manual_seed(0)
    width, out, tokens = 64, 48, 128
    W, M = torch.randn(out, width).bfloat16(), torch.rand(out, width) > 0.5
    a, b = torch.randn(4, width) / 8, torch.randn(out, 4) / 8
    x, dy = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, out).bfloat16()

    def outputs(function, dtype, adapter_dtype):
        leaves = [
            x.to(dtype).requires_grad_(),
            a.to(adapter_dtype).requires_grad_(),
            b.to(adapter_dtype).requires_grad_(),
        ]
        y = function(leaves[0], W.to(dtype), leaves[1], leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    def plain(x, W, a, b):
        return nn.functional.linear(x, M * (W + SCALE * (b @ a).to(W.dtype)))

    truth = outputs(plain, torch.float64, torch.float64)
    ours = outputs(lambda x, W, a, b: fused(x, W, None, M, a, b), torch.bfloat16, torch.float32)
    composed = outputs(plain, torch.bfloat16, torch.bfloat16)
    return [[float((g.double() - t).abs().max()) for g, t in zip(got, truth, strict=True)] for got in (ours, composed)]


@pytest.mark.parametrize("what", range(4), ids=["y", "dx", "dA", "dB"])
def test_bfloat16_errors_are_at_most_twice_those_of_plain_operations(what):
    ours, composed = bfloat16_errors()
    assert ours[what] <= 2 * composed[what]


def saved_tensors(run):
    found = []

    def keep(tensor):
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return found


def test_no_composed_weight_is_kept_for_backward():
    x, W, b_O, M, a, b = parts(torch.float32, shape=(4, I))
    saved = saved_tensors(lambda: fused(x, W, b_O, M, a, b))
    assert {t.data_ptr() for t in saved if t.numel() >= O * I} == {W.data_ptr()}


def test_the_input_is_kept_and_not_copied():
    x, W, b_O, M, a, b = parts(torch.float32)
    packed = pack_bits(M)
    saved = saved_tensors(lambda: function.MaskedLowRankLinear.apply(x, W, b_O, packed, a, b, SCALE, False))
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, W, packed, a, b)}


@pytest.mark.parametrize("panel", [1, 3 * 8 * 4 * I, 1 << 20], ids=["8 rows", "24 rows", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_change_nothing(monkeypatch, panel, dtype):
    """37 rows of 10 columns: masks whose last byte is padded, panels that end in the middle of the weight."""
    monkeypatch.setitem(function.PANEL_BYTES, "cpu", panel)
    torch.manual_seed(0)
    W, M, a, b = torch.randn(37, I).to(dtype), torch.rand(37, I) > 0.5, torch.randn(R, I), torch.randn(37, R)
    expected = torch.where(M, W + SCALE * (b @ a), 0.0)
    torch.testing.assert_close(effective_weight(W, M, a, b), expected.to(dtype))
    G = torch.randn(37, I).to(dtype)
    masked = torch.where(M, G, 0.0).float()
    dA, dB = function.adapter_gradients(G.clone(), pack_bits(M), a, b, SCALE)
    torch.testing.assert_close(dA, SCALE * b.T @ masked)
    torch.testing.assert_close(dB, SCALE * masked @ a.T)


def test_a_gradient_outside_the_mask_may_be_infinite():
    G, M = torch.full((8, I), float("nan")), torch.zeros(8, I, dtype=torch.bool)
    M[3, 4] = True
    G[3, 4] = 2.0
    dA, dB = function.adapter_gradients(G, pack_bits(M), torch.ones(R, I), torch.ones(8, R), SCALE)
    assert dA.sum() == R * SCALE * 2 and dB.sum() == R * SCALE * 2


def test_under_checkpointing_the_effective_weight_is_built_twice_a_layer_and_not_kept(monkeypatch):
    """Once in forward and once when the block is recomputed; its backward finds it saved."""
    built = []
    original = function.effective_weight
    monkeypatch.setattr(function, "effective_weight", lambda *args: built.append(1) or original(*args))
    x, W, b_O, M, a, b = parts(torch.float32)
    plain = torch.autograd.grad(fused(x, W, b_O, M, a, b).square().sum(), (x, a, b))
    assert len(built) == 2
    run = lambda x, a, b: fused(x, W, b_O, M, a, b, True)  # noqa: E731
    checkpointed = torch.utils.checkpoint.checkpoint(run, x, a, b, use_reentrant=False)
    assert len(built) == 3
    for got, expected in zip(torch.autograd.grad(checkpointed.square().sum(), (x, a, b)), plain, strict=True):
        assert torch.equal(got, expected)
    assert len(built) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_effective_weight_is_bitwise_zero_outside_the_mask(dtype):
    _, W, _, M, a, b = parts(dtype)
    adapter_dtype = torch.promote_types(dtype, torch.float32)
    weight = effective_weight(-W.abs() - 1, M, a.to(adapter_dtype), b.to(adapter_dtype))
    assert weight.dtype == dtype
    assert not bits(weight)[~M].any()


def test_the_effective_weight_equals_the_formula():
    _, W, _, M, a, b = parts()
    torch.testing.assert_close(effective_weight(W, M, a, b), M * (W + SCALE * (b @ a)), rtol=1e-14, atol=1e-14)


def test_infinite_products_outside_the_mask_are_zero_too():
    _, W, _, M, a, b = parts()
    W = W.masked_fill(~M, float("inf"))
    assert not bits(effective_weight(W, M, a, b))[~M].any()


# attaching


FAMILIES = ["llama", "opt", "qwen2", "gemma2", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attaching_leaves_logits_bitwise_equal(tiny_model, token_ids, family):
    model, ids = tiny_model(family), token_ids()
    before = model(ids).logits
    assert torch.equal(attach(model)(ids).logits, before)


def test_attaching_leaves_logits_bitwise_equal_with_gradients_on(tiny_model, token_ids):
    model, ids = tiny_model("llama"), token_ids()
    before = model(ids).logits
    assert torch.equal(attach(model)(ids).logits, before)


def test_only_adapters_train(tiny_model):
    model = attach(tiny_model("opt"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{factor}" for name in masked_linears(model) for factor in ("lora_A", "lora_B")}


def test_every_linear_of_every_block_is_replaced_and_no_other(tiny_model):
    model = tiny_model("llama")
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert set(masked_linears(attach(model))) == expected
    assert type(model.lm_head) is nn.Linear


def test_the_seed_decides_the_adapters(tiny_model):
    first, same, other = (masked_linears(attach(tiny_model("llama"), seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(first[n].lora_A, same[n].lora_A) and not torch.equal(first[n].lora_A, other[n].lora_A) for n in first)


@pytest.mark.parametrize(("base", "adapter"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_adapters_are_at_least_float32(base, adapter):
    layer = MaskedLinear(nn.Linear(I, O).to(base), 4, SCALE, torch.Generator())
    assert layer.lora_A.dtype == layer.lora_B.dtype == adapter


def test_training_and_inference_give_the_same_output():
    layer, x = masked(), torch.randn(4, I)
    with torch.no_grad():
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)


def test_the_dense_switch_gives_the_original_layer():
    linear = nn.Linear(I, O)
    x, weight = torch.randn(4, I), linear.weight.detach().clone()
    layer = masked(linear)
    layer.set_solution(layer.keep_OI, torch.randn(O, I))
    layer.dense = True
    assert torch.equal(layer(x), nn.functional.linear(x, weight, linear.bias))


# ranks


def test_rows_above_the_rank_do_nothing():
    layer = masked(max_rank=8)
    layer.set_rank(3)
    before = layer.effective()
    with torch.no_grad():
        layer.lora_A[3:] = 1e6
    assert torch.equal(layer.effective(), before)


def test_rows_above_the_rank_get_no_gradient():
    layer = masked(max_rank=8)
    layer.set_rank(3)
    layer(torch.randn(4, I)).square().sum().backward()
    assert not layer.lora_A.grad[3:].any() and not layer.lora_B.grad[:, 3:].any()
    assert layer.lora_A.grad[:3].any() and layer.lora_B.grad[:, :3].any()


def test_ranks_above_eight_take_effect():
    layer = masked(max_rank=16)
    layer(torch.randn(4, I)).square().sum().backward()
    assert layer.lora_B.grad[:, 8:].any()


def test_shrinking_the_rank_keeps_the_effective_weight():
    layer = masked(max_rank=8)
    before = layer.effective()
    layer.set_rank(2)
    torch.testing.assert_close(layer.effective(), before, rtol=1e-6, atol=1e-6)


def test_growing_the_rank_leaves_the_effective_weight():
    layer = masked(max_rank=8)
    layer.set_rank(2)
    before = layer.effective()
    layer.set_rank(8)
    torch.testing.assert_close(layer.effective(), before, rtol=1e-6, atol=1e-6)


def test_shapes_do_not_change_with_the_rank():
    layer = masked(max_rank=8)
    layer.set_rank(2)
    assert layer.lora_A.shape == (8, I) and layer.lora_B.shape == (O, 8)


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ValueError, match=r"expected 1\.\.8"):
        masked(max_rank=8).set_rank(rank)


# solutions


def test_a_solution_with_weights_becomes_the_effective_weight():
    layer = masked()
    keep = layer.keep_OI & (torch.rand(O, I) < 0.7)
    weight = torch.randn(O, I) * keep
    layer.set_solution(keep, weight)
    torch.testing.assert_close(layer.effective(), weight, rtol=1e-6, atol=1e-6)


def test_a_solution_of_a_mask_leaves_the_survivors():
    layer = masked()
    before, keep = layer.effective(), layer.keep_OI & (torch.rand(O, I) < 0.7)
    layer.set_solution(keep)
    assert torch.equal(layer.effective(), before.where(keep, 0.0))


def test_a_solution_leaves_the_adapter():
    layer = masked()
    before = layer.lora_A.clone(), layer.lora_B.clone()
    layer.set_solution(layer.keep_OI, torch.randn(O, I))
    assert torch.equal(layer.lora_A, before[0]) and torch.equal(layer.lora_B, before[1])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_weights_settle_at_is_the_effective_weight_to_the_bit(dtype, whole):
    layer = MaskedLinear(nn.Linear(I, O, dtype=dtype), 8, SCALE, torch.Generator(), whole=whole)
    layer.set_solution(torch.rand(O, I) < 0.5)
    for parameter in layer.trained.values():
        nn.init.normal_(parameter)
    weight = torch.randn(O, I).bfloat16().to(layer.exact).where(layer.keep_OI, 0)
    layer.settle(weight)
    assert torch.equal(bits(layer.merged()), bits(weight))
    assert torch.equal(bits(layer.effective()), bits(weight.to(dtype)))


def test_a_revival_is_refused_and_changes_nothing():
    layer = masked()
    before = layer.keep_OI.clone()
    with pytest.raises(ValueError, match="masks must be nested"):
        layer.set_solution(torch.ones_like(layer.keep_OI), torch.randn(O, I))
    assert torch.equal(layer.keep_OI, before)


@torch.no_grad()
def test_reset_restores_dense_logits(tiny_model, token_ids):
    model, ids = tiny_model("llama"), token_ids()
    before = model(ids).logits
    for layer in masked_linears(attach(model)).values():
        learned(layer)
        layer.set_solution(torch.rand_like(layer.weight) > 0.5, torch.randn_like(layer.weight))
        layer.set_rank(3)
        layer.reset(pack_bits(torch.ones_like(layer.keep_OI)))
    assert torch.equal(model(ids).logits, before)


def test_restore_brings_back_mask_and_base():
    layer = masked()
    layer.set_solution(layer.keep_OI, torch.randn(O, I))
    fresh = masked(keep=2.0)
    fresh.restore(layer.keep_bits, layer.weight.data)
    assert torch.equal(fresh.effective(), layer.effective())


# merging


def pruned_model(model):
    for seed, layer in enumerate(masked_linears(attach(model)).values()):
        learned(layer, seed)
        layer.set_solution(torch.rand_like(layer.weight, dtype=torch.float32) > 0.6)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merging_leaves_logits_bitwise_equal(tiny_model, token_ids, family):
    model, ids = pruned_model(tiny_model(family)), token_ids()
    before = model(ids).logits
    merge(model)
    assert torch.equal(model(ids).logits, before)


def test_merging_leaves_plain_linear_layers(tiny_model):
    model = pruned_model(tiny_model("opt"))
    names = list(masked_linears(model))
    merge(model)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_returns_masks_the_weights_are_bitwise_zero_outside_of(tiny_model, dtype):
    model = pruned_model(tiny_model("llama").to(dtype))
    kept = {name: layer.keep_OI.clone() for name, layer in masked_linears(model).items()}
    masks = merge(model)
    assert set(masks) == {f"{name}.weight" for name in kept}
    state = model.state_dict()
    for name, mask in masks.items():
        assert torch.equal(mask, kept[name.removesuffix(".weight")])
        assert state[name].dtype == dtype and not bits(state[name])[~mask].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_has_the_keys_of_its_source(tiny_model, family):
    model = tiny_model(family)
    before = list(model.state_dict())
    merge(pruned_model(model))
    assert list(model.state_dict()) == before


def test_a_merged_model_can_be_attached_again(tiny_model, token_ids):
    model, ids = pruned_model(tiny_model("llama")), token_ids()
    merge(model)
    before = model(ids).logits
    assert torch.equal(attach(model)(ids).logits, before)


def test_attaching_again_to_a_pruned_model_keeps_its_zeros(tiny_model):
    model = attach(tiny_model("llama"))
    for layer in masked_linears(model).values():
        layer.set_solution(torch.rand_like(layer.weight) > 0.5)
    masks = merge(model)
    attach(model, masks=masks)
    for name, layer in masked_linears(model).items():
        torch.nn.init.normal_(layer.lora_B)
        assert torch.equal(layer.keep_OI, masks[f"{name}.weight"])
    merge(model)
    for name, keep in masks.items():
        assert not model.get_parameter(name)[~keep].any()


def test_solvers_see_the_merged_weight_unrounded():
    layer = MaskedLinear(torch.nn.Linear(32, 16, bias=False).bfloat16(), 4, 2.0, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.lora_B, std=1e-3)
    before, keep = layer.weight.clone(), torch.rand(16, 32) > 0.3
    layer.set_solution(keep, layer.merged().where(keep, 0))  # a solver that changes no survivor
    assert torch.equal(layer.weight[keep], before[keep])


def test_weights_that_are_reused_are_built_once_without_gradients_too(monkeypatch):
    layer, built, own = masked(), [], MaskedLinear.effective
    monkeypatch.setattr(MaskedLinear, "effective", lambda layer: built.append(1) or own(layer))
    x = torch.randn(2, layer.in_features)
    with torch.no_grad():
        expected = layer(x)
        with reuse_effective_weights(layer):
            assert all(torch.equal(layer(x), expected) for _ in range(3))
    assert len(built) == 2 and layer.reused_OI is None


def test_merge_reuses_the_memory_of_the_base_weight(tiny_model):
    model = attach(tiny_model("llama"))
    before = {name: layer.weight.data_ptr() for name, layer in masked_linears(model).items()}
    merge(model)
    assert {name: model.get_submodule(name).weight.data_ptr() for name in before} == before


# movement scores


def test_movement_scores_are_those_of_autograd_over_all_backward_passes():
    layer = masked(nn.Linear(I, O).double())
    batches = [torch.randn(4, I, dtype=torch.float64) for _ in range(3)]
    expected = torch.zeros(O, I, dtype=torch.float64)
    for x in batches:
        W = layer.effective().detach().requires_grad_()
        nn.functional.linear(x, W, layer.bias).pow(3).sum().backward()
        expected -= W.detach() * W.grad
    with collect_scores(layer):
        for x in batches[:2]:
            layer(x).pow(3).sum().backward()  # no gradient is asked for at the input: the first layer of a model
    with collect_scores(layer):
        layer(batches[2].requires_grad_()).pow(3).sum().backward()
    torch.testing.assert_close(layer.score_OI.double(), expected, rtol=1e-6, atol=1e-6)
    assert not layer.score_OI[~layer.keep_OI].any()


def test_nothing_is_scored_outside_of_it():
    layer = masked()
    with collect_scores(layer):
        pass
    layer(torch.randn(4, I)).sum().backward()
    assert not layer.score_OI.any()
