"""A run killed at any moment leaves its last complete stage and nothing loadable; resumed, it ends with the very same bytes."""

import importlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import Stop, StopAtStep, comparable, file_bytes, save_text, set_up, toy_config, toy_run
from processes import call, losa, start
from transformers import AutoModelForCausalLM

from losa.models import load
from losa.session.origin import origin
from losa.session.stages import latest_stage
from losa.system.environment import versions

pytestmark = pytest.mark.usefixtures("no_figures")

VARIANTS = {
    "wanda": {},
    "sparsegpt": {"pruner": "sparsegpt"},  # base weights change
    "2:4": {"pattern": "2:4", "sparsity": None},
    "movement": {"pruner": "movement", "protect": [0]},  # scores are kept too
    "rotated": {"pruner": "alps", "rotate": True, "steps": 1},
    "whole": {"pruner": "alps", "train": {"weights": "all", "lr": 1e-3}, "reconstruct": {"epochs": 1}},  # no adapters
    "reconstructed": {"pruner": "alps", "reconstruct": {"epochs": 1}},  # the base absorbs
    "bfloat16": {"dtype": "bfloat16"},  # folded ranks round
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return set_up(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    """Directory of the finished run of a variant, made once."""
    made: dict[str, Path] = {}

    def of(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("whole") / "sparse"
            toy_run(folder, output=str(made[variant]), **VARIANTS[variant])
        return made[variant]

    return of


def stages(output: Path) -> list[str]:
    return sorted(path.parent.name for path in (output / ".losa").glob("*/stage.json"))


def assert_same_result(output: Path, expected: Path) -> None:
    assert file_bytes(output) == file_bytes(expected)
    assert comparable(output) == comparable(expected)


def assert_not_loadable(output: Path) -> None:
    assert not (output / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize(
    ("variant", "step", "update"),
    [("wanda", 1, None), ("wanda", 2, 3), ("wanda", 3, 1), ("sparsegpt", 2, None), ("2:4", 2, 2), ("bfloat16", 3, None)],
)
def test_interrupted_run_ends_as_if_it_had_not_been(folder, uninterrupted, tmp_path, variant, step, update):
    output = tmp_path / "sparse"
    with pytest.raises(Stop):
        toy_run(folder, output=str(output), callbacks=(StopAtStep(step, update),), **VARIANTS[variant])
    assert stages(output) == [f"{step:02d}-pruned"]
    assert_not_loadable(output)
    toy_run(folder, output=str(output), resume=True, **VARIANTS[variant])
    assert_same_result(output, uninterrupted(variant))


def test_interrupted_again_and_again(folder, uninterrupted, tmp_path):
    output = tmp_path / "sparse"
    for attempt in range(3):
        with pytest.raises(Stop):  # each resumed run reaches the next training and stops there
            toy_run(folder, output=str(output), resume=attempt > 0, callbacks=(StopAtStep(1 if attempt == 0 else 2),))
        assert stages(output) == [f"{attempt + 1:02d}-pruned"]
    toy_run(folder, output=str(output), resume=True)
    assert_same_result(output, uninterrupted("wanda"))


def test_interrupted_while_pruning(folder, uninterrupted, tmp_path, monkeypatch):
    """The half-pruned model is forgotten, not saved."""
    output = tmp_path / "sparse"
    module = importlib.import_module("losa.method")
    prune_blocks, calls = module.prune_blocks, []

    def stop_after_third(*args, **kwargs):
        errors = prune_blocks(*args, **kwargs)
        calls.append(errors)
        if len(calls) == 3:  # the baseline, step 1, step 2
            raise Stop
        return errors

    with monkeypatch.context() as patched:
        patched.setattr(module, "prune_blocks", stop_after_third)
        with pytest.raises(Stop):
            toy_run(folder, output=str(output))
    assert stages(output) == ["01-trained"]
    toy_run(folder, output=str(output), resume=True)
    assert_same_result(output, uninterrupted("wanda"))


def command(folder: Path, output: Path, *more: str) -> list[str]:
    """`losa run` of the toy configuration."""
    file = output.parent / "config.yaml"
    file.write_text(toy_config(folder, output=str(output)).to_yaml())
    return ["run", str(folder / "model"), "--output", str(output), "--config", str(file), *more]


@pytest.mark.parametrize(
    ("kill", "left"),
    [
        (("before", "00-baselines"), []),  # nothing to go on from but a half-written stage
        (("after", "01-trained"), ["01-pruned", "01-trained"]),  # the older stage was to be removed next
        (("before", "02-pruned"), ["01-trained"]),
        (("before", "sparse"), ["03-trained"]),  # the result is whole, but not in place
    ],
)
def test_sigkill_where_files_change_places(folder, uninterrupted, tmp_path, kill, left):
    output = tmp_path / "sparse"
    assert call(tmp_path / "log", losa, command(folder, output), kill) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert [name for name in stages(output) if not name.startswith("tmp-")] == left
    assert_not_loadable(output)
    assert call(tmp_path / "log", losa, command(folder, output, "--resume")) == 0, (tmp_path / "log").read_text()
    assert_same_result(output, uninterrupted("wanda"))
    assert not (output / ".losa").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "log", "sparse"]


def test_sigkill_when_the_result_is_in_place(folder, uninterrupted, tmp_path):
    """The result is whole; the next command removes what is left of the stages beside it."""
    output = tmp_path / "sparse"
    assert call(tmp_path / "log", losa, command(folder, output), ("after", "sparse")) == -signal.SIGKILL
    assert_same_result(output, uninterrupted("wanda"))
    assert (tmp_path / ".sparse.losa" / "new" / ".losa").is_dir()
    assert call(tmp_path / "log", losa, command(folder, output, "--resume")) == 2
    assert "is complete; there is nothing to resume" in (tmp_path / "log").read_text()
    assert_same_result(output, uninterrupted("wanda"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "log", "sparse"]


def test_sigkill_from_outside(folder, uninterrupted, tmp_path):
    """As soon as the first trained stage shows up, whatever the run is doing by the time the signal arrives."""
    output = tmp_path / "sparse"
    process = start(tmp_path / "log", losa, command(folder, output))
    deadline = time.monotonic() + 60
    while not (output / ".losa" / "01-trained").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert_not_loadable(output)
    toy_run(folder, output=str(output), resume=True)
    assert_same_result(output, uninterrupted("wanda"))


@pytest.fixture(scope="module")
def interrupted(folder, tmp_path_factory):
    """Output directory of a run that ended in its second training; copy before use."""
    output = tmp_path_factory.mktemp("interrupted") / "sparse"
    with pytest.raises(Stop):
        toy_run(folder, output=str(output), callbacks=(StopAtStep(2),))
    return output


@pytest.fixture
def output(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "sparse")


def test_half_written_stages_are_ignored(folder, uninterrupted, output):
    half = output / ".losa" / "tmp-03-pruned"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    (half / "stage.json").write_text('{"format": 1, "name": "03-pr')
    toy_run(folder, output=str(output), resume=True)
    assert_same_result(output, uninterrupted("wanda"))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"train": {"lr": 0.02}}, ["train.lr: 0.01 -> 0.02"]),
        ({"sparsity": 0.5}, ["rate_band: 0.02 -> 0.01", "sparsity: 0.6 -> 0.5"]),
        ({"pruner": "magnitude", "seed": 3}, ["pruner: 'wanda' -> 'magnitude'", "seed: 0 -> 3"]),
    ],
)
def test_changed_configuration_is_refused_with_a_diff(folder, output, changes, lines):
    before = stages(output)
    with pytest.raises(ValueError, match="the configuration changed") as caught:
        toy_run(folder, output=str(output), resume=True, **changes)
    assert [line.strip() for line in str(caught.value).splitlines()][1:-1] == lines
    assert stages(output) == before


def test_changed_text_is_refused(tmp_path):
    """The same path with another content would not end with the same bytes."""
    elsewhere = set_up(tmp_path / "elsewhere")
    with pytest.raises(Stop):
        toy_run(elsewhere, callbacks=(StopAtStep(1),))
    save_text(elsewhere / "text.txt", seed=9)
    with pytest.raises(ValueError, match=r"cannot resume .*the text changed"):
        toy_run(elsewhere, resume=True)


def test_moved_output_can_be_resumed(folder, uninterrupted, output, tmp_path):
    moved = tmp_path / "moved" / "sparse"
    moved.parent.mkdir()
    output.rename(moved)
    toy_run(folder, output=str(moved), resume=True)
    assert_same_result(moved, uninterrupted("wanda"))


def test_stage_of_another_format_is_refused(folder, output):
    path = output / ".losa" / "02-pruned" / "stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match=r"has format 99, expected 2; delete .*/\.losa to start anew"):
        toy_run(folder, output=str(output), resume=True)


def test_nothing_to_resume_starts_from_the_beginning(folder, uninterrupted, tmp_path):
    toy_run(folder, output=str(tmp_path / "sparse"), resume=True)
    assert_same_result(tmp_path / "sparse", uninterrupted("wanda"))


def test_complete_run_is_not_resumed(folder, uninterrupted):
    before = file_bytes(uninterrupted("wanda"))
    with pytest.raises(ValueError, match="is complete; there is nothing to resume"):
        toy_run(folder, output=str(uninterrupted("wanda")), resume=True)
    assert file_bytes(uninterrupted("wanda")) == before


def test_run_without_resume_leaves_an_interrupted_one_alone(folder, uninterrupted, output):
    before = stages(output)
    with pytest.raises(ValueError, match="interrupted run; finish it with --resume, or delete"):
        toy_run(folder, output=str(output))
    assert stages(output) == before
    assert latest_stage(output, toy_config(folder, output=str(output)).resolve(32, 64))
    toy_run(folder, output=str(output), resume=True)
    assert_same_result(output, uninterrupted("wanda"))


def test_new_run_killed_over_an_old_result_leaves_the_old_one_whole(folder, uninterrupted, tmp_path):
    output = shutil.copytree(uninterrupted("wanda"), tmp_path / "sparse")
    with pytest.raises(ValueError, match="holds a finished result; add --overwrite to replace it"):
        toy_run(folder, output=str(output), seed=5)
    with pytest.raises(Stop):
        toy_run(folder, output=str(output), callbacks=(StopAtStep(2),), seed=5, overwrite=True)
    assert stages(output) == ["02-pruned"]
    for path in uninterrupted("wanda").iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()
    toy_run(folder, output=str(output), resume=True, seed=5)
    assert comparable(output)["config"]["seed"] == 5


def change_head(folder: Path, where: str) -> None:
    """Another model, tokenizer or setting at the same path."""
    model = folder / "model"
    if where == "weights":
        loaded = AutoModelForCausalLM.from_pretrained(model)
        loaded.lm_head.weight.data[0, 0] += 1e-3
        loaded.save_pretrained(model)
    else:
        name, key, value = {
            "model configuration": ("config.json", "rms_norm_eps", 1e-3),
            "generation": ("generation_config.json", "temperature", 0.5),
            "tokenizer": ("tokenizer_config.json", "chat_template", "{{ messages }}"),
        }[where]
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | {key: value}))


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("weights", "the weights changed"),
        ("model configuration", "the model configuration changed"),
        ("generation", "the model configuration changed"),
        ("tokenizer", "the tokenizer changed"),
        ("version", r"the version of torch \(.* -> 9\.9\) changed"),
        ("link", "the weights changed"),
    ],
)
def test_another_model_at_the_same_path_is_refused(tmp_path, monkeypatch, where, named):
    here = set_up(tmp_path / "here")
    with pytest.raises(Stop):
        toy_run(here, callbacks=(StopAtStep(1),))
    before = stages(here / "sparse")
    if where == "version":
        monkeypatch.setattr("losa.session.origin.versions", lambda: versions() | {"torch": "9.9"})
    elif where == "link":
        set_up(tmp_path / "other")
        change_head(tmp_path / "other", "weights")
        shutil.rmtree(here / "model")
        (here / "model").symlink_to(tmp_path / "other" / "model")
    else:
        change_head(here, where)
    with pytest.raises(ValueError, match=f"cannot resume .*: {named}; restore it, or delete .*losa to start anew"):
        toy_run(here, resume=True)
    assert stages(here / "sparse") == before


def test_the_same_weights_elsewhere_have_the_same_origin(folder, tmp_path):
    first = origin(*load(toy_config(folder)), "text", torch.float32)
    shutil.copytree(folder / "model", tmp_path / "model")
    model, tokenizer = load(toy_config(tmp_path))
    tokenizer(["THE", "QUICK FOX"], padding=False, truncation=True, max_length=3)  # leaves settings in the tokenizer
    assert origin(model, tokenizer, "text", torch.float32) == first


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["mask", "header", "short", "empty", "gone", "manifest", "number", "half", "nested"])
def test_a_damaged_stage_falls_back_to_the_one_before(folder, uninterrupted, output, damage, caplog):
    stage = output / ".losa" / "02-pruned"
    state, manifest = stage / "state.safetensors", stage / "stage.json"
    assert [path.name for path in (output / ".losa" / "previous").iterdir()] == ["01-trained"]
    if damage == "mask":
        flip(state, -30)
    elif damage == "header":
        flip(state, 2)
    elif damage in ("short", "empty"):
        state.write_bytes(state.read_bytes()[: -100 if damage == "short" else 0])
    elif damage == "gone":
        state.unlink()
    elif damage == "manifest":
        flip(manifest, 40)
    elif damage == "number":  # still JSON, and still a record
        found = json.loads(manifest.read_text())
        found["record"]["perplexity"]["dense"] += 1
        manifest.write_text(json.dumps(found))
    elif damage == "half":
        manifest.write_text(manifest.read_text()[:500])
    else:
        manifest.write_text("[" * 100_000)
    toy_run(folder, output=str(output), resume=True)
    assert f"the stage {stage} is damaged; going on from the one before it" in caplog.text
    assert_same_result(output, uninterrupted("wanda"))


def test_damaged_stages_all_of_them_start_anew(folder, uninterrupted, output, caplog):
    for state in (output / ".losa").rglob("*.safetensors"):
        flip(state, -30)
    toy_run(folder, output=str(output), resume=True)
    assert caplog.text.count("is damaged") == 2
    assert_same_result(output, uninterrupted("wanda"))


def test_a_new_run_killed_early_leaves_an_output_beside_files_of_others(folder, uninterrupted, output, monkeypatch):
    (output / "notes.txt").write_text("mine")

    def stop(session):
        raise Stop

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("losa.api.measure_baselines", stop)
        toy_run(folder, output=str(output), overwrite=True)
    assert stages(output) == []
    toy_run(folder, output=str(output), resume=True)
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    assert_same_result(output, uninterrupted("wanda"))
    assert not (output / ".losa").exists()


def test_overwrite_starts_anew(folder, uninterrupted, output):
    toy_run(folder, output=str(output), overwrite=True, seed=5)
    assert comparable(output)["config"]["seed"] == 5


def test_saving_more_often_is_no_other_run(folder, uninterrupted, output):
    toy_run(folder, output=str(output), resume=True, train={"save_minutes": 1.5})
    assert file_bytes(output) == file_bytes(uninterrupted("wanda"))
