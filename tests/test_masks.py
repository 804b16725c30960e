"""Promised: masks with exact counts, spread over rows or groups as the method says, nested for ever, stored a bit a weight."""

import pytest
import references
import torch

from losa.bits import pack_bits, unpack_bits
from losa.pruning.masks import Pattern, keep_n_of_m, keep_unstructured, select

RATES = [0.1, 0.342, 0.549, 0.655, 0.7]


def full(rows, columns):
    return torch.ones(rows, columns, dtype=torch.bool)


def nested(inner, outer):
    return not (inner & ~outer).any()


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (32, 48), (5, 200)])
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.5, 0.655, 0.999])
def test_the_number_of_zeros_is_exact(shape, rate):
    keep = keep_unstructured(torch.rand(shape), full(*shape), rate)
    assert int((~keep).sum()) == round(keep.numel() * rate)


@pytest.mark.parametrize("rate", RATES)
def test_rows_differ_by_at_most_one_zero(rate):
    zeros = (~keep_unstructured(torch.rand(17, 31), full(17, 31), rate)).sum(1)
    assert zeros.max() - zeros.min() <= 1


@pytest.mark.parametrize("rate", RATES)
def test_unstructured_equals_the_plain_loop(rate):
    scores, keep = torch.rand(11, 23), torch.rand(11, 23) > 0.05
    assert torch.equal(keep_unstructured(scores, keep, rate), references.keep_rows(scores, keep, rate))


def test_equal_scores_are_taken_from_the_left():
    assert torch.equal(keep_unstructured(torch.ones(2, 4), full(2, 4), 0.5), torch.tensor([[False, False, True, True]] * 2))


def test_bfloat16_scores_equal_their_float32_values():
    scores = torch.rand(8, 16).bfloat16()
    assert torch.equal(keep_unstructured(scores, full(8, 16), 0.4), keep_unstructured(scores.float(), full(8, 16), 0.4))


def test_growing_rates_give_nested_exact_masks():
    keep = full(16, 33)
    for rate in RATES:
        before, keep = keep, keep_unstructured(torch.rand(16, 33), keep, rate)  # new scores at every step
        assert nested(keep, before)
        assert int((~keep).sum()) == round(keep.numel() * rate)


def test_a_pruned_weight_is_never_revived_by_a_high_score():
    keep = full(4, 8)
    keep[:, 0] = False
    scores = torch.rand(4, 8)
    scores[:, 0] = 1e9
    assert not keep_unstructured(scores, keep, 0.5)[:, 0].any()


def test_a_rate_below_what_is_pruned_changes_nothing():
    keep = keep_unstructured(torch.rand(6, 10), full(6, 10), 0.6)
    assert torch.equal(keep_unstructured(torch.rand(6, 10), keep, 0.3), keep)


PATTERNS = [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p.n}:{p.m}")
def test_each_group_keeps_exactly_n_at_full_share(pattern):
    keep = keep_n_of_m(torch.rand(9, 48), full(9, 48), pattern)
    assert keep.view(9, -1, pattern.m).sum(2).eq(pattern.n).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p.n}:{p.m}")
def test_n_of_m_equals_the_plain_loop(pattern):
    scores = torch.rand(9, 48)
    expected = references.keep_groups(scores, full(9, 48), pattern.n, pattern.m)
    assert torch.equal(keep_n_of_m(scores, full(9, 48), pattern), expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p.n}:{p.m}")
def test_growing_shares_are_nested_and_complete_the_pattern(pattern):
    keep = full(9, 48)
    for share in (0.2, 0.49, 0.78, 0.9, 0.99, 1.0):
        before, keep = keep, keep_n_of_m(torch.rand(9, 48), keep, pattern, share)
        assert nested(keep, before)
        assert keep.view(9, -1, pattern.m).sum(2).min() >= pattern.n
    assert keep.view(9, -1, pattern.m).sum(2).eq(pattern.n).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_a_pattern_takes_nothing_that_the_whole_pattern_keeps(share):
    """Even from a mask that has more zeros than the pattern wants, at places that it does not."""
    scores, before = torch.rand(64, 48), torch.rand(64, 48) > 0.7
    assert not (keep_n_of_m(scores, before, Pattern(2, 4)) & ~keep_n_of_m(scores, before, Pattern(2, 4), share)).any()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_a_share_of_the_pattern_has_that_share_of_its_zeros(share):
    keep = keep_n_of_m(torch.rand(9, 48), full(9, 48), Pattern(2, 4), share)
    assert int((~keep).sum()) == round(9 * 48 / 2 * share)


def test_select_follows_the_pattern():
    scores = torch.rand(4, 8)
    assert torch.equal(select(scores, full(4, 8), 0.25, Pattern(), 1.0), keep_unstructured(scores, full(4, 8), 0.25))
    assert torch.equal(select(scores, full(4, 8), 0.25, Pattern(2, 4), 1.0), keep_n_of_m(scores, full(4, 8), Pattern(2, 4)))


def test_a_width_the_pattern_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="expected a multiple of 4"):
        keep_n_of_m(torch.rand(2, 10), full(2, 10), Pattern(2, 4))


@pytest.mark.parametrize(("text", "pattern"), [("unstructured", Pattern()), ("2:4", Pattern(2, 4)), ("4:8", Pattern(4, 8))])
def test_patterns_are_read(text, pattern):
    assert Pattern.parse(text) == pattern


@pytest.mark.parametrize("text", ["", "4:2", "4:4", "0:4", "2:", "2:4:8", "-1:4", "2of4", "Unstructured", " 2:4"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match="expected 'unstructured' or 'n:m'"):
        Pattern.parse(text)


def test_a_pattern_knows_its_sparsity():
    assert (Pattern(2, 4).sparsity, Pattern(1, 4).sparsity) == (0.5, 0.75)
    assert Pattern(2, 4).structured and not Pattern().structured


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 9), (1, 17), (0, 4)])
def test_packed_bits_come_back(shape):
    keep = torch.rand(shape) > 0.5
    packed = pack_bits(keep)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-keep.numel() // 8)
    assert torch.equal(unpack_bits(packed, keep.shape), keep)


def test_the_lowest_bit_comes_first():
    assert pack_bits(torch.tensor([[True, False, False], [False, True, False]])).tolist() == [0b10001]


def test_packed_bits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="cannot be of shape"):
        unpack_bits(pack_bits(full(4, 8)), (5, 8))
