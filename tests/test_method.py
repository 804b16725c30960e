"""The method end to end on a toy: targets, rates, masks and ranks, step by step, with every pruner, pattern and rule."""

import pytest
import torch
from helpers import (
    Look,
    pruned_names,
    record_of,
    save_text,
    set_up,
    tensors,
    toy_config,
    toy_run,
)

pytestmark = pytest.mark.usefixtures("no_figures")


def test_sparsity_is_what_was_asked(done):
    folder, _, _ = done
    file, record = tensors(folder / "sparse"), record_of(folder / "sparse")
    names = pruned_names(folder / "sparse")
    assert len(names) == 14
    zeros = sum(int((file[name] == 0).sum()) for name in names)
    total = sum(file[name].numel() for name in names)
    assert zeros / total == pytest.approx(0.6, abs=1e-3)
    assert record["sparsity"] == {"asked": 0.6, "achieved": zeros / total, "weights": total}


def test_rates_of_the_record_are_the_zeros_of_the_file(done):
    folder, _, _ = done
    file, rates = tensors(folder / "sparse"), record_of(folder / "sparse")["steps"][-1]["rates"]
    assert len(set(rates)) == 2  # blocks do differ
    for name in pruned_names(folder / "sparse"):
        block = int(name.split(".")[2])
        assert int((file[name] == 0).sum()) == round(file[name].numel() * rates[block]), name


def test_masks_nest_from_step_to_step(done):
    folder, _, look = done
    file, steps = tensors(folder / "sparse"), record_of(folder / "sparse")["steps"]
    assert len(look.masks) == 3
    for name in look.masks[0]:
        for number, keep in enumerate(mask[name] for mask in look.masks):
            assert int((~keep).sum()) == round(keep.numel() * steps[number]["rates"][int(name.split(".")[2])])
            if number:
                assert not (keep & ~look.masks[number - 1][name]).any()
        last = look.masks[-1][name]
        assert torch.equal(file[f"{name}.weight"] != 0, last)
        assert not file[f"{name}.weight"][~last].view(torch.uint8).any()


def test_ranks_are_used_and_sum_to_the_budget(done):
    folder, _, look = done
    for number, (step, omega) in enumerate(zip(record_of(folder / "sparse")["steps"], (6, 8, 10), strict=True)):
        assert sum(step["ranks"]) == 2 * omega
        assert {name: step["ranks"][int(name.split(".")[2])] for name in look.ranks[number]} == look.ranks[number]


def test_training_recovers_quality(done):
    folder, _, _ = done
    found = record_of(folder / "sparse")["perplexity"]
    assert found["losa"] < found["pruned"]


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_every_pruner_and_pattern(done, tmp_path, pruner, pattern):
    folder, _, _ = done
    look, output = Look(tmp_path / "sparse"), tmp_path / "sparse"
    sparsity = 0.6 if pattern == "unstructured" else None
    toy_run(folder, callbacks=(look,), output=str(output), steps=2, pruner=pruner, pattern=pattern, sparsity=sparsity)
    file, record = tensors(output), record_of(output)
    for name in pruned_names(output):
        weight, keep = file[name], look.masks[-1][name.removesuffix(".weight")]
        assert torch.equal(weight != 0, keep)
        assert not (keep & ~look.masks[0][name.removesuffix(".weight")]).any()
        if pattern == "unstructured":
            assert int((weight == 0).sum()) == round(weight.numel() * record["steps"][-1]["rates"][int(name.split(".")[2])])
        else:
            n, m = map(int, pattern.split(":"))
            assert ((weight.view(weight.shape[0], -1, m) != 0).sum(2) == n).all()
    assert record["sparsity"]["achieved"] == pytest.approx(sparsity or 0.5, abs=1e-3 if sparsity else 1e-12)
    assert record["perplexity"]["losa"] < record["perplexity"]["pruned"]


def test_one_shot_baseline_of_the_reviewers(done, tmp_path):
    """One step, uniform rates, uniform ranks: Wanda and masked LoRA."""
    folder, _, _ = done
    output = tmp_path / "sparse"
    toy_run(folder, output=str(output), steps=1, rate_band=0.0, adapter={"allocation": "uniform"})
    (step,) = record_of(output)["steps"]
    assert (step["target"], step["rates"], step["ranks"]) == (0.6, [0.6, 0.6], [10, 10])
    assert step["importance"] is None
    file = tensors(output)
    for name in pruned_names(output):
        assert int((file[name] == 0).sum()) == round(0.6 * file[name].numel())


def test_documents_can_be_samples(done, tmp_path):
    """The released recipe: padded documents of their own lengths, not packed."""
    folder, _, _ = done
    (tmp_path / "data").mkdir()
    for number in range(60):
        save_text(tmp_path / "data" / f"{number:02d}.txt", 20 + 3 * number, seed=number)
    train = {"data": str(tmp_path / "data"), "samples": 50}
    model = toy_run(folder, output=None, train=train, steps=2, eval={"data": str(folder / "text.txt")})
    found = model.losa_record["perplexity"]
    assert found["losa"] < found["pruned"]


def test_movement_prunes_by_what_training_told(tmp_path):
    set_up(tmp_path)
    moved = toy_run(tmp_path, pruner="movement", output=None).losa_record
    by_size = toy_run(tmp_path, pruner="magnitude", output=None).losa_record
    assert moved["perplexity"]["pruned"] == by_size["perplexity"]["pruned"]  # nothing was trained yet
    assert moved["steps"][0] == by_size["steps"][0]
    assert moved["steps"][1]["errors"] != by_size["steps"][1]["errors"]
    assert moved["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-4)


def test_protected_blocks_stay_dense(tmp_path):
    set_up(tmp_path)
    model = toy_run(tmp_path, protect=[1], sparsity=0.4, output=None)
    for name, keep in model.losa_masks.items():
        assert keep.all() == (".layers.1." in name)
    assert model.losa_record["sparsity"]["achieved"] == pytest.approx(0.4, abs=1e-3)


def test_importance_by_depth_prunes_late_blocks_more(tmp_path):
    set_up(tmp_path, num_hidden_layers=3)
    record = toy_run(tmp_path, rates="depth", rate_band=0.1, output=None).losa_record
    for step in record["steps"]:
        assert step["rates"] == sorted(step["rates"]) and step["rates"][0] < step["rates"][-1]
    with pytest.raises(ValueError, match="rates is 'width', expected one of rmi, depth, uniform, owl, dlp, error"):
        toy_config(tmp_path, rates="width")


@pytest.mark.parametrize("rule", ["owl", "dlp", "error"])
def test_layers_have_their_own_rates_by_any_rule(tmp_path, rule):
    record = toy_run(set_up(tmp_path), rates=rule, output=None).losa_record
    for step in record["steps"]:
        assert step["achieved"] == pytest.approx(step["target"], abs=1e-3)
        assert len(set(step["layer_rates"].values())) > 1
    assert record["config"]["rate_band"] == pytest.approx({"owl": 0.08, "dlp": 0.15, "error": 0.1}[rule])
