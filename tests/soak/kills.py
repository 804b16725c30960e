"""Random kills: `python tests/soak/kills.py --kills 200 [--seed 0] [--work DIR]`, or `pytest -m nightly tests/soak`.

Commands that write (run, prune, pack, unpack, compare, eval --save), on a toy and on novels-4m, get SIGKILL, SIGTERM or SIGINT at
a random moment, over and over, until one gets through. After every signal, nothing half-written may look finished, and nothing of
anybody else's may be gone; the end must be, bit for bit, what an undisturbed command made.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import processes
from helpers import set_up, toy_values

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TELLS_TIME = ("losa.json", "report.html")
DEMO = Path(__file__).parents[2] / "src" / "losa" / "demo_assets"


@dataclass(frozen=True)
class Job:
    """A command that writes `output`.

    Attributes:
        arguments: of `losa`, for an output.
        again: options that make it go on after a kill; over an old result, or not.
        replaces: whether an old result can stand there first.
        look: what two ends must have in common, or None where there is no end.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    again: tuple[str, ...]
    replaces: bool
    look: Callable[[Path], Any]


def result(output: Path) -> Any:
    """A finished checkpoint: files bit for bit, and what the record says beside times."""
    if not (output / "config.json").exists():
        assert not (output / "losa.json").exists(), "a record without a model"
        return None
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file() and path.name not in TELLS_TIME}
    record = json.loads((output / "losa.json").read_text()) if (output / "losa.json").exists() else {}
    for key in ("seconds", "evaluation"):
        record.pop(key, None)
    record.get("config", {}).pop("output", None)
    files.pop("mine.safetensors", None)
    return files, record


def rows(output: Path) -> Any:
    """A comparison: every row that is there is whole; None as long as its plots are missing."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((output / "rows").glob("*.json"))}
    for row in found.values():
        row.pop("seconds")
    return (found, sorted(path.name for path in output.iterdir())) if (output / "comparison-by-time.svg").exists() else None


def measured(output: Path) -> Any:
    """`eval.json` of a checkpoint, or None."""
    path = output / "eval.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    for row in found["perplexity"]:
        row.pop("model")
    return found


def jobs(folder: Path, models: Sequence[str]) -> list[Job]:
    """All kinds, on every model; what they read is made in `folder`."""
    made: list[Job] = []
    short = ["--length", "32", "--windows", "8", "--device", "cpu", "--save"]
    for model in models:
        home = folder / model
        values = settings(home, model)
        (home / "c.yaml").write_text(json.dumps(values))
        whole = values | {"steps": 1, "pruner": "alps", "train": values["train"] | {"weights": "all", "lr": 1e-3}}
        (home / "whole.yaml").write_text(json.dumps(whole))
        shared = {key: values[key] for key in ("device", "calibration", "train")} | {"eval": values["eval"]}
        comparison = {
            "targets": ["0.6"],
            "methods": ["dense", "Wanda", "Wanda + LoSA"],
            "run": shared | {"model": values["model"]},
        }
        (home / "comparison.yaml").write_text(json.dumps(comparison))
        pruning = ["--calibration", values["train"]["data"], "--set", "calibration.sequences=4", "--set", "eval.windows=4"]
        pruning += [item for part in ("calibration", "eval") for item in ("--set", f"{part}.length=32")]
        pruning += ["--set", "calibration.rmi_sequences=4"]

        def of(command: str, *more: str, source: str = values["model"]) -> Callable[[Path], list[str]]:
            return lambda output: [command, source, "--output", str(output), *more]

        run = [["-c", str(home / f"{name}.yaml")] for name in ("c", "whole")]
        sparse, packed = str(home / "sparse"), str(home / "packed")
        made += [
            Job(f"run {model}", of("run", *run[0]), ("--resume",), True, result),
            Job(f"run, all weights {model}", of("run", *run[1], "--set", "train.save_minutes=1e-9"), ("--resume",), True, result),
            Job(f"prune {model}", of("prune", *pruning, "--set", "train.save_minutes=1e-9"), ("--resume",), True, result),
            Job(f"pack {model}", lambda output, sparse=sparse: ["pack", sparse, str(output)], (), True, result),
            Job(f"unpack {model}", lambda output, packed=packed: ["unpack", packed, str(output)], (), True, result),
            Job(f"compare {model}", of("compare", "-c", str(home / "comparison.yaml")), (), False, rows),
            Job(
                f"eval {model}",
                lambda output, text=values["train"]["data"]: ["eval", str(output), "--data", text, *short],
                (),
                False,
                measured,
            ),
        ]
        if not (home / "packed").exists():
            for arguments in (of("run", *run[0])(home / "sparse"), ["pack", sparse, packed]):
                assert processes.call(folder / "log", processes.losa, arguments) == 0, (folder / "log").read_text()
    return made


def settings(home: Path, model: str) -> dict[str, Any]:
    """The toy's configuration, for either model."""
    set_up(home)
    values = toy_values(home, steps=2, train={"tokens": 3200}, eval={"windows": 8})
    if model != "toy":
        values |= {"model": str(DEMO / "novels-4m")}
        values["train"]["data"] = str(DEMO / "held.txt")
    del values["output"]
    return values


def begin(mark: str, arguments: list[str]) -> None:
    """`losa`, once it is there to be killed."""
    import losa.cli  # noqa: F401

    Path(mark).touch()
    try:
        processes.losa(arguments)
    finally:  # what follows is multiprocessing's
        for number in SIGNALS[1:]:
            signal.signal(number, signal.SIG_DFL)


class Soak:
    """Kills, and what came of them."""

    def __init__(self, folder: Path, seed: int, models: Sequence[str] = ("toy", "novels-4m")) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.jobs = jobs(folder, models)
        self.wanted: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.counts: Counter[str] = Counter()

    def output(self, job: Job) -> Path:
        """Always of the same name, which is in the model card."""
        home = Path(tempfile.mkdtemp(dir=self.folder))
        if job.look is measured:
            shutil.copytree(self.folder / job.name.split()[-1] / "sparse", home / "out")
        return home / "out"

    def call(self, job: Job, output: Path, *more: str, after: float | None = None, number: int = 0) -> int:
        """The exit status of a command that gets signal `number` after so many seconds."""
        log, mark = output.parent / "log", output.parent / "mark"
        mark.unlink(missing_ok=True)
        process = processes.start(log, begin, str(mark), [*job.arguments(output), *more])
        while process.is_alive() and not mark.exists():
            time.sleep(0.001)
        if after is not None:
            time.sleep(after)
            if process.is_alive():
                os.kill(process.pid or 0, number)
        process.join(120)
        assert process.exitcode is not None, f"{job.name} hangs"
        assert "Traceback" not in log.read_text(), log.read_text()
        return process.exitcode

    def undisturbed(self, job: Job) -> Any:
        """What a job makes, and how long it takes."""
        if job.name not in self.wanted:
            output = self.output(job)
            assert self.call(job, output) == 0, (output.parent / "log").read_text()
            self.seconds[job.name] = time.time() - (output.parent / "mark").stat().st_mtime
            self.wanted[job.name] = job.look(output)
            assert self.wanted[job.name] is not None
        return self.wanted[job.name]

    def torture(self, job: Job, most: int) -> int:
        """Kills one command until it gets through; at most `most` times, then it is let through. Returns the kills."""
        wanted, output = self.undisturbed(job), self.output(job)
        old = None
        if job.replaces and self.random.random() < 0.4:
            assert self.call(self.job("prune"), output) == 0
            (output / "mine.safetensors").write_text("mine")
            old = result(output)
        first = ("--overwrite",) if old else ()
        kills, again = 0, first
        while True:
            number = self.random.choice(SIGNALS) if kills < most else 0
            after = self.random.uniform(0.0, 1.0) * self.seconds[job.name] if number else None
            code = self.call(job, output, *again, after=after, number=number)
            found = job.look(output)
            assert found in (None, old, wanted), f"{job.name}: {output} is neither the old result nor the new one"
            assert not old or (output / "mine.safetensors").read_text() == "mine"
            done = found == wanted and old != wanted
            if code == 0 or (kills and code == 2 and done):
                break
            assert code in (-number, 128 + number), f"{job.name} ended with {code}: {(output.parent / 'log').read_text()}"
            kills += 1
            self.counts[f"{job.name.rpartition(' ')[0]}, {signal.Signals(number).name}"] += 1
            started = any((output / ".losa").glob("*/stage.json"))
            again = job.again if job.again and (started or not old) else first
        assert found == wanted, f"{job.name}: another end, in {output}"
        left = {path.name for path in output.parent.iterdir()}
        assert left <= {"out", "log", "mark"}, left
        shutil.rmtree(output.parent)
        return kills

    def job(self, kind: str) -> Job:
        """One of a kind, on the toy."""
        return next(job for job in self.jobs if job.name == f"{kind} toy")

    def go(self, kills: int, deadline: float = float("inf"), kinds: Sequence[str] = ()) -> int:
        """Kills jobs of these kinds, or of all, until so many are done or until a moment. Returns how many there were."""
        chosen = [self.job(kind) for kind in kinds] or self.jobs
        done = 0
        while done < kills and time.monotonic() < deadline:
            done += self.torture(self.random.choice(chosen), min(4, kills - done))
        return done


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--work", type=Path, help="folder to work in, kept; a temporary one by default")
    args = parser.parse_args()
    processes.preload_losa()
    with tempfile.TemporaryDirectory() as temporary:
        deadline = time.monotonic() + args.seconds
        soak = Soak(args.work or Path(temporary), args.seed)
        done = soak.go(args.kills, deadline)
    for name, count in sorted(soak.counts.items()):
        print(f"{count:5d}  {name}")
    print(f"{done:5d}  kills in all; every end bit for bit the undisturbed one")


if __name__ == "__main__":
    main()
