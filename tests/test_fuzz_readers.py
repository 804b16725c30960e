"""A few hundred mutants of every file that is read, and by hand or at night 100,000 (`soak/fuzz_readers.py`)."""

import os
import signal

import pytest
import yaml
from soak.fuzz_readers import TARGETS, Target, fault, fuzz
from soak.mutate import mutate_bytes
from soak.readers import save_samples


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    save_samples(folder)
    return folder


def faults(name: str, count: int, seed: int, samples) -> list[tuple[int, str]]:
    return [(number, outcome) for number, outcome in fuzz(name, count, seed, samples) if outcome != "+"]


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_are_read_or_refused_in_a_sentence(name, samples):
    assert faults(name, 12, 0, samples) == []


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutants(name, samples):
    assert faults(name, -(-100_000 // len(TARGETS)), 0, samples) == []


def _loop(folder):
    while True:
        pass


def _eat(folder):
    return [bytes(64 << 20) for _ in range(64)]


def _crash(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def _stumble(folder):
    {}["key"]


@pytest.mark.parametrize(
    ("read", "message"),
    [(_loop, "hang at"), (_eat, "memory at"), (_crash, "the process ended with -9"), (_stumble, "KeyError at")],
)
def test_the_fuzzer_sees_what_it_looks_for(read, message, tmp_path, monkeypatch):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "file").write_bytes(b"content")
    monkeypatch.setitem(TARGETS, "bad", Target("sample", {"file": mutate_bytes}, read))
    monkeypatch.setattr("soak.fuzz_readers.SECONDS", 1)
    ((number, found),) = faults("bad", 1, 0, tmp_path)
    assert number == 0
    assert found.startswith(message)


def test_what_is_a_sentence():
    assert fault(ValueError("one sentence")) is None
    assert fault(yaml.YAMLError("x")) is not None
    assert fault(ValueError("")) is not None
