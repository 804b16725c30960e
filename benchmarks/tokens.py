"""Quality against training tokens: draws the rows of a table as tokens.svg beside it.

    python benchmarks/tokens.py docs/benchmarks/tokens.csv

The columns are `zeros` (and what else is different), `text`, `tokens`, `perplexity` and `dense`, the dense model's perplexity.
A row is a run of its own, with a schedule as long as its tokens, so a line is not the course of one training.
"""

import argparse
import csv
import math
from pathlib import Path

SPEED = 224  # tokens a second on two cores of a Zen 4 (docs/results.md)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    table = parser.parse_args().table
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with table.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name in dict.fromkeys((row["zeros"], row["text"]) for row in rows):
        mine = [row for row in rows if (row["zeros"], row["text"]) == name]
        minutes = [int(row["tokens"]) / SPEED / 60 for row in mine]
        nats = [math.log(float(row["perplexity"]) / float(row["dense"])) for row in mine]
        axes.plot(minutes, nats, "o-", markersize=4, label=f"{name[0]}, {name[1]}")
    axes.axhline(math.log(1.1), color="#999999", linewidth=1, linestyle="--", label="10 % above dense")
    ticks = [0, 1, 3, 10, 30, 60]
    axes.set(xscale="symlog", xlim=(0, 70), ylim=(0, None), ylabel="nats above dense")
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xlabel(f"minutes of training on two cores ({SPEED} tokens a second)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(table.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
