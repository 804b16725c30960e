"""Promised: a walk through the blocks that is stopped on its way is resumed there, and ends as if it had not been: pruning,
reconstruction and rounding, of `losa run` and of `losa prune`."""

import importlib
import logging
import math
import signal
from pathlib import Path

import pytest
import torch
from helpers import Stop, comparable, file_bytes, record_of, set_up, toy_config
from processes import call, losa

import losa as package
from losa import method
from losa.data import prepare
from losa.models import load
from losa.session import stages as files
from losa.walk import BlockKeeping

pytestmark = pytest.mark.usefixtures("no_figures")

BLOCKS = {"num_hidden_layers": 3}
OFTEN = {"save_minutes": 1e-9}  # after every block
WHOLE = {"pruner": "alps", "steps": 1, "rates": "uniform", "train": {"weights": "all", "lr": 1e-3}}
VARIANTS = {
    "adapters": {},
    "whole": WHOLE,
    "reconstructed": WHOLE | {"reconstruct": {"epochs": 1}},
    "rounded": WHOLE | {"values": "int4"},
    "reconstructed, adapters": {"pruner": "sparsegpt", "reconstruct": {"epochs": 1}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return set_up(tmp_path_factory.mktemp("walk"), **BLOCKS)


def make(folder: Path, output: Path, kind: str = "run", resume: bool = False, **changes):
    config = toy_config(folder, output=str(output), **changes)
    return getattr(package, kind)(*load(config), config, resume=resume)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Directory of what was not stopped, made once."""
    made: dict[tuple[str, str], Path] = {}

    def of(variant: str, kind: str) -> Path:
        if (variant, kind) not in made:
            made[variant, kind] = tmp_path_factory.mktemp("made") / "sparse"
            make(folder, made[variant, kind], kind, **VARIANTS[variant])
        return made[variant, kind]

    return of


def stop_in(monkeypatch, visit: str, block: int, walk: int = 1) -> None:
    """Ends the program in the middle of a visit of a block, in the so-manieth walk that makes such visits."""
    place = {"reconstruction_visit": "losa.method", "rounding_visit": "losa.method", "pruning_visit": "losa.calibration"}[visit]
    module = importlib.import_module(place)
    real, walks = getattr(module, visit), []

    def stopping(*args, **kwargs):
        walks.append(visit)
        does, number = real(*args, **kwargs), len(walks)

        def visiting(stop):
            does(stop)  # half of it is done: what is saved must not have it
            if (number, stop.index) == (walk, block):
                raise Stop

        return visiting

    monkeypatch.setattr(module, visit, stopping)


def left(output: Path) -> list[str]:
    return sorted(path.parent.name for path in (output / ".losa").glob("*/stage.json"))


@pytest.mark.parametrize(
    ("variant", "kind", "visit", "walk", "block", "stage"),
    [
        ("adapters", "run", "pruning_visit", 3, 1, "01-trained"),  # after the baseline's and the first step's
        ("adapters", "prune", "pruning_visit", 1, 2, "00-dense"),
        ("whole", "run", "pruning_visit", 1, 2, "00-baselines"),
        ("whole", "prune", "pruning_visit", 1, 1, "00-dense"),
        ("reconstructed", "run", "reconstruction_visit", 1, 2, "01-pruned"),
        ("reconstructed, adapters", "run", "reconstruction_visit", 1, 1, "03-pruned"),
        ("rounded", "run", "rounding_visit", 1, 1, "01-trained"),
        ("rounded", "prune", "rounding_visit", 1, 2, "01-pruned"),
    ],
)
def test_a_walk_that_was_stopped_goes_on(folder, whole, tmp_path, monkeypatch, variant, kind, visit, walk, block, stage):
    output = tmp_path / "sparse"
    expected = whole(variant, kind)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_in(patched, visit, block, walk)
        make(folder, output, kind, **VARIANTS[variant])
    assert left(output) == [stage, f"{stage}-block-{block}"]
    seen = []
    with monkeypatch.context() as patched:
        module = importlib.import_module("losa.session.session")
        patched.setattr(module.logger, "info", lambda text, *args: seen.append(text % args))
        make(folder, output, kind, resume=True, **VARIANTS[variant])
    assert any(f"after block {block - 1}" in line for line in seen if line.startswith("resuming"))
    assert file_bytes(output) == file_bytes(expected)
    assert comparable(output) == comparable(expected)
    assert not (output / ".losa").exists()


def test_blocks_are_saved_one_after_the_other_and_a_damaged_one_ends_them(folder, whole, tmp_path, monkeypatch, caplog):
    output = tmp_path / "sparse"
    changes = WHOLE | {"train": WHOLE["train"] | OFTEN}
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_in(patched, "pruning_visit", 2)
        make(folder, output, **changes)
    assert left(output) == ["00-baselines", "00-baselines-block-1", "00-baselines-block-2"]
    sizes = [(output / ".losa" / f"00-baselines-block-{done}" / "state.safetensors").stat().st_size for done in (1, 2)]
    assert sizes[0] == sizes[1]  # each its own block
    state = output / ".losa" / "00-baselines-block-2" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with caplog.at_level(logging.INFO, "losa"):
        make(folder, output, resume=True, **changes)
    assert "00-baselines-block-2 is damaged; going on from block 1" in caplog.text
    assert "resuming pruning after block 0" in caplog.text
    assert file_bytes(output) == file_bytes(whole("whole", "run"))


def test_damping_that_was_raised_before_is_in_the_record(folder, tmp_path, monkeypatch):
    """By a solver that says so of every layer."""
    from losa import calibration
    from losa.pruning import Solution

    real = calibration._solve

    def raised(*args, **kwargs):
        return {name: Solution(found.weight_OI, found.keep_OI, 0.5) for name, found in real(*args, **kwargs).items()}

    monkeypatch.setattr(calibration, "_solve", raised)
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stop_in(patched, "pruning_visit", 2)
        make(folder, tmp_path / "sparse", "prune", **WHOLE)
    make(folder, tmp_path / "sparse", "prune", resume=True, **WHOLE)
    assert len(record_of(tmp_path / "sparse")["steps"][0]["raised_damping"]) == 7 * 3


def test_the_command_goes_on(folder, whole, tmp_path):
    """Killed without warning, where the second block's state is in place."""
    output, config = tmp_path / "sparse", tmp_path / "config.yaml"
    config.write_text(toy_config(folder, output=str(output), **VARIANTS["whole"]).to_yaml())
    arguments = ["prune", "--config", str(config), "--set", "train.save_minutes=1e-9"]
    assert call(tmp_path / "log", losa, arguments, ("after", "00-dense-block-2")) == -signal.SIGKILL
    assert call(tmp_path / "log", losa, arguments) == 2
    assert "finish it with --resume" in (tmp_path / "log").read_text()
    assert call(tmp_path / "log", losa, ["run", *arguments[1:], "--resume"]) == 2
    assert "it is losa prune that was interrupted, not losa run" in " ".join((tmp_path / "log").read_text().split())
    assert call(tmp_path / "log", losa, [*arguments, "--resume"]) == 0, (tmp_path / "log").read_text()
    assert file_bytes(output) == file_bytes(whole("whole", "prune"))


def test_what_cannot_be_saved_is_saved_later(folder, whole, tmp_path, monkeypatch, caplog):
    """A full disk does not end a pruning."""
    real, calls = files.save_blocks, []

    def full(output, stage, model, first, done, values):
        calls.append((first, done))
        if done == 1:
            raise OSError("no space left")
        real(output, stage, model, first, done, values)

    monkeypatch.setattr(files, "save_blocks", full)
    output = tmp_path / "sparse"
    make(folder, output, "prune", **WHOLE | {"train": WHOLE["train"] | OFTEN})
    assert "no space left; pruning goes on" in caplog.text
    assert calls == [(0, 1), (0, 2), (2, 3)]
    assert file_bytes(output) == file_bytes(whole("whole", "prune"))


def test_an_end_without_anything_new_saves_nothing():
    saved = []
    keeping = BlockKeeping(lambda *blocks: not saved.append(blocks), math.inf, done=2)
    with pytest.raises(Stop), keeping.walking():
        raise Stop
    assert saved == []
    with pytest.raises(Stop), keeping.walking():
        keeping.did(2)
        raise Stop
    assert saved == [(2, 3)]


def test_reconstruction_sees_more_text_than_pruning_in_shorter_pieces(folder, tmp_path, monkeypatch):
    seen, real = {}, method.walk_blocks

    def walking(model, ids_ST, visits, **options):
        seen["pieces"] = ids_ST
        return real(model, ids_ST, visits, **options)

    monkeypatch.setattr(method, "walk_blocks", walking)
    text = {"calibration": {"sequences": 2, "length": 32}, "reconstruct": {"epochs": 1, "sequences": 6, "length": 12}}
    config = toy_config(folder, output=str(tmp_path / "sparse"), **WHOLE | text)
    loaded = load(config)
    config = config.resolve(loaded[0].config.hidden_size, 64)
    package.prune(*loaded, config)
    ids_ST = prepare(config, loaded[1], training=False).calibration
    assert ids_ST.shape == (6, 32) and config.reconstructed_pieces == 12
    assert torch.equal(seen["pieces"], torch.cat([ids_ST[:, :12], ids_ST[:, 12:24]], 1).reshape(12, 12))
