"""A few random kills and pairs of writers; many of both with `pytest -m nightly`."""

import pytest
from kills import Soak
from writers import Writers


@pytest.mark.parametrize("kills", [3, pytest.param(200, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])])
@pytest.mark.slow
def test_random_kills(tmp_path, kills):
    short = kills < 10
    soak = Soak(tmp_path, 0, ["toy"] if short else ["toy", "novels-4m"])
    assert soak.go(kills, kinds=["run, all weights", "pack"] if short else []) >= kills


@pytest.mark.parametrize("pairs", [2, pytest.param(50, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])])
@pytest.mark.slow
def test_pairs_of_writers(tmp_path, pairs):
    writers = Writers(tmp_path, 0)
    writers.go(pairs)
    assert sum(writers.counts.values()) == pairs
