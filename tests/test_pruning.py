"""Promised: magnitude and Wanda as defined; SparseGPT equal to column-by-column optimal brain surgeon, robust to Hessians that
are deficient, loud about those that are hopeless; zeros that are bitwise +0."""

import logging

import pytest
import references
import torch

from losa.pruning import PRUNERS, Pattern, get_pruner, magnitude, movement, sparsegpt, wanda

UNSTRUCTURED = Pattern()
SHAPES = [(24, 200), (8, 96), (5, 300)]


def full(rows, columns):
    return torch.ones(rows, columns, dtype=torch.bool)


def correlated(tokens, width):
    """Inputs whose features share a few common causes and differ in size, as activations do."""
    causes = torch.randn(tokens, width // 4, dtype=torch.float64) @ torch.randn(width // 4, width, dtype=torch.float64)
    return (causes + torch.randn(tokens, width, dtype=torch.float64)) * torch.rand(width, dtype=torch.float64).add(0.1)


def hessian(x):
    return 2 * x.T @ x


def solve(name, weight, keep, inputs, rate, pattern=UNSTRUCTURED, share=1.0):
    pruner = get_pruner(name)
    statistic = pruner.collect(None, inputs.float()) if pruner.collect else None
    return pruner.solve([weight], [keep], statistic, [rate], pattern, share)[0]


def sparsegpt_one(weight, keep, H, rate, pattern, share=1.0):
    """SparseGPT on a layer that shares its input with none: weight, mask, damping."""
    [(weight, keep)], damping = sparsegpt.prune([weight], [keep], H, [rate], pattern, share)
    return weight, keep, damping


def test_an_unknown_pruner_is_refused():
    with pytest.raises(ValueError, match="expected one of alps, magnitude, movement, sparsegpt, wanda"):
        get_pruner("random")


# magnitude


@pytest.mark.parametrize("rate", [0.25, 0.7])
def test_magnitude_takes_the_smallest_of_each_row(rate):
    weight = torch.randn(12, 40)
    assert torch.equal(
        magnitude.prune(weight, full(12, 40), rate, UNSTRUCTURED),
        references.keep_rows(weight.abs(), full(12, 40), rate),
    )


def test_magnitude_does_not_depend_on_inputs():
    assert PRUNERS["magnitude"].collect is None


# movement


def test_movement_takes_what_moves_towards_zero():
    weight, score, keep = torch.randn(12, 40), torch.randn(12, 40), torch.rand(12, 40) > 0.1
    assert torch.equal(movement.prune(weight, keep, score, 0.5, UNSTRUCTURED), references.keep_rows(score, keep, 0.5))


@pytest.mark.parametrize("score", [None, torch.zeros(12, 40)])
def test_movement_before_any_training_is_magnitude(score):
    weight = torch.randn(12, 40)
    expected = magnitude.prune(weight, full(12, 40), 0.5, UNSTRUCTURED)
    assert torch.equal(movement.prune(weight, full(12, 40), score, 0.5, UNSTRUCTURED), expected)


def test_a_score_that_is_not_finite_is_refused():
    score = torch.randn(12, 40)
    score[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite; lower train\.lr"):
        movement.prune(torch.randn(12, 40), full(12, 40), score, 0.5, UNSTRUCTURED)


# wanda


@pytest.mark.parametrize("rate", [0.342, 0.5, 0.7])
def test_wanda_equals_the_definition(rate):
    weight, x, keep = torch.randn(24, 60), correlated(100, 60), torch.rand(24, 60) > 0.1
    expected = references.keep_rows(references.wanda_scores(weight, x), keep, rate)
    assert torch.equal(wanda.prune(weight, keep, wanda.collect(None, x.float()), rate, UNSTRUCTURED), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_wanda_equals_the_definition_in_groups(n, m):
    weight, x = torch.randn(16, 64), correlated(100, 64)
    expected = references.keep_groups(references.wanda_scores(weight, x), full(16, 64), n, m)
    assert torch.equal(wanda.prune(weight, full(16, 64), wanda.collect(None, x.float()), 0.5, Pattern(n, m)), expected)


def test_wanda_takes_other_weights_than_magnitude():
    weight, x = torch.randn(24, 60), correlated(100, 60)
    masks = [solve(name, weight, full(24, 60), x, 0.5).keep_OI for name in ("wanda", "magnitude")]
    assert not torch.equal(*masks)


@pytest.mark.parametrize("collect", [wanda.collect, sparsegpt.collect], ids=["wanda", "sparsegpt"])
def test_statistics_of_batches_add_up(collect):
    x = correlated(96, 20).float()
    total = None
    for batch in x.split([50, 1, 45]):
        total = collect(total, batch)
    torch.testing.assert_close(total, collect(None, x), rtol=1e-5, atol=1e-4)


def test_statistics_are_sums_of_squares():
    x = correlated(96, 20)
    torch.testing.assert_close(wanda.collect(None, x.float()), x.square().sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(sparsegpt.collect(None, x.float()).double(), hessian(x), rtol=1e-5, atol=1e-3)


def test_statistics_of_bfloat16_inputs_are_float32_or_better():
    x = correlated(96, 20).bfloat16()
    assert torch.equal(wanda.collect(None, x), wanda.collect(None, x.float()))
    assert torch.equal(sparsegpt.collect(None, x), sparsegpt.collect(None, x.float()))


def test_wanda_refuses_activations_that_are_not_finite():
    x = correlated(10, 8)
    x[3, 2] = float("inf")
    with pytest.raises(ValueError, match="non-finite activations"):
        wanda.prune(torch.randn(4, 8), full(4, 8), wanda.collect(None, x.float()), 0.5, UNSTRUCTURED)


# sparsegpt


def assert_equals_surgeon(weight, keep, H, rate, pattern=UNSTRUCTURED):
    new_weight, new_keep, damping = sparsegpt_one(weight, keep, H, rate, pattern)
    expected_weight, expected_keep = references.obs_prune(weight, keep, H, rate, pattern.n, pattern.m)
    assert torch.equal(new_keep, expected_keep)
    torch.testing.assert_close(new_weight, expected_weight, rtol=1e-8, atol=1e-8)
    assert damping == 0.01


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparsegpt_equals_the_surgeon(shape, rate):
    weight = torch.randn(shape, dtype=torch.float64)
    assert_equals_surgeon(weight, full(*shape), hessian(correlated(400, shape[1])), rate)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparsegpt_equals_the_surgeon_from_a_pruned_start(shape):
    H = hessian(correlated(400, shape[1]))
    weight, keep, _ = sparsegpt_one(torch.randn(shape, dtype=torch.float64), full(*shape), H, 0.4, UNSTRUCTURED)
    assert_equals_surgeon(weight, keep, hessian(correlated(400, shape[1])), 0.65)


def test_sparsegpt_equals_the_surgeon_from_a_mask_it_did_not_choose():
    keep = torch.rand(24, 200) > 0.3
    keep[:, :20] = False  # more zeros in the first block than its share
    weight = torch.randn(24, 200, dtype=torch.float64) * keep
    assert_equals_surgeon(weight, keep, hessian(correlated(400, 200)), 0.5)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 5)])
def test_sparsegpt_equals_the_surgeon_in_groups(n, m):
    weight = torch.randn(24, 200, dtype=torch.float64)
    assert_equals_surgeon(weight, full(24, 200), hessian(correlated(400, 200)), 0.5, Pattern(n, m))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_sparsegpt_completes_a_pattern_begun_earlier(n, m):
    H, pattern = hessian(correlated(400, 200)), Pattern(n, m)
    weight, keep, _ = sparsegpt_one(torch.randn(24, 200, dtype=torch.float64), full(24, 200), H, 0.0, pattern, share=0.6)
    assert keep.view(24, -1, m).sum(2).min() >= n
    assert int((~keep).sum()) == pytest.approx(0.6 * 24 * 200 * pattern.sparsity, rel=0.02)
    assert_equals_surgeon(weight, keep, H, 0.0, pattern)


@pytest.mark.parametrize("rate", [0.123, 0.5, 0.655])
def test_sparsegpt_meets_its_count_over_uneven_blocks(rate):
    _, keep, _ = sparsegpt_one(torch.randn(7, 300), full(7, 300), hessian(correlated(400, 300)), rate, UNSTRUCTURED)
    assert int((~keep).sum()) == round(7 * 300 * rate)


def test_sparsegpt_meets_its_count_where_the_last_columns_had_more_zeros():
    keep = torch.rand(24, 300) > 0.2
    keep[:, 200:] &= torch.rand(24, 100) > 0.8
    weight, H = torch.randn(24, 300) * keep, hessian(correlated(400, 300))
    zeros = int((~keep).sum())
    _, found, _ = sparsegpt_one(weight, keep, H, 0.55, UNSTRUCTURED)
    assert zeros < int((~found).sum()) == round(24 * 300 * 0.55) and not (found & ~keep).any()
    assert torch.equal(sparsegpt_one(weight, keep, H, 0.3, UNSTRUCTURED)[1], keep), "more zeros than asked for already"


def test_sparsegpt_masks_are_nested():
    weight, keep, H = torch.randn(24, 200), full(24, 200), hessian(correlated(400, 200)).float()
    for rate in (0.342, 0.549, 0.655, 0.694, 0.7):
        before = keep
        weight, keep, _ = sparsegpt_one(weight, keep, H, rate, UNSTRUCTURED)
        assert not (keep & ~before).any()


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, Pattern(2, 4)], ids=["unstructured", "2:4"])
def test_sparsegpt_reconstructs_better_than_wanda(pattern):
    weight, x = torch.randn(48, 128), correlated(500, 128)
    errors = {}
    for name in ("wanda", "sparsegpt"):
        solution = solve(name, weight, full(48, 128), x, 0.5, pattern)
        assert int((~solution.keep_OI).sum()) == 48 * 64
        errors[name] = float((x @ (weight - solution.weight_OI).double().T).square().sum())
    assert errors["sparsegpt"] < 0.8 * errors["wanda"]


def test_the_upper_factor_is_that_of_the_damped_inverse():
    H = hessian(correlated(400, 50))
    U, damping = sparsegpt.inverse_factor(H)
    damped = H + damping * H.diagonal().mean() * torch.eye(50, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(50, dtype=torch.float64), rtol=0, atol=1e-8)
    assert torch.equal(U, U.triu())


def test_the_hessian_is_left_as_it_was():
    H = hessian(correlated(400, 50))
    before = H.clone()
    sparsegpt_one(torch.randn(6, 50), full(6, 50), H, 0.5, UNSTRUCTURED)
    assert torch.equal(H, before)


def test_fewer_tokens_than_features_need_no_more_damping():
    weight = torch.randn(8, 64)
    solution = solve("sparsegpt", weight, full(8, 64), correlated(10, 64), 0.5)
    assert solution.raised_damping is None
    assert torch.isfinite(solution.weight_OI).all()


def indefinite(negative):
    """A 16 x 16 matrix with one negative eigenvalue, others 1."""
    Q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    return Q @ torch.diag(torch.tensor([negative] + [1.0] * 15, dtype=torch.float64)) @ Q.T


@pytest.mark.parametrize(("negative", "damping"), [(-0.05, 0.1), (-0.5, 1.0), (-3.0, 10.0)])
def test_damping_is_raised_and_recorded_when_the_factorisation_fails(negative, damping, caplog):
    with caplog.at_level(logging.WARNING, "losa"):
        weight, _, used = sparsegpt_one(torch.randn(4, 16).double(), full(4, 16), indefinite(negative), 0.5, UNSTRUCTURED)
    assert used == pytest.approx(damping)
    assert "does not factorise with damping 0.01" in caplog.text
    assert torch.isfinite(weight).all()


def test_raised_damping_equals_the_surgeon_with_that_damping():
    weight, H = torch.randn(4, 16, dtype=torch.float64), indefinite(-0.05)
    expected, _ = references.obs_prune(weight, full(4, 16), H, 0.5, damping=0.1)
    torch.testing.assert_close(sparsegpt_one(weight, full(4, 16), H, 0.5, UNSTRUCTURED)[0], expected, rtol=1e-8, atol=1e-8)


def test_a_hopeless_hessian_is_refused():
    with pytest.raises(ValueError, match="does not factorise even with damping 10"):
        sparsegpt_one(torch.randn(4, 16), full(4, 16), indefinite(-10.0), 0.5, UNSTRUCTURED)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(bad):
    H = hessian(correlated(400, 16))
    H[2, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        sparsegpt_one(torch.randn(4, 16), full(4, 16), H, 0.5, UNSTRUCTURED)


def test_sparsegpt_refuses_a_width_the_pattern_does_not_divide():
    with pytest.raises(ValueError, match="expected a multiple of 4"):
        sparsegpt_one(torch.randn(4, 18), full(4, 18), hessian(correlated(50, 18)), 0.5, Pattern(2, 4))


def test_sparsegpt_takes_groups_wider_than_its_blocks():
    new, keep, _ = sparsegpt_one(torch.randn(4, 256), full(4, 256), hessian(correlated(400, 256)), 0.5, Pattern(128, 256))
    assert keep.sum(1).eq(128).all() and not new[~keep].any()


def dead_inputs(size=1.0):
    x = correlated(400, 40) * size
    x[:, [1, 2, 17]] = 0.0
    return x


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, Pattern(2, 4)], ids=["unstructured", "2:4"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_inputs_that_never_fire_go_first(pattern, size):
    weight = torch.randn(8, 40) + 5 * torch.eye(8, 40)
    solution = solve("sparsegpt", weight, full(8, 40), dead_inputs(size), 0.5, pattern)
    assert torch.isfinite(solution.weight_OI).all()
    assert not solution.keep_OI[:, [1, 2, 17]].any()


@pytest.mark.parametrize("pattern", [UNSTRUCTURED, Pattern(2, 4)], ids=["unstructured", "2:4"])
def test_inputs_that_never_fire_equal_the_surgeon(pattern):
    weight = torch.randn(8, 40, dtype=torch.float64)
    assert_equals_surgeon(weight, full(8, 40), hessian(dead_inputs()), 0.5, pattern)


def test_inputs_that_are_all_dead_leave_the_count_right():
    solution = solve("sparsegpt", torch.randn(8, 40), full(8, 40), torch.zeros(20, 40), 0.5)
    assert torch.isfinite(solution.weight_OI).all()
    assert int((~solution.keep_OI).sum()) == 160


# all of them


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("pattern", [UNSTRUCTURED, Pattern(2, 4)], ids=["unstructured", "2:4"])
def test_zeros_outside_the_mask_are_bitwise_positive(name, pattern):
    weight = -torch.rand(24, 160) - 0.1  # a product with the mask would leave -0
    solution = solve(name, weight, full(24, 160), correlated(200, 160), 0.5, pattern)
    assert solution.weight_OI.dtype == torch.float32
    assert not solution.weight_OI.view(torch.int32)[~solution.keep_OI].any()


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_survivors_are_left_alone_by_mask_only_pruners(name):
    weight = torch.randn(8, 40)
    solution = solve(name, weight, full(8, 40), correlated(100, 40), 0.5)
    assert torch.equal(solution.weight_OI[solution.keep_OI], weight[solution.keep_OI])
    assert not PRUNERS[name].updates_weights


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize(
    ("rate", "pattern", "share"), [(0.55, UNSTRUCTURED, 1.0), (0.0, Pattern(2, 4), 1.0), (0.0, Pattern(2, 4), 0.4)]
)
def test_layers_solved_together_are_solved_as_if_alone(pruner, rate, pattern, share):
    """q, k and v of different heights, one of them pruned before."""
    x = correlated(300, 160)
    weights = [torch.randn(rows, 160, dtype=torch.float64) for rows in (24, 8, 16)]
    masks = [full(24, 160), full(8, 160), torch.rand(16, 160) > 0.2]
    solver = get_pruner(pruner)
    statistic = solver.collect(None, x.float()) if solver.collect else None
    together = solver.solve(weights, masks, statistic, [rate] * 3, pattern, share)
    for weight, mask, solution in zip(weights, masks, together, strict=True):
        alone = solver.solve([weight], [mask], statistic, [rate], pattern, share)[0]
        assert torch.equal(solution.keep_OI, alone.keep_OI)
        torch.testing.assert_close(solution.weight_OI, alone.weight_OI, rtol=1e-9, atol=1e-9)
