"""Promised: the model's function stays, in every family that can be turned, and what cannot be is refused before a weight
changes; rotations are orthogonal, entropies fall and are what they are defined to be; no random numbers."""

import copy
import math

import pytest
import references
import torch

from losa.models import find_decoder
from losa.rotation import (
    entropy,
    find_value_path,
    input_salience,
    learn_rotations,
    merge,
    objective,
    orthogonal,
    output_salience,
    rotate_values,
)

TURNING = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]


def randomise_biases(model):
    """Biases are zero in new models."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def heads(K=2, Q=3, O=7, d=4, I=6):  # noqa: E741
    """Weights and Gram matrices of `K` KV heads, in float64, with features of very different size."""
    X = torch.randn(K, Q, 50, d, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.3, 0.1], dtype=torch.float64)[:d]
    mix = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    X = X @ mix
    return torch.randn(K, Q, O, d, dtype=torch.float64) @ mix, X.mT @ X, mix.T @ torch.randn(K, d, I, dtype=torch.float64)


def random_rotation(K=2, d=4):
    return torch.linalg.qr(torch.randn(K, d, d, dtype=torch.float64))[0]


def test_salience_and_entropy_equal_their_definition():
    W_o, G, W_v = heads()
    R, inputs = random_rotation(), torch.rand(6, dtype=torch.float64)
    expected = torch.zeros(2, dtype=torch.float64)
    for k in range(2):
        of_v = references.output_salience(W_v[k], inputs, R[k])
        # each column has G_jj as a factor, which its entropy does not see
        torch.testing.assert_close(output_salience(W_v[k], R[k]) * inputs, of_v)
        expected[k] += sum(references.entropy(of_v[:, j].tolist()) for j in range(6))
        for q in range(3):
            of_o = references.input_salience(W_o[k, q], G[k, q], R[k])
            torch.testing.assert_close(input_salience(W_o[k, q], G[k, q], R[k]), of_o)
            expected[k] += sum(references.entropy(of_o[i].tolist()) for i in range(7))
    torch.testing.assert_close(objective(R, W_o, G, W_v), expected)


def test_entropy_of_zeros_is_zero_and_has_a_gradient():
    S = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], requires_grad=True)
    H = entropy(S, -1)
    torch.testing.assert_close(H, torch.tensor([0.0, 0.0, math.log(2)]))
    H.sum().backward()
    assert torch.isfinite(S.grad).all()


def test_gradient_of_the_objective_through_the_factorisation():
    W_o, G, W_v = heads()
    A = (torch.eye(4, dtype=torch.float64) + 0.3 * torch.randn(2, 4, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: objective(orthogonal(A), W_o, G, W_v), (A,))


def test_orthogonal_is_the_identity_at_the_identity_and_continuous_around_it():
    eye = torch.eye(16).repeat(3, 1, 1)
    assert torch.equal(orthogonal(eye), eye)
    nearby = orthogonal(eye + 1e-4 * torch.randn(3, 16, 16))
    assert (nearby - eye).abs().max() < 1e-2
    assert torch.linalg.det(nearby).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learned_rotations_are_orthogonal_and_concentrate_salience(dtype):
    W_o, G, W_v = (tensor.to(dtype) for tensor in heads(K=3))
    R, before, after = learn_rotations(W_o, G, W_v)
    assert (R.mT @ R - torch.eye(4)).abs().max() < 1e-12
    assert (R - torch.eye(4)).abs().max() > 0.1
    assert (after < 0.97 * before).all()
    torch.testing.assert_close(objective(R.to(dtype), W_o, G, W_v), after, rtol=1e-4, atol=0)
    torch.testing.assert_close(objective(torch.eye(4, dtype=dtype).repeat(3, 1, 1), W_o, G, W_v), before, rtol=1e-5, atol=0)


def test_heads_learned_together_are_heads_learned_alone():
    W_o, G, W_v = heads()
    together = learn_rotations(W_o, G, W_v, steps=10)[0]
    alone = [learn_rotations(W_o[k, None], G[k, None], W_v[k, None], steps=10)[0] for k in range(2)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_best_rotation_met_is_kept():
    W_o, G, W_v = heads()
    _, before, after = learn_rotations(W_o, G, W_v, steps=5, lr=30.0)  # leaps at random
    assert (after <= before).all()


def test_scale_does_not_matter_even_where_squares_underflow():
    W_o, G, W_v = (tensor.float() for tensor in heads())
    plain, tiny = learn_rotations(W_o, G, W_v, steps=3)[0], learn_rotations(W_o * 2**-50, G * 2**-60, W_v * 2**-50, steps=3)[0]
    torch.testing.assert_close(plain, tiny)
    W_o[0, 0, 0], W_v[1, :, 0], G[0, 1] = 0, 0, 0  # dead rows, columns and heads
    R, before, after = learn_rotations(W_o, G, W_v, steps=3)
    assert torch.isfinite(R).all() and (after < before).all()


def test_values_that_are_not_finite_are_an_error():
    W_o, G, W_v = heads()
    G[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        learn_rotations(W_o, G, W_v)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("family", TURNING)
def test_the_function_stays_and_entropy_falls(family, dtype, tolerance, tiny_model, token_ids):
    bias = {"attention_bias": True} if family == "llama" else {}
    model = randomise_biases(tiny_model(family, **bias)).to(dtype)
    before, dense = logits(model, token_ids()), copy.deepcopy(model.state_dict())
    entropies = rotate_values(model, token_ids(), steps=20, batch_size=2)
    after = logits(model, token_ids())
    assert (after - before).norm() < tolerance * before.norm()
    assert len(entropies) == 3
    for index, block in enumerate(entropies):
        assert block["entropy_after"] < block["entropy_before"] <= math.log(8) + 1e-6, index
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, dense[name])}
    values = {"weight", "bias"} if family in ("llama", "qwen2") else {"weight"}
    prefix = find_decoder(model).name
    expected = {f"{prefix}.{index}.self_attn.v_proj.{value}" for index in range(3) for value in values}
    assert changed == expected | {f"{prefix}.{index}.self_attn.o_proj.weight" for index in range(3)}


def test_statistics_are_those_of_the_dense_model(tiny_model, token_ids):
    """The objective's value from the inputs of `o_proj` in the model's own forward."""
    model = tiny_model("llama").double()
    paths = [find_value_path(block, "a block") for block in find_decoder(model).blocks]
    inputs = []
    hooks = [path.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for path in paths]
    logits(model, token_ids())
    for hook in hooks:
        hook.remove()
    expected = []
    for path, x in zip(paths, inputs, strict=True):
        total = torch.zeros(1, dtype=torch.float64)
        for k in range(2):
            W_v = path.v_proj.weight[8 * k : 8 * k + 8].detach()
            slices = [slice(8 * h, 8 * h + 8) for h in (2 * k, 2 * k + 1)]  # query heads 2k and 2k + 1 take KV head k
            X = torch.stack([x.flatten(0, 1)[:, part] for part in slices])
            W_o = torch.stack([path.o_proj.weight[:, part].detach() for part in slices])
            total += objective(torch.eye(8, dtype=torch.float64)[None], W_o[None], (X.mT @ X)[None], W_v[None])
        expected.append(total.item() / (2 * (2 * 32 + 32)))
    found = [block["entropy_before"] for block in rotate_values(model, token_ids(), steps=1, batch_size=2)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_without_steps_nothing_changes_and_batches_do_not_matter(tiny_model, token_ids):
    model = tiny_model("qwen2")
    dense = copy.deepcopy(model.state_dict())
    still = rotate_values(model, token_ids(), steps=0)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    assert all(block["entropy_before"] == block["entropy_after"] for block in still)
    assert [b["entropy_before"] for b in rotate_values(model, token_ids(), steps=0, batch_size=2)] == pytest.approx(
        [b["entropy_before"] for b in still], rel=1e-5
    )


def test_no_random_numbers(tiny_model, token_ids):
    first, second = tiny_model("llama"), tiny_model("llama")
    rotate_values(first, token_ids(), steps=5)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    rotate_values(second, token_ids(), steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("family", "found"), [("phi3", "self_attn.qkv_proj"), ("gpt_neox", "query_key_value"), ("opt", "out_proj")]
)
def test_other_structures_are_refused_in_one_sentence(family, found, tiny_model, token_ids):
    with pytest.raises(ValueError, match=f"rotation needs one attention module with v_proj and o_proj.*{found}"):
        rotate_values(tiny_model(family), token_ids())


def test_refused_before_any_weight_changes(tiny_model, token_ids):
    model = tiny_model("llama")
    dense = copy.deepcopy(model.state_dict())
    attention = find_decoder(model).blocks[2].self_attn
    attention.head_dim = 5
    with pytest.raises(ValueError, match=r"layers\.2 has v_proj\.out_features 16, o_proj\.in_features 32, head_dim 5"):
        rotate_values(model, token_ids())
    attention.head_dim = 8
    blocks = find_decoder(model).blocks
    blocks[1].self_attn.v_proj.weight = blocks[0].self_attn.v_proj.weight
    with pytest.raises(ValueError, match="shares some between blocks"):
        rotate_values(model, token_ids())
    assert all(torch.equal(dense[n], v) for n, v in model.state_dict().items() if n != "model.layers.1.self_attn.v_proj.weight")


def test_subclasses_of_linear_are_refused(tiny_model):
    block = find_decoder(tiny_model("llama")).blocks[0]

    class Other(torch.nn.Linear):
        pass

    block.self_attn.o_proj = Other(32, 32)
    with pytest.raises(ValueError, match="a block has a Other"):
        find_value_path(block, "a block")


def test_head_dim_from_the_configuration(tiny_model):
    block = find_decoder(tiny_model("llama")).blocks[0]
    del block.self_attn.head_dim
    path = find_value_path(block, "a block")
    assert (path.kv_heads, path.group, path.head_dim) == (2, 2, 8)
    del block.self_attn.config
    with pytest.raises(ValueError, match="head_dim 0"):
        find_value_path(block, "a block")


def test_a_gate_between_values_and_output_is_an_error_and_weights_stay(tiny_model, token_ids):
    model = tiny_model("llama")
    attention = find_decoder(model).blocks[1].self_attn
    gate = torch.linspace(0.5, 1.5, 32)
    attention.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * gate,))
    dense = copy.deepcopy(find_decoder(model).blocks[1].state_dict())
    with pytest.raises(ValueError, match=r"layers\.1 changes the output of its attention"):
        rotate_values(model, token_ids(), steps=20)
    assert all(torch.equal(dense[name], value) for name, value in find_decoder(model).blocks[1].state_dict().items())


def test_merge_turns_the_bias_with_the_values(tiny_model):
    path = find_value_path(find_decoder(randomise_biases(tiny_model("qwen2")).double()).blocks[0], "a block")
    R, x = random_rotation(2, 8), torch.randn(3, 32, dtype=torch.float64)
    before = path.v_proj(x)
    merge(path, R)
    torch.testing.assert_close(path.v_proj(x), torch.cat([before[:, :8] @ R[0], before[:, 8:] @ R[1]], dim=1))
