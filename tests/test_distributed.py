"""Promised: two processes do what one does. Same masks, same rates and ranks, loss and adapters equal within float32 rounding,
with the whole model in every process (DDP) and with its weights spread over them (FSDP2)."""

import processes
import pytest
import torch
from helpers import record_of, set_up, tensors, toy_config, toy_values
from safetensors.torch import load_file, save_file

from losa.session.checks import check_parts, check_request


def run_in(folder, output, count, *options):
    """`losa run` on the toy in `count` processes; the output directory."""
    values = toy_values(folder)
    sets = [f"calibration.{key}={value}" for key, value in values["calibration"].items()]
    sets += [f"train.{key}={value}" for key, value in values["train"].items() if key not in ("data", "weights")]
    options = options if "--train" in options else ("--train", values["train"]["weights"], *options)
    sets += ["eval.length=32", "eval.windows=16", "steps=3", "calibration.error_sequences=5", "device=cpu"]
    sets += ["rates=rmi"]
    options = options if "--pruner" in options else ("--pruner", "wanda", *options)
    arguments = ["run", values["model"], "--output", str(folder / output), "--data", values["train"]["data"], "--sparsity", "0.6"]
    arguments += [item for pair in sets for item in ("--set", pair)] + list(options)
    statuses = processes.ranks(folder / output, count, processes.losa, arguments)
    logs = [(folder / output).with_suffix(f".{rank}").read_text() for rank in range(count)]
    assert statuses == [0] * count, logs
    return folder / output, logs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return set_up(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def alone(folder):
    return run_in(folder, "alone", 1)[0]


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["DDP", "FSDP2"])
def test_two_processes_do_what_one_does(folder, alone, options):
    together, logs = run_in(folder, "together" + "".join(options), 2, *options)
    one, two = record_of(alone), record_of(together)
    assert (one["processes"], two["processes"]) == (1, 2)
    for step, other in zip(one["steps"], two["steps"], strict=True):
        assert (step["rates"], step["ranks"]) == (other["rates"], other["ranks"])
        assert other["errors"] == pytest.approx(step["errors"], rel=1e-5)
        assert [loss for _, loss in other["loss"]] == pytest.approx([loss for _, loss in step["loss"]], rel=1e-5)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
    found = tensors(together)
    for name, expected in tensors(alone).items():
        assert torch.equal(found[name] == 0, expected == 0), name
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    assert "saved and verified" in logs[0]
    assert logs[1] == ""  # one of them speaks


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["DDP", "FSDP2"])
@pytest.mark.slow
def test_everything_at_once(folder, options):
    """SparseGPT's updated weights, accumulation, checkpointing, distillation of blocks."""
    sets = ["train.accumulation=2", "train.batch_size=4", "train.gradient_checkpointing=true", "train.distill_blocks=0.1"]
    chosen = ["--pruner", "sparsegpt", *(item for pair in sets for item in ("--set", pair))]
    runs = [
        run_in(folder, f"all-{count}{''.join(options)}", count, *chosen, *(options if count > 1 else []))[0] for count in (1, 2)
    ]
    one, two = (record_of(run) for run in runs)
    assert [step["ranks"] for step in one["steps"]] == [step["ranks"] for step in two["steps"]]
    # Rounding may swap two nearly equal scores, and then the weights that make up for them differ too.
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=5e-3)
    different = [(a == 0) != (b == 0) for a, b in zip(*(tensors(run).values() for run in runs), strict=True)]
    assert sum(int(d.sum()) for d in different) / sum(d.numel() for d in different) < 2e-3


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["DDP", "FSDP2"])
@pytest.mark.slow
def test_all_weights_and_reconstruction(folder, options):
    sets = ["reconstruct.epochs=2", "reconstruct.sequences=7", "reconstruct.batch_size=2", "train.lr=0.001", "steps=1"]
    chosen = ["--pruner", "wanda", "--train", "all", *(item for pair in sets for item in ("--set", pair))]
    runs = [
        run_in(folder, f"whole-{count}{''.join(options)}", count, *chosen, *(options if count > 1 else []))[0] for count in (1, 2)
    ]
    one, two = (record_of(run) for run in runs)
    assert two["steps"][0]["reconstructed"] == pytest.approx(one["steps"][0]["reconstructed"], rel=1e-3)
    assert all(new < old for new, old in zip(one["steps"][0]["reconstructed"], one["steps"][0]["errors"], strict=True))
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)


def train_from_host(model_directory, folder, on_host):
    """Trains the adapters of a toy on a twin that streams its weights from the host, or as it is; saves them."""
    from pathlib import Path

    from losa.adapter import attach, masked_linears
    from losa.config import TrainConfig
    from losa.models import load
    from losa.system import distributed
    from losa.training import train
    from losa.training.sharding import copy_trained, sharded

    device = torch.device("cpu")
    model, _ = load(model_directory)
    attach(model, 4)
    for layer in masked_linears(model).values():
        layer.set_solution(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5)
        layer.restore(layer.keep_bits, layer.weight + 0.01)  # so that the dense originals are kept apart
    twin = model
    if on_host:
        distributed.join(device, alone=True)
        twin = sharded(model, device, on_host=True)
    rows = torch.randint(0, 60, (32, 16), generator=torch.Generator().manual_seed(1))
    config = TrainConfig(lr=0.01, batch_size=8)
    train(twin, rows, config, name="test", seed=0, work_dir=Path(folder), dense_on_host=on_host)
    if on_host:
        copy_trained(twin, model)
        torch.distributed.destroy_process_group()
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, Path(folder, f"{on_host}.safetensors"))


def test_training_with_weights_on_the_host_is_the_same_training(folder, tmp_path):
    for on_host in (False, True):
        log = tmp_path / f"log-{on_host}"
        assert processes.call(log, train_from_host, str(folder / "model"), str(tmp_path), on_host) == 0, log.read_text()
    plain, streamed = (load_file(tmp_path / f"{on_host}.safetensors") for on_host in (False, True))
    assert any(value.any() for name, value in plain.items() if "lora_B" in name)
    for name, value in plain.items():
        torch.testing.assert_close(streamed[name], value, rtol=1e-5, atol=1e-6)


def test_shares_that_do_not_divide_are_refused(tmp_path):
    config = toy_config(tmp_path, train={"batch_size": 6})
    check_parts(config, 3, 3)
    check_parts(config, 6)
    with pytest.raises(ValueError, match=r"train\.batch_size is 6, expected a multiple of the 4 processes"):
        check_parts(toy_config(tmp_path, train={"batch_size": 6}, calibration={"rmi_sequences": 8}), 4)
    with pytest.raises(ValueError, match=r"eval\.windows is 3, expected at least one for each of 6 processes"):
        check_parts(config, 6, 3)


def test_sharding_one_process_is_refused(tmp_path, monkeypatch):
    folder = set_up(tmp_path)
    with pytest.raises(ValueError, match="shard is True, expected several processes"):
        check_request(toy_config(folder, shard=True), training=True)


@pytest.mark.parametrize(
    ("variable", "value", "way_out"),
    [
        ("ACCELERATE_USE_FSDP", "true", "set shard: true"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "set shard: true"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--mixed_precision no"),
    ],
)
def test_an_accelerate_configuration_of_other_engines_is_refused(tmp_path, monkeypatch, variable, value, way_out):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=way_out):
        check_request(toy_config(set_up(tmp_path)), training=True)
