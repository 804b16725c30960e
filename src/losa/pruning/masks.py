"""Keep-masks: which weights live. True keeps, False is a zero for ever.

The mask is data. It is never re-derived as `weight != 0` from a merged checkpoint, which prunes by accident whatever
happens to round to zero. Every function here takes the mask of the step before and returns one nested in it.

Legend: `O` out_features, `I` in_features.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Where zeros may stand: anywhere (`n == m == 0`) or `n` kept of every `m` neighbours along a row."""

    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Reads `unstructured`, `2:4`, `4:8`, or any other `n:m`.

        Raises:
            ValueError: not one of these, or not 0 < n < m.
        """
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match and 0 < int(match[1]) < int(match[2]):
            return cls(int(match[1]), int(match[2]))
        raise ValueError(f"pattern is {text!r}, expected 'unstructured' or 'n:m' with 0 < n < m, such as 2:4 or 4:8")

    @property
    def structured(self) -> bool:
        """Whether zeros are counted per group of `m`."""
        return self.m > 0

    @property
    def sparsity(self) -> float:
        """The ratio of zeros an n:m pattern implies."""
        return 1 - self.n / self.m


def pruned_count(numel: int, rate: float) -> int:
    """Zeros that `rate` means for `numel` weights; one rounding rule for the whole project."""
    return min(round(numel * rate), numel)


def keep_unstructured(score_OI: Tensor, keep_OI: Tensor, rate: float) -> Tensor:
    """Prunes the lowest scores of each output row until the tensor holds `pruned_count(numel, rate)` zeros.

    Scores are compared within a row, as Wanda does (https://arxiv.org/abs/2306.11695, section 3): all rows lose the same
    number `k`; the remainder that does not divide by the rows is taken, one each, from the rows whose next score is lowest.
    (The released Wanda rounds down instead and misses its rate by up to `1 / I`.)

    Args:
        score_OI: importance of each weight, higher is kept.
        keep_OI: mask of the step before; what is False stays False and counts as pruned.
        rate: ratio of zeros over the whole tensor, in [0, 1).
    """
    rows = score_OI.shape[0]
    count = max(pruned_count(score_OI.numel(), rate), int((~keep_OI).sum()))
    per_row, extra = divmod(count, rows)
    score_OI = torch.where(keep_OI, score_OI.float() if score_OI.dtype.itemsize < 4 else score_OI, -torch.inf)
    order_OI = torch.argsort(score_OI, dim=1, stable=True)
    lost_OI = torch.zeros_like(keep_OI)
    lost_OI.scatter_(1, order_OI[:, :per_row], True)
    if extra:
        next_O = order_OI[:, per_row]
        chosen = torch.argsort(score_OI.gather(1, next_O[:, None])[:, 0], stable=True)[:extra]
        lost_OI[chosen, next_O[chosen]] = True
    return keep_OI & ~lost_OI


def keep_n_of_m(score_OI: Tensor, keep_OI: Tensor, pattern: Pattern, share: float = 1.0) -> Tensor:
    """Prunes the `m - n` lowest scores of every group of `m` neighbours, or on the way there only a `share` of them.

    With `share < 1` (an early dynamic step) the lowest-scored `share` of these candidates goes, over the whole tensor.
    No group ever loses more than `m - n`, so the next step can complete the pattern with a nested mask.

    Args:
        share: ratio of the candidates that are pruned now, in [0, 1].

    Raises:
        ValueError: `I` is not a multiple of `m`.
    """
    rows, columns = score_OI.shape
    if columns % pattern.m:
        raise ValueError(f"in_features is {columns}, expected a multiple of {pattern.m} for pattern {pattern.n}:{pattern.m}")
    score_OI = torch.where(keep_OI, score_OI.float() if score_OI.dtype.itemsize < 4 else score_OI, -torch.inf)
    groups = score_OI.view(rows, columns // pattern.m, pattern.m)
    lowest = torch.argsort(groups, dim=2, stable=True)[..., : pattern.m - pattern.n]
    candidate_OI = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, lowest, True).view(rows, columns)
    if share < 1:
        candidates = int(candidate_OI.sum())
        count = min(candidates, max(pruned_count(candidates, share), int((~keep_OI).sum())))
        ranked = torch.where(candidate_OI, score_OI, torch.inf).flatten().argsort(stable=True)[:count]
        candidate_OI = torch.zeros_like(candidate_OI).view(-1).index_fill_(0, ranked, True).view(rows, columns)
    return keep_OI & ~candidate_OI


def select(score_OI: Tensor, keep_OI: Tensor, rate: float, pattern: Pattern, share: float) -> Tensor:
    """Keep-mask by any score, unstructured per row at `rate`, or n:m at `share` of the pattern."""
    if pattern.structured:
        return keep_n_of_m(score_OI, keep_OI, pattern, share)
    return keep_unstructured(score_OI, keep_OI, rate)
