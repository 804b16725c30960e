"""Promised: rounding under a mask equal to a plain float64 GPTQ; after the descent no single weight has a better value; less
error than rounding to nearest; and a run whose result lies on the grid, is resumed bit for bit, and packs without loss."""

import pytest
import references
import torch
from helpers import Stop, StopAtStep, file_bytes, record_of, set_up, tensors, toy_config, toy_run
from test_grid import nearest
from test_pruning import correlated, full, hessian

from losa import prune
from losa.models import load
from losa.pruning.grid import FORMATS, snap
from losa.pruning.rounding import round_to
from losa.pruning.sparsegpt import DAMPING
from losa.runtime.files import pack_checkpoint, unpack_checkpoint

pytestmark = pytest.mark.usefixtures("no_figures")


def problem(rows=12, columns=160, tokens=600, density=0.5):
    torch.manual_seed(0)
    keep = torch.rand(rows, columns) < density
    return torch.randn(rows, columns, dtype=torch.float64) * keep, keep, hessian(correlated(tokens, columns))


def of_columns(found, name):
    """Step and `low` of a column, for every row."""
    group = FORMATS[name].group or found.weight_OI.shape[1]
    return lambda i: (found.step_OG[:, i // group].double(), found.low_OG[:, i // group].double())


@pytest.mark.parametrize("name", ["int4", "int8", "dense3"])
def test_equals_gptq(name):
    weight, keep, moments = problem()
    [found] = round_to([weight], [keep], moments, FORMATS[name], sweeps=0)
    at = of_columns(found, name)
    expected = references.gptq_under_mask(weight, keep, moments, DAMPING, lambda w, i: snap(w, *at(i), FORMATS[name].span))
    torch.testing.assert_close(found.weight_OI, expected, rtol=0, atol=1e-12)


def test_no_weight_has_a_better_value_alone():
    weight, keep, moments = problem(4, 48)
    [rounded] = round_to([weight], [keep], moments, FORMATS["int4"], sweeps=50)
    found, at = rounded.weight_OI, of_columns(rounded, "int4")
    moments = moments + DAMPING * moments.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    best = ((found - weight) @ moments * (found - weight)).sum(1)
    for column in range(48):
        step, low = at(column)
        for q in range(FORMATS["int4"].span + 1):
            other = found.clone()
            other[:, column] = torch.where(keep[:, column], step * (low + q), 0.0)
            assert (((other - weight) @ moments * (other - weight)).sum(1) >= best * (1 - 1e-9)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_errs_less_than_the_nearest(name, dtype):
    weight, keep, moments = problem()
    keep = keep if FORMATS[name].sparse else full(*keep.shape)
    plain = nearest(weight.float(), name).double().where(keep, 0)
    [(found, *grid)] = round_to([weight.to(dtype)], [keep], moments.to(dtype), FORMATS[name])
    assert found.dtype == dtype
    assert not found[~keep].view(torch.int32 if dtype == torch.float32 else torch.int64).any()
    torch.testing.assert_close(nearest(found.float(), name, grid).where(keep, 0), found.float(), rtol=0, atol=0)
    error = references.output_error(weight, found.double(), moments)
    assert error < 0.7 * references.output_error(weight, plain, moments)


def test_layers_that_share_an_input_are_rounded_as_alone():
    weight, keep, moments = problem()
    both = round_to([weight[:5], weight[5:]], [keep[:5], keep[5:]], moments, FORMATS["int4"])
    [alone] = round_to([weight[5:]], [keep[5:]], moments, FORMATS["int4"])
    assert torch.equal(both[1].weight_OI, alone.weight_OI)


def test_inputs_that_never_fired():
    weight, keep, moments = problem()
    moments[7] = moments[:, 7] = 0
    [found] = round_to([weight], [keep], moments, FORMATS["int4"])
    assert torch.isfinite(found.weight_OI).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return set_up(tmp_path_factory.mktemp("rounding"), dtype=torch.bfloat16)


def assert_lossless(sparse, tmp_path, values):
    done = pack_checkpoint(sparse, tmp_path / "packed", values, head="keep")
    assert done["lossless"]
    unpack_checkpoint(tmp_path / "packed", tmp_path / "unpacked")
    before, after = tensors(sparse), tensors(tmp_path / "unpacked")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)


@pytest.mark.parametrize(("pruner", "values"), [("alps", "int4"), ("wanda", "int8")])
def test_a_pruned_model_packs_without_loss(folder, tmp_path, pruner, values):
    config = toy_config(folder, output=str(tmp_path / "sparse"), pruner=pruner, steps=1, rates="uniform", values=values)
    prune(*load(config), config)
    assert_lossless(tmp_path / "sparse", tmp_path, values)
    assert "rounding" in record_of(tmp_path / "sparse")["seconds"]


@pytest.mark.parametrize("weights", ["all", "adapters"])
def test_a_run_is_resumed_on_its_grid_and_packs_without_loss(folder, tmp_path, weights):
    changes = {"pruner": "alps", "values": "int4", "steps": 1, "train": {"weights": weights, "lr": 1e-3}}
    toy_run(folder, output=str(tmp_path / "whole" / "sparse"), **changes)
    with pytest.raises(Stop):
        toy_run(folder, output=str(tmp_path / "sparse"), callbacks=(StopAtStep(1, 3),), **changes)
    toy_run(folder, output=str(tmp_path / "sparse"), resume=True, **changes)
    assert file_bytes(tmp_path / "sparse") == file_bytes(tmp_path / "whole" / "sparse")
    assert_lossless(tmp_path / "sparse", tmp_path, "int4")
    perplexity = record_of(tmp_path / "sparse")["perplexity"]
    assert list(perplexity) == ["dense", "pruned", "unrounded", "losa"]
    assert perplexity["pruned"] > max(perplexity["unrounded"], perplexity["losa"])


def test_other_values_are_refused(folder):
    with pytest.raises(ValueError, match="values is 'int5', expected int8 or int4"):
        toy_config(folder, values="int5")
