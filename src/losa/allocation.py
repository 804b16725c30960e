"""How much to prune where, and how much rank to give. Pure functions on plain numbers.

* `cubic_sparsity`: the target of step `t` of `T`; most pruning happens early, while there is training left to recover.
* `layer_rates`: LoSA section 3.2 states a linear programme; its exact solution is a sort. (The release calls SLSQP, which
  stops off the optimum in most cases.)
* `spread`: rates that fall in proportion to a value, as OWL and DLP set them.
* `equal_slope_rates`: rates that minimise the sum of given convex costs; its exact solution is a sort too.
* `allocate_ranks`: LoSA section 3.3, ranks proportional to reconstruction error, at a fixed total.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite


def cubic_sparsity(step: int, steps: int, final: float) -> float:
    """Target of dynamic step `step` (1-based) of `steps`: `s_t = s (1 - (1 - t/T)^3)`; a ratio in (0, `final`]."""
    if not 1 <= step <= steps:
        raise ValueError(f"step is {step}, expected 1..{steps}")
    return final * (1 - (1 - step / steps) ** 3)


def default_delta(sparsity: float) -> float:
    """How far a block's rate may leave the mean: .01 up to 50 %, .02 up to 60 %, .03 above.

    Differs from the release: defined above 70 % too.
    """
    if sparsity <= 0.5:
        return 0.01
    return 0.02 if sparsity <= 0.6 else 0.03


def layer_rates(
    importance: Sequence[float],
    sizes: Sequence[int],
    target: float,
    delta: float,
    previous: Sequence[float] | None = None,
    protected: Collection[int] = (),
) -> list[float]:
    """Sparsity rate of each block: minimise `sum_l w_l s_l I_l` with `sum_l w_l s_l = target`, `|s_l - target| <= delta`.

    `w_l` is the ratio of all weights that the block holds. The optimum of this linear programme: every block starts at its lower
    bound; then, from the least important block up, each is raised to its upper bound until the budget is spent. At most one
    block ends in between. Ties break by index, the earlier block being pruned more.

    Differs from the paper: `previous` (the rates already applied) is a lower bound too, for a weight once pruned stays
    pruned. Whatever the previous importances were, this stays feasible as long as `target` does not shrink.

    Args:
        importance: `L` values; only their order matters.
        sizes: prunable weights of each block.
        target: mean sparsity over all weights, in [0, 1).
        delta: half-width of the allowed band, >= 0. The band is cut to [0, 1).
        previous: rates applied in the step before, or None.
        protected: blocks that keep all weights; the band of the others then lies around what they must lose instead.

    Returns:
        `L` rates in [0, 1) whose weighted mean is `target` to rounding.

    Raises:
        ValueError: lengths differ, a block without weights, a negative `delta`, a NaN, `target` outside [0, 1) or below the
            weighted mean of `previous`, or more than the blocks that are not protected hold.
    """
    band = _band(len(importance), "importances", sizes, target, delta, previous, protected, unit="blocks")
    if any(value != value for value in importance):
        raise ValueError(f"expected no NaN among importances; found {list(importance)}")
    rates = list(band.lower)
    room = target - band.mean(rates)
    for block in sorted(range(len(rates)), key=lambda i: (importance[i], i)):
        step = min(band.upper[block] - rates[block], max(room, 0.0) / band.weight[block])
        rates[block] += step
        room -= step * band.weight[block]
    return rates


@dataclass(frozen=True)
class _Band:
    """Where rates may lie.

    Attributes:
        width: its half-width after cutting it to [0, 1).
        weight: `w_l`, the ratio of all weights that an entry holds.
        lower, upper: bounds of each entry; both 0 where it is protected.
    """

    width: float
    weight: list[float]
    lower: list[float]
    upper: list[float]

    def mean(self, rates: Sequence[float]) -> float:
        """Mean over all weights."""
        return sum(w * rate for w, rate in zip(self.weight, rates, strict=True))


def _band(
    count: int,
    what: str,
    sizes: Sequence[int],
    target: float,
    delta: float,
    previous: Sequence[float] | None,
    protected: Collection[int],
    unit: str = "entries",
) -> _Band:
    """The band of rates of `count` entries with `what`, and the errors of the functions below and above.

    Where the band's lower end would ask for more than `target`, because the previous rates did not come from such a band, the
    previous rates alone are the lower bounds. So any target that does not shrink is feasible.
    """
    past = [0.0] * count if previous is None else list(previous)
    if not count or len(sizes) != count or len(past) != count:
        raise ValueError(f"got {count} {what}, {len(sizes)} sizes and {len(past)} previous rates; expected as many")
    if min(sizes) < 1 or not delta >= 0:
        raise ValueError(f"expected sizes >= 1 and delta >= 0; found {list(sizes)} and {delta}")
    if not 0 <= target < 1:
        raise ValueError(f"target is {target}, expected a ratio in [0, 1)")
    total, free = sum(sizes), [entry not in protected for entry in range(count)]
    open_size = sum(size for size, is_free in zip(sizes, free, strict=True) if is_free)
    if target * total >= open_size:
        found = f"{open_size / total:.4f}, what {unit} outside {sorted(protected)} hold"
        raise ValueError(f"target is {target}, expected less than {found}")
    weight = [size / total for size in sizes]
    mean = target * total / open_size if protected else target  # of the entries that are not protected
    width = min(delta, (1 - mean) / 2)
    past = [rate if is_free else 0.0 for rate, is_free in zip(past, free, strict=True)]
    lower = [max(mean - width, 0.0, rate) if is_free else 0.0 for rate, is_free in zip(past, free, strict=True)]
    upper = [max(mean + width, rate) if is_free else 0.0 for rate, is_free in zip(past, free, strict=True)]
    band = _Band(width, weight, lower, upper)
    if (pruned := band.mean(past)) > target + 1e-9:
        raise ValueError(f"target {target} is below what is already pruned ({pruned:.6f}); sparsity only grows")
    return band if band.mean(lower) <= target + 1e-9 else _Band(width, weight, past, upper)


def spread(
    values: Sequence[float],
    sizes: Sequence[int],
    target: float,
    delta: float,
    previous: Sequence[float] | None = None,
    protected: Collection[int] = (),
) -> list[float]:
    """Sparsity rates that fall in proportion to `values`, as OWL (https://arxiv.org/abs/2310.05175, section 3.3) sets them.

    Of the entries that are not protected, the lowest value asks for `delta` above the target, the highest for `delta` below it,
    and the others lie between them in proportion. Then one offset is added to all rates, each being cut to its bounds, so that
    the mean is the target: `s_i = clip(c - 2 delta (v_i - min v) / (max v - min v), lower_i, upper_i)`, `c` by bisection.

    Differs from the release of OWL: rates stay in the band also where values are skewed, blocks may differ in size, and previous
    rates are lower bounds. Equal values give equal rates, as far as previous rates allow.

    Args:
        values: one finite number an entry (a block or a layer); the higher, the less is pruned.
        sizes: prunable weights of each entry.
        target: mean sparsity over all weights, in [0, 1).
        delta: half-width of the allowed band, >= 0. The band is cut to [0, 1).
        previous: rates applied in the step before, or None.
        protected: entries that keep all weights; the band of the others then lies around what they must lose instead.

    Returns:
        Rates in [0, 1) whose weighted mean is `target` to rounding, none below its previous rate.

    Raises:
        ValueError: lengths differ, an entry without weights, a negative `delta`, a value that is not finite, `target` outside
            [0, 1) or below the weighted mean of `previous`, or more than the entries that are not protected hold.
    """
    band = _band(len(values), "values", sizes, target, delta, previous, protected)
    if not all(isfinite(value) for value in values):
        raise ValueError(f"expected finite values, found {list(values)}")
    free = [value for entry, value in enumerate(values) if entry not in protected]
    lowest, extent = min(free), max(free) - min(free)
    falls = [2 * band.width * (value - lowest) / extent if extent > 0 else 0.0 for value in values]

    def rates(offset: float) -> list[float]:
        bounds = zip(falls, band.lower, band.upper, strict=True)
        return [min(max(offset - fall, low), high) for fall, low, high in bounds]

    low, high = min(band.lower), max(band.upper) + 2 * band.width
    for _ in range(64):  # down to 2^-64, below what a rate near 1 resolves
        middle = (low + high) / 2
        low, high = (middle, high) if band.mean(rates(middle)) < target else (low, middle)
    return rates(high)


def equal_slope_rates(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[int],
    target: float,
    delta: float,
    previous: Sequence[float] | None = None,
    protected: Collection[int] = (),
) -> list[float]:
    """Sparsity rate of each layer: minimise `sum_l C_l(s_l)` with `sum_l w_l s_l = target` and every rate in its band.

    `C_l` is convex and piecewise linear, given by its values at equally spaced rates; `w_l` is the ratio of weights in the layer.
    At the optimum all layers inside their bands lose their next weight at the same price, the Lagrange multiplier. It is found
    without a search: every layer starts at its lower bound, then the pieces of all curves are spent in order of
    price (slope over `w_l`), the cheapest first, until the budget is spent. Ties break by index.

    Args:
        costs: of each layer, at rates `0, 1/n, 2/n, ..., 1`; convex, at least two values. `n` may differ.
        sizes, target, delta, previous, protected: as of `spread`.

    Returns:
        Rates in [0, 1) whose weighted mean is `target` to rounding, none below its previous rate.

    Raises:
        ValueError: as `spread`; a curve of fewer than two values, or one that is not finite or not convex.
    """
    band = _band(len(costs), "cost curves", sizes, target, delta, previous, protected)
    for layer, curve in enumerate(costs):
        _check_convex(layer, curve)
    pieces = []  # (price, layer, piece, length)
    for layer, curve in enumerate(costs):
        count = len(curve) - 1
        for piece, (before, after) in enumerate(pairwise(curve)):
            start, end = max(piece / count, band.lower[layer]), min((piece + 1) / count, band.upper[layer])
            if start < end:
                pieces.append(((after - before) * count / band.weight[layer], layer, piece, end - start))
    rates = list(band.lower)
    room = target - band.mean(rates)
    for _, layer, _, length in sorted(pieces):
        if room <= 0:
            break
        step = min(length, room / band.weight[layer])
        rates[layer] += step
        room -= step * band.weight[layer]
    return [min(rate, high) for rate, high in zip(rates, band.upper, strict=True)]  # pieces add up to the bound, but for rounding


def _check_convex(layer: int, curve: Sequence[float]) -> None:
    if len(curve) < 2 or not all(isfinite(cost) for cost in curve):
        raise ValueError(f"the cost curve of entry {layer} needs two or more finite values, found {list(curve)[:8]}")
    slopes = [after - before for before, after in pairwise(curve)]
    slack = 1e-9 * max(abs(cost) for cost in curve)
    if any(after < before - slack for before, after in pairwise(slopes)):
        raise ValueError(f"the cost curve of entry {layer} is not convex: what is removed first must be the cheapest")


def allocate_ranks(errors: Sequence[float], mean_rank: float, max_rank: int) -> list[int]:
    """Adapter rank of each block from its reconstruction error: `r_l = round(L_l / mean(L) * Omega)`, LoSA equation 9.

    Clipped to [1, `max_rank`], then corrected so that the ranks sum to `round(L * Omega)` exactly: ranks are taken from the
    blocks with the smallest errors, or given to those with the largest, one at a time in turn.

    Differs from the release: the budget is met, and ranks above 8 take effect.

    Raises:
        ValueError: no errors, a negative or non-finite error, or `mean_rank` outside [1, `max_rank`].
    """
    if not errors or any(not 0 <= e < float("inf") for e in errors):
        raise ValueError(f"reconstruction errors must be finite and >= 0, found {list(errors)}")
    if not 1 <= mean_rank <= max_rank:
        raise ValueError(f"mean rank is {mean_rank}, expected 1..{max_rank} (the largest rank of any block)")
    count, mean = len(errors), sum(errors) / len(errors)
    ranks = [min(max(round(e / mean * mean_rank) if mean else round(mean_rank), 1), max_rank) for e in errors]
    budget = round(count * mean_rank)
    ascending = sorted(range(count), key=lambda i: (errors[i], i))
    while missing := budget - sum(ranks):
        step, order = (1, ascending[::-1]) if missing > 0 else (-1, ascending)
        movable = [block for block in order if 1 <= ranks[block] + step <= max_rank]
        for block in movable[: abs(missing)]:
            ranks[block] += step
    return ranks
