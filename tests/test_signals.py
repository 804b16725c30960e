"""What a process makes of SIGTERM and SIGINT."""

import signal
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from losa.system.signals import SIGNALS, Interrupted, Noted, raised


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_raised_and_handlers_are_put_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted) as caught, raised():
        signal.raise_signal(number)
    assert caught.value.number == number
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_library_that_makes_another_exception_of_it_hides_nothing():
    with pytest.raises(Interrupted), raised():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted:
            raise ValueError("could not determine the shape") from None
    with pytest.raises(ValueError, match="nothing to do with it"), raised():
        raise ValueError("nothing to do with it")


def test_a_destructor_hides_nothing():
    class Group:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)
            len(())  # the handler runs here, and what it raises goes nowhere

    with pytest.raises(Interrupted), raised():
        Group()
        time.sleep(5)


def test_an_import_is_finished_first(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "amid.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\nwhole = True\n")
    with pytest.raises(Interrupted), raised():
        import amid

        time.sleep(5)
    assert amid.whole


def test_an_operator_in_python_is_finished_first():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            signal.raise_signal(signal.SIGTERM)
            done.append(operator(*args, **(kwargs or {})))
            return done[-1]

    done = []
    with pytest.raises(Interrupted), raised():
        with Mode():
            torch.ones(2) + 1
        time.sleep(5)
    assert torch.equal(done[-1], torch.full((2,), 2.0))


def test_a_noted_signal_waits_and_a_second_does_not():
    reached = []
    with pytest.raises(KeyboardInterrupt), Noted().listening() as noted:
        signal.raise_signal(signal.SIGINT)
        reached.append(noted.number)
    assert reached == [signal.SIGINT]
    with pytest.raises(Interrupted), Noted().listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_other_threads_handle_no_signals():
    failed = []

    def work():
        try:
            with raised(), Noted().listening():
                pass
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
