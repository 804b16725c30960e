"""One writer at a time; a result replaces another in one step or not at all; nothing of anybody else's is ever lost."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
from helpers import file_bytes, record_of, set_up, tensors, toy_config, toy_run
from processes import call, losa
from test_cli import losa_main

from losa.api import prune
from losa.config import LosaConfig
from losa.models import load
from losa.runtime.files import pack_checkpoint, unpack_checkpoint
from losa.system import output as outputs
from losa.system.output import LIST, check_free, claim, commit, fresh, listed

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = set_up(tmp_path_factory.mktemp("output"))
    toy_run(folder, steps=1)
    pack_checkpoint(folder / "sparse", folder / "packed")
    return folder


@pytest.fixture
def sparse(folder, tmp_path):
    return shutil.copytree(folder / "sparse", tmp_path / "sparse")


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def put(output: Path, **files: str) -> None:
    """A result of these files."""
    with claim(output):
        new = fresh(output)
        for name, text in files.items():
            (new / name).write_text(text)
        commit(output)


# ---- the lock -----------------------------------------------------------------------------------------------------------------


def hold(path: str, ready, let_go) -> None:
    with claim(path):
        ready.set()
        let_go.wait(60)


@pytest.fixture
def holder():
    """Starts a process that has an output to itself."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(path):
        ready, let_go = context.Event(), context.Event()
        process = context.Process(target=hold, args=(str(path), ready, let_go))
        process.start()
        started.append(process)
        assert ready.wait(60)
        return process, let_go

    yield start
    for process in started:
        process.kill()
        process.join()


def test_one_writer_whatever_the_path_is_called(tmp_path, holder, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    process, let_go = holder(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for spelling in (tmp_path / "out", "out", "./x/../out", "link", tmp_path / "link" / "."):
        with pytest.raises(ValueError, match=f"another losa command writes to .* \\(process {process.pid} on "), claim(spelling):
            pass
    with claim("other"), claim(None), claim(None):
        pass
    let_go.set()
    process.join()
    with claim("out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_the_system_lets_go_of_a_killed_writer(tmp_path, holder):
    process, _ = holder(tmp_path / "out")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / ".out.losa" / "lock").exists()
    with claim(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_no_folder_is_left_where_none_was(tmp_path):
    with claim(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())


def test_where_only_the_output_can_be_written_to_the_lock_is_inside(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with claim(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".losa.lock"]
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="is not a directory that can be written to"), claim(tmp_path / "new"):
        pass


def test_every_command_claims_its_output(folder, tmp_path, holder, monkeypatch, capsys):
    """One sentence and exit status 2, before anything is read; in Python too."""
    output = tmp_path / "out"
    shutil.copytree(folder / "packed", output)
    before = content(output)
    holder(output)
    data = ["--data", str(folder / "text.txt")]
    for arguments in (
        ["run", str(folder / "model"), "-o", str(output), *data],
        ["prune", str(folder / "model"), "-o", str(output), "--calibration", str(folder / "text.txt")],
        ["compare", str(folder / "model"), "-o", str(output), *data, "--methods", "dense"],
        ["pack", str(folder / "sparse"), str(output), "--overwrite"],
        ["unpack", str(folder / "packed"), str(output), "--overwrite"],
        ["eval", str(output), *data, "--save"],
        ["bench", str(output), "--save"],
        ["demo", "-o", str(output)],
        ["report", str(output)],
    ):
        code, out, err = losa_main(monkeypatch, capsys, *arguments)
        assert code == 2, arguments
        lines = [line for line in (out + err).splitlines() if "Loading" not in line]
        assert len(lines) == 1, lines
        assert f"another losa command writes to {output}" in lines[0]
    config = toy_config(folder, output=str(output))
    with pytest.raises(ValueError, match="another losa command writes"):
        toy_run(folder, output=str(output))
    with pytest.raises(ValueError, match="another losa command writes"):
        prune(*load(config), config)
    assert content(output) == before


# ---- publishing ---------------------------------------------------------------------------------------------------------------


def test_a_result_lists_its_files(folder):
    for name in ("sparse", "packed"):
        assert listed(folder / name) == {path.name for path in (folder / name).iterdir()} - {LIST}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_others_put_beside_a_result_stays(tmp_path, monkeypatch, can_exchange, caplog):
    if not can_exchange:
        monkeypatch.setattr(outputs, "exchange", lambda *_: False)
    output = tmp_path / "out"
    put(output, first="1", both="1")
    (output / "eval.json").write_text("measured on the old result")
    (output / "thesis.safetensors").write_text("mine")
    (output / "x.safetensors").mkdir()
    (output / "x.safetensors" / "deep").write_text("mine")
    (output / "second").write_text("mine, and in the way")
    (output / "link").symlink_to("nowhere")
    put(output, second="2", both="2")
    assert content(output) == {
        LIST: json.dumps({"files": ["both", "second"]}, indent=1).encode() + b"\n",
        "second": b"2",
        "both": b"2",
        "thesis.safetensors": b"mine",
        "x.safetensors/deep": b"mine",
        "second.1": b"mine, and in the way",
    }
    assert (output / "link").readlink() == Path("nowhere")
    assert "is called second.1 now" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("where", ["exchange", "rename", "copymode", "link", "_discard", "write_text", "sync"])
def test_an_end_anywhere_leaves_the_old_or_the_new_result(tmp_path, monkeypatch, where, can_exchange):
    """Where a process dies while it publishes, whichever of the calls it is in; `claim` then does not tidy up either."""
    output = tmp_path / "out"
    for number in range(1, 9):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        put(output, a="old", gone="old")
        (output / "mine").write_text("mine")
        with monkeypatch.context() as patched:
            patched.setattr(outputs, "_tidy", lambda final: None)
            if not can_exchange:
                patched.setattr(outputs, "exchange", lambda *_: False)
            owner = {"exchange": outputs, "_discard": outputs, "sync": outputs, "copymode": shutil, "link": os}.get(where, Path)
            patched.setattr(owner, where, dying(getattr(owner, where), number))
            try:
                put(output, a="new")
                reached = False
            except Died:
                reached = True
        with claim(output):
            assert content(output)["mine"] == b"mine"
            assert {name: content(output).get(name) for name in ("a", "gone")} in (
                {"a": b"old", "gone": b"old"},
                {"a": b"new", "gone": None},
            )
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        if not reached:
            break


class Died(BaseException):
    pass


def dying(function, number):
    """Raises before the call of this number, counted from 1, and after it when the number is even."""
    calls = []

    def call(*args, **kwargs):
        calls.append(0)
        if len(calls) == (number + 1) // 2:
            if number % 2 == 0:
                function(*args, **kwargs)
            raise Died
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("command", ["run", "prune", "pack", "unpack"])
def test_a_result_is_replaced_only_when_asked(folder, sparse, tmp_path, command):
    """What stands there may be of any command."""
    (sparse / "thesis.tex").write_text("mine")
    before = content(sparse)

    def make(overwrite: bool, output: Path = sparse) -> None:
        config = toy_config(folder, output=str(output), steps=1, seed=7)
        if command == "run":
            toy_run(folder, output=str(output), steps=1, seed=7, overwrite=overwrite)
        elif command == "prune":
            prune(*load(config), LosaConfig.from_dict(config.to_dict() | {"calibration": {"data": str(folder / "text.txt"),
                  "length": 32, "sequences": 8}}), overwrite=overwrite)  # fmt: skip
        elif command == "pack":
            pack_checkpoint(folder / "sparse", output, overwrite=overwrite)
        else:
            unpack_checkpoint(folder / "packed", output, overwrite=overwrite)

    with pytest.raises(ValueError, match="--overwrite to replace it"):
        make(overwrite=False)
    assert content(sparse) == before
    make(overwrite=True)
    assert content(sparse)["thesis.tex"] == b"mine"
    assert tensors(sparse).keys() != tensors(folder / "sparse").keys() or command != "pack"
    make(overwrite=True, output=tmp_path / "fresh" / "sparse")
    assert listed(sparse) == listed(tmp_path / "fresh" / "sparse")
    (sparse / LIST).unlink()
    with pytest.raises(ValueError, match=r"does not list its files|is not empty and not an earlier run"):
        make(overwrite=True)
    with pytest.raises(ValueError, match="is not empty and not an earlier run"):
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "thesis.tex").write_text("mine")
        make(overwrite=True, output=tmp_path / "theirs")


def test_what_cannot_be_an_output(tmp_path, monkeypatch):
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("lost", "loop"):
        with pytest.raises(ValueError, match=f"output .*{name}"), claim(tmp_path / name):
            pass
    with pytest.raises(ValueError, match="give one of the two"):
        check_free(tmp_path / "out", overwrite=True, resume=True)
    (tmp_path / "here").mkdir()
    check_free(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is the current directory or above it"):
        check_free(".")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(ValueError, match=r"is a mount point, .*; choose a directory inside it"):
        check_free("here")


def test_a_link_to_an_output_stays_a_link(folder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    toy_run(folder, output=str(tmp_path / "link"), steps=1)
    assert (tmp_path / "link").is_symlink()
    assert record_of(tmp_path / "real")["kind"] == "run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_what_killed_commands_left_is_removed_by_the_next(folder, sparse, tmp_path):
    before = content(sparse)
    (sparse / ".losa" / "tmp-03-pruned").mkdir(parents=True)
    (sparse / ".losa" / "tmp-03-pruned" / "stage.json").write_text("{}")
    (sparse / ".eval.json.losa-partial").write_text("{")
    half = tmp_path / ".sparse.losa" / "new"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text("half")
    with claim(sparse):
        assert content(sparse) == before
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


# ---- full disks ---------------------------------------------------------------------------------------------------------------


def small_files(limit: int, arguments: list[str]) -> None:
    """The `losa` command on a disk that takes no file of more than `limit` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.stderr.flush()
    losa(arguments)


@pytest.mark.parametrize("command", ["run", "prune", "pack", "unpack"])
@pytest.mark.parametrize("limit", [7_000, 60_000])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_result(folder, sparse, tmp_path, command, limit):
    before = content(sparse)
    (tmp_path / "c.yaml").write_text(toy_config(folder, steps=1).to_yaml())
    own = {
        "run": ["run", folder / "model", "-o", sparse, "-c", tmp_path / "c.yaml"],
        "prune": ["prune", folder / "model", "-o", sparse, "-c", tmp_path / "c.yaml", "--calibration", folder / "text.txt"],
        "pack": ["pack", folder / "sparse", sparse],
        "unpack": ["unpack", folder / "packed", sparse],
    }[command]
    code = call(tmp_path / "log", small_files, limit, [*map(str, own), "--overwrite"])
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert code == 2, log
    assert "cannot write" in log.splitlines()[-1]
    after = content(sparse)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if name not in before and not name.startswith(".losa/")]


def test_the_result_of_a_run_in_two_directories_is_the_same(folder, tmp_path):
    toy_run(folder, output=str(tmp_path / "sparse"), steps=1)
    assert file_bytes(tmp_path / "sparse") == file_bytes(folder / "sparse")
