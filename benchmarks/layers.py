"""The CPU kernels alone: single packed layers against torch's dense bfloat16 `F.linear`, side by side in one process.

    python benchmarks/layers.py --output docs/benchmarks          # everything: about half an hour on two cores
    python benchmarks/layers.py --output OUT --models 7B --sparsity 0.7 --tokens 1 --threads 2
    python benchmarks/layers.py --output OUT --models heads --sparsity 0 --tokens 1    # output heads: nothing is zero

Every measurement rotates over copies of the weight that together are several times the last-level cache, all in huge pages, and
dense and packed layers take turns, so that both see the same clock and the same neighbours. Times are medians. One of the turns
only reads the dense weight (`amax`): no dense engine is faster with one token, so `best dense` is the fastest of that, `F.linear`
and `torch.mv`, and the share of bandwidth is the packed layer's bytes per second over that read's. `cached_us` is the packed
layer's time with the same copy again and again: where that fits into a cache (2048 x 2048), what its instructions take without
waiting for memory. Writes layers.csv and layers.svg.
"""

import argparse
import csv
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from losa.runtime import dispatch
from losa.runtime.format import PackedWeight, pack
from losa.runtime.memory import huge_region
from losa.runtime.values import TYPES
from losa.system.environment import machine
from losa.system.progress import progress

SHAPES = {  # rows x columns of q/o, gate/up and down projections
    "1B": [(2048, 2048), (5632, 2048), (2048, 5632)],
    "7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "13B": [(5120, 5120), (13824, 5120), (5120, 13824)],
    "heads": [(49152, 576), (32000, 2048)],  # of SmolLM2-135M and TinyLlama; ask for them, and for --sparsity 0
}
ROTATED = 256 << 20  # bytes of copies of a weight
COLUMNS = [
    "model", "rows", "columns", "sparsity", "tokens", "threads", "values", "kernel", "dense_us", "best_dense_us", "sparse_us",
    "speedup", "speedup_best_dense", "gb_per_s", "share_of_bandwidth", "cached_us",
]  # fmt: skip


class Copies:
    """Copies of some tensors, in one region of huge pages, handed out in turn."""

    def __init__(self, tensors: list[Tensor | None]) -> None:
        size = sum(-(-tensor.nbytes // 64) * 64 for tensor in tensors if tensor is not None)
        self.count = max(2, -(-ROTATED // size))
        self.region, self.used, self.turn = huge_region(size * self.count), 0, 0
        self.copies = [[self._place(tensor) for tensor in tensors] for _ in range(self.count)]

    def _place(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        home = self.region[self.used : self.used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.used += -(-tensor.nbytes // 64) * 64
        return home.copy_(tensor)

    def next(self) -> list[Tensor | None]:
        """The next copy."""
        self.turn = (self.turn + 1) % self.count
        return self.copies[self.turn]


def rotated_packed(packed: PackedWeight) -> Callable[[], PackedWeight]:
    copies = Copies(list(packed[:5]))

    def following() -> PackedWeight:
        return PackedWeight(*copies.next(), *packed[5:])

    return following


def in_turns(works: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Median microseconds of each, called one after the other until `budget` seconds have gone, at least five times each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: median(found) * 1e6 for name, found in times.items()}


def measure(
    model: str, shape: tuple[int, int], sparsity: float, tokens: list[int], threads: list[int], budget: float
) -> list[dict[str, object]]:
    rows, columns = shape
    W_OI = torch.where(torch.rand(shape) < sparsity, 0, torch.randn(shape).mul_(0.02).bfloat16())
    dense = Copies([W_OI])
    found = {values: pack(W_OI, kind) for values, kind in TYPES.items()}
    packed = {values: rotated_packed(weight) for values, weight in found.items()}
    kernel, results = dispatch.choose(), []
    for count, batch in itertools.product(threads, tokens):
        torch.set_num_threads(count)
        x = torch.randn(batch, columns).bfloat16()
        works: dict[str, Callable[[], object]] = {"dense": lambda x=x: linear(x, dense.next()[0])}
        works["read"] = lambda: dense.next()[0].view(torch.float32).amax()
        if batch == 1:
            works["mv"] = lambda x=x: torch.mv(dense.next()[0], x[0])
        for values, following in packed.items():
            works[values] = lambda x=x, following=following: dispatch.linear(x, following(), None, kernel)
        times = in_turns(works, budget)
        best = min(times["dense"], times["mv"], times["read"]) if batch == 1 else times["dense"]
        for values, weight in found.items():
            size = sum(tensor.nbytes for tensor in weight.tensors().values())
            rate = size / times[values] / 1e3
            again = in_turns({values: lambda x=x, weight=weight: dispatch.linear(x, weight, None, kernel)}, budget / 16)
            results.append(
                dict(
                    zip(
                        COLUMNS,
                        [
                            model, rows, columns, sparsity, batch, count, values, kernel, round(times["dense"]), round(best),
                            round(times[values]), round(times["dense"] / times[values], 2), round(best / times[values], 2),
                            round(rate, 1), round(size / times[values] / (W_OI.nbytes / times["read"]), 2),
                            round(again[values]),
                        ],
                        strict=True,
                    )
                )
            )  # fmt: skip
    return results


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Speed-up over torch's dense `F.linear` against tokens, one panel a sparsity, most threads, mean over the shapes."""
    import matplotlib.pyplot as plt

    threads = max(int(row["threads"]) for row in rows)
    levels = sorted({float(row["sparsity"]) for row in rows})
    figure, axes = plt.subplots(1, len(levels), figsize=(3.1 * len(levels), 3.4), sharey=True, squeeze=False)
    for axis, level in zip(axes[0], levels, strict=True):
        for model, values in itertools.product(SHAPES, TYPES):
            points: dict[int, list[float]] = {}
            for row in rows:
                if (row["model"], row["values"], float(row["sparsity"]), int(row["threads"])) == (model, values, level, threads):
                    points.setdefault(int(row["tokens"]), []).append(float(row["speedup"]))
            if points:
                tokens = sorted(points)
                color = {"1B": "C0", "7B": "C1", "13B": "C2", "heads": "C3"}[model]
                style = (
                    color
                    + {
                        "bfloat16": "-",
                        "int8": "--",
                        "int4": ":",
                    }[values]
                )
                axis.plot(tokens, [sum(points[t]) / len(points[t]) for t in tokens], style, marker=".", label=f"{model} {values}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", title=f"{level:.0%} zeros", xlabel="tokens")
        axis.set_xticks(
            sorted({int(row["tokens"]) for row in rows}), labels=[str(t) for t in sorted({int(row["tokens"]) for row in rows})]
        )
        axis.minorticks_off()
    axes[0][0].set_ylabel("speed-up over dense bfloat16")
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(f"{machine()}: packed layers against torch F.linear", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for layers.csv and layers.svg")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["1B", "7B", "13B"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.5, help="for one measurement of dense and packed together")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.output.mkdir(parents=True, exist_ok=True)
    cases = [(model, shape, level) for model in arguments.models for shape in SHAPES[model] for level in arguments.sparsity]
    rows: list[dict[str, object]] = []
    with (arguments.output / "layers.csv").open("w", newline="") as file:
        print(f"# {machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", file=file)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for model, shape, level in progress(cases, "layers"):
            found = measure(model, shape, level, arguments.tokens, arguments.threads, arguments.seconds)
            writer.writerows(found)
            file.flush()
            rows += found
            for row in found:
                print(*(row[name] for name in COLUMNS), flush=True)
    plot(rows, arguments.output / "layers.svg")


if __name__ == "__main__":
    main()
