"""Distillation: the loss equals its float64 definition, the teacher is the dense model, and the Trainer mixes both losses."""

import pytest
import torch

from losa.adapter import attach, dense_mode, masked_linears
from losa.config import TrainConfig
from losa.distillation import kl_divergence
from losa.training import LosaTrainer, train


def plain_kl(student, teacher, labels, temperature):
    """Token by token, from the definition."""
    total = 0.0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if labels[row, t + 1] != -100:
                p = torch.softmax(teacher[row, t].double() / temperature, 0)
                q = torch.softmax(student[row, t].double() / temperature, 0)
                total += float((p * (p / q).log()).sum()) * temperature**2
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_equals_its_definition_and_skips_unlabelled_tokens(temperature):
    student, teacher = torch.randn(2, 7, 11), torch.randn(2, 7, 11)
    labels = torch.randint(0, 11, (2, 7))
    labels[1, 4:] = -100
    found = kl_divergence(student, teacher, labels, temperature)
    assert found.item() == pytest.approx(plain_kl(student, teacher, labels, temperature), rel=1e-5)


def test_kl_to_itself_is_zero():
    logits = torch.randn(1, 5, 9)
    assert kl_divergence(logits, logits, torch.zeros(1, 5, dtype=torch.int64)).item() == pytest.approx(0, abs=1e-6)


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


@pytest.mark.parametrize("items", [None, torch.tensor(30)])
def test_the_trainer_mixes_cross_entropy_and_kl(tiny_model, token_ids, tmp_path, items, monkeypatch):
    model, ids = pruned(tiny_model("llama")), token_ids(2, 16)
    with dense_mode(model), torch.no_grad():
        teacher = model(input_ids=ids).logits
    student = model(input_ids=ids).logits
    tokens = 30 if items is not None else ids[:, 1:].numel()
    cross = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / tokens
    expected = 0.25 * cross + 0.75 * kl_divergence(student, teacher, ids) / tokens
    seen = []
    monkeypatch.setattr(
        LosaTrainer, "train", lambda self: seen.append(self.compute_loss(model, batch(ids), num_items_in_batch=items))
    )
    train(model, ids, TrainConfig(lr=1e-3, distill=0.75), name="test", seed=0, work_dir=tmp_path)
    assert seen[0].item() == pytest.approx(expected.item(), rel=1e-5)


def batch(ids):
    return {"input_ids": ids, "labels": ids}
