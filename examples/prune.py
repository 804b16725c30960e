"""Prune a model once, without training, and count its zeros: `python examples/prune.py [--sparsity 0.5] [--pruner wanda]`."""

import argparse
from pathlib import Path

import losa

ASSETS = Path(losa.__file__).parent / "demo_assets"  # a small real Llama, and excerpts of novels


def main() -> None:
    """Prunes, prints two perplexities and the sparsity of every block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ASSETS / "novels-4m"))
    parser.add_argument("--data", default=str(ASSETS / "train.txt"), help="calibration text")
    parser.add_argument("--eval-data", default=str(ASSETS / "held.txt"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pruner", default="alps", help="alps, sparsegpt, wanda or magnitude")
    parser.add_argument("--windows", type=int, default=16, help="of the evaluation text")
    args = parser.parse_args()
    keys = {"model": args.model, "sparsity": args.sparsity, "pruner": args.pruner, "calibration.data": args.data}
    keys |= {"eval.data": args.eval_data, "eval.windows": args.windows}
    config = losa.LosaConfig.load(preset="one-shot", overrides=keys)
    model = losa.prune(*losa.load(config), config)  # a PreTrainedModel, of the class it came with
    print({name: round(value, 2) for name, value in model.losa_record["perplexity"].items()})
    for index, block in enumerate(model.model.layers):
        weights = [layer.weight for name, layer in block.named_modules() if name.endswith("_proj")]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        print(f"block {index}: {zeros / sum(weight.numel() for weight in weights):.2%} zeros")


if __name__ == "__main__":
    main()
