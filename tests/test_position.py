"""A training that is killed or asked to end goes on from the update it was at, and ends with the very same bytes."""

import os
import shutil
import signal

import pytest
from helpers import Stop, StopAtStep, comparable, file_bytes, set_up, toy_run
from processes import call, losa, ranks
from transformers import TrainerCallback

from losa.system.output import stages

pytestmark = pytest.mark.usefixtures("no_figures")

EVERY = {"save_minutes": 1e-9}  # after every update
VARIANTS = {
    "adapters": {"steps": 2},
    "movement": {"steps": 2, "pruner": "movement"},  # scores of half a training
    "whole": {"steps": 1, "train": {"weights": "all", "lr": 1e-3, "accumulation": 2, "batch_size": 4}},
    "samples": {"steps": 1, "train": {"samples": 90, "schedule": "cosine", "tokens": 1}},
}


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of update `update` of training number `training`."""

    def __init__(self, number: int, training: int, update: int) -> None:
        self.number, self.left, self.update = number, training, update

    def on_train_begin(self, *args, **kwargs) -> None:
        self.left -= 1

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.left == 0 and state.global_step + 1 == self.update:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = set_up(tmp_path_factory.mktemp("position"), attention_dropout=0.1)  # so that random numbers matter
    (folder / "text.jsonl").write_text("".join(f'{{"text": "THE FOX {"JUMPS " * (i % 7)}{i}"}}\n' for i in range(120)))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    made = {}

    def of(variant):
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("whole") / "sparse"
            toy_run(folder, output=str(made[variant]), **values(folder, variant))
        return made[variant]

    return of


def values(folder, variant, **train):
    """Changes of a variant to the toy's configuration."""
    changes = dict(VARIANTS[variant])
    own = {"data": str(folder / "text.jsonl")} if variant == "samples" else {}
    return changes | {"train": changes.get("train", {}) | own | train, "eval": {"data": str(folder / "text.txt"), "windows": 4}}


def positions(output):
    return [stage.name for stage in stages(output) if "-update-" in stage.name]


def assert_same_result(output, expected):
    assert file_bytes(output) == file_bytes(expected)
    found, wanted = comparable(output), comparable(expected)
    for record in (found, wanted):
        del record["config"]["train"]["save_minutes"]
    assert found == wanted


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_in_a_training(folder, uninterrupted, tmp_path, variant):
    output, steps = tmp_path / "sparse", VARIANTS[variant]["steps"]
    with pytest.raises(Stop):
        toy_run(folder, output=str(output), callbacks=(StopAtStep(steps, 4),), **values(folder, variant, **EVERY))
    assert positions(output) == [f"{steps:02d}-pruned-update-3"]
    with pytest.raises(Stop):  # and again
        toy_run(folder, output=str(output), callbacks=(StopAtStep(1, 7),), resume=True, **values(folder, variant, **EVERY))
    assert positions(output) == [f"{steps:02d}-pruned-update-6"]
    toy_run(folder, output=str(output), resume=True, **values(folder, variant))
    assert_same_result(output, uninterrupted(variant))


@pytest.mark.parametrize("update", [1, 5, "last"])
def test_a_signal_saves_the_update_that_is_under_way(folder, uninterrupted, tmp_path, update):
    output = tmp_path / "sparse"
    last = comparable(uninterrupted("whole"))["steps"][0]["loss"][-1][0]
    update = 15 if update == "last" else update
    assert last == 10
    with pytest.raises(KeyboardInterrupt):
        toy_run(folder, output=str(output), callbacks=(SignalAt(signal.SIGINT, 1, update),), **values(folder, "whole"))
    assert positions(output) == [f"01-pruned-update-{update}"]
    assert not (output / "config.json").exists()
    toy_run(folder, output=str(output), resume=True, **values(folder, "whole"))
    assert_same_result(output, uninterrupted("whole"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_damaged_position_is_passed_over(folder, uninterrupted, tmp_path, caplog):
    output = tmp_path / "sparse"
    with pytest.raises(Stop):
        toy_run(folder, output=str(output), callbacks=(StopAtStep(1, 6),), **values(folder, "whole", **EVERY))
    (stage,) = [stage for stage in stages(output) if "-update-" in stage.name]
    content = bytearray((stage / "state.safetensors").read_bytes())
    content[-5] ^= 1
    (stage / "state.safetensors").write_bytes(content)
    older = shutil.copytree(stage, stage.with_name("01-pruned-update-3"))
    (older / "stage.json").write_text("[" * 100_000)
    toy_run(folder, output=str(output), resume=True, **values(folder, "whole"))
    assert caplog.text.count("is damaged and passed over") == 2
    assert_same_result(output, uninterrupted("whole"))


def test_a_full_disk_does_not_end_a_training(folder, uninterrupted, tmp_path, monkeypatch, caplog):
    output = tmp_path / "sparse"

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("losa.session.stages.save_position", full)
    toy_run(folder, output=str(output), **values(folder, "whole", **EVERY))
    assert "No space left on device; the training goes on" in caplog.text
    assert_same_result(output, uninterrupted("whole"))


def killed_at(update, number, arguments):
    """`losa` that gets a signal in the middle of an update."""
    from losa import session

    start = session.Session.start.__func__
    made = SignalAt(number, 1, update)
    session.Session.start = classmethod(lambda cls, *args, **kwargs: start(cls, *args, **kwargs | {"callbacks": (made,)}))
    losa(arguments)


def command(folder, output, *more):
    from helpers import toy_config

    file = output.parent / f"{output.name}.yaml"
    file.write_text(toy_config(folder, output=str(output), **values(folder, "whole")).to_yaml())
    return ["run", str(folder / "model"), "--output", str(output), "--config", str(file), *more]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_ends_with_a_sentence(folder, uninterrupted, tmp_path, number):
    output, log = tmp_path / "sparse", tmp_path / "log"
    code = call(log, killed_at, 5, number, command(folder, output, "--set", "train.save_minutes=1e-9"))
    assert code == (-number if number == signal.SIGKILL else 128 + number), log.read_text()
    assert positions(output) == [f"01-pruned-update-{4 if number == signal.SIGKILL else 5}"]
    if number != signal.SIGKILL:
        assert f"stopped by {number.name}; nothing half-written is left" in log.read_text().splitlines()[-1]
        assert "Traceback" not in log.read_text()
    assert call(log, losa, command(folder, output, "--resume")) == 0, log.read_text()
    assert_same_result(output, uninterrupted("whole"))


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["DDP", "FSDP2"])
@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(folder, tmp_path, options):
    whole, output = tmp_path / "whole" / "sparse", tmp_path / "sparse"
    whole.parent.mkdir()
    batch = ["--set", "train.batch_size=4", *options]
    assert ranks(tmp_path / "a", 2, losa, command(folder, whole, *batch)) == [0, 0]
    stopped = ranks(tmp_path / "b", 2, killed_at, 4, signal.SIGTERM, command(folder, output, *batch))
    assert stopped == [143, 143], (tmp_path / "b.0").read_text()
    assert positions(output) == ["01-pruned-update-4"]
    assert ranks(tmp_path / "c", 2, losa, command(folder, output, "--resume", *batch)) == [0, 0], (tmp_path / "c.0").read_text()
    assert "update 4 of the training" in (tmp_path / "c.0").read_text()
    assert_same_result(output, whole)
