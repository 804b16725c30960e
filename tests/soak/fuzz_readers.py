"""Damages files by the thousand and reads them: every mutant must be read, or refused in a sentence.

    python tests/soak/fuzz_readers.py --mutants 100000 [--target config ...] [--seed 0] [--keep FOLDER]

A mutant fails the reader if what comes is no ValueError or OSError (a traceback for users), takes more than 10 seconds or a GiB
more than there was, or ends the process. Mutant number `n` of a target and a seed is always the same. Workers are forked from one
process that has everything imported; one that is dead or silent is replaced, and goes on after the mutant it died of.
"""

import argparse
import contextlib
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LOSA_PROGRESS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from soak.readers import TARGETS, Target, save_samples

from losa.system.doors import out_of_memory

SECONDS, BYTES = 10, 1 << 30  # of a mutant
PATIENCE = 120  # seconds without a word from a worker, which on a busy machine is slow to start
TURN = 500  # mutants of a worker: what libraries keep of each does not add up
SENTENCE = 20_000  # characters of a message; what a user wrote is shown to him


class TooLong(BaseException):
    """Raised in a worker by its clock; no Exception, so that nothing catches it."""


def _late(*_: object) -> None:
    raise TooLong


def mutant(name: str, target: Target, seed: int, number: int, samples: Path) -> tuple[str, bytes]:
    """The file that is changed, and its content."""
    pick = random.Random(f"{name} {seed} {number}")
    file = pick.choice(sorted(target.files))
    return file, target.files[file](pick, (samples / target.sample / file).read_bytes())


def fault(error: BaseException) -> str | None:
    """What is wrong with how a reader ended: its kind and place; None for a sentence."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    where = [frame for frame in traceback.extract_tb(error.__traceback__) if "/losa/" in frame.filename]
    place = f"{Path(where[-1].filename).name}:{where[-1].lineno} {where[-1].name}" if where else "outside"
    if isinstance(error, TooLong):
        return f"hang at {place}"
    if any(out_of_memory(one) for one in chain):
        return f"memory at {place}"
    if not isinstance(error, ValueError | OSError | FloatingPointError):
        frames = traceback.extract_tb(error.__traceback__)
        last = f", from {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return f"{type(error).__name__} at {place}{last}"
    said = str(error)
    if not said.strip() or len(said) > SENTENCE:
        return f"message of {len(said)} characters at {place}"
    return None


def _work(name: str, seed: int, numbers: range, samples: Path, pipe: int) -> None:
    """A worker: reads mutants and tells of each, as lines `number outcome` into the pipe, with `+` for one that was read."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch) / target.sample
        with Path(os.devnull).open("r+b") as nothing:  # what libraries print of every mutant
            for stream in (0, 1, 2):
                os.dup2(nothing.fileno(), stream)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        signal.signal(signal.SIGALRM, _late)
        shutil.copytree(samples, scratch, dirs_exist_ok=True)
        for number in numbers:
            os.write(pipe, f"{number} \n".encode())
            file, content = mutant(name, target, seed, number, samples)
            (folder / file).unlink(missing_ok=True)  # what was mapped of the one before stays whole
            (folder / file).write_bytes(content)
            found: str | None = "+"
            signal.alarm(SECONDS)
            try:
                target.read(folder)
            except BaseException as error:
                signal.alarm(0)
                found = fault(error)
            signal.alarm(0)
            with contextlib.suppress(OSError):
                (folder / file).unlink(missing_ok=True)
                shutil.copy(samples / target.sample / file, folder / file)
            if found:
                os.write(pipe, f"{number} {found}\n".encode())


def _lines(pipe: int, process: int) -> Iterator[str]:
    """Lines of a worker. One that says nothing for long is killed."""
    rest = b""
    while True:
        if not select.select([pipe], [], [], PATIENCE)[0]:
            os.kill(process, signal.SIGKILL)
        data = os.read(pipe, 65536)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in whole)


def turn(name: str, seed: int, numbers: range, samples: Path) -> tuple[int, list[tuple[int, str]]]:
    """Has one worker read mutants. Returns how far it came, and what was read or is at fault, by number."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reading)
            _work(name, seed, numbers, samples, writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    last, faults = numbers.start - 1, []
    for line in _lines(reading, process):
        number, _, found = line.partition(" ")
        last = int(number)
        if found:
            faults.append((last, found))
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status != 0:
        faults.append((max(last, numbers.start), f"the process ended with {status}"))
        last = max(last, numbers.start)
    return last + 1, faults


def fuzz(name: str, count: int, seed: int, samples: Path) -> list[tuple[int, str]]:
    """Reads `count` mutants of a target; returns the numbers of those that were read, with `+`, and of the faults."""
    faults, at = [], 0
    while at < count:
        at, found = turn(name, seed, range(at, min(count, at + TURN)), samples)
        faults += found
    return faults


def main(arguments: list[str] | None = None) -> int:
    """Reads mutants of all targets, or some, and prints the faults, each kind once. Exit status 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=1000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--keep", type=Path, help="folder for the first mutant of every fault")
    options = parser.parse_args(arguments)
    each, bad = -(-options.mutants // len(options.target)), 0
    with tempfile.TemporaryDirectory(prefix="samples-") as scratch:
        samples = Path(scratch)
        save_samples(samples)
        for name in options.target:
            began = time.perf_counter()
            found = fuzz(name, each, options.seed, samples)
            faults = [(number, outcome) for number, outcome in found if outcome != "+"]
            about = f"{len(found) - len(faults):,} read, {len(faults)} faults, {time.perf_counter() - began:.0f} s"
            print(f"{name}: {each:,} mutants, {about}", flush=True)
            bad += len(faults)
            for kind, times in Counter(kind for _, kind in faults).most_common():
                number = next(number for number, other in faults if other == kind)
                print(f"  {times:,} x {kind}, first mutant {number}", flush=True)
                if options.keep:
                    file, content = mutant(name, TARGETS[name], options.seed, number, samples)
                    options.keep.mkdir(parents=True, exist_ok=True)
                    (options.keep / f"{name}-{options.seed}-{number}-{file}".replace("/", "-")).write_bytes(content)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
