"""The command line is thin, helps everywhere, and tells what is wrong in one line with exit status 2."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer.main
from helpers import pruned_names, save_text, set_up, tensors, toy_config, toy_run
from processes import call, losa
from safetensors.torch import save_file
from typer.testing import CliRunner

from losa.cli import app, main
from losa.commands.inspect import inspect
from losa.config import LosaConfig
from losa.evaluation import evaluate_checkpoint
from losa.models import load

COMMANDS = typer.main.get_command(app).commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = set_up(tmp_path_factory.mktemp("cli"), talks=True)
    toy_run(folder, steps=1)
    toy_run(folder, steps=1, output=str(folder / "two-four"), pattern="2:4", sparsity=None)
    return folder


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def losa_main(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a `losa` command, through its entry point."""
    monkeypatch.setattr(sys, "argv", ["losa", *map(str, arguments)])
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_line_error(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert code == 2, err
    lines = [line for line in err.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "Traceback" not in out + err


@pytest.mark.parametrize("name", ["", *sorted(COMMANDS)])
def test_help_of_every_command(name):
    result = CliRunner().invoke(app, [name, "--help"] if name else ["--help"])
    assert result.exit_code == 0
    for shown in COMMANDS if not name else (parameter.name for parameter in COMMANDS[name].params):
        assert shown.rstrip("_").replace("as_json", "json").replace("_", "-").lower() in result.output.lower()


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_has_a_help_text(name):
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_the_commands():
    makes = {"run", "prune", "round", "pack", "unpack"}
    shows = {"compare", "eval", "inspect", "report", "plan", "generate", "chat", "serve", "bench", "push", "doctor", "demo"}
    assert set(COMMANDS) == makes | shows
    assert {option for parameter in COMMANDS["run"].params for option in parameter.opts} >= {
        *("--output", "-o", "--sparsity", "--data", "--calibration", "--eval-data", "--pruner", "--pattern", "--preset"),
        *("--config", "-c", "--set", "--device", "--offload", "--seed", "--trust-remote-code", "--resume"),
    }


def test_no_command_shows_the_help():
    assert "Usage" in CliRunner().invoke(app, []).output


def test_run_from_file_options_and_set(folder, tmp_path):
    """In a process of its own. `--set` wins over options, options over the file."""
    values = toy_config(folder, steps=2, rate_band=0.0).to_dict()
    (tmp_path / "c.yaml").write_text(LosaConfig.from_dict(values | {"sparsity": 0.3, "seed": 4}).to_yaml())
    arguments = ["run", str(folder / "model"), "-o", str(tmp_path / "sparse"), "-c", str(tmp_path / "c.yaml")]
    arguments += ["--sparsity", "0.5", "--pruner", "magnitude", "--seed", "5"]
    arguments += ["--set", "seed=6", "--set", "train.lr=1e-2", "--set", "adapter.max_rank=12"]
    code = call(tmp_path / "log", losa, arguments)
    log = (tmp_path / "log").read_text()
    assert code == 0, log
    config = json.loads((tmp_path / "sparse" / "losa.json").read_text())["config"]
    assert (config["sparsity"], config["pruner"], config["seed"], config["steps"]) == (0.5, "magnitude", 6, 2)
    assert (config["train"]["lr"], config["adapter"]["max_rank"]) == (0.01, 12)
    assert "sparsity asked 0.5000, achieved 0.5000" in log
    assert "saved and verified: " in log


def test_preset_of_run(folder, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("losa.session.check_request", lambda config, **kwargs: seen.append(config), raising=False)
    monkeypatch.setattr("losa.models.load", lambda config: (_ for _ in ()).throw(ValueError("enough")))
    losa_main(monkeypatch, capsys, "run", folder / "model", "-o", folder / "o", "--preset", "paper", "--data", "own.json")
    assert seen[0].train.samples == 10_000
    assert seen[0].train.data == "own.json"


def test_prune(folder, tmp_path, monkeypatch, capsys):
    arguments = ["prune", folder / "model", "-o", tmp_path / "pruned", "--calibration", folder / "text.txt", "--sparsity", "0.5"]
    arguments += ["--set", "calibration.sequences=4", "--set", "calibration.length=32", "--set", "eval.length=32"]
    code, out, err = losa_main(monkeypatch, capsys, *arguments, "--set", "calibration.rmi_sequences=4", "--device", "cpu")
    assert code == 0, err
    assert "pruned only" in out
    assert "16 windows of 32 tokens; losa eval takes all" in " ".join(out.split())
    for layer in inspect(tmp_path / "pruned"):
        assert layer.zeros == layer.numel // 2


def test_inspect_table(folder, monkeypatch, capsys):
    code, out, _ = losa_main(monkeypatch, capsys, "inspect", folder / "two-four")
    assert code == 0
    rows = [line for line in out.splitlines() if "50.00%" in line]
    assert len(rows) == 3  # two blocks and all
    assert all("2:4" in row and "4:8" in row for row in rows)
    code, out, _ = losa_main(monkeypatch, capsys, "inspect", folder / "two-four", "--layers")
    assert sum("model.layers." in line for line in out.splitlines()) == 14


def test_inspect_json(folder, monkeypatch, capsys):
    code, out, _ = losa_main(monkeypatch, capsys, "inspect", folder / "sparse", "--json")
    assert code == 0
    found, file = json.loads(out), tensors(folder / "sparse")
    assert [layer["name"] for layer in found["layers"]] == sorted(pruned_names(folder / "sparse"))
    for layer in found["layers"]:
        weight = file[layer["name"]]
        assert layer["sparsity"] == int((weight == 0).sum()) / weight.numel()
        assert layer["block"] == int(layer["name"].split(".")[2])
    assert found["zeros"] / found["weights"] == found["sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_inspect_of_a_dense_model_shows_no_pattern(folder, monkeypatch, capsys):
    _, out, _ = losa_main(monkeypatch, capsys, "inspect", folder / "model", "--json")
    found = json.loads(out)
    assert found["zeros"] == 0
    assert all(layer["patterns"] == [] for layer in found["layers"])


def test_eval_json(folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder))
    arguments = ["eval", folder / "sparse", "--data=~/text.txt", "--windows", "3", "--device", "cpu", "--json"]
    code, out, err = losa_main(monkeypatch, capsys, *arguments, "--length", "16", "--length", "32")
    assert code == 0, err
    config = LosaConfig(model=str(folder / "sparse"), device="cpu")
    assert json.loads(out) == evaluate_checkpoint(config, str(folder / "text.txt"), [16, 32], 3)


def test_eval_table_names_the_window(folder, monkeypatch, capsys):
    arguments = ["eval", folder / "sparse", "--data", folder / "text.txt", "--windows", "3", "--device", "cpu"]
    code, out, _ = losa_main(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "windows in tokens" in out
    assert re.search(r"\b64\b.*\b3\b", out)


@pytest.fixture
def weightless(folder, tmp_path, quick_probe) -> Path:
    """The toy's directory with nothing in it but `config.json`."""
    (tmp_path / "model").mkdir()
    shutil.copy(folder / "model" / "config.json", tmp_path / "model")
    return tmp_path / "model"


def test_plan_needs_no_weights(weightless, folder, unsimulated, monkeypatch, capsys):
    arguments = ["plan", weightless, "--device", "cpu", "--set", "train.tokens=1000"]
    code, out, err = losa_main(monkeypatch, capsys, *arguments, "--json")
    assert code == 0, err
    plan = json.loads(out)
    model, _ = load(toy_config(folder))
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    assert (
        plan["prunable"] == 8 * plan["masks"] == sum(tensors(folder / "model")[n].numel() for n in pruned_names(folder / "model"))
    )
    assert plan["weights"] == 4 * plan["parameters"]
    assert plan["fits"] is True
    code, out, _ = losa_main(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "it fits" in out


def test_plan_that_does_not_fit_exits_with_one(weightless, unsimulated, monkeypatch, capsys):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20, total=1 << 30))
    code, out, _ = losa_main(monkeypatch, capsys, "plan", weightless, "--device", "cpu")
    assert code == 1
    assert "it does not fit" in out


def test_plan_of_an_absurd_batch_allocates_nothing_and_does_not_fit(weightless, monkeypatch, capsys):
    import torch

    largest, randn = [0], torch.randn

    def watched(*shape, **options):
        assert torch.Size(shape).numel() < 1 << 28, f"a plan that would allocate {shape}"
        largest[0] = max(largest[0], torch.Size(shape).numel())
        return randn(*shape, **options)

    monkeypatch.setattr("torch.randn", watched)
    code, out, err = losa_main(monkeypatch, capsys, "plan", weightless, "--device", "cpu", "--set", "train.batch_size=10000000")
    assert code == 1, err
    assert "it does not fit" in out


def test_plan_checks_the_disk_of_the_output(weightless, unsimulated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    arguments = ["plan", weightless, "--device", "cpu", "-o", tmp_path / "not" / "there" / "yet", "--json"]
    code, out, _ = losa_main(monkeypatch, capsys, *arguments)
    assert code == 1
    assert json.loads(out)["fits"] is False
    assert not (tmp_path / "not").exists()


@pytest.mark.slow
def test_plan_counts_what_a_choice_costs(weightless, monkeypatch, capsys):
    def plan(*more) -> dict:
        _, out, err = losa_main(monkeypatch, capsys, "plan", weightless, "--device", "cpu", "--json", *more)
        assert not err
        return json.loads(out)

    base, adapters = plan(), ("--set", "train.weights=adapters")
    short = ("--set", "calibration.length=8")  # so that the solver needs more than the hidden states
    assert plan("--pruner", "sparsegpt", *short)["calibration"] > plan("--pruner", "wanda", *short)["calibration"]
    changing, keeping = plan("--pruner", "sparsegpt", *adapters), plan("--pruner", "wanda", *adapters)
    assert changing["peak_memory"] - changing["runtime"] > keeping["peak_memory"] - keeping["runtime"]
    assert plan("--set", "train.gradient_checkpointing=true")["training"] < base["training"]
    assert plan("--set", "train.batch_size=32")["training"] > 1.9 * base["training"]  # 16 rows of 64 tokens by default
    assert plan("--set", "adapter.max_rank=32", *adapters)["trained"] == 2 * plan(*adapters)["trained"]
    assert plan("--set", "adapter.max_rank=32")["trained"] == base["trained"] == 16 * base["prunable"]
    assert plan("--set", "dtype=bfloat16")["weights"] == base["weights"] / 2


def test_pack_run_and_unpack(folder, tmp_path, monkeypatch, capsys):
    source, packed, again = folder / "sparse", tmp_path / "packed", tmp_path / "again"
    code, out, err = losa_main(monkeypatch, capsys, "pack", source, packed)
    assert (code, err.strip()) == (0, "")
    assert re.search(r"packed 14 layers, 60\.\d\d% zeros: .* of dense\nsaved and verified: ", out)
    code, out, _ = losa_main(monkeypatch, capsys, "inspect", packed, "--json")
    assert code == 0
    assert json.loads(out)["sparsity"] == pytest.approx(0.6, abs=1e-3)
    code, out, err = losa_main(monkeypatch, capsys, "generate", packed, "--prompt", "THE QUICK", "--tokens", "5")
    assert code == 0, err
    assert out.startswith("THE QUICK")
    assert "5 tokens in" in err
    first = losa_main(monkeypatch, capsys, "generate", packed, "--prompt", "THE", "--temperature", "1", "--seed", "1")
    assert (
        first[1] == losa_main(monkeypatch, capsys, "generate", packed, "--prompt", "THE", "--temperature", "1", "--seed", "1")[1]
    )
    code, out, err = losa_main(monkeypatch, capsys, "bench", packed, "--prompt", "4", "--new", "3", "--rounds", "1")
    assert code == 0, err
    assert "sparse bfloat16" in out
    assert "GB/s" in out
    code, out, err = losa_main(monkeypatch, capsys, "unpack", packed, again)
    assert code == 0, err
    assert tensors(again).keys() == tensors(source).keys()
    sparse = [
        evaluate_checkpoint(LosaConfig.from_dict({"model": str(path)}), str(folder / "text.txt"), [32], 8)["perplexity"][0]
        for path in (again, packed)
    ]
    assert sparse[0]["perplexity"] == pytest.approx(sparse[1]["perplexity"], rel=1e-3)


def test_packing_says_in_a_line_each_what_is_unusual(folder, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO", "losa")
    code, out, _ = losa_main(monkeypatch, capsys, "pack", folder / "model", tmp_path / "dense")
    assert code == 0 and "has hardly any zeros" in out and "losa run makes them" in out
    assert [record.message for record in caplog.records].count("14 layers rounded from float32 to bfloat16") == 1
    assert "hardly any" not in losa_main(monkeypatch, capsys, "pack", folder / "sparse", tmp_path / "packed")[1]
    broken = shutil.copytree(folder / "sparse", tmp_path / "broken")
    (broken / "losa.json").write_text("{}")
    assert_one_line_error(losa_main(monkeypatch, capsys, "pack", broken, tmp_path / "x"), "say what to store with --values")
    assert losa_main(monkeypatch, capsys, "pack", broken, tmp_path / "x", "--values", "int8")[0] == 0


def test_a_kernel_that_does_not_run_here_is_one_line(folder, tmp_path, monkeypatch, capsys):
    assert losa_main(monkeypatch, capsys, "pack", folder / "sparse", tmp_path / "packed")[0] == 0
    monkeypatch.setenv("LOSA_KERNELS", "abacus")
    result = losa_main(monkeypatch, capsys, "generate", tmp_path / "packed", "--prompt", "THE")
    assert_one_line_error(result, "LOSA_KERNELS is 'abacus'; this machine and installation run reference")


@pytest.mark.parametrize(("file", "message"), [("adapter_config.json", "is an adapter"), (".losa/x", "holds an interrupted run")])
def test_directories_that_are_no_model_yet_say_so(folder, tmp_path, monkeypatch, capsys, file, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    result = losa_main(monkeypatch, capsys, "eval", tmp_path, "--data", folder / "text.txt")
    assert_one_line_error(result, message)


@pytest.mark.parametrize("command", ["inspect", "report", "eval"])
def test_an_interrupted_run_is_recognised(tmp_path, monkeypatch, capsys, command):
    stage = tmp_path / ".losa" / "01-pruned"
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text("{}")
    message = "holds an interrupted run, not a model yet; finish it with --resume"
    assert_one_line_error(losa_main(monkeypatch, capsys, command, tmp_path), message)


def test_brackets_in_a_path_are_no_markup(folder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "[b]a[/i]" / "t[1].txt"
    text.parent.mkdir(parents=True)
    text.write_text((folder / "text.txt").read_text())
    model = shutil.copytree(folder / "sparse", text.parent / "[red]m")
    code, out, err = losa_main(monkeypatch, capsys, "eval", model, "--data", text, "--windows", "2", "--save")
    assert code == 0, err
    assert f"kept in {model / 'eval.json'}" in err
    assert "t[1].txt" in out


def test_doctor(monkeypatch, capsys):
    code, out, err = losa_main(monkeypatch, capsys, "doctor")
    assert code == 0, err
    assert "self-test: passed" in out
    assert "transformers" in out


BAD = [
    (["run", "MODEL", "-o", "OUT", "--data", "TEXT", "--sparsity", "1.5"], "sparsity is 1.5, expected a ratio between 0 and 1"),
    (["run", "MODEL", "-o", "OUT", "--data", "TEXT", "--set", "train.batchsize=1"], "did you mean train.batch_size?"),
    (["run", "MODEL", "-o", "OUT", "--data", "TEXT", "--set", "train.lr"], "--set is 'train.lr', expected key=value"),
    (["run", "MODEL", "-o", "OUT", "--data", "TEXT", "--set", "train.lr=[1"], "--set"),
    (
        ["run", "MODEL", "-o", "OUT", "--data", "TEXT", "--preset", "fast"],
        "preset is 'fast', expected one of one-shot, paper, quick",
    ),
    (["run", "MODEL", "-o", "OUT", "--data", "TEXT", "-c", "none.yaml"], "cannot read the config none.yaml"),
    (
        ["run", "MODEL", "-o", "OUT", "--data", "TEXT", "--pruner", "wonda"],
        "pruner is 'wonda', expected one of alps, magnitude, movement, sparsegpt, wanda",
    ),
    (["run", "MODEL", "-o", "OUT", "--data", "TEXT", "--device", "abacus"], "device is 'abacus', expected auto, cpu or cuda"),
    (["run", "MODEL", "-o", "OUT", "--data", "nowhere/at/all.txt"], "nowhere/at/all.txt"),
    (["run", "MODEL", "-o", "OUT"], "--data"),
    (["run", "MODEL", "-o", "MODEL", "--data", "TEXT"], "is the model itself"),
    (["run", "no-such-model", "-o", "OUT", "--data", "TEXT"], "no-such-model"),
    (["run", "/no/such/model", "-o", "OUT", "--data", "TEXT"], "there is no model at /no/such/model"),
    (["prune", "MODEL", "-o", "OUT"], "--calibration"),
    (["eval", "MODEL", "--data", "nowhere.txt"], "nowhere.txt"),
    (["eval", "MODEL", "--tasks", ","], "--tasks is ',', expected `paper` or names"),
    (["eval", "MODEL", "--tasks", "rte", "--words"], "--words measures a text; give one with --data"),
    (["eval", "MODEL", "--data", "TEXT", "--limit", "5"], "--limit and --task-data are for tasks; give some with --tasks"),
    (["compare", "MODEL", "--data", "TEXT"], "a directory for rows, tables and plots; give one with --output"),
    (["compare", "-o", "OUT", "--data", "TEXT"], "give one as the argument MODEL"),
    (["compare", "MODEL", "--data", "TEXT", "-o", "OUT", "--methods", "Wandaa"], "methods is 'Wandaa', expected some of dense"),
    (["eval", "no-such-model", "--data", "TEXT", "--save"], "no-such-model is not the directory of a finished checkpoint"),
    (["pack", "MODEL", "MODEL"], "exists; choose another directory"),
    (["pack", "MODEL", "OUT", "--values", "int3"], "packed values are 'int3', expected one of bfloat16, int8"),
    (["pack", "nowhere", "OUT"], "nowhere is not a directory"),
    (["unpack", "MODEL", "OUT"], "is not packed"),
    (["generate", "MODEL", "--prompt", ""], "found 0 characters"),
    (["generate", "/no/such/model", "--prompt", "A", "--temperature", "1e-40"], "temperature is 1e-40, expected 0, or a number"),
    (["bench", "MODEL", "--rounds", "1000000000000"], "at most 1000 rounds"),
    (["plan", "MODEL", "--memory", "inf"], "--memory is inf, expected what a machine could have"),
    (["plan", "MODEL", "--tflops", "1e308"], "--tflops is 1e+308, expected what a machine could have"),
    (["generate", "MODEL", "--prompt", "A", "--device", "abacus"], "expected auto, cpu or cuda"),
    (["bench", "MODEL", "--new", "1"], "1 new tokens"),
    (["eval", "MODEL", "--data", "TEXT", "--length", "65"], "window length 65 is beyond the model's 64 tokens"),
    (["inspect", "EMPTY"], "no .safetensors file in"),
    (["inspect", "EMPTY/[bold]"], "/[bold]"),
    (["plan", "MODEL", "--pattern", "4:2"], "pattern is '4:2', expected 'unstructured' or 'n:m'"),
    (["plan", "/no/such/model"], "/no/such/model"),
    (["eval", "/no/such/model", "--data", "TEXT"], "there is no model at /no/such/model"),
    (["generate", "./nope", "--prompt", "x"], "there is no model at ./nope"),
    (["generate", "nope", "--prompt", "x"], "the model 'nope' of the hub (there is no such directory here)"),
    (["eval", "EMPTY", "--data", "TEXT"], "it has no config.json"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_what_a_user_got_wrong_is_one_line(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("COLUMNS", "60")  # a narrow terminal breaks no line that goes to a log
    places = {"MODEL": folder / "model", "OUT": tmp_path / "out", "TEXT": folder / "text.txt", "EMPTY": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    assert_one_line_error(losa_main(monkeypatch, capsys, *arguments), message)
    assert not (tmp_path / "out").exists()


def test_refused_resume_shows_the_diff(folder, tmp_path, monkeypatch, capsys):
    stage = tmp_path / "out" / ".losa" / "01-pruned"
    stage.mkdir(parents=True)
    config = toy_config(folder, output=str(tmp_path / "out")).resolve(32, 64).to_dict()
    manifest = {
        "format": 2,
        "name": "01-pruned",
        "done": 2,
        "fingerprint": "another",
        "config": config | {"seed": 7},
        "record": {},
    }
    (stage / "stage.json").write_text(json.dumps(manifest))
    (tmp_path / "c.yaml").write_text(toy_config(folder).to_yaml())
    arguments = ["run", folder / "model", "-o", tmp_path / "out", "-c", tmp_path / "c.yaml", "--resume"]
    code, _, err = losa_main(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "seed: 7 -> 0" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["run"], ["run", "m"], ["run", "m", "-o", "o", "--bogus"], ["bogus"], ["eval", "m"]])
def test_wrong_usage_is_status_two_too(arguments, monkeypatch, capsys):
    code, _, err = losa_main(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err


def test_damaged_checkpoint_is_named(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"garbage" * 10)
    assert_one_line_error(losa_main(monkeypatch, capsys, "inspect", tmp_path), "not a valid safetensors file")


def test_debug_variable_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("LOSA_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["losa", "inspect", "/nowhere"])
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        main()


def test_status_two_in_a_process_of_its_own(folder, tmp_path):
    text = save_text(tmp_path / "short.txt", 40)
    arguments = ["run", str(folder / "model"), "-o", str(tmp_path / "out"), "--data", str(text)]
    assert call(tmp_path / "log", losa, arguments) == 2
    log = (tmp_path / "log").read_text()
    assert "error: " in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")]
)
def test_memory_that_runs_out_is_a_sentence(folder, monkeypatch, capsys, error):
    def eat(*_):
        raise error

    monkeypatch.setattr("losa.commands.inspect.inspect", eat)
    result = losa_main(monkeypatch, capsys, "inspect", folder / "model")
    assert_one_line_error(result, "out of memory: ")
    assert "losa plan" in result[2]


def test_names_in_files_are_neither_markup_nor_commands(tmp_path, monkeypatch, capsys):
    save_file({"model.0.[/red]\x1b[2J": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    code, out, err = losa_main(monkeypatch, capsys, "inspect", tmp_path, "--layers")
    assert code == 0, err
    assert "[/red]" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("command", [["run", "--data", "TEXT"], ["prune", "--calibration", "TEXT"]])
def test_numbers_that_no_machine_holds_are_refused_before_a_model_is_loaded(folder, tmp_path, monkeypatch, capsys, command):
    text, (name, *options) = str(folder / "text.txt"), command
    options = [text if option == "TEXT" else option for option in options]
    huge = "train.tokens=1e15" if name == "run" else "calibration.sequences=1e15"
    arguments = [name, tmp_path / "no-model", "-o", tmp_path / "out", *options, "--set", huge]
    assert_one_line_error(losa_main(monkeypatch, capsys, *arguments), "bytes of memory, this machine has")
