"""Pairs of commands that write to one output at once: `python tests/soak/writers.py --pairs 50 [--seed 0]`, or
`pytest -m nightly tests/soak`.

One of the two makes its result, the other ends with one sentence and status 2; the result is one of theirs, never a mix.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import processes
from kills import result, rows, settings

KINDS = ("run", "prune", "pack", "compare")
SENTENCE = "another losa command writes to"


class Writers:
    """Two versions of each command, what each makes alone, and what the pairs came to."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.values = settings(folder, "toy")
        self.counts: Counter[str] = Counter()
        self.alone: dict[tuple[str, int], Any] = {}
        (folder / "c.yaml").write_text(json.dumps(self.values))

    def arguments(self, kind: str, version: int, output: Path) -> list[str]:
        """Of `losa`; the versions differ in what they make."""
        model, text = self.values["model"], self.values["train"]["data"]
        if kind == "pack":
            return ["pack", str(self.sparse()), str(output), "--values", ("bfloat16", "int8")[version]]
        seed = ["--set", f"seed={version}"]
        if kind == "compare":
            shared = {key: self.values[key] for key in ("model", "device", "calibration", "train", "eval")}
            values = {"methods": ["dense", "Wanda"], "targets": ["0.6"], "seeds": [version], "run": shared}
            (self.folder / f"comparison-{version}.yaml").write_text(json.dumps(values))
            return ["compare", "-c", str(self.folder / f"comparison-{version}.yaml"), "-o", str(output)]
        if kind == "prune":
            short = [f"calibration.{key}" for key in ("sequences=4", "rmi_sequences=4", "length=32")] + ["eval.length=32"]
            return ["prune", model, "-o", str(output), "--calibration", text, *seed, *(f"--set={key}" for key in short)]
        return ["run", model, "-o", str(output), "-c", str(self.folder / "c.yaml"), *seed]

    def sparse(self) -> Path:
        """A checkpoint to pack, made once."""
        output = self.folder / "sparse"
        if not output.exists():
            assert processes.call(self.folder / "log", processes.losa, self.arguments("run", 0, output)) == 0
        return output

    def look(self, kind: str, output: Path) -> Any:
        """What there is."""
        if kind != "compare":
            return result(output)
        found = rows(output)
        for row in found[0].values() if found else ():
            row.pop("date")
        return found and sorted(json.dumps(row) for row in found[0].values())

    def wanted(self, kind: str, version: int) -> Any:
        """What a version makes when it is alone."""
        if (kind, version) not in self.alone:
            output = Path(tempfile.mkdtemp(dir=self.folder)) / "out"
            log = output.parent / "log"
            assert processes.call(log, processes.losa, self.arguments(kind, version, output)) == 0, log.read_text()
            self.alone[kind, version] = self.look(kind, output)
        return self.alone[kind, version]

    def pair(self, kind: str) -> None:
        """Starts both, a random moment apart."""
        wanted = [self.wanted(kind, version) for version in (0, 1)]
        home = Path(tempfile.mkdtemp(dir=self.folder))
        (home / "link").symlink_to(home / "out")
        logs = [home / "log-0", home / "log-1"]
        (home / "out").mkdir()
        spelling = home / "out" if kind == "pack" else home / self.random.choice(["out", "link", "x/../out"])
        (home / "out").rmdir() if kind == "pack" else (home / "x").mkdir()
        started = []
        for version, output in enumerate((home / "out", spelling)):
            started.append(processes.start(logs[version], processes.losa, self.arguments(kind, version, output)))
            time.sleep(self.random.choice([0, 0, 0.1, 0.4]))
        for process in started:
            process.join(120)
        codes, texts = [process.exitcode for process in started], [log.read_text() for log in logs]
        assert 0 in codes, texts
        first = codes.index(0)
        found = self.look(kind, home / "out")
        if codes == [0, 0]:  # one after the other, which only a comparison allows
            assert kind == "compare", texts
            self.counts[f"{kind}, one after the other"] += 1
            return
        lines = [line for line in texts[1 - first].splitlines() if line.startswith("error:")]
        assert codes[1 - first] == 2 and len(lines) == 1 and "Traceback" not in texts[1 - first], texts
        assert SENTENCE in lines[0] or "holds a finished result" in lines[0] or "exists; choose" in lines[0], lines
        assert found == wanted[first], f"{kind}: a mix, in {home}"
        self.counts[f"{kind}, {'at once' if SENTENCE in lines[0] else 'one after the other'}"] += 1

    def go(self, pairs: int) -> None:
        """So many pairs, the kinds in turns."""
        for number in range(pairs):
            self.pair(KINDS[number % len(KINDS)])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    processes.preload_losa()
    with tempfile.TemporaryDirectory() as temporary:
        writers = Writers(Path(temporary), args.seed)
        writers.go(args.pairs)
    for name, count in sorted(writers.counts.items()):
        print(f"{count:5d}  {name}")


if __name__ == "__main__":
    main()
