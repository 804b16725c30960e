"""Quality against bytes and against speed, of what `losa compare` found: what is not beaten in both, and what to use."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from losa.report.content import size

WITHIN = (1.1, 1.25, 1.5, 2.0, 3.0)  # times the dense model's perplexity, that recommendations are made for


@dataclass(frozen=True)
class Point:
    """A method at a target, over its seeds."""

    name: str
    family: str
    default: bool  # what `losa run` makes
    perplexity: float
    bits: float
    bytes: float
    speed: float | None  # tokens per second
    of_dense: float | None  # times that of the dense model, in turns
    accuracy: float | None  # mean of the paper's seven tasks


def points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """One for every method and target, in their order."""
    places = dict.fromkeys((row["method"], row["target"]) for row in rows)
    return [_point([row for row in rows if (row["method"], row["target"]) == place]) for place in places]


def _point(mine: Sequence[dict[str, Any]]) -> Point:
    """Of the seeds of one method at one target."""
    method, target = mine[0]["method"], mine[0]["target"]

    def mean(of: Callable[[dict[str, Any]], float | None]) -> float | None:
        values = [value for row in mine if (value := of(row)) is not None]
        return statistics.mean(values) if len(values) == len(mine) else None

    return Point(
        f"{method} {label(target)}" if target else method,
        _family(mine[0]),
        is_default(method),
        statistics.mean(row["perplexity"] for row in mine),
        statistics.mean(row["bits"] for row in mine),
        statistics.mean(row["bytes"] for row in mine),
        mean(lambda row: row["speed"] and row["speed"]["tokens_per_second"]),
        mean(lambda row: row["speed"] and row["speed"]["of_dense"]),
        mean(accuracy),
    )


def label(target: str) -> str:
    """`0.7` -> `70 %`; patterns as they are."""
    return target if ":" in target else f"{float(target) * 100:g} %"


def is_default(method: str) -> bool:
    """Whether a method is what `losa run` makes."""
    return method.startswith("losa")


def accuracy(row: dict[str, Any]) -> float | None:
    """Mean of the paper's seven tasks; None where not all were measured."""
    scored = row["tasks"] and row["tasks"]["mean"]
    return scored["acc"] if scored else None


def _family(row: dict[str, Any]) -> str:
    values = row["config"]["values"]
    if not row["target"]:
        return "dense, few bits" if values else "dense"
    return "sparse and rounded" if values else "sparse"


def front(found: Sequence[Point], cost: Callable[[Point], float]) -> list[Point]:
    """Those that no other beats in perplexity and cost both, the cheapest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (cost(point), point.perplexity)):
        if not best or point.perplexity < best[-1].perplexity:
            best.append(point)
    return best


def recommendations(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For what quality costs least in bytes and in time: a sentence for each loss of quality that anything stays within."""
    found = points(rows)
    dense = next((point for point in found if point.family == "dense"), None)
    if dense is None:
        return []
    lines: list[str] = []
    for times in WITHIN:
        good = [point for point in found if point is not dense and point.perplexity <= times * dense.perplexity]
        if not good:
            continue
        small = min(good, key=lambda point: (point.bits, point.perplexity))
        run = " (llama.cpp and others run dense models of few bits)" if small.family == "dense, few bits" else ""
        told = f"smallest is {small.name}, {small.bits:.2f} bits a weight, perplexity {small.perplexity:.2f}{run}"
        fast = max((point for point in good if point.speed), key=lambda point: point.speed or 0.0, default=None)
        if fast is not None:
            told += f"; fastest is {fast.name}, {fast.of_dense:.1f}x dense, perplexity {fast.perplexity:.2f}"
        if not lines or told != lines[-1].partition(": ")[2]:
            lines.append(f"Within {times:g} times the dense model's perplexity: {told}")
    return lines or ["Nothing here stays within three times the dense model's perplexity: keep more weights, or train longer"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Size and speed beside quality, in Markdown."""
    found = points(rows)
    fast, scored = any(point.speed for point in found), any(point.accuracy for point in found)
    head = ["method", "bits a weight", "size", "perplexity", *(["zero-shot, %"] if scored else [])]
    head += ["tokens/s", "of dense"] if fast else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for point in found:
        cells = [point.name, f"{point.bits:.2f}", size(round(point.bytes)), f"{point.perplexity:.2f}"]
        if scored:
            cells.append(f"{100 * point.accuracy:.1f}" if point.accuracy else "")
        if fast:
            cells += [f"{point.speed:.0f}", f"{point.of_dense:.2f}x"] if point.speed else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
