"""Promised: the cubic schedule; layer rates that are the optimum of the paper's linear programme, exact in the mean and always
feasible; ranks that sum to their budget and follow the errors."""

import itertools
import random

import numpy as np
import pytest
import references

from losa.allocation import allocate_ranks, cubic_sparsity, default_delta, equal_slope_rates, layer_rates, spread


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


# rates in proportion to a value


def in_band(rates, target, delta, previous, protected=(), tolerance=1e-9):
    width = min(delta, (1 - target) / 2)
    lower = [max(target - width, 0.0, past) for past in previous]
    upper = [max(target + width, past) for past in previous]
    bounds = zip(rates, lower, upper, strict=True)
    return all(low - tolerance <= rate <= high + tolerance for rate, low, high in bounds)


def test_values_evenly_spaced_give_rates_evenly_spaced_over_the_whole_band():
    assert spread([3.0, 1.0, 2.0], [5, 5, 5], 0.7, 0.08) == pytest.approx([0.62, 0.78, 0.70], abs=1e-12)


def test_skewed_values_stay_in_the_band_and_the_others_in_proportion():
    rates = spread([0.0, 0.1, 0.0, 1.0], [1] * 4, 0.6, 0.1)
    assert rates == pytest.approx([0.640, 0.620, 0.640, 0.5], abs=1e-12)  # the last is cut: 0.64 - 0.2 is below the band


@pytest.mark.parametrize("seed", range(60))
def test_spread_is_one_offset_before_cutting(seed):
    """Against scipy's root of the same equation, written as it stands in the docstring."""
    from scipy.optimize import brentq

    _, values, sizes, target, delta = random_case(seed)
    delta = delta or 0.05  # of a band without width scipy sees no sign change
    width = min(delta, (1 - target) / 2)
    extent = (max(values) - min(values)) or 1.0

    def clipped(offset):
        wanted = [offset - 2 * width * (value - min(values)) / extent for value in values]
        return [min(max(want, target - width, 0.0), target + width) for want in wanted]

    offset = brentq(lambda c: mean(clipped(c), sizes) - target, -1.0, 3.0, xtol=1e-15)
    rates = spread(values, sizes, target, delta)
    assert rates == pytest.approx(clipped(offset), abs=1e-9)
    assert mean(rates, sizes) == pytest.approx(target, abs=1e-12)
    assert in_band(rates, target, delta, [0.0] * len(sizes))


@pytest.mark.parametrize("seed", range(60))
def test_a_higher_value_never_loses_more_and_equal_values_lose_alike(seed):
    draw, values, sizes, target, delta = random_case(seed)
    values[draw.randrange(len(values))] = values[0]
    pairs = sorted(zip(values, spread(values, sizes, target, delta), strict=True))
    for (value, rate), (higher, lower_rate) in itertools.pairwise(pairs):
        assert lower_rate <= rate + 1e-12
        assert value < higher or lower_rate == rate


def test_equal_values_are_uniform():
    assert spread([0.3] * 3, [3, 1, 2], 0.6, 0.1) == pytest.approx([0.6] * 3, abs=1e-12)


# rates at equal slope


def random_curves(draw, count, pieces=8):
    """Convex cost curves, some with equal slopes, of different lengths."""
    curves = []
    for _ in range(count):
        slopes = sorted(draw.choice([0.0, 0.5, draw.random(), draw.expovariate(1)]) for _ in range(draw.randint(1, pieces)))
        curves.append([0.0, *itertools.accumulate(slopes)])
    return curves


def cost(curves, rates):
    return sum(float(np.interp(rate, np.linspace(0, 1, len(curve)), curve)) for curve, rate in zip(curves, rates, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_equal_slopes_are_the_optimum_of_the_convex_programme(seed):
    draw, _, sizes, target, delta = random_case(seed)
    curves = random_curves(draw, len(sizes))
    previous = spread([draw.random() for _ in sizes], sizes, target * draw.uniform(0, 1), delta)
    best = references.linprog_curves(curves, sizes, target, delta, previous)
    rates = equal_slope_rates(curves, sizes, target, delta, previous)
    assert cost(curves, rates) == pytest.approx(best, abs=1e-8)
    assert mean(rates, sizes) == pytest.approx(target, abs=1e-12)
    assert in_band(rates, target, delta, previous)


def test_equal_slopes_equal_a_brute_force_over_single_weights():
    """Three layers of 4, 4 and 8 weights, one piece a weight: the cheapest set of 8 removed weights, of all that are possible."""
    draw = random.Random(5)
    sizes = [4, 4, 8]
    prices = [sorted(draw.random() for _ in range(size)) for size in sizes]
    choices = [k for k in itertools.product(*(range(size + 1) for size in sizes)) if sum(k) == 8]
    choices = [k for k in choices if all(abs(n / size - 0.5) <= 0.25 for n, size in zip(k, sizes, strict=True))]
    best = min(choices, key=lambda k: sum(sum(p[:n]) for p, n in zip(prices, k, strict=True)))
    curves = [[0.0, *itertools.accumulate(p)] for p in prices]
    rates = equal_slope_rates(curves, sizes, 0.5, 0.25)
    assert [rate * size for rate, size in zip(rates, sizes, strict=True)] == pytest.approx(best)


def test_a_layer_in_its_band_pays_the_same_price_as_the_others():
    """Quadratic costs: equal slopes a_l s_l / w_l, solved by hand; s = (w_l / a_l) * multiplier."""
    grid = np.linspace(0, 1, 2001)
    curves = [list(a * grid**2) for a in (1.0, 2.0, 4.0)]
    rates = equal_slope_rates(curves, [1, 1, 1], 0.35, 0.3)
    assert rates == pytest.approx([0.6, 0.3, 0.15], abs=1e-3)


# both


def rules_of_thumb(draw, sizes):
    """The two functions, each on random input, as `(target, delta, previous, protected) -> rates`."""
    values, curves = [draw.random() for _ in sizes], random_curves(draw, len(sizes))
    return [
        lambda *arguments: spread(values, sizes, *arguments),
        lambda *arguments: equal_slope_rates(curves, sizes, *arguments),
    ]


@pytest.mark.parametrize("seed", range(100))
def test_any_targets_that_do_not_shrink_are_feasible(seed):
    """Rule, values and band change from step to step, and the rates before came from anywhere."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 30) for _ in range(draw.randint(1, 10))]
    previous = [draw.uniform(0, 0.9) for _ in sizes] if draw.random() < 0.5 else None
    target = mean(previous, sizes) if previous else 0.0
    for _ in range(6):
        target += draw.choice([0.0, 0.02, 0.3]) * (0.98 - target)
        rates = draw.choice(rules_of_thumb(draw, sizes))(target, draw.choice([0.0, 0.01, 0.1, 0.5]), previous)
        assert all(now >= past for now, past in zip(rates, previous or rates, strict=True))
        assert all(0 <= rate < 1 for rate in rates)
        assert mean(rates, sizes) == pytest.approx(target, abs=1e-9)
        previous = rates


@pytest.mark.parametrize("seed", range(40))
def test_protected_entries_keep_all_for_every_rule(seed):
    draw, _, sizes, target, delta = random_case(seed)
    protected = draw.sample(range(len(sizes)), draw.randint(0, len(sizes) - 1))
    free = [entry for entry in range(len(sizes)) if entry not in protected]
    target *= sum(sizes[entry] for entry in free) / sum(sizes)
    for rule in rules_of_thumb(draw, sizes):
        rates = rule(target, delta, None, protected)
        assert all(rates[entry] == 0 for entry in protected)
        assert mean(rates, sizes) == pytest.approx(target, abs=1e-9)
        inner = mean([rates[entry] for entry in free], [sizes[entry] for entry in free])
        assert in_band([rates[entry] for entry in free], inner, delta, [0.0] * len(free))


def curves_of(values):
    return [[0.0, value] for value in values]


@pytest.mark.parametrize("function", [spread, lambda values, *rest: equal_slope_rates(curves_of(values), *rest)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 0.5, 0.1), "got 0 "),
        (([1.0], [1, 2], 0.5, 0.1), "2 sizes"),
        (([1.0, 2.0], [1, 1], 0.5, 0.1, [0.1]), "1 previous"),
        (([1.0], [0], 0.5, 0.1), "sizes >= 1"),
        (([1.0], [1], 0.5, -0.1), "delta >= 0"),
        (([1.0], [1], 0.5, float("nan")), "delta >= 0"),
        (([1.0], [1], 1.0, 0.1), "target is 1.0"),
        (([1.0], [1], -0.1, 0.1), "target is -0.1"),
        (([1.0, 2.0], [1, 1], 0.5, 0.1, [0.6, 0.6]), "sparsity only grows"),
        (([1.0, 2.0], [1, 1], 0.5, 0.1, None, [0]), r"less than 0.5000, what entries outside \[0\]"),
        (([1.0, float("nan")], [1, 1], 0.5, 0.1), "finite"),
        (([1.0, float("inf")], [1, 1], 0.5, 0.1), "finite"),
    ],
)
def test_requests_that_no_rule_can_meet_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize(("curve", "message"), [([0.0], "two or more"), ([0.0, 0.6, 0.9], "not convex")])
def test_curves_that_are_none_are_refused(curve, message):
    with pytest.raises(ValueError, match=message):
        equal_slope_rates([curve], [3], 0.5, 0.1)
