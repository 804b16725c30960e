"""Promised: reconstruction lowers each block's error on its calibration text and on other text, moves no mask, does the same on
every run, and stops with the block's name where the error is not finite."""

import pytest
import torch
from test_calibration import lively, prune_blocks

from losa.adapter import attach, masked_linears
from losa.config import ReconstructConfig
from losa.pruning import Pattern, get_pruner
from losa.reconstruction import reconstruction_visit

CONFIG = ReconstructConfig(epochs=4, lr=3e-3, sequences=16)


def pruned(ids, config=CONFIG, whole=True, dtype=torch.float32):
    model = attach(lively().to(dtype), whole=whole)
    visits = [reconstruction_visit(config, 0)] if config.epochs else []
    errors = prune_blocks(model, ids, [0.6] * 3, get_pruner("wanda"), Pattern(), then=visits)
    return model, errors


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_blocks_fall(token_ids, whole, dtype):
    ids = token_ids(16, 24)
    _, before = pruned(ids, ReconstructConfig(epochs=0), whole, dtype)
    model, after = pruned(ids, CONFIG, whole, dtype)
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True))
    assert all((layer.dense_OI is None) == whole for layer in masked_linears(model).values())


def test_the_first_mask_is_the_same_and_none_comes_back(token_ids):
    ids = token_ids(16, 24)
    plain, _ = pruned(ids, ReconstructConfig(epochs=0))
    model, _ = pruned(ids)
    for name, layer in masked_linears(model).items():
        assert not layer.effective()[~layer.keep_OI].any()
        if ".0." in name:  # later blocks see other inputs, and may choose other weights
            assert torch.equal(layer.keep_OI, masked_linears(plain)[name].keep_OI)


def test_is_the_same_every_time(token_ids):
    ids = token_ids(8, 24)
    one, other = (pruned(ids, ReconstructConfig(epochs=2, lr=3e-3, sequences=8))[0] for _ in range(2))
    for a, b in zip(masked_linears(one).values(), masked_linears(other).values(), strict=True):
        assert torch.equal(a.effective(), b.effective())


def test_sequences_that_are_not_used_by_it_do_not_matter_to_it(token_ids):
    ids = token_ids(12, 24)
    config = ReconstructConfig(epochs=2, lr=1e-3, sequences=4)
    assert len(pruned(ids, config)[1]) == 3


def test_an_error_that_is_not_finite_names_the_block(token_ids):
    def poison(stop):
        if stop.index == 1:
            stop.dense.hidden[0][0, 0, 0] = torch.nan

    visits, model = [poison, reconstruction_visit(CONFIG, 0)], attach(lively())
    with pytest.raises(FloatingPointError, match=r"pruning \(wanda\), block 1: the error is not finite; lower reconstruct.lr"):
        prune_blocks(model, token_ids(8, 24), [0.6] * 3, get_pruner("wanda"), Pattern(), then=visits)
