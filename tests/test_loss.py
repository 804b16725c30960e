"""The fused loss and its gradient equal their float64 definitions, the teacher is the dense model, the Trainer mixes losses."""

import pytest
import torch

from losa import loss as losa_loss
from losa.adapter import attach, dense_mode, masked_linears
from losa.config import TrainConfig
from losa.loss import block_loss, causal_loss
from losa.models import find_decoder
from losa.training import LosaTrainer, train


def plain_loss(student, teacher, labels, distill, temperature):
    """Token by token, from the definition, in float64; differentiable."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[row, t + 1] != -100:
                q = torch.softmax(student[row, t].double(), 0)
                total = total - (1 - distill) * q[labels[row, t + 1]].log()
                if distill:
                    p = torch.softmax(teacher[row, t].double() / temperature, 0)
                    q = torch.softmax(student[row, t].double() / temperature, 0)
                    total = total + distill * (p * (p / q).log()).sum() * temperature**2
    return total


def logits_and_labels(dtype=torch.float32):
    student, teacher = 3 * torch.randn(2, 7, 11), 3 * torch.randn(2, 7, 11)
    labels = torch.randint(0, 11, (2, 7))
    labels[1, 4:] = -100
    labels[0, 2] = -100
    return student.to(dtype).requires_grad_(), teacher.to(dtype), labels


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22], ids=["row by row", "3 rows", "one"])
@pytest.mark.parametrize(("distill", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.3, 2.5), (1.0, 0.7)])
def test_loss_and_gradient_equal_their_definition_and_skip_unlabelled_tokens(monkeypatch, chunk, distill, temperature):
    monkeypatch.setitem(losa_loss.CHUNK, "cpu", chunk)
    student, teacher, labels = logits_and_labels()
    found = causal_loss(student, labels, teacher, distill, temperature)
    expected = plain_loss(student, teacher, labels, distill, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (got,) = torch.autograd.grad(3 * found, student)
    (want,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not got[1, 3:].any() and not got[0, 1].any() and not got[:, -1].any()


def test_gradients_in_bfloat16_err_at_most_twice_as_much_as_torchs_own():
    student, _, labels = logits_and_labels(torch.bfloat16)
    wide = student.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(plain_loss(wide, None, labels, 0.0, 1.0), wide)
    (ours,) = torch.autograd.grad(causal_loss(student, labels), student)
    plain = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    (torchs,) = torch.autograd.grad(plain, student)
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max()
    assert ours.dtype == torch.bfloat16


def test_cross_entropy_is_that_of_transformers(tiny_model, token_ids):
    model, ids = tiny_model("llama"), token_ids(2, 16)
    output = model(input_ids=ids, labels=ids)
    assert causal_loss(output.logits, ids).item() / 30 == pytest.approx(output.loss.item(), rel=1e-6)


def test_kl_to_itself_is_zero():
    logits = torch.randn(1, 5, 9)
    assert causal_loss(logits, torch.zeros(1, 5, dtype=torch.int64), logits, 1.0).item() == pytest.approx(0, abs=1e-6)


def test_one_tensor_of_the_logits_own_dtype_is_kept():
    student, _, labels = logits_and_labels(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        causal_loss(student, labels)
    assert [(tensor.numel(), tensor.dtype) for tensor in kept] == [(student.numel(), torch.bfloat16)]


def test_block_loss_equals_its_definition_and_skips_padding():
    student, teacher = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    ratios = []
    for y, dense in zip(student.double(), teacher.double(), strict=True):
        real = [(b, t) for b in range(2) for t in range(5) if mask[b, t]]
        ratios.append(sum((y[i] - dense[i]).square().sum() for i in real) / sum(dense[i].square().sum() for i in real))
    found = block_loss(list(student), list(teacher), mask)
    assert found.item() == pytest.approx(float(sum(ratios) / 3), rel=1e-5)


def pruned(model):
    attach(model)
    for layer in masked_linears(model).values():
        layer.set_solution(torch.rand_like(layer.weight) > 0.5)
    return model


def test_the_teacher_is_the_dense_model_bit_for_bit(tiny_model, token_ids):
    model, ids = tiny_model("llama"), token_ids(2, 16)
    dense = model(input_ids=ids).logits
    pruned(model)
    assert not torch.equal(model(input_ids=ids).logits, dense)
    with dense_mode(model):
        assert torch.equal(model(input_ids=ids).logits, dense)
    assert not any(layer.dense for layer in masked_linears(model).values())


def loss_of(model, ids, tmp_path, monkeypatch, items, **changes):
    """What the Trainer minimises on one batch."""
    seen = []
    monkeypatch.setattr(
        LosaTrainer,
        "train",
        lambda self: seen.append(self.compute_loss(model, {"input_ids": ids, "labels": ids}, num_items_in_batch=items)),
    )
    train(model, ids, TrainConfig(lr=1e-3, batch_size=8, **changes), name="test", seed=0, work_dir=tmp_path)
    return seen[0]


@pytest.mark.parametrize("items", [None, torch.tensor(60)])
def test_the_trainer_mixes_cross_entropy_and_kl(tiny_model, token_ids, tmp_path, items, monkeypatch):
    model, ids = pruned(tiny_model("llama")), token_ids(2, 16)
    with dense_mode(model), torch.no_grad():
        teacher = model(input_ids=ids).logits
    expected = plain_loss(model(input_ids=ids).logits, teacher, ids, 0.75, 1.0) / (30 if items is None else 60)
    found = loss_of(model, ids, tmp_path, monkeypatch, items, distill=0.75)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def block_outputs(model, ids):
    outputs = []
    handles = [block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in find_decoder(model).blocks]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return outputs


def test_the_trainer_adds_the_error_of_the_blocks(tiny_model, token_ids, tmp_path, monkeypatch):
    model, ids = pruned(tiny_model("llama")), token_ids(2, 16)
    with dense_mode(model), torch.no_grad():
        dense = block_outputs(model, ids)
    extra = 2.0 * block_loss(block_outputs(model, ids), dense, None)
    plain = loss_of(model, ids, tmp_path, monkeypatch, None, distill=0.0)
    found = loss_of(model, ids, tmp_path, monkeypatch, None, distill=0.0, distill_blocks=2.0)
    assert (found - plain).item() == pytest.approx(extra.item(), rel=1e-4)
    found.backward()
    assert all(layer.lora_B.grad.any() for layer in masked_linears(model).values())
    assert not any(block._forward_hooks for block in find_decoder(model).blocks)
