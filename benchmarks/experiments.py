"""Regenerates the tables and plots of docs/experiments.md from the configurations in configs/experiments.

    python benchmarks/experiments.py [NAME ...]

Each is a `losa compare`; rows that exist are not made again (delete `experiments/` to measure anew). A table stands in the page
between `<!-- table NAME -->` and `<!-- end -->`, and only that is replaced: what was found, in words, is written by hand.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "experiments.md"
FOUND = ROOT / "experiments"  # where the configurations put their rows


def fill(page: str, name: str, table: str) -> str:
    """The page with `table` between the marks of `name`."""
    marked = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marked.search(page):
        raise SystemExit(f"{PAGE.name} has no place for the table {name}")
    return marked.sub(lambda match: f"{match[1]}{table.strip()}\n{match[2]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = {path.stem: path for path in sorted((ROOT / "configs" / "experiments").glob("*.yaml"))}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(configs)}; all by default")
    args = parser.parse_args()
    for name in args.names or configs:
        subprocess.run([sys.executable, "-m", "losa", "compare", "-c", str(configs[name])], check=True, cwd=ROOT)
        page = PAGE.read_text("utf-8")
        for table in (name, f"{name}-context"):
            if f"<!-- table {table} -->" in page:
                page = fill(page, table, (FOUND / f"{table}.md").read_text("utf-8"))
        PAGE.write_text(page, "utf-8")
        shutil.copy(FOUND / f"{name}.csv", ROOT / "docs" / "experiments")
        for figure in FOUND.glob(f"{name}-*.svg"):
            if f"(experiments/{figure.name})" in page:
                shutil.copy(figure, ROOT / "docs" / "experiments")


if __name__ == "__main__":
    main()
