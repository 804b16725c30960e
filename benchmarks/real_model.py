"""What recovers a real language model: one table of methods, targets and seeds, each row a `losa` command in its own process.

    python benchmarks/real_model.py --model MODEL --data TEXT --eval-data TEXT --output DIR [--table main] [--seeds 0,1,2]

MODEL is the directory that a recipe such as SmolLM2-135M's makes. Every row is what a user would type, so its seconds and its
peak memory are those of the whole process. A row that is there is not made again: a table that was stopped goes on. Checkpoints
are removed once they are measured. `--before DIR` makes the rows of an earlier version, from a checkout of it.
"""

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PAPER = {"train.weights": "adapters", "pruner": "wanda", "rates": "rmi", "steps": 5}  # LoSA's own parts
ONE_SHOT = {"steps": 1, "rate_band": 0}
BASELINE = PAPER | ONE_SHOT | {"adapter.allocation": "uniform", "train.distill": 0}
RATES = {"pruner": "alps", "rates": "dlp", "rate_band": 0.15}
RELEASED = {"train.distill": 0, "train.last_share": 0.6, "train.lr": 2e-4}

# name -> (command, keys)
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "magnitude": ("prune", {"pruner": "magnitude"}),
    "Wanda": ("prune", {"pruner": "wanda"}),
    "SparseGPT": ("prune", {"pruner": "sparsegpt"}),
    "ALPS": ("prune", {"pruner": "alps"}),
    "ALPS + rates": ("prune", RATES),
    "ALPS + rates + reconstruction": ("prune", RATES | {"reconstruct.epochs": 4}),
    "Wanda + masked LoRA, one shot": ("run", BASELINE),
    "LoSA as in the paper": ("run", PAPER | RELEASED),
    "losa, before": ("before", {}),
    "losa, adapters": ("run", {"train.weights": "adapters"}),
    "losa": ("run", {}),
}
# What each part of the default earns: the default, less that part, or with another in its place.
ABLATIONS: dict[str, tuple[str, dict[str, object]]] = {
    "losa": ("run", {}),
    "SparseGPT instead of ALPS": ("run", {"pruner": "sparsegpt"}),
    "Wanda instead of ALPS": ("run", {"pruner": "wanda"}),
    "rates by median score": ("run", {"rates": "dlp"}),
    "rates by mutual information": ("run", {"rates": "rmi"}),
    "five dynamic steps": ("run", {"steps": 5}),
    "adapters instead of all weights": ("run", {"train.weights": "adapters"}),
    "no distillation": ("run", {"train.distill": 0}),
    "half of it distillation": ("run", {"train.distill": 0.5}),
    "distillation alone": ("run", {"train.distill": 1}),
    "with reconstruction": ("run", {"reconstruct.epochs": 2}),
    "with rotation": ("run", {"rotate": True}),
}
TABLES = {"main": METHODS, "ablations": ABLATIONS}


def tokens_of(args: argparse.Namespace, kind: str) -> int:
    """Trained on; an earlier version that calibrates longer gets fewer, so that both take equally long."""
    return {"prune": 0, "before": args.tokens_before or args.tokens}.get(kind, args.tokens)


def command(args: argparse.Namespace, kind: str, keys: dict[str, object], target: str, seed: int, output: Path) -> list[str]:
    """What a user would type."""
    sets = {"calibration.length": args.window, "eval.length": args.window, "eval.windows": args.windows, "seed": seed}
    sets |= {"pattern": target} if ":" in target else {"sparsity": target}
    if kind != "prune":
        sets |= {"train.tokens": tokens_of(args, kind), "train.length": 512}
    sets |= keys
    if ":" in target:  # the pattern fixes all rates
        sets |= {"rate_band": 0}
    line = [sys.executable, "-m", "losa", "run" if kind == "before" else kind, args.model, "--output", str(output)]
    line += ["--calibration" if kind == "prune" else "--data", args.data, "--eval-data", args.eval_data]
    return line + [item for key, value in sets.items() for item in ("--set", f"{key}={value}")]


def measured(line: list[str], source: str | None) -> tuple[float, float]:
    """Runs a command; seconds and peak memory in MiB."""
    environment = os.environ | ({"PYTHONPATH": str(Path(source, "src"))} if source else {})
    began = time.perf_counter()
    process = subprocess.Popen(line, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(line)}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def make(args: argparse.Namespace, name: str, kind: str, keys: dict[str, object], target: str, seed: int) -> dict:
    """One row, or what is there of it."""
    slug = f"{name}-{target}-{seed}".replace(" ", "_").replace(",", "").replace(":", "to").replace("+", "and")
    file, output = Path(args.output, "rows", f"{slug}.json"), Path(args.output, "checkpoint")
    if file.exists():
        return json.loads(file.read_text())
    shutil.rmtree(output, ignore_errors=True)
    line = command(args, kind, keys, target, seed, output)
    seconds, memory = measured(line, args.before if kind == "before" else None)
    record = json.loads((output / "losa.json").read_text())
    row = {"method": name, "target": target, "seed": seed, "seconds": round(seconds), "peak_mib": round(memory)}
    row |= {"perplexity": record["perplexity"], "stages": record["seconds"], "zeros": record["sparsity"]["achieved"]}
    row["tokens"] = tokens_of(args, kind)
    if args.tasks:
        row["tasks"] = tasks(args, output)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row | {"date": time.strftime("%Y-%m-%d"), "config": record["config"]}, indent=1) + "\n")
    shutil.rmtree(output)
    return row


def tasks(args: argparse.Namespace, model: Path | str) -> dict:
    """The zero-shot tasks of a checkpoint."""
    line = [sys.executable, "-m", "losa", "eval", str(model), "--tasks", "paper", "--limit", str(args.limit), "--json"]
    line += ["--task-data", args.task_data] if args.task_data else []
    found = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    return {"mean_acc": found["mean_acc"], "tasks": {name: task.get("acc") for name, task in found["tasks"].items()}}


def write(folder: Path, name: str, rows: list[dict]) -> None:
    """All rows as CSV, and their means over seeds as a Markdown table."""
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["method", "target", "seed", "dense", "pruned", "perplexity", "zero-shot", "tokens", "seconds", "peak MiB"]
        )
        for row in rows:
            found, mean = row["perplexity"], row.get("tasks", {}).get("mean_acc")
            last = found.get("losa", found.get("pruned"))
            values = [row["method"], row["target"], row["seed"], f"{found['dense']:.4f}", f"{found.get('pruned', last):.4f}"]
            writer.writerow(
                [*values, f"{last:.4f}", mean and f"{mean['acc']:.4f}", row["tokens"], row["seconds"], row["peak_mib"]]
            )
    lines = ["| method | zeros | perplexity | above dense, nats | zero-shot, % | tokens | seconds | peak MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["target"]), []).append(row)
    for (method, target), group in groups.items():
        values = [row["perplexity"].get("losa", row["perplexity"].get("pruned")) for row in group]
        above = [math.log(value / row["perplexity"]["dense"]) for value, row in zip(values, group, strict=True)]
        means = [row["tasks"]["mean_acc"]["acc"] for row in group if row.get("tasks")]
        zeros = target if ":" in target else f"{float(target):.0%}"
        seconds, memory = (sum(row[key] for row in group) / len(group) for key in ("seconds", "peak_mib"))
        zero_shot = spread([100 * mean for mean in means], 1) if means else ""
        lines.append(
            f"| {method} | {zeros} | {spread(values, 2)} | {spread(above, 3)} | {zero_shot} | {group[0]['tokens']:,} | "
            f"{seconds:.0f} | {memory:.0f} |"
        )
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


def spread(values: list[float], digits: int) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--data", "--eval-data", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--table", choices=TABLES, default="main")
    parser.add_argument("--name", help="of the files that are written; the table's when not given")
    parser.add_argument("--methods", help="some of the table's, separated by semicolons")
    parser.add_argument("--targets", default="0.7", help="such as 0.5,0.6,0.7,2:4")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--tokens-before", type=int, help="of the earlier version; those of the others when not given")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tasks", action="store_true", help="zero-shot accuracy too")
    parser.add_argument("--task-data", help="folder with the tasks' data")
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--before", help="checkout of an earlier version")
    args = parser.parse_args()
    table = TABLES[args.table]
    names = args.methods.split(";") if args.methods else [name for name in table if args.before or table[name][0] != "before"]
    rows = []
    for target in args.targets.split(","):
        for name in names:
            for seed in map(int, args.seeds.split(",")):
                rows.append(make(args, name, *table[name], target, seed))
                print(
                    json.dumps({key: rows[-1][key] for key in ("method", "target", "seed", "perplexity", "seconds")}), flush=True
                )
                write(Path(args.output), args.name or args.table, rows)


if __name__ == "__main__":
    main()
