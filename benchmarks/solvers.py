"""Layer error of every solver on a real model's layers, over SparseGPT's, and over the least-squares floor of its own mask.

    python benchmarks/solvers.py --model MODEL --data TEXT [--rates 0.5,0.7] [--blocks 0,2,10,20,29]

The error of a layer is `||X (W - W')^T||^2`, over calibration text that goes through the dense model. ADMM (Boza, 2401.02938),
which the package does not have, stands here as what ALPS was chosen over: damping 0.1, one penalty, 20 turns, the mask's size on
a cubic schedule over the first 15; then the same conjugate gradients.
"""

import argparse
import time
from functools import partial

import torch
from torch import Tensor

from losa import LosaConfig, load
from losa.data import calibration_windows, load_documents, pieces
from losa.models import block_inputs, block_linears, find_decoder
from losa.pruning import Pattern, alps, sparsegpt, wanda
from losa.system.environment import keep_freed_memory

FLOOR_TURNS = 500


def error(W_OI: Tensor, new_OI: Tensor, G_II: Tensor) -> float:
    difference_OI = W_OI - new_OI
    return float((difference_OI @ G_II * difference_OI).sum())


def admm(W_OI: Tensor, G_II: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    norm_I = torch.diagonal(G_II).sqrt().clamp(min=1e-8)
    full_OI, G_II = torch.ones_like(W_OI, dtype=torch.bool), G_II / (norm_I[:, None] * norm_I)
    eye_II, W_OI = torch.eye(len(G_II)), W_OI * norm_I
    target_OI, inverse_II = W_OI @ (G_II + 0.1 * eye_II), torch.linalg.inv(G_II + 1.1 * eye_II)
    now_OI, U_OI = W_OI, torch.zeros_like(W_OI)
    for turn in range(21):
        share = 1 - (1 - min(1, (turn + 1) / 15)) ** 3
        keep_OI = alps.keep_largest((now_OI + U_OI).abs(), full_OI, round(W_OI.numel() * (1 - rate * share)))
        sparse_OI = (now_OI + U_OI).where(keep_OI, 0)
        U_OI = U_OI + now_OI - sparse_OI
        now_OI = (target_OI + sparse_OI - U_OI) @ inverse_II
    return alps.refine(sparse_OI, W_OI, keep_OI, G_II) / norm_I, keep_OI


def solutions(W_OI: Tensor, G_II: Tensor, rate: float) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Weights, mask and seconds by solver."""
    keep_OI, pattern = torch.ones_like(W_OI, dtype=torch.bool), Pattern()

    def by_wanda() -> tuple[Tensor, Tensor]:
        mask_OI = wanda.prune(W_OI, keep_OI, torch.diagonal(G_II).double(), rate, pattern)
        return W_OI.where(mask_OI, 0), mask_OI

    solvers = {
        "SparseGPT": lambda: sparsegpt.prune([W_OI], [keep_OI], G_II, [rate], pattern)[0][0],
        "Wanda": by_wanda,
        "ADMM": lambda: admm(W_OI, G_II, rate),
        "ALPS": lambda: alps.prune([W_OI], [keep_OI], G_II, [rate], pattern)[0],
    }
    found = {}
    for name, solver in solvers.items():
        began = time.perf_counter()
        found[name] = (*solver(), time.perf_counter() - began)
    return found


def collect(moments: dict[str, Tensor], name: str, layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    moments[name] = sparsegpt.collect(moments.get(name), inputs[0].flatten(0, 1))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rates", default="0.5,0.7")
    parser.add_argument("--blocks", default="0,2,10,20,29")
    args = parser.parse_args()
    keep_freed_memory()
    model, tokenizer = load(LosaConfig.from_dict({"model": args.model}))
    ids_ST = calibration_windows(pieces(load_documents(args.data), 0), tokenizer, 1024, 32)
    stream, wanted = block_inputs(model, ids_ST), {int(block) for block in args.blocks.split(",")}
    ratios: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for index, block in enumerate(find_decoder(model).blocks[: max(wanted) + 1]):
        layers = block_linears(block) if index in wanted else {}
        moments: dict[str, Tensor] = {}
        handles = [layer.register_forward_pre_hook(partial(collect, moments, name)) for name, layer in layers.items()]
        stream.advance(block, index)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            W_OI, G_II = layer.weight.float(), moments[name]
            for rate in args.rates.split(","):
                found = solutions(W_OI, G_II, float(rate))
                base = error(W_OI, found["SparseGPT"][0], G_II)
                for solver, (new_OI, keep_OI, seconds) in found.items():
                    floor = error(W_OI, alps.refine(new_OI, W_OI, keep_OI, G_II, FLOOR_TURNS), G_II)
                    mine = error(W_OI, new_OI, G_II)
                    ratios.setdefault((rate, solver), []).append((mine / base, mine / floor, seconds))
    print("| zeros | solver | error over SparseGPT's | over the floor of its mask | seconds a layer |\n|---|---|---|---|---|")
    for (rate, solver), rows in ratios.items():
        over, floor, seconds = (sum(values) / len(rows) for values in zip(*rows, strict=True))
        print(f"| {float(rate):.0%} | {solver} | {over:.3f} | {floor:.3f} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
