"""Promised: a plan's simulation equals what the same step really has alive; processes and devices elsewhere are counted; times
come from a short probe, stage by stage."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import save_toy, set_up, toy_config
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from losa.adapter import attach
from losa.api import run
from losa.cli.tables import plan_table
from losa.commands.toy import TOY
from losa.config import LosaConfig
from losa.loss import causal_loss
from losa.models import block_linears, find_decoder, load
from losa.planning.plan import plan
from losa.planning.probe import Line, _line, solver_cost
from losa.planning.simulation import _Meter, simulate_evaluation, simulate_reconstruction, simulate_training
from losa.pruning import PRUNERS, get_pruner
from losa.training import activation_checkpointing

SIZES = {"num_hidden_layers": 6, "hidden_size": 48, "intermediate_size": 96}


def build(vocabulary=64):
    config = LlamaConfig(**TOY | SIZES | {"vocab_size": vocabulary}, max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def config(**train):
    values = {"batch_size": 4, "length": 64, "distill": 0.0, **train}
    return LosaConfig.from_dict({"train": values, "eval": {"length": 64}, "adapter": {"max_rank": 10}})


def alive_in_a_step(checkpointing: bool, rows: int, whole: bool) -> int:
    """Bytes at the peak of a real step on all six blocks."""
    model = attach(build(), 10, whole=whole).train()
    ids = torch.zeros(rows, 64, dtype=torch.int64)
    with _Meter() as meter, activation_checkpointing(model, checkpointing):
        loss = causal_loss(model(input_ids=ids, use_cache=False).logits, ids)
        loss.backward()
    return meter.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("weights", ["all", "adapters"])
def test_two_simulated_blocks_tell_what_six_have_alive(checkpointing, rows, weights):
    simulated = simulate_training(build, config(batch_size=rows, gradient_checkpointing=checkpointing, weights=weights))
    real = alive_in_a_step(checkpointing, rows, weights == "all")
    # More rather than less: fake attention returns its output in another layout, which costs a copy that the real one saves.
    assert real <= simulated <= 1.1 * real


def test_a_teacher_and_a_larger_vocabulary_cost_memory():
    small, distilled = simulate_training(build, config()), simulate_training(build, config(distill=0.5))
    assert small < distilled
    outputs = 6 * 4 * 64 * 48 * 2  # of the dense model's blocks; those of the sparse one are kept for its backward anyway
    assert simulate_training(build, config(distill=0.5, distill_blocks=1.0)) - distilled >= 0.9 * outputs
    logits = 4 * 64 * (4096 - 64) * 2
    large = simulate_training(lambda: build(4096), config())
    assert large - small >= 2 * logits * 0.9
    model = attach(build(4096), 10, whole=True).train()
    ids = torch.zeros(4, 64, dtype=torch.int64)
    with _Meter() as meter:  # the loss in four chunks, of which the simulation looks at one
        causal_loss(model(input_ids=ids, use_cache=False).logits, ids).backward()
    assert meter.peak <= large <= 1.1 * meter.peak
    assert simulate_evaluation(lambda: build(4096), config()) > simulate_evaluation(build, config())


def test_the_meter_forgets_what_is_gone():
    with _Meter() as meter:
        first = torch.zeros(1000)
        view = first[10:]
        del first
        second = torch.zeros(500)
        del view
        third = torch.zeros(100)
    assert meter.peak == 4 * 1500
    assert meter.alive == 4 * 600
    del second, third


@pytest.fixture
def model(tmp_path):
    return str(save_toy(tmp_path / "model", torch.bfloat16, **SIZES))


@pytest.mark.slow
def test_processes_share_the_work(model):
    train = {"tokens": 6400, "length": 64, "batch_size": 8}
    values = {"model": model, "train": train, "calibration": {"sequences": 64}, "device": "cpu"}
    state = torch.random.get_rng_state()
    one, four = (plan(LosaConfig.from_dict(values), processes, 2**30, 1e12) for processes in (1, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert four.seconds == pytest.approx(one.seconds / 4)
    assert four.training < one.training
    assert four.calibration < one.calibration
    assert (four.weights, four.processes) == (one.weights, 4)
    spread = plan(LosaConfig.from_dict(values | {"shard": True}), 4, 2**30, 1e12)
    assert spread.peak_memory < four.peak_memory
    for rates, refused in (("rmi", r"calibration\.rmi_sequences is 64"), ("uniform", r"train\.batch_size is 8")):
        with pytest.raises(ValueError, match=f"{refused}, expected a multiple of the 3 processes"):
            plan(LosaConfig.from_dict(values | {"rates": rates}), 3, 2**30, 1e12)


def test_what_a_run_would_refuse_is_refused_at_once(model):
    for changes, message in (
        ({"pattern": "5:7", "sparsity": None}, "not a multiple of 7"),
        ({"protect": [6]}, "block numbers below 6"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(LosaConfig.from_dict({"model": model, **changes}))


def test_a_device_elsewhere_is_not_measured(model, unsimulated, monkeypatch):
    for measured in ("_speed", "probe"):
        monkeypatch.setattr(f"losa.planning.plan.{measured}", lambda *args: pytest.fail("measured here"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 40, total=1 << 40))
    made = plan(LosaConfig.from_dict({"model": model}), memory=1 << 20, flops=1e12)
    assert (made.device, made.available_memory, made.fits) == ("elsewhere", 1 << 20, False)
    assert plan(LosaConfig.from_dict({"model": model}), memory=80 << 30, flops=1e12).fits


def planned(model, **changes):
    return plan(LosaConfig.from_dict({"model": model, **changes}), memory=80 << 30, flops=1e12)


def test_what_is_trained_has_sixteen_bytes_a_number(model):
    whole, adapters = planned(model), planned(model, train={"weights": "adapters"})
    assert whole.trained == 16 * whole.prunable
    assert adapters.trained < whole.trained
    assert whole.peak_memory - adapters.peak_memory > 0.7 * (whole.trained - adapters.trained)


def test_what_is_trained_grows_with_the_ranks(model, unsimulated):
    ranks = [planned(model, train={"weights": "adapters"}, adapter={"max_rank": rank}).trained for rank in (16, 32)]
    assert ranks[1] == 2 * ranks[0] == 2 * planned(model, train={"weights": "adapters"}).trained


@pytest.mark.parametrize("pruner", PRUNERS)
def test_dense_weights_are_kept_where_the_base_changes(model, unsimulated, pruner):
    kept = 2 * planned(model).prunable * get_pruner(pruner).updates_weights
    assert planned(model, pruner=pruner, train={"weights": "adapters"}).dense_copy == kept
    assert planned(model, pruner=pruner).dense_copy == 0
    for changes in ({"reconstruct": {"epochs": 1}}, {"values": "int4"}):
        changed = planned(model, pruner=pruner, train={"weights": "adapters"}, **changes)
        assert changed.dense_copy == 2 * changed.prunable


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"weights": "adapters"}},
        {"train": {"weights": "adapters"}, "values": "int4"},
        {"train": {"weights": "all"}, "values": "int8"},
        {"train": {"weights": "adapters"}, "pruner": "movement"},
    ],
)
def test_a_run_stays_within_its_disk(tmp_path, unsimulated, monkeypatch, changes):
    """But for what says what a file holds, which counts for something in a model as small."""
    set_up(tmp_path, hidden_size=64, intermediate_size=128)
    most, real = [], Path.rename

    def rename(path, target):  # whatever is published
        found = real(path, target)
        most.append(sum(file.stat().st_size for file in tmp_path.glob("**/*sparse*/**/*") if file.is_file()))
        return found

    monkeypatch.setattr(Path, "rename", rename)
    config = toy_config(tmp_path, steps=2, **changes | {"train": changes["train"] | {"save_minutes": 1e-9}})
    run(*load(config), config)
    assert max(most) < 1.2 * plan(config).disk


def test_the_simulated_reconstruction_is_what_an_update_has_alive():
    settings = LosaConfig.from_dict({"calibration": {"length": 64}, "reconstruct": {"epochs": 1, "batch_size": 4}})
    block = find_decoder(attach(build(), whole=True)).blocks[0]
    weights = sum(linear.weight.numel() for linear in block_linears(block).values())
    simulated = simulate_reconstruction(build, settings)
    activations = simulated - 16 * weights
    assert 0 < activations < 64 * 4 * 48 * 1000
    settings.reconstruct.batch_size = 8
    assert simulate_reconstruction(build, settings) - 16 * weights > 1.5 * activations


@pytest.mark.slow
def test_reconstruction_costs_memory_and_time(model):
    calibration = {"sequences": 64, "length": 64}
    without, with_it = (planned(model, calibration=calibration, reconstruct={"epochs": epochs}) for epochs in (0, 3))
    assert with_it.calibration > without.calibration
    assert without.stages["reconstruction"] == 0 < with_it.stages["reconstruction"]
    assert with_it.stages["pruning"] == without.stages["pruning"]  # it is a walk of its own


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 5, "rates": "rmi"},
        {"train": {"weights": "adapters", "gradient_checkpointing": True}, "reconstruct": {"epochs": 1}, "pruner": "sparsegpt"},
        {"pruner": "alps", "rates": "owl"},
        {"pruner": "movement", "rates": "depth"},
        {"pruner": "wanda", "values": "int4"},
        {"pruner": "magnitude", "pattern": "2:4", "eval": {"windows": 7}},
    ],
)
def test_a_probe_times_every_stage(model, quick_probe, unsimulated, changes):
    state = torch.random.get_rng_state()
    made = plan(LosaConfig.from_dict({"model": model, "device": "cpu", "train": {"tokens": 10_000}, **changes}))
    assert torch.equal(torch.random.get_rng_state(), state)
    measured_importance = changes.get("rates") in ("rmi", "owl")
    absent = {"reconstruction"} if "reconstruct" not in changes else set()
    absent |= {"baseline"} if "steps" not in changes else set()
    absent |= set() if measured_importance else {"importance"}
    absent |= set() if "values" in changes else {"rounding"}
    assert {stage for stage, seconds in made.stages.items() if seconds == 0} == absent
    assert made.seconds == sum(made.stages.values())
    assert made.probed
    if "eval" in changes:
        assert made.windows == 7
    console = Console(record=True, width=100)
    console.print(plan_table(made))
    text = console.export_text()
    assert "probe" in text
    assert all(stage in text for stage in made.stages)


def test_more_work_takes_longer(model, quick_probe, unsimulated):
    values = {"model": model, "device": "cpu", "train": {"tokens": 20_000}, "eval": {"windows": 64}, "pruner": "sparsegpt"}
    small = plan(LosaConfig.from_dict(values))
    large = plan(LosaConfig.from_dict(values | {"train": {"tokens": 800_000}, "eval": {"windows": 2560}, "steps": 50}))
    for stage in ("training", "evaluation", "pruning"):
        assert large.stages[stage] > 3 * small.stages[stage]


def test_a_block_too_large_to_try_is_not_tried(model, unsimulated, monkeypatch):
    monkeypatch.setattr("losa.planning.plan.probe_bytes", lambda *sizes: 1 << 60)
    made = plan(LosaConfig.from_dict({"model": model, "device": "cpu"}))
    assert not made.probed
    console = Console(record=True, width=100)
    console.print(plan_table(made))
    assert "at least" in console.export_text()


@pytest.mark.parametrize(("call", "token"), [(0.003, 1e-5), (0.0, 1e-3), (0.2, 0.05), (3.0, 0.1)])
def test_a_line_is_found_again_however_slow_the_machine_is(monkeypatch, call, token):
    asked = []

    def prepare(rows, length):
        asked.append(rows * length)
        return lambda: call + token * rows * length

    monkeypatch.setattr("losa.planning.probe._seconds", lambda work, device: work())
    found = _line(prepare, 8, 1024, torch.device("cpu"))
    assert (found.call, found.token) == pytest.approx((call, token), abs=1e-9)
    assert max(asked) <= 8192
    assert call + token * max(asked) < 1.0 or max(asked) <= 128
    assert found(2, 100) == pytest.approx(2 * call + 100 * token)


def test_noise_gives_no_negative_times(monkeypatch):
    monkeypatch.setattr("losa.planning.probe._seconds", lambda work, device: 0.1)
    assert _line(lambda rows, length: lambda: None, 1, 256, torch.device("cpu")) == Line(0.0, 0.1 / 160)


def test_solvers_grow_with_what_they_do():
    assert solver_cost(get_pruner("wanda"), 20, 30) == 600
    assert solver_cost(get_pruner("sparsegpt"), 20, 30) == 20 * 900 + 27_000
