"""Promised: Gram matrices to float32 precision at any chunk, CKA as HSIC defines it, an order that beta cannot change."""

import pytest
import references
import torch

from losa.importance import cka_matrix, gram, rmi_importance


def features(n=8, width=40, count=4):
    """Features of `count` blocks, each a noisy mixture of the one before, with a mean."""
    first = torch.randn(n, width)
    blocks = [first]
    for _ in range(count - 1):
        blocks.append(blocks[-1] + 0.7 * torch.randn(n, width) + 0.3)
    return blocks


@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_gram_equals_the_inner_products_at_any_chunk(chunk):
    F = features()[1]
    torch.testing.assert_close(gram(F, chunk), references.gram(F), rtol=1e-6, atol=1e-5)


def test_gram_is_float64():
    assert gram(features()[0]).dtype == torch.float64


def test_gram_of_bfloat16_features_is_computed_in_float32():
    F = features()[0].bfloat16()
    torch.testing.assert_close(gram(F, 7), references.gram(F), rtol=1e-6, atol=1e-5)


def test_gram_sums_chunks_in_float64():
    F = torch.cat([torch.full((2, 1), 4096.0), torch.full((2, 4096), 0.5)], dim=1)  # float32 loses nothing inside a chunk
    expected = 4096.0**2 + 4096 * 0.25
    assert gram(F, chunk=1).eq(expected).all()


def test_cka_equals_the_hsic_definition():
    grams = [gram(F) for F in features()]
    expected = torch.tensor([[references.hsic_cka(a, b) for b in grams] for a in grams], dtype=torch.float64)
    torch.testing.assert_close(cka_matrix(grams), expected, rtol=0, atol=1e-12)


def test_cka_is_symmetric_with_a_unit_diagonal_inside_0_and_1():
    cka = cka_matrix([gram(F) for F in features()])
    assert torch.equal(cka, cka.T)
    assert torch.allclose(torch.diagonal(cka), torch.ones(4, dtype=torch.float64))
    assert cka.min() >= 0 and cka.max() <= 1


def test_cka_does_not_see_the_scale_of_features():
    blocks = features()
    scaled = [F * 10.0**i for i, F in enumerate(blocks)]
    torch.testing.assert_close(cka_matrix([gram(F) for F in scaled]), cka_matrix([gram(F) for F in blocks]), rtol=0, atol=1e-6)


def test_cka_does_not_see_an_orthogonal_transform_of_features():
    blocks = features()
    rotated = [F @ torch.linalg.qr(torch.randn(40, 40))[0] for F in blocks]
    torch.testing.assert_close(cka_matrix([gram(F) for F in rotated]), cka_matrix([gram(F) for F in blocks]), rtol=0, atol=1e-5)


def test_cka_does_not_see_a_shift_of_all_features():
    blocks = features()
    shifted = [F + torch.randn(40) for F in blocks]
    torch.testing.assert_close(cka_matrix([gram(F) for F in shifted]), cka_matrix([gram(F) for F in blocks]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [2, 3, 7, 10, 13, 64])
def test_features_that_are_the_same_for_every_sequence_have_zero_similarity(n):
    same = torch.randn(1, 40).expand(n, 40)
    cka = cka_matrix([gram(torch.randn(n, 40)), gram(same), gram(torch.randn(n, 40))])
    assert cka[1].abs().max() == 0 and cka[:, 1].abs().max() == 0


@pytest.mark.parametrize("beta", [0.5, 1.0, 10.0])
def test_importance_equals_the_formula(beta):
    cka = cka_matrix([gram(F) for F in features(count=6)])
    expected = references.importance(cka.tolist(), beta)
    assert rmi_importance(cka, beta).tolist() == pytest.approx(expected, rel=1e-12)


def test_beta_does_not_change_the_order():
    cka = cka_matrix([gram(F) for F in features(count=6)])
    orders = {tuple(rmi_importance(cka, beta).argsort().tolist()) for beta in (0.1, 1.0, 7.0)}
    assert len(orders) == 1


def test_the_block_most_like_the_others_is_the_least_important():
    cka = torch.tensor([[1.0, 0.9, 0.8], [0.9, 1.0, 0.1], [0.8, 0.1, 1.0]], dtype=torch.float64)
    assert rmi_importance(cka).argsort().tolist() == [0, 1, 2]


def test_blocks_without_any_similarity_are_equally_important():
    assert rmi_importance(torch.eye(3, dtype=torch.float64)).tolist() == [1.0, 1.0, 1.0]
