"""One training step under a mask: ours against plain LoRA (peft) and against the scheme the paper's authors released.

    python benchmarks/training.py --output docs/benchmarks

One process, the same random Llama, tokens, batch and precision, steps in turn: forward, backward and an AdamW update of adapters
of rank 16 on all seven projections. Peak memory is measured in a process of its own for each, as resident memory over what the
imports hold. Writes training.csv. Needs peft (`pip install peft`).
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import RANK, SHAPES, distilled_loss, losa_model, random_mask, random_model, stepper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from losa.loss import causal_loss
from losa.models import block_linears, find_decoder
from losa.system.environment import keep_freed_memory, machine

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ReleasedLinear(nn.Module):
    """What the release computes: the base product, and a second dense product with the masked update, under checkpointing."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, device = linear.weight, linear.weight.device
        self.keep_OI = random_mask(linear.weight)
        linear.weight.data.masked_fill_(~self.keep_OI, 0)
        dtype = torch.bfloat16
        self.lora_A = nn.Parameter(torch.randn(RANK, linear.in_features, dtype=dtype, device=device) / 64)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, RANK, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        def update(x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.keep_OI * (self.lora_B @ self.lora_A))

        return nn.functional.linear(x, self.weight) + 2.0 * checkpoint(update, x, use_reentrant=False)


def peft_model(shape: dict[str, int], device: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return get_peft_model(random_model(shape, device), config)


def released_model(shape: dict[str, int], device: str) -> nn.Module:
    model = random_model(shape, device).requires_grad_(False)
    for block in find_decoder(model).blocks:
        for name, linear in block_linears(block).items():
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, ReleasedLinear(linear))
    return model


def transformers_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def losa_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return causal_loss(model(input_ids=ids, use_cache=False).logits, ids) / ids[:, 1:].numel()


SCHEMES = {
    "peft LoRA": (peft_model, transformers_loss),
    "released scheme": (released_model, transformers_loss),
    "losa, cross-entropy": (losa_model, losa_loss),
    "losa, half distilled": (losa_model, distilled_loss),
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(args: argparse.Namespace, scheme: str, tokens: int) -> int:
    """Of two steps in a fresh process; it says on its last line what it needed."""
    command = [sys.executable, __file__, "--peak", scheme, "--shape", args.shape, "--tokens", str(tokens)]
    command += ["--length", str(args.length), "--blocks", str(args.blocks or 0), "--device", args.device, "--output", "."]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM). getrusage would show the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_peak(args: argparse.Namespace, shape: dict[str, int], ids: Tensor) -> None:
    make, loss = SCHEMES[args.peak]
    __import__("peft")
    before = resident("VmRSS")
    step = stepper(make(shape, args.device), loss)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step(ids)
    print(torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for training.csv")
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--blocks", type=int, help="so many decoder blocks only")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="tokens of a step")
    parser.add_argument("--length", type=int, default=512, help="of a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", choices=SCHEMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = SHAPES[args.shape] | ({"num_hidden_layers": args.blocks} if args.blocks else {})

    def batch(tokens: int) -> Tensor:
        return torch.randint(0, 32000, (tokens // args.length, args.length), device=args.device)

    if args.peak:
        return measure_peak(args, shape, batch(args.tokens[0]))
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "training.csv").open("w", newline="") as file:
        print(f"# {machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, {args.shape}, {shape}", file=file)
        writer = csv.DictWriter(file, ["scheme", "tokens", "seconds", "of_peft", "tokens_per_s", "peak_mib", "peak_of_peft"])
        writer.writeheader()
        peaks = {tokens: {name: peak_bytes(args, name, tokens) for name in SCHEMES} for tokens in args.tokens}
        keep_freed_memory()
        models = {make: make(shape, args.device) for make in dict.fromkeys(make for make, _ in SCHEMES.values())}
        steps = {name: stepper(models[make], loss) for name, (make, loss) in SCHEMES.items()}
        for tokens in args.tokens:
            ids, seconds = batch(tokens), {name: [] for name in steps}
            for turn in range(args.rounds + 1):
                for name, step in steps.items():
                    start = time.perf_counter()
                    step(ids)
                    synchronize()
                    if turn:  # the first one warms up
                        seconds[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            for name, median in medians.items():
                row = {
                    "scheme": name, "tokens": tokens, "seconds": round(median, 3),
                    "of_peft": round(median / medians["peft LoRA"], 3), "tokens_per_s": round(tokens / median, 1),
                    "peak_mib": peaks[tokens][name] >> 20,
                    "peak_of_peft": round(peaks[tokens][name] / peaks[tokens]["peft LoRA"], 3),
                }  # fmt: skip
                writer.writerow(row)
                file.flush()
                print(row, flush=True)
    return None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
