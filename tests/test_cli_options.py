"""Promised: verbs share their options; a command is planned or rehearsed by changing a word; version, help, public names."""

import json
import re
from operator import attrgetter
from pathlib import Path
from typing import get_args

import pytest
import typer.main
from helpers import set_up, toy_config
from test_cli import assert_one_line_error, losa_main
from typer.testing import CliRunner

import losa
from losa.cli import app
from losa.cli.options import LAYERS, SHARED, Request
from losa.config import LosaConfig

COMMANDS = typer.main.get_command(app).commands


def options(verb: str) -> dict[str, str]:
    """Help text by option."""
    return {option: parameter.help for parameter in COMMANDS[verb].params for option in parameter.opts if option[0] == "-"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return set_up(tmp_path_factory.mktemp("options"))


@pytest.mark.parametrize("verb", ["plan", "prune", "compare"])
def test_verbs_share_the_options_of_run(verb):
    own = {"--resume", "--dry-run", "--config", "-c", "--output", "-o"}
    for option, text in options("run").items():
        if option in own or (verb == "compare" and option in ("--seed", "--overwrite")):  # rows of a comparison are kept
            continue
        assert options(verb)[option] == text, option


def test_plan_takes_every_option_of_run():
    assert options("run").keys() <= options("plan").keys()


def test_eval_takes_what_decides_a_measurement():
    shared = {"--data", "--eval-data", "--windows", "--config", "--set", "--preset", "--dtype", "--device", "--trust-remote-code"}
    assert shared <= options("eval").keys()


def test_defaults_that_help_texts_name_are_those_of_the_configuration():
    named = {}
    for shared in SHARED.values():
        for number, name in re.findall(r"Default ([\d.]+)\.|`(\w+)` \(default", get_args(shared.annotation)[1].help):
            named[shared.key] = number or name
    assert {"sparsity", "train.distill", "seed", "pruner", "device"} <= named.keys()
    assert named == {key: str(attrgetter(key)(LosaConfig())) for key in named}


def test_every_shared_option_sets_a_key_of_the_configuration():
    known = LosaConfig().to_dict()
    for option in SHARED.values():
        part, _, key = option.key.rpartition(".")
        assert key in (known[part] if part else known)
    assert set(LAYERS) == {"preset", "config", "set_"}


def test_layers_of_a_request(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 4\nsparsity: 0.3\nsteps: 7\n")
    request = Request("paper", tmp_path / "c.yaml", ["seed=6"], {"seed": 5, "sparsity": 0.5})
    config = request.resolve("one-shot", model="m")
    assert (config.model, config.seed, config.sparsity, config.steps) == ("m", 6, 0.5, 7)
    assert (config.train.samples, config.eval.windows, config.rates) == (10_000, 16, "uniform")  # one-shot, on top of the preset


def test_a_run_is_rehearsed(folder, unsimulated, quick_probe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("losa.models.load", lambda config: pytest.fail("loaded"))
    (tmp_path / "c.yaml").write_text(toy_config(folder, steps=1).to_yaml())
    arguments = ["run", folder / "model", "-o", tmp_path / "out", "-c", tmp_path / "c.yaml", "--dry-run"]
    code, out, err = losa_main(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert "sparsity: 0.6" in out
    assert "120 rows of 32 tokens" in out
    assert not (tmp_path / "out").exists()
    code, out, err = losa_main(monkeypatch, capsys, "plan", *arguments[1:])
    assert code == 0, err
    assert "it fits" in out
    short = tmp_path / "short.txt"
    short.write_text("A LAZY DOG")
    assert_one_line_error(losa_main(monkeypatch, capsys, *arguments, "--data", short), "too short to hold a part out")
    whole = toy_config(folder, steps=1, output=str(tmp_path / "out"))
    (tmp_path / "whole.yaml").write_text(whole.to_yaml())
    assert losa_main(monkeypatch, capsys, "run", "-c", tmp_path / "whole.yaml", "--dry-run")[0] == 0, "model and output are there"
    (tmp_path / "whole.yaml").write_text("seed: 1")
    nothing = losa_main(monkeypatch, capsys, "run", "-c", tmp_path / "whole.yaml", "--dry-run")
    assert_one_line_error(nothing, "no model; give a directory or hub name as the first argument, or `model:` in the file")
    for verb in ("run", "plan"):  # what needs no weights to be refused
        narrow = losa_main(monkeypatch, capsys, verb, *arguments[1:], "--dtype", "float16")
        assert_one_line_error(narrow, "dtype is 'float16', expected bfloat16 or float32")
    code, out, err = losa_main(monkeypatch, capsys, "prune", *arguments[1:], "--pruner", "wanda")
    assert code == 0, err
    assert "pruner: wanda" in out and "evaluation" in out and "120 rows" not in out, "nothing is trained on"
    assert not (tmp_path / "out").exists()


def test_eval_reads_set_and_windows(folder, monkeypatch, capsys):
    arguments = ["eval", folder / "model", "--device", "cpu", "--json", "--windows", "3", "--set", "eval.length=16"]
    code, out, err = losa_main(monkeypatch, capsys, *arguments, "--eval-data", folder / "text.txt")
    assert code == 0, err
    [row] = json.loads(out)["perplexity"]
    assert (row["window"], row["windows"]) == (16, 3)


def test_compare_takes_one_target_by_the_names_of_run(folder, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("losa.comparison.compare", lambda config: seen.append(config) or [])
    monkeypatch.setattr("losa.cli.tables.comparison_table", lambda rows: "")
    arguments = ["compare", folder / "model", "--data", folder / "text.txt", "-o", tmp_path / "out", "--seed", "3"]
    for target in (["--sparsity", "0.5"], ["--pattern", "2:4"]):
        assert losa_main(monkeypatch, capsys, *arguments, *target, "--preset", "quick")[0] == 0
    assert [config.targets for config in seen] == [["0.5"], ["2:4"]]
    assert seen[0].seeds == [3]
    assert seen[0].rows()[1].config.train.tokens == 200_000


@pytest.mark.parametrize("arguments", [["-h"], *([verb, "-h"] for verb in sorted(COMMANDS))])
def test_the_short_form_of_help(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version_names_and_completion(monkeypatch, capsys):
    code, out, _ = losa_main(monkeypatch, capsys, "--version")
    assert (code, out) == (0, f"losa {losa.__version__}\n")
    assert losa.__version__[0].isdigit()
    assert set(losa.__all__) | {"__version__"} <= set(dir(losa))
    assert all(getattr(losa, name) is not None for name in losa.__all__)
    page = Path(__file__).parents[1].joinpath("docs", "api.md").read_text()
    for name in re.findall(r"^::: losa\.(\S+)", page, re.MULTILINE):
        assert attrgetter(name)(losa) is not None
    assert "--show-completion" in CliRunner().invoke(app, ["--help"]).output
