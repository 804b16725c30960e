"""Prune a model and recover its quality, into a checkpoint that opens anywhere: `python examples/recover.py OUTPUT`."""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM

import losa

ASSETS = Path(losa.__file__).parent / "demo_assets"  # a small real Llama, and excerpts of novels


def main() -> None:
    """Runs the method, prints what it won back, and opens the result without this package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="directory of the sparse checkpoint, which must not exist")
    parser.add_argument("--model", default=str(ASSETS / "novels-4m"))
    parser.add_argument("--data", default=str(ASSETS / "train.txt"))
    parser.add_argument("--eval-data", default=str(ASSETS / "held.txt"))
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=400_000, help="of training; more is better")
    parser.add_argument("--windows", type=int, default=32, help="of the evaluation text")
    args = parser.parse_args()
    keys = {"model": args.model, "output": args.output, "sparsity": args.sparsity, "train.tokens": args.tokens}
    texts = {"train.data": args.data, "eval.data": args.eval_data, "eval.windows": args.windows}
    config = losa.LosaConfig.load(overrides=keys | texts)
    model, tokenizer = losa.load(config)
    sparse = losa.run(model, tokenizer, config)
    print(sparse.losa_record["perplexity"])
    model = AutoModelForCausalLM.from_pretrained(args.output)
    zeros = (model.model.layers[0].mlp.up_proj.weight == 0).float().mean()
    print(f"{args.output}: {zeros:.2%} of the first up projection are zero; see {args.output}/report.html")


if __name__ == "__main__":
    main()
