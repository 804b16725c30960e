"""How much to prune where, and how much rank to give: three closed forms. Pure functions on plain numbers.

* `cubic_sparsity`: the target of step `t` of `T`; most pruning happens early, while there is training left to recover.
* `layer_rates`: LoSA section 3.2 states a linear programme; its exact solution is a sort. (The release calls SLSQP, which
  stops off the optimum in most cases.)
* `allocate_ranks`: LoSA section 3.3, ranks proportional to reconstruction error, at a fixed total.
"""

from collections.abc import Collection, Sequence


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

    `w_l` is the block's share of the weights. The optimum of this linear programme: every block starts at its lower
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
    count = len(importance)
    previous = [0.0] * count if previous is None else list(previous)
    if not count or len(sizes) != count or len(previous) != count:
        raise ValueError(f"got {count} importances, {len(sizes)} sizes and {len(previous)} previous rates; expected as many")
    if min(sizes) < 1 or delta < 0 or any(value != value for value in importance):
        raise ValueError(f"expected sizes >= 1, delta >= 0 and no NaN; found {list(sizes)}, {delta} and {list(importance)}")
    if not 0 <= target < 1:
        raise ValueError(f"target is {target}, expected a ratio in [0, 1)")
    total = sum(sizes)
    share = [size / total for size in sizes]
    open_share = sum(share[block] for block in range(count) if block not in protected)
    if target >= open_share:
        raise ValueError(f"target is {target}, expected less than {open_share:.4f}, what blocks outside {list(protected)} hold")
    mean = target / open_share if protected else target  # of the blocks that are not protected
    # The band is cut symmetrically at its open end, so that the mean stays reachable.
    width = min(delta, (1 - mean) / 2)
    lower = [0.0 if block in protected else max(mean - width, 0.0, past) for block, past in enumerate(previous)]
    upper = [0.0 if block in protected else max(mean + width, past) for block, past in enumerate(previous)]
    room = target - sum(w * low for w, low in zip(share, lower, strict=True))
    if room < -1e-9:
        raise ValueError(f"target {target} is below what is already pruned ({target - room:.6f}); sparsity only grows")
    rates = list(lower)
    for block in sorted(range(count), key=lambda i: (importance[i], i)):
        step = min(upper[block] - lower[block], max(room, 0.0) / share[block])
        rates[block] += step
        room -= step * share[block]
    return rates


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
