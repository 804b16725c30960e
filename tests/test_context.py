"""Promised: losses by position that add up to the perplexity, bands that cover a window once, and a passage that a model which
copies finds easy the second time."""

import math

import pytest
import torch
from conftest import make_tiny_model

from losa.evaluation import perplexity
from losa.evaluation.context import bands, context_use, loss_by_position


def test_positions_equal_the_definition_and_add_up_to_the_perplexity():
    model, ids = make_tiny_model("llama"), torch.randint(3, 64, (5, 40))
    with torch.no_grad():
        scores = model(input_ids=ids).logits.double().log_softmax(-1)
    expected = [-sum(scores[s, t, ids[s, t + 1]].item() for s in range(5)) / 5 for t in range(39)]
    found = loss_by_position(model, ids, batch_size=2)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert math.exp(found.mean()) == pytest.approx(perplexity(model, ids), rel=1e-6)
    assert loss_by_position(model, ids, device=torch.device("cpu")).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [2, 16, 17, 100, 256, 2048])
def test_bands_cover_every_context_once(length):
    found = [context for first, last in bands(length) for context in range(first, last + 1)]
    assert found == list(range(1, length))


def test_bands_of_a_short_window():
    assert bands(64) == [(1, 15), (16, 31), (32, 63)]


class Copier(torch.nn.Module):
    """Predicts what followed the last time its token was there."""

    training = False

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 1)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, **_):
        logits = torch.zeros(*input_ids.shape, 64)
        for row, ids in enumerate(input_ids.tolist()):
            for at, token in enumerate(ids):
                if token in ids[:at]:
                    logits[row, at, ids[len(ids[:at]) - 1 - ids[:at][::-1].index(token) + 1]] = 20.0
        return type("Output", (), {"logits": logits})


def test_a_model_that_copies_finds_the_second_time_easy():
    ids = torch.stack([torch.randperm(60)[:40] for _ in range(3)])
    found = context_use(Copier(), ids)
    assert found["passage"] == pytest.approx(64, rel=1e-6)  # uniform over the vocabulary
    assert found["passage_again"] == pytest.approx(1, rel=1e-3)
    assert [band[:2] for band in found["by_context"]] == [[1, 15], [16, 31], [32, 39]]
