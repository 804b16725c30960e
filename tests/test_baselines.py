"""Pruning once, without training, and what it is the baseline of."""

import pytest
import torch
from helpers import (
    pruned_names,
    record_of,
    set_up,
    tensors,
    toy_config,
)

from losa.api import prune, run
from losa.models import load


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_prune_changes_survivors_only_if_the_solver_does(done, tmp_path, pruner):
    folder, _, _ = done
    output = tmp_path / "pruned"
    config = toy_config(folder, output=str(output), pruner=pruner, rate_band=0.0)
    model = prune(*load(config), config)
    source, result, record = tensors(folder / "model"), tensors(output), record_of(output)
    for name in pruned_names(output):
        kept = result[name] != 0
        assert int((~kept).sum()) == round(0.6 * kept.numel())
        assert torch.equal(source[name][kept], result[name][kept]) == (pruner in ("magnitude", "wanda"))
    assert record["kind"] == "prune"
    assert list(record["perplexity"]) == ["dense", "pruned"]
    assert "one-shot pruning" in (output / "README.md").read_text()
    assert model.losa_record["sparsity"] == record["sparsity"]


def test_prune_is_the_baseline_of_a_run(done):
    folder, _, _ = done
    config = toy_config(folder, output=None, rate_band=0.0, train={"data": None}, calibration={"data": str(folder / "text.txt")})
    found = prune(*load(config), config).losa_record["perplexity"]
    assert {name: record_of(folder / "sparse")["perplexity"][name] for name in found} == found


def test_a_model_pruned_in_memory_keeps_its_zeros_through_a_run(tmp_path):
    folder = set_up(tmp_path)
    config = toy_config(folder, output=None, sparsity=0.5, rate_band=0.0, steps=1)
    model = prune(*load(config), config)
    before = model.losa_masks
    config = toy_config(folder, output=None, steps=2)
    after = run(model, load(config)[1], config).losa_masks
    for name, keep in before.items():
        assert not (after[name] & ~keep).any()
        assert not model.get_parameter(name)[~keep].any()
