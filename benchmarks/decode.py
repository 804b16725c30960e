"""End to end: a Llama with random weights and zeros, dense against packed, in one process.

    python benchmarks/decode.py --output docs/benchmarks
    python benchmarks/decode.py --output OUT --device cuda --shape 7B --prompts 32 2048 --new 128

Builds the model (TinyLlama's shape, 1.1 billion parameters with an untied head, or Llama-2-7B's), saves it, measures it as `losa
bench` does: decoding through transformers' `generate`, batch 1, on a GPU with a static cache and CUDA graphs, and the time to the
first token of a short and a long prompt. Writes decode.csv.
"""

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # huge pages for what torch allocates itself; before torch is imported

import torch
from common import SHAPES, save_random

from losa.runtime.bench import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for decode.csv")
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--model", type=Path, help="use this checkpoint instead of a random one; made there when it does not exist"
    )
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 512])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, (arguments.output / "decode.csv").open("w", newline="") as file:
        directory = arguments.model or Path(folder, "model")
        if not directory.exists():
            save_random(directory, arguments.sparsity, SHAPES[arguments.shape], arguments.device)
        writer = None
        for prompt in arguments.prompts:
            result = compare(directory, prompt, arguments.new, arguments.rounds, arguments.device)
            dense = result["rows"][0]
            for row in result["rows"]:
                line = {
                    "model": row["name"], "prompt": prompt, "new": arguments.new,
                    "tokens_per_s": round(row["tokens_per_second"], 2),
                    "speedup": round(row["tokens_per_second"] / dense["tokens_per_second"], 2),
                    "limit_tokens_per_s": round(row["limit_tokens_per_second"], 1),
                    "first_token_s": round(row["first_token_seconds"], 3),
                    "prefill_speedup": round(dense["first_token_seconds"] / row["first_token_seconds"], 2),
                    "resident_mib": round(row["resident_bytes"] / 2**20),
                    "resident_of_dense": round(row["resident_bytes"] / dense["resident_bytes"], 3),
                    "bandwidth_gb_s": round(result["bandwidth"] / 1e9, 1),
                }  # fmt: skip
                if writer is None:
                    print(f"# {result['machine']}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", file=file)
                    writer = csv.DictWriter(file, list(line))
                    writer.writeheader()
                writer.writerow(line)
                file.flush()
                print(line, flush=True)


if __name__ == "__main__":
    main()
