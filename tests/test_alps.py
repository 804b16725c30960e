"""Promised: ALPS equal to a plain float64 version of its paper; survivors within 5 % of the least-squares floor of their mask;
masks that meet their count, nest, and respect patterns; less error than SparseGPT's."""

import pytest
import references
import torch
from test_pruning import UNSTRUCTURED, correlated, full, hessian

from losa.pruning import Pattern, alps, sparsegpt

PATTERNS = [UNSTRUCTURED, Pattern(2, 4), Pattern(4, 8)]


def problem(rows=24, columns=64, tokens=400):
    torch.manual_seed(0)
    return torch.randn(rows, columns, dtype=torch.float64), correlated(tokens, columns)


def solve(weight, keep, moments, rate, pattern=UNSTRUCTURED, share=1.0):
    return alps.prune([weight], [keep], moments, [rate], pattern, share)[0]


@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_equals_the_paper(rate):
    weight, x = problem(12, 32)
    new, keep = solve(weight, full(12, 32), hessian(x), rate)
    count = 12 * 32 - round(12 * 32 * rate)
    expected, mask = references.alps(weight, hessian(x), count, alps.DAMPING, alps.TURNS)
    assert torch.equal(keep, mask)
    floor = references.output_error(weight, expected, hessian(x))
    assert references.output_error(weight, new, hessian(x)) == pytest.approx(floor, rel=1e-3)


def test_conjugate_gradients_reach_least_squares():
    weight, x = problem(6, 24)
    keep = torch.rand(6, 24) > 0.6
    found = alps.refine(weight * keep, weight, keep, hessian(x), turns=24)
    torch.testing.assert_close(found, references.least_squares_on_mask(weight, keep, hessian(x)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_survivors_are_near_the_floor_of_their_mask(pattern, dtype):
    weight, x = problem()
    new, keep = solve(weight.to(dtype), full(24, 64), hessian(x).to(dtype), 0.6, pattern)
    floor = references.output_error(weight, references.least_squares_on_mask(weight, keep, hessian(x)), hessian(x))
    assert references.output_error(weight, new, hessian(x)) <= 1.05 * floor


@pytest.mark.parametrize("pattern", PATTERNS)
def test_errs_less_than_sparsegpt(pattern):
    weight, x = problem()
    new, _ = solve(weight, full(24, 64), hessian(x), 0.6, pattern)
    [(other, _)], _ = sparsegpt.prune([weight], [full(24, 64)], hessian(x), [0.6], pattern)
    assert references.output_error(weight, new, hessian(x)) < 0.95 * references.output_error(weight, other, hessian(x))


@pytest.mark.parametrize("rate", [0.0, 0.333, 0.7, 0.99])
def test_meets_its_count(rate):
    weight, x = problem()
    new, keep = solve(weight, full(24, 64), hessian(x), rate)
    assert int((~keep).sum()) == round(24 * 64 * rate)
    assert not new[~keep].any()


def test_equal_scores_leave_the_count_right():
    score = torch.ones(4, 8)
    assert [int(alps.keep_largest(score, full(4, 8), count).sum()) for count in (0, 5, 32)] == [0, 5, 32]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pruned_weight_stays_pruned(pattern):
    weight, x = problem()
    first, keep = solve(weight, full(24, 64), hessian(x), 0.3, pattern, 0.5)
    second, kept = solve(first, keep, hessian(x), 0.6, pattern)
    assert not (kept & ~keep).any()
    assert not second[~kept].any()
    if pattern.structured:
        assert torch.equal(kept.view(24, -1, pattern.m).sum(2), torch.full((24, 64 // pattern.m), pattern.n))


def test_nothing_to_prune_changes_nothing():
    weight, x = problem()
    new, keep = solve(weight, full(24, 64), hessian(x), 0.0)
    assert keep.all()
    torch.testing.assert_close(new, weight)


def test_inputs_that_never_fire_go_first_and_are_left_alone():
    weight, x = problem()
    x[:, :8] = 0
    new, keep = solve(weight, full(24, 64), hessian(x), 8 / 64)
    assert not keep[:, :8].any()
    new, keep = solve(weight, full(24, 64), hessian(x), 4 / 64)
    assert torch.equal(new[:, :8][keep[:, :8]], weight[:, :8][keep[:, :8]])


def test_fewer_tokens_than_features():
    weight, x = problem(24, 64, tokens=16)
    new, _ = solve(weight, full(24, 64), hessian(x), 0.5)
    assert torch.isfinite(new).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_is_refused(bad):
    weight, x = problem()
    moments = hessian(x)
    moments[0, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        solve(weight, full(24, 64), moments, 0.5)


def test_a_width_the_pattern_does_not_divide_is_refused():
    weight, x = problem(24, 30)
    with pytest.raises(ValueError, match="multiple of 4"):
        solve(weight, full(24, 30), hessian(x), 0.5, Pattern(2, 4))
