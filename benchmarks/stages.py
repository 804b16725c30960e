"""Where the time of a whole run goes on a 1.1 B Llama: measured on a few of its blocks, put together by counting.

    python benchmarks/stages.py [--sequences 128] [--tokens 2000000] [--pruner wanda]

Blocks are alike, and calibration sequences are too. So each stage is timed at two sizes and is a straight line beyond:
- pruning a block: a + b * sequences + c * sequences of the errors (a is the solver's time);
- importance of a block: d * sequences;
- a training step of the default batch (8 x 1024, half distilled): e + f * blocks (e is the head, the loss and the optimizer);
- saving: the model is written, read and checked once at the end, and a stage after each half step.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import SHAPES, distilled_loss, losa_model, random_model, stepper

from losa.adapter import attach, merge
from losa.calibration import block_grams, prune_blocks
from losa.config import LosaConfig
from losa.pruning import Pattern, get_pruner
from losa.rates import decoder_layers
from losa.session.result import write_verified
from losa.session.stages import save_stage
from losa.system.environment import keep_freed_memory, machine

SHAPE = SHAPES["1.1B"]
BLOCKS, STEPS, WINDOW = SHAPE["num_hidden_layers"], 5, 2048


def seconds(work: Callable[[], object], repeats: int = 2) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[128, 64, 32])
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--pruner", default="wanda")
    args = parser.parse_args()
    keep_freed_memory()
    config, pruner = LosaConfig(), get_pruner(args.pruner)
    print(f"# {machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, 1.1 B, {args.pruner}")

    def pruning(sequences: int, errors: int) -> float:
        """Of a block."""
        ids = torch.randint(0, 32000, (sequences, WINDOW))

        def work() -> None:
            rates = {layer.name: 0.5 for layer in decoder_layers(model)}
            prune_blocks(model, ids, rates, pruner, Pattern(), error_sequences=errors)

        model = attach(random_model(SHAPE | {"num_hidden_layers": 2}, "cpu").eval())
        return seconds(work) / 2

    at_8, at_16, with_errors = pruning(8, 0), pruning(16, 0), pruning(8, 8)
    b, c = (at_16 - at_8) / 8, (with_errors - at_8) / 8
    a = at_8 - 8 * b
    model = losa_model(SHAPE | {"num_hidden_layers": 3}, "cpu").eval()
    ids = torch.randint(0, 32000, (16, config.calibration.rmi_length))
    d = seconds(lambda: block_grams(model, ids)) / (2 * 16)  # the last block is not run
    with tempfile.TemporaryDirectory() as folder:
        stage = seconds(lambda: save_stage(Path(folder), "01-x", model, config, {}), 1) * BLOCKS / 3
        weights = sum(p.numel() for p in model.parameters())
        masks = merge(model)
        saving = seconds(lambda: write_verified(Path(folder), model, None, masks, ""), 1) * 1.1e9 / weights
    times = []
    for blocks in (2, 4):
        step = stepper(losa_model(SHAPE | {"num_hidden_layers": blocks}, "cpu"), distilled_loss)
        batch = torch.randint(0, 32000, (8, 1024))
        times.append(seconds(lambda step=step, batch=batch: step(batch)))
    f = (times[1] - times[0]) / 2
    e = times[0] - 2 * f
    print(f"pruning a block: {a:.2f} s + {b:.3f} s a sequence + {c:.3f} s a sequence of the errors")
    print(f"importance of a block: {d:.3f} s a sequence")
    print(f"training step, 8,192 tokens: {e:.2f} s + {f:.2f} s a block; stage {stage:.1f} s, result {saving:.1f} s")
    training = args.tokens / 8192 * (e + BLOCKS * f)
    for sequences in args.sequences:
        errors, rmi = min(config.calibration.error_sequences, sequences), config.calibration.rmi_sequences
        parts = {
            "training": training,
            "pruning": STEPS * BLOCKS * (a + b * sequences + c * errors),
            "one-shot baseline": BLOCKS * (a + b * sequences),
            "importance": STEPS * BLOCKS * d * rmi,
            "saving": (2 * STEPS + 1) * stage + saving,
        }
        total = sum(parts.values())
        shares = ", ".join(f"{name} {value:.0f} s ({value / total:.1%})" for name, value in parts.items())
        print(f"{sequences} sequences: {shares}; all but training {1 - training / total:.1%}", flush=True)


if __name__ == "__main__":
    main()
