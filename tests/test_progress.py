"""Promised: one bar over a whole run and one for its loop on a terminal; in a pipe a line a minute with the time that is left."""

import io
import sys
from types import SimpleNamespace

import pytest
from helpers import set_up, toy_run

from losa.planning.work import remaining
from losa.system import progress as module
from losa.system.progress import Whole, duration, progress, whole_run


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    now = [0.0]
    monkeypatch.setenv("LOSA_PROGRESS", "1")
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]))
    return now


def test_a_pipe_gets_a_line_a_minute(clock, capsys):
    loop = progress(range(100), "pruning")
    for _ in loop:
        clock[0] += 5
        loop.set_postfix(loss="2.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert lines[0] == "pruning: 12 of 100, loss 2.5, about 7 min 20 s left"


def test_a_short_loop_says_nothing_in_a_pipe(clock, capsys):
    assert list(progress([1, 2, 3], "x")) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_loops_of_a_run_share_the_line(clock, capsys):
    whole = Whole({"pruning": 1.0, "training": 3.0}, {}, {}, remaining)
    with whole_run(whole):
        with whole.inside("pruning", 1.0):
            for _ in progress(range(10), "pruning"):
                clock[0] += 4  # 40 s
        whole.seconds = {"pruning": 40.0}
        with whole.inside("training", 1.0), progress(None, "training", total=10) as loop:
            for _ in range(5):
                clock[0] += 20
                loop.update()
    assert capsys.readouterr().err.splitlines() == ["training: 3 of 10, all of it 48 %, about 2 min 20 s left"]
    assert whole.state() == (1.0, 0.0)


def test_a_terminal_gets_bars(monkeypatch):
    monkeypatch.setenv("LOSA_PROGRESS", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    whole = Whole({"pruning": 1.0}, {}, {}, remaining)
    with whole_run(whole), whole.inside("pruning", 1.0):
        assert list(progress(range(3), "loop")) == [0, 1, 2]
        assert whole.state()[0] == 1.0
    assert "all:" in sys.stderr.getvalue()
    assert "loop:" in sys.stderr.getvalue()


def test_quiet(monkeypatch):
    monkeypatch.setenv("LOSA_PROGRESS", "0")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(range(3), "loop")) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""


def test_a_run_goes_from_nothing_to_all_but_the_last_evaluation(tmp_path, monkeypatch):
    seen = []

    class Watched(Whole):
        def show(self):
            seen.append(self.state()[0])

    monkeypatch.setattr("losa.session.session.Whole", Watched)
    toy_run(set_up(tmp_path), steps=2)
    assert seen == sorted(seen)
    assert 0 < seen[0] < 0.1
    assert 0.8 < seen[-1] < 1


def test_durations():
    assert [duration(seconds) for seconds in (5, 65, 3700)] == ["0 min 5 s", "1 min 5 s", "1 h 1 min"]
