"""The output directory: one command at a time writes there, and what it writes appears whole or not at all.

While a command writes to `x`, a hidden directory `.x.losa` lies beside it:

    lock    locked by the command (flock); the system lets go of it when the process dies, however it dies
    new     the next content of `x`, complete before it changes places with `x` in one step

Both are gone when the command ends. What a killed one left there is removed by the next, which takes the lock first. Only what
losa wrote is ever deleted: every result lists its files, and whatever else lies beside them is carried into the next result.
"""

import ctypes
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from losa.system.doors import read_json
from losa.system.writing import HALF, sync

try:
    import fcntl
except ImportError:  # no flock on this system
    fcntl = None  # type: ignore[assignment]

LIST = "losa-files.json"  # names of what losa wrote into a directory
RECORD, EVALUATION, BENCH = "losa.json", "eval.json", "bench.json"  # the last two are added to a result after it is published
WORK, PREVIOUS = ".losa", "previous"  # stages of a run, inside of its output; in it, the stage before the newest
MANIFEST = "stage.json"
CARD = "README.md"
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # from linux/fs.h, fcntl.h

logger = logging.getLogger(__name__)


def work_dir(output: Path) -> Path:
    """Where a run keeps what is not its result; removed when the run is complete."""
    return output / WORK


def place(output: str | Path) -> Path:
    """Where an output really is: the same path for every spelling and every link.

    Raises:
        ValueError: a link to nothing, or a loop of links.
    """
    path = Path(output)
    try:
        final = path.resolve()
        lost = path.is_symlink() and not final.exists() and not (_beside(final) / "old").exists()  # which `claim` puts back
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot use output {output}: {error}") from error
    if lost:
        raise ValueError(
            f"output {output} is a link to {final}, which does not exist; remove the link or choose another directory"
        )
    return final


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.name}.losa")


@contextmanager
def claim(output: str | Path | None) -> Iterator[None]:
    """Has `output` to itself while it lasts, from before anything there is read, and removes what killed commands left. Of
    several processes that belong together, the first does this. Nothing is claimed when None.

    Raises:
        ValueError: another command writes there, or nothing can be written there.
    """
    if output is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    final = place(output)
    missing = [path for path in (final, *final.parents) if not path.exists()]
    try:
        lock = _lock(output, _lock_file(output, final))
    except OSError as error:
        raise ValueError(f"cannot lock output {output}: {error}; choose another directory") from error
    try:
        _tidy(final)
        try:
            yield
        finally:
            _tidy(final)
            _lock_file(output, final).unlink(missing_ok=True)
            for made in (_beside(final), *missing):  # directories that this made, where nothing came into them
                with suppress(OSError):
                    made.rmdir()
    finally:
        os.close(lock)


def _lock_file(output: str | Path, final: Path) -> Path:
    """Beside the output; inside, where only that can be written to: then nobody can put another directory in its place."""
    existing = next(path for path in final.parents if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return _beside(final) / "lock"
    if final.is_dir() and os.access(final, os.W_OK):
        return final / ".losa.lock"
    raise ValueError(f"cannot create {output}: {existing} is not a directory that can be written to")


def _lock(output: str | Path, path: Path) -> int:
    """An open, locked file. The one who lets go of it removes it, so what was locked may be no longer what has the name."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:
            continue  # the directory was removed just now
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "it does not say which"
            os.close(descriptor)
            raise ValueError(
                f"another losa command writes to {output} ({holder}); wait until it ends, or choose another directory"
            ) from error
        except OSError as error:
            logger.warning("this file system has no locks (%s); see that no other command writes to %s", error, output)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)


def _tidy(final: Path) -> None:
    """Removes what commands that were killed left: half of a new result, an old one that was replaced, work without a stage."""
    beside = _beside(final)
    old, new = beside / "old", beside / "new"
    if old.exists() and not final.exists():  # killed between two renames
        old.rename(final)
    for left in (old, new):
        if left.exists():
            _discard(left, final)
    if (final / WORK).is_dir() and not stages(final):
        others = [path.name for path in final.iterdir() if path.name != WORK]
        if not others or LIST in others:  # else it alone tells that what lies there lies in an output
            shutil.rmtree(final / WORK)
    for half_stage in (final / WORK).glob("tmp-*"):
        shutil.rmtree(half_stage)
    for half in (*final.glob(f".*{HALF}"), *final.glob(f"*/.*{HALF}")):
        half.unlink()


def _discard(directory: Path, final: Path) -> None:
    """Deletes a directory that was, or was to be, the output. What is not ours and not in the output goes there."""
    if (directory / LIST).exists() or (directory / WORK).exists():  # or else half of a new result
        for entry in _strangers(directory):
            if final.is_dir() and not os.path.lexists(final / entry.name):
                entry.rename(final / entry.name)
    shutil.rmtree(directory)


def listed(directory: Path) -> set[str] | None:
    """The names that losa wrote into a directory, or None where it does not say."""
    try:
        found = json.loads((directory / LIST).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else None


def _strangers(directory: Path) -> list[Path]:
    """What is in a directory that losa did not write."""
    ours = (listed(directory) or set()) | {LIST, WORK}
    if LIST in {path.name for path in directory.iterdir()}:
        ours |= {EVALUATION, BENCH}
    return [path for path in directory.iterdir() if path.name not in ours]


def stages(output: Path) -> list[Path]:
    """The directories of the stages that a run has left in its output; the one before the newest is in a directory of its own."""
    found = (path.parent for pattern in ("", f"{PREVIOUS}/") for path in (output / WORK).glob(f"{pattern}*/{MANIFEST}"))
    return sorted(path for path in found if not path.name.startswith("tmp-"))


def check_free(output: str | Path, overwrite: bool = False, resume: bool = False) -> None:
    """Refuses an output where a result would take the place of something that it may not replace.

    Raises:
        ValueError: a file, someone's files, a finished result without `overwrite`, an interrupted run without `resume` or
            `overwrite`, a mount point, the current directory; or both `resume` and `overwrite`.
    """
    final = place(output)
    if resume and overwrite:
        raise ValueError("--resume goes on with what is there and --overwrite starts anew; give one of the two")
    if final.exists() and not final.is_dir():
        raise ValueError(f"output {output} is a file; choose another directory")
    existing = next(path for path in final.parents if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"cannot create {output}: {existing} is not a directory that can be written to")
    if not final.exists():
        return
    started, finished = bool(stages(final)), any((final / name).exists() for name in (RECORD, LIST))
    if started and not resume and not overwrite:
        way_out = f"finish it with --resume, or delete {final / WORK}, as --overwrite does"
        raise ValueError(f"output {output} holds an interrupted run; {way_out}")
    if resume and finished and not started:
        raise ValueError(f"the run in {output} is complete; there is nothing to resume")
    if finished and not resume and not overwrite:
        raise ValueError(f"output {output} holds a finished result; add --overwrite to replace it, or choose another directory")
    if finished and listed(final) is None:
        raise ValueError(f"output {output} holds a result that does not list its files; remove it, or choose another directory")
    if not finished and not (final / WORK).is_dir() and any(final.iterdir()):
        raise ValueError(f"output {output} is not empty and not an earlier run; choose another directory")
    if os.path.ismount(final) or final == Path.cwd() or final in Path.cwd().parents:
        kind = "a mount point" if os.path.ismount(final) else "the current directory or above it"
        raise ValueError(f"output {output} is {kind}, which a result cannot take the place of; choose a directory inside it")


def fresh(output: str | Path) -> Path:
    """An empty directory beside a claimed output, for `commit`."""
    new = _beside(place(output)) / "new"
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(parents=True)
    return new


def commit(output: str | Path) -> None:
    """What was written to the directory of `fresh` becomes the content of a claimed output, in one step: at any moment there is
    the old content or the new one, whole. Files of others are carried over; one whose name is taken gets another."""
    final = place(output)
    beside = _beside(final)
    new, old = beside / "new", beside / "old"
    names = sorted(path.name for path in new.iterdir())
    (new / LIST).write_text(json.dumps({"files": names}, indent=1) + "\n", encoding="utf-8")
    _sync_tree(new)
    if not final.exists():
        new.rename(final)
    else:
        shutil.copymode(final, new)
        for stranger in _strangers(final):
            _carry(stranger, new)
        sync(new)
        if not exchange(new, final):
            final.rename(old)
            new.rename(final)
    sync(final.parent)
    for left in (old, new):
        if left.exists():
            _discard(left, final)


def exchange(first: Path, second: Path) -> bool:
    """Two directories change places in one step. False, and nothing done, where the system cannot do that."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    done: int = renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE)
    return done == 0


def _carry(stranger: Path, new: Path) -> None:
    """Puts what is not ours into the new directory too: the same files, by hard links where there are such."""
    target = new / stranger.name
    number = 0
    while os.path.lexists(target):
        number += 1
        target = new / f"{stranger.name}.{number}"
    if number:
        logger.warning("%s is in the way of the result and is called %s now", stranger, target.name)
    if stranger.is_dir() and not stranger.is_symlink():
        shutil.copytree(stranger, target, symlinks=True, copy_function=_link)
    else:
        _link(stranger, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        if not path.is_symlink():
            sync(path)


def check_finished(directory: Path) -> None:
    """Refuses the output of a run that has made no model yet.

    Raises:
        ValueError: it holds what such a run keeps to go on, and no model.
    """
    if work_dir(directory).is_dir() and not (directory / "config.json").is_file():
        raise ValueError(f"{directory} holds an interrupted run, not a model yet; finish it with --resume")


def read_record(directory: Path) -> dict[str, Any]:
    """The `losa.json` of a finished run.

    Raises:
        ValueError: there is none, as of a run that was interrupted, or it is damaged.
    """
    path = directory / RECORD
    if not path.is_file():
        check_finished(directory)
        raise ValueError(f"{directory} has no {RECORD}; it is not a finished LoSA run")
    return read_json(path)
