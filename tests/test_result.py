"""Promised: every pruned weight is bitwise zero in the re-opened file, or there is no result."""

from pathlib import Path

import pytest
import torch
from helpers import (
    record_of,
    save_toy,
    set_up,
    toy_config,
    toy_run,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from losa.models import load
from losa.session.result import verify_zeros

pytestmark = pytest.mark.usefixtures("no_figures")


def test_result_is_sharded_like_the_source(tmp_path):
    folder = set_up(tmp_path, shard="40KB")
    shards = len(list((folder / "model").glob("*.safetensors")))
    assert shards >= 3
    toy_run(folder, steps=1)
    assert abs(len(list((folder / "sparse").glob("*.safetensors"))) - shards) <= 1
    assert (folder / "sparse" / "model.safetensors.index.json").exists()
    AutoModelForCausalLM.from_pretrained(folder / "sparse")


def test_a_second_run_replaces_the_first_whole(tmp_path):
    """No shard of the earlier result survives beside the new one."""
    folder = set_up(tmp_path, shard="40KB")
    toy_run(folder, steps=1)
    assert len(list((folder / "sparse").glob("*.safetensors"))) > 1
    save_toy(tmp_path / "other")
    toy_run(folder, steps=1, model=str(tmp_path / "other"), overwrite=True)
    assert [path.name for path in (folder / "sparse").glob("*.safetensors*")] == ["model.safetensors"]
    assert record_of(folder / "sparse")["config"]["model"] == str(tmp_path / "other")


def planted(tmp_path, change) -> tuple[Path, dict[str, torch.Tensor]]:
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[1, 2:5] = False
    weight = torch.ones(4, 6, dtype=torch.bfloat16).masked_fill(~keep, 0.0)
    file = {"a.weight": weight, "b.weight": torch.ones(3)}
    change(file)
    save_file(file, tmp_path / "model.safetensors")
    return tmp_path, {"a.weight": keep}


def test_verify_accepts_true_zeros(tmp_path):
    verify_zeros(*planted(tmp_path, lambda file: None))


def test_verify_accepts_a_layer_that_lost_nothing(tmp_path):
    directory, masks = planted(tmp_path, lambda file: None)
    verify_zeros(directory, masks | {"b.weight": torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize("value", [1e-30, -0.0, float("nan")])
def test_verify_finds_one_planted_value(tmp_path, value):
    def plant(file) -> None:
        file["a.weight"][1, 3] = value

    with pytest.raises(RuntimeError, match=r"a\.weight in model\.safetensors: 1 pruned weights are not zero"):
        verify_zeros(*planted(tmp_path, plant))


def test_verify_finds_a_missing_tensor(tmp_path):
    with pytest.raises(RuntimeError, match=r"lacks a\.weight"):
        verify_zeros(*planted(tmp_path, lambda file: file.pop("a.weight")))


def test_verify_reads_every_shard(tmp_path):
    directory, masks = planted(tmp_path, lambda file: None)
    save_file({"c.weight": torch.ones(2, 2)}, directory / "model-2.safetensors")
    with pytest.raises(RuntimeError, match=r"c\.weight"):
        verify_zeros(directory, masks | {"c.weight": torch.zeros(2, 2, dtype=torch.bool)})


def test_result_that_fails_verification_is_never_put_in_place(done, tmp_path, monkeypatch):
    folder, _, _ = done
    output = tmp_path / "sparse"
    save = type(load(toy_config(folder))[0]).save_pretrained

    def damage(self, directory, **kwargs) -> None:
        save(self, directory, **kwargs)
        path = Path(directory) / "model.safetensors"
        file = load_file(path)
        file["model.layers.1.mlp.up_proj.weight"][file["model.layers.1.mlp.up_proj.weight"] == 0] += 1e-8
        save_file(file, path, {"format": "pt"})

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", damage)
    with pytest.raises(RuntimeError, match="pruned weights are not zero; the result is void"):
        toy_run(folder, output=str(output), steps=1)
    assert not (output / "config.json").exists()
    assert not (output / "losa.json").exists()
