"""Recovery table: what `losa run` wins back on one model, by pruner and sparsity, beside its baselines and its ceiling.

    python benchmarks/recovery.py --model MODEL --data TRAIN_TEXT --eval-data HELD_TEXT --output DIR [--set key=value ...]

Rows: LoSA with each pruner at 50, 60, 70 % and 2:4; the missing baseline of the literature at 70 % (same pruner and tokens,
one shot, uniform rates, uniform ranks, masked adapters, cross-entropy), and it distilled; LoSA with the released loss and shares;
and the ceiling: the dense model, same adapters, same tokens.
Every row is a finished run in its own directory and is not run twice, so an interrupted table goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from losa.report.content import gap_closed

BASELINE = ["steps=1", "rate_band=0", "adapter.allocation=uniform", "train.distill=0"]
LOSA = ["train.weights=adapters", "steps=5", "rates=rmi"]
TARGETS = {"70": ["sparsity=0.7"], "50": ["sparsity=0.5"], "60": ["sparsity=0.6"], "2:4": ["pattern=2:4"]}
PRUNERS = ("wanda", "sparsegpt")


def rows() -> dict[str, list[str]]:
    """Name of a row -> its `--set` items."""
    table = {}
    for name, target in TARGETS.items():
        for pruner in PRUNERS:
            sets = [*LOSA, f"pruner={pruner}", *target]
            table[f"LoSA {pruner} {name}"] = sets
            if name == "70":
                table[f"uniform one-shot {pruner} {name}"] = [*sets, *BASELINE]
                table[f"uniform one-shot distilled {pruner} {name}"] = [*sets, *BASELINE, "train.distill=0.5"]
                table[f"LoSA as released {pruner} {name}"] = [*sets, "train.distill=0", "train.last_share=0.6"]
    return table


def run_row(args: argparse.Namespace, output: Path, sets: list[str]) -> dict:
    """One `losa run` in its own process; its record."""
    if not (output / "losa.json").exists():
        command = [sys.executable, "-m", "losa", "run", args.model, "--output", str(output), "--data", args.data]
        command += ["--eval-data", args.eval_data, *(item for pair in (*sets, *args.set) for item in ("--set", pair))]
        subprocess.run(command, check=True)
    return json.loads((output / "losa.json").read_text())


def ceiling(args: argparse.Namespace, output: Path) -> float:
    """Perplexity of the dense model after training the same adapters (rank 10 in every block) on the same rows."""
    if not output.exists():
        from losa import LosaConfig, load
        from losa.adapter import attach, masked_linears
        from losa.data import prepare
        from losa.evaluation import perplexity
        from losa.models import max_length
        from losa.system.environment import keep_freed_memory, resolve_device
        from losa.system.yaml_tree import parse_set
        from losa.training import train

        keep_freed_memory()
        overrides = {"model": args.model, "train.data": args.data, "eval.data": args.eval_data, "train.distill": 0}
        overrides |= {"train.weights": "adapters"}
        config = LosaConfig.load(overrides=overrides | parse_set(args.set))
        model, tokenizer = load(config)
        model.to(resolve_device(config.device))
        config = config.resolve(model.config.get_text_config().hidden_size, max_length(model.config))
        data = prepare(config, tokenizer)
        attach(model, config.adapter.max_rank, config.adapter.scale, config.seed)
        for layer in masked_linears(model).values():
            layer.set_rank(round(config.adapter.mean_rank_last))
        train(model, data.train, config.train, name="dense, fine-tuned", seed=config.seed, work_dir=output.parent)
        output.write_text(json.dumps({"perplexity": perplexity(model, data.evaluation)}))
    return json.loads(output.read_text())["perplexity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "eval-data", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--set", action="append", default=[], help="key=value for every row")
    parser.add_argument("--only", action="append", default=[], help="names of rows; all by default")
    args = parser.parse_args()
    root = Path(args.output)
    root.mkdir(parents=True, exist_ok=True)
    lines = [
        "| row | sparsity | dense | pruned only | trained | gap closed | training s | all s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, sets in rows().items():
        if args.only and name not in args.only:
            continue
        record = run_row(args, root / name.replace(" ", "-").replace(":", "-"), sets)
        found, seconds = record["perplexity"], record["seconds"]
        figures = [f"{record['sparsity']['achieved']:.2%}", *(f"{found[key]:.2f}" for key in ("dense", "pruned", "losa"))]
        figures += [f"{gap_closed(found):.1%}", f"{seconds['training']:.0f}", f"{sum(seconds.values()):.0f}"]
        lines.append(f"| {name} | {' | '.join(figures)} |")
        (root / "table.md").write_text("\n".join(lines) + "\n")
    if not args.only or "dense, fine-tuned" in args.only:
        lines.append(f"| dense, fine-tuned | 0 % | | | {ceiling(args, root / 'ceiling.json'):.2f} | | | |")
        (root / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
