"""SIGTERM and SIGINT: what a scheduler sends before it kills, and what Ctrl-C sends."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
IMPORT = "<frozen importlib._bootstrap>"
OPERATORS = ("/torch/_library/", "/torch/_subclasses/", "/torch/_ops.py", "/torch/_prims", "/torch/_refs", "/torch/_decomp")
MOMENT, PATIENCE = 0.05, 60.0  # seconds: until a signal is sent again, and altogether that it is


class Interrupted(BaseException):
    """A signal asked the process to end. Not an Exception, so that nothing on the way takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Has `handler` called for both signals while it lasts. Nothing outside of the main thread, which alone gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def end_quietly() -> None:
    """Has both signals end the process without a word once Python is on its way out, where no exception can be caught."""
    for number in SIGNALS:
        atexit.register(signal.signal, number, signal.SIG_DFL)


def fragile(frame: FrameType | None) -> bool:
    """Whether the main thread is where an exception would do harm: amid an import, which it would leave half done, or in Python
    code that torch calls to compute an operator (fake tensors), whose callers in C++ end the process for some."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file == IMPORT or frame.f_code.co_name == "__torch_dispatch__" or any(part in file for part in OPERATORS):
            return True
        frame = frame.f_back
    return False


@contextmanager
def raised() -> Iterator[None]:
    """Has both signals raise `Interrupted` while it lasts. Also where a library makes another exception of it on the way, and
    where it is raised in a destructor, which Python lets no exception leave: it is then raised again a moment later. So it is
    where an exception would do harm (`fragile`)."""
    came = 0
    patience = PATIENCE
    sent = threading.Timer(0.0, lambda: None)

    def send_again(number: int) -> None:
        nonlocal sent
        sent.cancel()  # one of several that come is enough
        sent = threading.Timer(MOMENT, os.kill, (os.getpid(), number))
        sent.start()

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came, patience
        if fragile(frame) and patience > 0:
            patience -= MOMENT
            send_again(number)
            return
        came = number
        raise Interrupted(number)

    def again(lost: Any) -> None:
        if isinstance(lost.exc_value, Interrupted):
            send_again(lost.exc_value.number)
        else:
            before(lost)

    before, sys.unraisablehook = sys.unraisablehook, again
    try:
        with handled(interrupt):
            yield
    except Exception as error:
        if came:
            raise Interrupted(came) from error
        raise
    finally:
        sent.cancel()
        sys.unraisablehook = before


@contextmanager
def ctrl_c_as_usual() -> Iterator[None]:
    """Has SIGINT raise `KeyboardInterrupt` while it lasts, for what ends an answer and not the command."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


class Noted:
    """Has the first signal noted and not obeyed while it lasts, so that work can be saved; a second one is obeyed at once.

    Attributes:
        number: of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def listening(self) -> Iterator["Noted"]:
        """At the end, the signal that came is sent again, to whoever handled it before, unless an exception is under way."""

        def note(number: int, frame: Any) -> None:
            if self.number:
                raise Interrupted(number)
            self.number = int(number)

        with handled(note):
            yield self
        if self.number:
            signal.raise_signal(self.number)
