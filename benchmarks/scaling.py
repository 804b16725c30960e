"""Memory and time of LoSA for Llama-2's shapes on 1 to 8 GPUs, as `losa plan` computes them: the table of docs/scaling.md.

    python benchmarks/scaling.py --memory 80 --tflops 200 >> docs/scaling.md

Nothing is measured on a GPU here: bytes are counted and simulated, and time is flops over the given speed.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import LlamaConfig

from losa import LosaConfig
from losa.planning.plan import plan
from losa.system.progress import duration

SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
COMMON = {"vocab_size": 32000, "max_position_embeddings": 4096, "dtype": "bfloat16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=80, help="GiB of a GPU")
    parser.add_argument("--tflops", type=float, default=200, help="TFLOP/s it sustains in bfloat16")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    print("| model | GPUs | weights of a GPU | training | GiB of a GPU | GiB of the host, a process | fits | time, at least |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in ((name, SHAPES[name]) for name in args.models):
            LlamaConfig(**COMMON, **shape).save_pretrained(Path(folder, name))
            for processes in args.processes:
                for shard in (False, True) if processes > 1 else (False,):
                    train = {"weights": "adapters", "gradient_checkpointing": True, "batch_size": 8}
                    values = {"model": str(Path(folder, name)), "shard": shard, "train": train}
                    made = plan(LosaConfig.from_dict(values), processes, int(args.memory * 2**30), args.tflops * 1e12)
                    way = "whole" if not shard else "spread (`--shard`)"
                    fits = "yes" if made.peak_memory <= made.available_memory else "no"
                    gib = [f"{value / 2**30:.1f}" for value in (made.training, made.peak_memory, made.host_memory)]
                    print(f"| {name} | {processes} | {way} | {' | '.join(gib)} | {fits} | {duration(made.seconds)} |", flush=True)


if __name__ == "__main__":
    main()
