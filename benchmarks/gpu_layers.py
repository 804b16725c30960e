"""The GPU kernels alone: single packed layers against torch's dense bfloat16 `F.linear` (cuBLAS), side by side in one process.

    python benchmarks/gpu_layers.py --output docs/benchmarks          # every shape of Llama-2-7B, a few minutes
    python benchmarks/gpu_layers.py --output OUT --sparsity 0.7 --tokens 1 8

Every measurement is a CUDA graph of calls that rotate over copies of the weight, together several times the L2 cache, so launches
cost what they cost in decoding and every byte comes from the memory. Dense and packed take turns; times are medians. The limit of
a layer is its bytes (weights, and its index) over the copy bandwidth measured here. Writes gpu_layers.csv.
"""

import argparse
import csv
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import linear

from losa.runtime import dispatch
from losa.runtime.bench import bandwidth
from losa.runtime.format import PackedWeight, chunk_index, pack
from losa.runtime.values import TYPES
from losa.system.environment import machine, resolve_device
from losa.system.progress import progress

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]  # rows x columns of Llama-2-7B's q/k/v/o, gate/up and down projections
ROTATED = 512 << 20  # bytes of copies of a weight
CALLS = 96  # in one graph, whatever the number of copies, so that starting it is shared by equally many
COLUMNS = [
    "rows", "columns", "sparsity", "tokens", "values", "kernel", "dense_us", "sparse_us", "limit_us", "speedup", "gb_per_s",
    "share_of_bandwidth",
]  # fmt: skip


def copies(tensors: list[torch.Tensor | None]) -> list[list[torch.Tensor | None]]:
    """The tensors, as often as fills the caches several times over."""
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return [[None if tensor is None else tensor.clone() for tensor in tensors] for _ in range(max(2, -(-ROTATED // size)))]


def captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """`CALLS` calls, one after the other, in a graph; what they call has run before, so nothing is compiled or tuned in it."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), CALLS):
            call()
    return graph


def in_turns(works: dict[str, list[Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Median microseconds of one call of each."""
    graphs = {name: captured(calls) for name, calls in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _, (name, graph) in itertools.product(range(rounds + 1), graphs.items()):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times[name].append(start.elapsed_time(end) * 1e3 / CALLS)
    return {name: median(found[1:]) for name, found in times.items()}


def measure(shape: tuple[int, int], sparsity: float, tokens: list[int], rate: float, rounds: int) -> list[dict[str, object]]:
    """Rows of the table for one weight; `rate` is the copy bandwidth in bytes per second."""
    device, results = torch.device("cuda"), []
    W_OI = torch.where(torch.rand(shape, device=device) < sparsity, 0, torch.randn(shape, device=device).mul_(0.02).bfloat16())
    kernel = dispatch.choose("cuda")
    dense, packed = [W for (W,) in copies([W_OI])], {}
    for name, kind in TYPES.items():
        weight = pack(W_OI, kind)
        parts = copies([*weight[:5], chunk_index(weight)])
        packed[name] = [(PackedWeight(*fields, *shape, kind), index) for *fields, index in parts]
    for count in tokens:
        x = torch.randn(count, shape[1], device=device).bfloat16()
        works: dict[str, list[Callable[[], object]]] = {"dense": [lambda x=x, W=W: linear(x, W) for W in dense]}
        for name, weights in packed.items():
            works[name] = [lambda x=x, w=w, i=i: dispatch.linear(x, w, None, kernel, i) for w, i in weights]
        times = in_turns(works, rounds)
        for name, weights in packed.items():
            weight, index = weights[0]
            size = sum(part.nbytes for part in (*weight[:5], index) if part is not None)
            theirs, ours, limit = times["dense"], times[name], size / rate * 1e6
            found = [
                *shape, sparsity, count, name, kernel, round(theirs, 1), round(ours, 1), round(limit, 1),
                round(theirs / ours, 2), round(size / ours / 1e3, 1), round(limit / ours, 2),
            ]  # fmt: skip
            results.append(dict(zip(COLUMNS, found, strict=True)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for gpu_layers.csv")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 8, 16, 256, 2048])
    parser.add_argument("--rounds", type=int, default=20, help="turns of every measurement")
    arguments = parser.parse_args()
    device = resolve_device("cuda")
    torch.manual_seed(0)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rate = bandwidth(device, 1 << 30)
    with (arguments.output / "gpu_layers.csv").open("w", newline="") as file:
        versions = f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
        print(f"# {machine()}, {versions}, copies at {rate / 1e9:.0f} GB/s", file=file)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for shape, level in progress(list(itertools.product(SHAPES, arguments.sparsity)), "layers"):
            rows = measure(shape, level, arguments.tokens, rate, arguments.rounds)
            writer.writerows(rows)
            file.flush()
            for row in rows:
                print(*(row[name] for name in COLUMNS), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
