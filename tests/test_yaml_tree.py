"""YAML and dotted keys become a tree of dataclasses, under the names of today and of earlier versions."""

import pytest

from losa.config import LosaConfig, TrainConfig
from losa.system.yaml_tree import differences, parse_set, warn_of_old_name


def test_parse_set_reads_yaml_values():
    pairs = parse_set(["train.lr=1e-3", "steps=3", "offload=true", "train.data=a=b.txt", "pattern='2:4'"])
    assert list(pairs) == ["train.lr", "steps", "offload", "train.data", "pattern"]
    config = LosaConfig.load(overrides=pairs)
    assert (config.train.lr, config.steps, config.offload) == (0.001, 3, True)
    assert (config.train.data, config.pattern) == ("a=b.txt", "2:4")


def test_pattern_needs_no_quotes(tmp_path):
    """YAML 1.1 would read 2:4 as 2 * 60 + 4."""
    (tmp_path / "c.yaml").write_text("pattern: 4:8\n")
    assert LosaConfig.load(overrides=parse_set(["pattern=2:4"])).pattern == "2:4"
    assert LosaConfig.load(str(tmp_path / "c.yaml")).pattern == "4:8"


@pytest.mark.parametrize("item", ["train.lr", "=3", "", "train.lr=[1"])
def test_parse_set_refuses(item):
    with pytest.raises(ValueError, match="--set"):
        parse_set([item])


def test_differences_are_lines_of_leaves():
    old = LosaConfig(sparsity=0.7, rates="rmi", train=TrainConfig(lr=1e-3)).to_dict()
    new = LosaConfig(sparsity=0.5, rates="rmi", train=TrainConfig(lr=2e-3)).to_dict()
    assert differences(old, new) == ["rate_band: 0.03 -> 0.01", "sparsity: 0.7 -> 0.5", "train.lr: 0.001 -> 0.002"]
    assert differences(old, old) == []
    assert differences({"a": 1}, {"b": {"c": 2}}) == ["a: 1 -> None", "b: None -> {'c': 2}"]


@pytest.fixture
def said(caplog):
    warn_of_old_name.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("importance", "rates", "depth"),
        ("delta", "rate_band", 0.07),
        ("adapter.omega_first", "adapter.mean_rank_first", 3.0),
        ("adapter.omega_last", "adapter.mean_rank_last", 12.0),
    ],
)
def test_old_names_of_keys_still_work_with_one_warning(said, old, new, value):
    for _ in range(2):
        assert LosaConfig.load(overrides={old: value}) == LosaConfig.load(overrides={new: value})
    assert said() == [f"the key {old} is called {new} now"]


def test_of_old_and_new_names_the_last_one_given_wins(tmp_path, said):
    file = tmp_path / "c.yaml"
    file.write_text("adapter: {omega_first: 2, mean_rank_last: 5}\n")
    assert LosaConfig.load(str(file), "paper").adapter.mean_rank_first == 2
    assert LosaConfig.load(str(file), "paper", {"adapter.mean_rank_first": 4}).adapter.mean_rank_first == 4
    assert LosaConfig.load(str(file), "paper", {"adapter.omega_last": 7}).adapter.mean_rank_last == 7


def test_what_is_saved_has_the_new_names(said):
    saved = LosaConfig.load(overrides={"delta": 0.05}).to_dict()
    assert saved["rate_band"] == 0.05 and "delta" not in saved
