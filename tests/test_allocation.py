"""Promised: the cubic schedule; layer rates that are the optimum of the paper's linear programme, exact in the mean and always
feasible; ranks that sum to their budget and follow the errors."""

import random

import pytest
import references

from losa.allocation import allocate_ranks, cubic_sparsity, default_delta, layer_rates


def mean(rates, sizes):
    return sum(r * s for r, s in zip(rates, sizes, strict=True)) / sum(sizes)


def objective(rates, importance, sizes):
    return sum(r * i * s for r, i, s in zip(rates, importance, sizes, strict=True)) / sum(sizes)


def random_case(seed):
    """Importances, unequal sizes, target and delta."""
    draw = random.Random(seed)
    count = draw.randint(1, 12)
    importance = [draw.random() for _ in range(count)]
    sizes = [draw.randint(1, 50) for _ in range(count)]
    return draw, importance, sizes, draw.uniform(0.0, 0.97), draw.choice([0.0, 0.01, 0.03, 0.2])


def test_cubic_schedule_of_five_steps():
    targets = [round(cubic_sparsity(t, 5, 0.7), 3) for t in range(1, 6)]
    assert targets == [0.342, 0.549, 0.655, 0.694, 0.7]


def test_one_step_goes_straight_to_the_target():
    assert cubic_sparsity(1, 1, 0.63) == 0.63


@pytest.mark.parametrize("step", [0, 6, -1])
def test_steps_outside_the_schedule_are_refused(step):
    with pytest.raises(ValueError, match=r"expected 1\.\.5"):
        cubic_sparsity(step, 5, 0.7)


@pytest.mark.parametrize(("sparsity", "delta"), [(0.3, 0.01), (0.5, 0.01), (0.55, 0.02), (0.6, 0.02), (0.7, 0.03), (0.9, 0.03)])
def test_default_delta_follows_the_sparsity(sparsity, delta):
    assert default_delta(sparsity) == delta


@pytest.mark.parametrize("seed", range(60))
def test_rates_are_the_optimum_of_the_linear_programme(seed):
    _, importance, sizes, target, delta = random_case(seed)
    best, _ = references.linprog_rates(importance, sizes, target, delta, [0.0] * len(sizes))
    rates = layer_rates(importance, sizes, target, delta)
    assert objective(rates, importance, sizes) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_rates_are_the_optimum_above_previous_rates_too(seed):
    draw, importance, sizes, target, delta = random_case(seed)
    previous = layer_rates([draw.random() for _ in sizes], sizes, target * draw.uniform(0.3, 1.0), delta)
    best, _ = references.linprog_rates(importance, sizes, target, delta, previous)
    rates = layer_rates(importance, sizes, target, delta, previous)
    assert objective(rates, importance, sizes) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_the_mean_is_the_target(seed):
    _, importance, sizes, target, delta = random_case(seed)
    assert mean(layer_rates(importance, sizes, target, delta), sizes) == pytest.approx(target, abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_rates_stay_in_their_band(seed):
    _, importance, sizes, target, delta = random_case(seed)
    rates = layer_rates(importance, sizes, target, delta)
    assert all(max(target - delta, 0) - 1e-12 <= rate <= target + delta + 1e-12 for rate in rates)


@pytest.mark.parametrize("delta", [0.03, 0.2, 0.5])
def test_rates_stay_below_one_at_an_extreme_target(delta):
    rates = layer_rates([0.3, 0.1, 0.2, 0.9], [4, 1, 2, 3], 0.95, delta)
    assert all(0 <= rate < 1 for rate in rates)


@pytest.mark.parametrize("seed", range(100))
def test_five_steps_of_changing_importance_stay_feasible_and_monotone(seed):
    draw = random.Random(seed)
    sizes = [draw.randint(1, 30) for _ in range(draw.randint(2, 10))]
    final, delta = draw.uniform(0.3, 0.97), draw.choice([0.01, 0.03, 0.1, 0.3])
    previous = None
    for step in range(1, 6):
        target = cubic_sparsity(step, 5, final)
        rates = layer_rates([draw.random() for _ in sizes], sizes, target, delta, previous)
        assert all(now >= past for now, past in zip(rates, previous or rates, strict=True))
        assert mean(rates, sizes) == pytest.approx(target, abs=1e-9)
        previous = rates
    assert all(rate < 1 for rate in previous)


@pytest.mark.parametrize("count", [4, 5, 9])
def test_at_most_one_block_lies_between_its_bounds(count):
    importance = [random.Random(count).random() for _ in range(count)]
    rates = layer_rates(importance, [10] * count, 0.7, 0.03)
    assert sum(0.67 + 1e-9 < rate < 0.73 - 1e-9 for rate in rates) <= 1


def test_the_most_important_blocks_lose_least():
    assert layer_rates([0.9, 0.1, 0.8, 0.2], [1] * 4, 0.5, 0.01) == pytest.approx([0.49, 0.51, 0.49, 0.51])


def test_ties_break_by_index():
    assert layer_rates([1.0] * 4, [1] * 4, 0.5, 0.1) == pytest.approx([0.6, 0.6, 0.4, 0.4])


def test_a_delta_of_zero_is_uniform():
    assert layer_rates([0.9, 0.1, 0.5], [3, 1, 2], 0.6, 0.0) == pytest.approx([0.6] * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 0.5, 0.1), "got 0 importances"),
        (([1.0], [1, 2], 0.5, 0.1), "1 importances, 2 sizes"),
        (([1.0, 2.0], [1, 2], 0.5, 0.1, [0.1]), "1 previous"),
        (([1.0], [1], 1.0, 0.1), "target is 1.0"),
        (([1.0], [1], -0.1, 0.1), "target is -0.1"),
        (([1.0, 2.0], [1, 1], 0.5, 0.1, [0.6, 0.6]), "sparsity only grows"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_rates(*arguments)


def random_errors(seed):
    draw = random.Random(seed)
    errors = [draw.lognormvariate(-3, draw.choice([0.1, 1, 3])) for _ in range(draw.randint(1, 40))]
    return errors, draw.choice([1, 6, 6.5, 7, 10, 16])


@pytest.mark.parametrize("seed", range(60))
def test_ranks_sum_to_the_budget(seed):
    errors, omega = random_errors(seed)
    assert sum(allocate_ranks(errors, omega, 16)) == round(len(errors) * omega)


@pytest.mark.parametrize("seed", range(60))
def test_ranks_lie_between_one_and_the_maximum(seed):
    errors, omega = random_errors(seed)
    assert all(1 <= rank <= 16 for rank in allocate_ranks(errors, omega, 16))


@pytest.mark.parametrize("seed", range(60))
def test_a_larger_error_never_gets_a_smaller_rank(seed):
    errors, omega = random_errors(seed)
    ranks = [rank for _, rank in sorted(zip(errors, allocate_ranks(errors, omega, 16), strict=True), key=lambda pair: pair[0])]
    assert ranks == sorted(ranks)


def test_what_is_missing_goes_to_the_largest_errors():
    # 6 * e / mean = 5.49, 5.84, 6.67 rounds to 5, 6, 7 = 18; at 6.5 it is 5.95, 6.32, 7.23 -> 6, 6, 7 = 19 of 20
    assert allocate_ranks([0.33, 0.351, 0.401], 6.5, 16) == [6, 6, 8]


def test_what_is_too_much_comes_from_the_smallest_errors():
    # 3 * e / mean = 1.62, 2.70, 4.68 rounds to 2, 3, 5 = 10 of 9
    assert allocate_ranks([0.9, 1.5, 2.6], 3, 16) == [1, 3, 5]


@pytest.mark.parametrize("errors", [[0.2] * 5, [0.0] * 5])
def test_equal_errors_get_equal_ranks(errors):
    assert allocate_ranks(errors, 7, 16) == [7] * 5


@pytest.mark.parametrize("errors", [[], [0.1, float("nan")], [float("inf"), 0.1], [0.1, -0.1]])
def test_errors_that_mean_nothing_are_refused(errors):
    with pytest.raises(ValueError, match="finite and >= 0"):
        allocate_ranks(errors, 7, 16)


@pytest.mark.parametrize("omega", [0, 0.5, 17])
def test_a_mean_rank_out_of_range_is_refused(omega):
    with pytest.raises(ValueError, match=r"expected 1\.\.16"):
        allocate_ranks([0.1, 0.2], omega, 16)


# protected blocks


@pytest.mark.parametrize("seed", range(40))
def test_protected_blocks_keep_all_and_the_others_lose_more(seed):
    draw, importance, sizes, target, delta = random_case(seed)
    protected = draw.sample(range(len(sizes)), draw.randint(0, len(sizes) - 1))
    target *= sum(size for block, size in enumerate(sizes) if block not in protected) / sum(sizes)
    rates = layer_rates(importance, sizes, target, delta, protected=protected)
    assert all(rates[block] == 0 for block in protected)
    assert all(0 <= rate < 1 for rate in rates)
    assert mean(rates, sizes) == pytest.approx(target, abs=1e-9)
    free = [block for block in range(len(sizes)) if block not in protected]
    alone = layer_rates(
        [importance[b] for b in free], [sizes[b] for b in free], mean([rates[b] for b in free], [sizes[b] for b in free]), delta
    )
    assert [rates[b] for b in free] == pytest.approx(alone, abs=1e-9)


def test_more_than_the_others_hold_is_refused():
    with pytest.raises(ValueError, match=r"target is 0.6, expected less than 0.5000, what blocks outside \[0, 1\] hold"):
        layer_rates([0.0] * 4, [1] * 4, 0.6, 0.0, protected=[0, 1])
