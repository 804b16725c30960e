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
    found = []
    for method, target in dict.fromkeys((row["method"], row["target"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["target"]) == (method, target)]
        zeros = target if ":" in target else f"{float(target) * 100:g} %" if target else ""

        def mean(of: Callable[[dict[str, Any]], float], mine: list[dict[str, Any]] = mine) -> float:
            return statistics.mean(map(of, mine))

        fast, scored = all(row["speed"] for row in mine), all(row["tasks"] and row["tasks"]["mean"] for row in mine)
        found.append(
            Point(
                f"{method} {zeros}".strip(),
                _family(mine[0]),
                method.startswith("losa"),
                mean(lambda row: row["perplexity"]),
                mean(lambda row: row["bits"]),
                mean(lambda row: row["bytes"]),
                mean(lambda row: row["speed"]["tokens_per_second"]) if fast else None,
                mean(lambda row: row["speed"]["of_dense"]) if fast else None,
                mean(lambda row: row["tasks"]["mean"]["acc"]) if scored else None,
            )
        )
    return found


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
        small = min(good, key=lambda point: point.bits)
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
