"""How far a long loop is, and a whole run: bars on a terminal, a line a minute anywhere else, on the first process only.

A run has one bar over all its stages with the time that is left (`whole_run`); the loop that it is in has one below. In a file
or a pipe both are one line, at most one a minute, and loops that are done within a minute say nothing. `LOSA_PROGRESS=0` keeps it
quiet.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

EVERY = 60.0  # seconds between two lines
BAR = "{desc}: {percentage:3.0f}%|{bar}| {postfix}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _quiet() -> bool:
    return os.environ.get("LOSA_PROGRESS") == "0" or os.environ.get("RANK", "0") != "0"


class Whole:
    """All stages of a run: how much of the work is done, at the pace so far.

    Attributes:
        done: ratio of each stage that is done.
        line: when the last line was written, by `time.monotonic`.
    """

    def __init__(
        self,
        work: Mapping[str, float],
        done: Mapping[str, float],
        seconds: Mapping[str, float],
        left: Callable[[Mapping[str, float], Mapping[str, float], Mapping[str, float]], float | None],
    ) -> None:
        self.work, self.done, self.seconds, self.left_of = work, dict(done), seconds, left
        self.stage, self.ratio, self.began, self.moved_by = "", 0.0, 0.0, 0.0
        self.line = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty() and not _quiet():
            self.bar = tqdm(total=100, desc="all", leave=False, dynamic_ncols=True, bar_format=BAR)

    @contextmanager
    def inside(self, stage: str, ratio: float) -> Iterator[None]:
        """While it lasts, what loops do is `ratio` of a stage."""
        self.stage, self.ratio, self.began, self.moved_by = stage, ratio, time.perf_counter(), 0.0
        try:
            yield
        finally:
            self.done[stage] = min(1.0, self.done.get(stage, 0.0) + ratio)
            self.stage = ""
            self.show()

    def move(self, ratio: float) -> None:
        """A loop is `ratio` through; of several loops in a stage, what the furthest did counts."""
        self.moved_by = max(self.moved_by, min(1.0, ratio))
        self.show()

    def state(self) -> tuple[float, float | None]:
        """Ratio of all work that is done, and seconds that are left, None where no pace tells."""
        done, seconds = dict(self.done), dict(self.seconds)
        if self.stage:
            done[self.stage] = min(1.0, done.get(self.stage, 0.0) + self.ratio * self.moved_by)
            seconds[self.stage] = seconds.get(self.stage, 0.0) + time.perf_counter() - self.began
        whole = sum(self.work.values()) or 1.0
        return sum(work * done.get(stage, 0.0) for stage, work in self.work.items()) / whole, self.left_of(
            self.work, done, seconds
        )

    def text(self) -> str:
        """`62 %, about 3 min 5 s left`."""
        ratio, left = self.state()
        return f"{100 * ratio:.0f} %" + ("" if left is None else f", about {duration(left)} left")

    def show(self) -> None:
        """Moves the bar, on a terminal."""
        if self.bar is None:
            return
        ratio, left = self.state()
        self.bar.n = 100 * ratio
        self.bar.set_postfix_str(f"{self.stage or ''}{'' if left is None else f', about {duration(left)} left'}")

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()


_WHOLE: ContextVar[Whole | None] = ContextVar("whole", default=None)  # the run that loops are part of


@contextmanager
def whole_run(whole: Whole) -> Iterator[Whole]:
    """While it lasts, every loop is part of that run."""
    token = _WHOLE.set(whole)
    try:
        yield whole
    finally:
        _WHOLE.reset(token)
        whole.close()


class Loop:
    """A loop under way: over items, or updated by hand."""

    def __init__(self, items: Iterable[Any] | None, label: str, total: int | None, done: int = 0) -> None:
        self.items, self.label = items, label
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.count, self.extra, self.whole = done, "", _WHOLE.get()
        self.before, self.began = done, time.monotonic()
        self.line = self.began
        quiet = _quiet()
        self.lines = not quiet and not sys.stderr.isatty()
        self.bar: Any = None
        if not quiet and not self.lines:
            self.bar = tqdm(total=self.total, desc=label, initial=done, leave=False, dynamic_ncols=True, mininterval=0.5)

    def __iter__(self) -> Iterator[Any]:
        assert self.items is not None
        with self:
            for item in self.items:
                yield item
                self.update()

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self.count += count
        if self.whole is not None and self.total:
            self.whole.move(self.count / self.total)
        if self.bar is not None:
            self.bar.total = self.total  # it may have become known
            self.bar.update(count)
        since = self.line if self.whole is None else max(self.line, self.whole.line)
        if self.lines and time.monotonic() - since >= EVERY:
            self._say()

    def _say(self) -> None:
        self.line = time.monotonic()
        over = f"{self.count:,} of {self.total:,}" if self.total else f"{self.count:,}"
        parts = [f"{self.label}: {over}", *([self.extra] if self.extra else [])]
        if self.whole is not None:
            self.whole.line = self.line
            parts.append(f"all of it {self.whole.text()}")
        elif self.total:
            parts.append(
                f"about {duration((self.line - self.began) * (self.total - self.count) / (self.count - self.before))} left"
            )
        print(", ".join(parts), file=sys.stderr, flush=True)

    def set_postfix(self, **values: str) -> None:
        """Shown beside the count."""
        self.extra = ", ".join(f"{name} {value}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(self.extra, refresh=False)

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def progress(items: Iterable[Any] | None, label: str, total: int | None = None, done: int = 0) -> Loop:
    """A loop over `items`, or one to update by hand when `items` is None, of which `done` are done, that tells how far it is."""
    return Loop(items, label, total, done)
