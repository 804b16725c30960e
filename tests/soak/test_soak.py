"""A few random kills and pairs of writers; many of both with `pytest -m nightly`."""

import pytest
from kills import Soak
from writers import Writers


@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])])
def test_random_kills(tmp_path, kills):
    soak = Soak(tmp_path, seed=0)
    if kills < 10:
        soak.jobs = [soak.job("run, all weights"), soak.job("pack")]
    assert soak.go(kills) >= kills


@pytest.mark.parametrize("pairs", [3, pytest.param(50, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])])
def test_pairs_of_writers(tmp_path, pairs):
    writers = Writers(tmp_path, seed=0)
    writers.go(pairs)
    assert sum(writers.counts.values()) == pairs
