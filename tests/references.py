"""Independent reference implementations, in plain float64 and written for clarity. They import nothing of losa's.

Where the package uses a trick (chunks, Cholesky factors, closed forms, sorts), the reference uses the definition.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def gram(features: Tensor) -> Tensor:
    """All inner products of the rows."""
    features = features.double()
    return torch.tensor([[float(a @ b) for b in features] for a in features], dtype=torch.float64)


def hsic_cka(gram_a: Tensor, gram_b: Tensor) -> float:
    """`HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))` with `HSIC(K, L) = trace(K H L H)`, H the centring matrix."""
    n = len(gram_a)
    centring = torch.eye(n, dtype=torch.float64) - 1.0 / n

    def hsic(k: Tensor, other: Tensor) -> float:
        return float(torch.trace(k @ centring @ other @ centring))

    return hsic(gram_a, gram_b) / math.sqrt(hsic(gram_a, gram_a) * hsic(gram_b, gram_b))


def importance(similarity: list[list[float]], beta: float) -> list[float]:
    """`exp(-beta * (similarity to the other blocks) / (all similarities between different blocks))`."""
    count = len(similarity)
    to_others = [sum(similarity[i][j] for j in range(count) if j != i) for i in range(count)]
    return [math.exp(-beta * one / sum(to_others)) for one in to_others]


def linprog_rates(
    importance: list[float], sizes: list[int], target: float, delta: float, previous: list[float]
) -> tuple[float, list[float]]:
    """Optimum of the layer-rate programme by scipy: objective and rates. Fails where it is infeasible."""
    from scipy.optimize import linprog

    share = [size / sum(sizes) for size in sizes]
    half = min(delta, (1 - target) / 2)
    bounds = [(max(target - half, 0.0, past), max(target + half, past)) for past in previous]
    costs = [w * i for w, i in zip(share, importance, strict=True)]
    answer = linprog(costs, A_eq=[share], b_eq=[target], bounds=bounds, method="highs")
    assert answer.success, answer.message
    return float(answer.fun), list(answer.x)


def linprog_curves(curves: list[list[float]], sizes: list[int], target: float, delta: float, previous: list[float]) -> float:
    """Least total cost of convex piecewise linear curves, by scipy: each cost is an unknown above the lines of all its pieces."""
    from scipy.optimize import linprog

    count, share = len(curves), [size / sum(sizes) for size in sizes]
    half = min(delta, (1 - target) / 2)
    bounds = [(max(target - half, 0.0, past), max(target + half, past)) for past in previous] + [(None, None)] * count
    above, heights = [], []  # slope * s_l - cost_l <= slope * left - value at left
    for layer, curve in enumerate(curves):
        pieces = len(curve) - 1
        for piece in range(pieces):
            slope = (curve[piece + 1] - curve[piece]) * pieces
            line = [0.0] * (2 * count)
            line[layer], line[count + layer] = slope, -1.0
            above.append(line)
            heights.append(slope * piece / pieces - curve[piece])
    total, mean = [0.0] * count + [1.0] * count, [share + [0.0] * count]
    answer = linprog(total, A_ub=above, b_ub=heights, A_eq=mean, b_eq=[target], bounds=bounds, method="highs")
    assert answer.success, answer.message
    return float(answer.fun)


def keep_rows(scores: Tensor, keep: Tensor, rate: float) -> Tensor:
    """Row-wise unstructured mask: each row loses equally many, the remainder goes where the next score is lowest."""
    rows, columns = scores.shape
    total = max(round(rows * columns * rate), int((~keep).sum()))
    everyone, extra = total // rows, total % rows

    def value(row: int, column: int) -> float:
        return float(scores[row, column]) if keep[row, column] else -math.inf

    mask = keep.clone()
    following = []
    for row in range(rows):
        ranked = sorted(range(columns), key=lambda column: (value(row, column), column))
        for column in ranked[:everyone]:
            mask[row, column] = False
        if extra:
            following.append((value(row, ranked[everyone]), row, ranked[everyone]))
    for _, row, column in sorted(following)[:extra]:
        mask[row, column] = False
    return mask


def keep_groups(scores: Tensor, keep: Tensor, n: int, m: int) -> Tensor:
    """The whole n:m pattern: of every m neighbours the n highest scores stay."""
    rows, columns = scores.shape
    mask = keep.clone()
    for row in range(rows):
        for start in range(0, columns, m):
            group = range(start, start + m)
            ranked = sorted(group, key=lambda c: (float(scores[row, c]) if keep[row, c] else -math.inf, c))
            for column in ranked[: m - n]:
                mask[row, column] = False
    return mask


def wanda_scores(weight: Tensor, inputs: Tensor) -> Tensor:
    """`|W_oi| * ||X_i||_2`."""
    return weight.double().abs() * inputs.double().square().sum(0).sqrt()


def damped_inverse(hessian: Tensor, damping: float) -> Tensor:
    """`(H + damping * mean diagonal)^-1`; a feature that never fired first gets a diagonal of 1."""
    hessian, columns = hessian.double().clone(), len(hessian)
    added = damping * sum(float(hessian[i, i]) for i in range(columns)) / columns
    for i in range(columns):
        hessian[i, i] = (float(hessian[i, i]) or 1.0) + added
    return torch.linalg.inv(hessian)


def eliminate(inverse: Tensor, i: int) -> Tensor:
    """The inverse Hessian of the columns after i, from that of the columns from i on: one step of Gaussian elimination."""
    return inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]


def removal_costs(weight: Tensor, inverse: Tensor, columns: range, dead: set[int]) -> Tensor:
    """`w_i^2 / P_ii`, with the `P_ii` each column will have when its turn comes; nothing for features that never fired."""
    costs = []
    for i in columns:
        costs.append(torch.zeros(len(weight), dtype=torch.float64) if i in dead else weight[:, i].square() / inverse[i, i])
        inverse = eliminate(inverse, i)
    return torch.stack(costs, dim=1)


def drop_cheapest(costs: Tensor, keep: Tensor, count: int) -> Tensor:
    """Mask without the `count` cheapest entries; what is gone already counts, and comes first."""
    rows, columns = costs.shape
    ranked = sorted((float(costs[r, c]) if keep[r, c] else -math.inf, r, c) for r in range(rows) for c in range(columns))
    mask = keep.clone()
    for _, row, column in ranked[: max(count, int((~keep).sum()))]:
        mask[row, column] = False
    return mask


def obs_prune(
    weight: Tensor, keep: Tensor, hessian: Tensor, rate: float, n: int = 0, m: int = 0, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, column by column, with the inverse Hessian of the columns that remain at hand at all times.

    Removing `w_i` costs `w_i^2 / P_ii` and moves the other weights by `-w_i / P_ii * P_i,:`, `P` being that inverse. Masks are
    chosen for 128 columns at a time, or for groups of m. No factorisation, nothing delayed.
    """
    rows, columns = weight.shape
    weight, mask = weight.double().clone(), keep.clone()
    dead = {i for i in range(columns) if hessian[i, i] == 0}
    inverse = damped_inverse(hessian, damping)
    width = m or 128
    for i in range(columns):
        if i % width == 0:
            chosen = range(i, min(i + width, columns))
            part = slice(chosen.start, chosen.stop)
            costs = removal_costs(weight, inverse, chosen, dead)
            if m:
                mask[:, part] = keep_groups(costs, keep[:, part], n, m)
            else:
                zeros_so_far = int((~mask[:, :i]).sum())
                mask[:, part] = drop_cheapest(costs, keep[:, part], round(rows * chosen.stop * rate) - zeros_so_far)
        for row in range(rows):
            if not mask[row, i]:
                weight[row, i:] -= weight[row, i] / inverse[i, i] * inverse[i, i:]
                weight[row, i] = 0.0
        inverse = eliminate(inverse, i)
    return weight, mask


def masked_low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """`x (M * (W + s B A))^T + bias` as it is written, for autograd to differentiate."""
    y = x @ (keep * (weight + scale * (b @ a))).T
    return y if bias is None else y + bias


def reconstruction_error(dense: Tensor, sparse: Tensor) -> float:
    """`sum over channels of ||(Y_dense - Y_sparse) / ||Y_dense||_channel||^2`, over the number of channels."""
    dense, sparse = dense.double().flatten(0, -2), sparse.double().flatten(0, -2)
    total = 0.0
    for channel in range(dense.shape[1]):
        norm = float(dense[:, channel].norm())
        if norm:
            total += float(((dense[:, channel] - sparse[:, channel]) / norm).square().sum())
    return total / dense.shape[1]


def packed_by_hand(W_OI: torch.Tensor, values: str) -> tuple[list[int], list[float], list[int]]:
    """Mask bytes, values and offsets of the packed format, weight by weight, as docs/packed-format.md words it."""
    group = {"bfloat16": 2, "int8": 4, "int4": 4}[values]
    rows, columns = W_OI.shape
    W = W_OI.double().tolist()
    mask, stored, offsets = [], [], [0]
    for strip in range(0, rows, 16):
        for word in range(0, columns, group):
            bits = 0
            for row in range(16):
                for column in range(group):
                    inside = strip + row < rows and word + column < columns
                    if inside and W[strip + row][word + column] != 0:
                        bits |= 1 << (row * group + column)
                        stored.append(W[strip + row][word + column])
            mask += list(bits.to_bytes(2 * group, "little"))
        offsets.append(len(stored))
    return mask, stored, offsets


def codes_by_hand(stored: list[int], bits: int, count: int) -> list[int]:
    """The numbers without 0 of several codes a byte, the first one lowest, as docs/packed-format.md words it: -8 to 8 of four
    bits."""
    codes = [byte // 2**place % 2**bits for byte in stored for place in range(0, 8, bits)]
    half = 2 ** (bits - 1)
    return [code - half if code < half else code - half + 1 for code in codes[:count]]


def input_salience(weight: Tensor, gram: Tensor, rotation: Tensor) -> Tensor:
    """`(W R)_ij^2 (R^T G R)_jj`, sum by sum."""
    rows, width = weight.shape
    salience = torch.zeros(rows, width, dtype=torch.float64)
    for j in range(width):
        energy = sum(float(rotation[a, j] * gram[a, b] * rotation[b, j]) for a in range(width) for b in range(width))
        for i in range(rows):
            salience[i, j] = sum(float(weight[i, a] * rotation[a, j]) for a in range(width)) ** 2 * energy
    return salience


def output_salience(weight: Tensor, squares: Tensor, rotation: Tensor) -> Tensor:
    """`(R^T W)_ij^2 G_jj`, sum by sum."""
    width, columns = weight.shape
    salience = torch.zeros(width, columns, dtype=torch.float64)
    for i in range(width):
        for j in range(columns):
            salience[i, j] = sum(float(rotation[a, i] * weight[a, j]) for a in range(width)) ** 2 * float(squares[j])
    return salience


def entropy(salience: list[float]) -> float:
    """`-sum p ln p` of the shares `p`."""
    total = math.fsum(salience)
    return -math.fsum(s / total * math.log(s / total) for s in salience if s > 0)


def least_squares_on_mask(weight: Tensor, keep: Tensor, moments: Tensor) -> Tensor:
    """The best weights of a mask, row by row from the normal equations: `G_kk w_k = G_k: w_0` over what the row keeps."""
    weight, moments = weight.double(), moments.double()
    answer = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = keep[row].nonzero()[:, 0]
        if len(kept):
            answer[row, kept] = torch.linalg.lstsq(moments[kept][:, kept], moments[kept] @ weight[row])[0]
    return answer


def output_error(weight: Tensor, other: Tensor, moments: Tensor) -> float:
    """`||X (W - W')^T||^2`, from `G = X^T X`."""
    difference = weight.double() - other.double()
    return float(torch.trace(difference @ moments.double() @ difference.T))


def alps(weight: Tensor, moments: Tensor, count: int, damping: float, turns: int) -> tuple[Tensor, Tensor]:
    """ALPS as its paper states it, with an explicit inverse for every penalty; `count` weights are kept. Ends like the package's:
    the same penalties, and conjugate gradients written as exact least squares of the damped problem."""
    weight, moments = weight.double(), moments.double()
    norm = moments.diagonal().sqrt()
    scaled = weight * norm
    gram = moments / norm[:, None] / norm[None, :] + damping * torch.eye(len(moments), dtype=torch.float64)

    def largest(values: Tensor) -> Tensor:
        ranked = sorted(range(values.numel()), key=lambda i: -abs(float(values.flatten()[i])))[:count]
        keep = torch.zeros(values.numel(), dtype=torch.bool)
        keep[ranked] = True
        return keep.view_as(values)

    penalty, multiplier, keep = 0.1, torch.zeros_like(scaled), largest(scaled)
    sparse, seen = scaled * keep, keep
    for turn in range(1, turns + 1):
        inverse = torch.linalg.inv(gram + penalty * torch.eye(len(gram), dtype=torch.float64))
        dense = (scaled @ gram - multiplier + penalty * sparse) @ inverse
        keep = largest(dense + multiplier / penalty)
        sparse = (dense + multiplier / penalty) * keep
        multiplier = multiplier + penalty * (dense - sparse)
        if turn % 3 == 0:
            changed = int((keep != seen).sum()) / count
            if changed == 0:
                break
            seen = keep
            penalty *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
    return least_squares_on_mask(scaled, keep, gram) / norm, keep


def gptq_under_mask(
    weight: Tensor, keep: Tensor, moments: Tensor, damping: float, nearest: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Column by column: round what is kept, zero what is not, and let the columns that are left make up for it, with the inverse
    of their own part of the damped Hessian taken anew for each column. `nearest(values, column)` rounds."""
    weight, moments = weight.double().clone(), moments.double()
    moments = moments + damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(moments[column:, column:])
        new = torch.where(keep[:, column], nearest(weight[:, column], column), 0.0)
        error = (weight[:, column] - new) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
        weight[:, column] = new
    return weight
