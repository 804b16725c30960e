"""Every example runs, on the model and texts that ship with the package, cut to seconds; the notebook's cells run as code."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import losa
from losa.pruning import PRUNERS, Pattern

EXAMPLES = Path(__file__).parents[1] / "examples"
ASSETS = Path(losa.__file__).parent / "demo_assets"
SHORT = {f"{part}.length": 128 for part in ("calibration", "train", "eval")} | {"calibration.sequences": 8, "eval.windows": 2}
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script of the folder as `python examples/NAME` would, in this process; returns what it printed. Here configurations
    have little calibration, and Wanda where they name no pruner."""
    load = losa.LosaConfig.load

    def short(*where: object, overrides: dict[str, object] | None = None, **more: object) -> losa.LosaConfig:
        return load(*where, overrides={"pruner": "wanda"} | (overrides or {}) | SHORT, **more)

    monkeypatch.setattr(losa.LosaConfig, "load", short)

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def text(tmp_path):
    """The beginning of the demo's text, which is tokenised sooner."""
    path = tmp_path / "text.txt"
    path.write_text((ASSETS / "train.txt").read_text("utf-8")[:160_000], encoding="utf-8")
    return path


def test_prune(run, text):
    shown = run("prune.py", "--sparsity", 0.5, "--pruner", "wanda", "--windows", 2, "--data", text, "--eval-data", text)
    assert re.findall(r"block \d: (.*) zeros", shown) == ["50.00%"] * 8


def test_recover_then_pack_and_generate(run, text, tmp_path):
    shown = run("recover.py", tmp_path / "sparse", "--tokens", 2048, "--windows", 2, "--data", text, "--eval-data", text)
    assert "'dense'" in shown and "70.00% of the first up projection" in shown
    assert (tmp_path / "sparse" / "report.html").is_file()
    shown = run("pack_and_generate.py", tmp_path / "sparse", tmp_path / "packed", "--tokens", 8)
    before, after = map(float, re.findall(r"([\d.]+) MiB", shown))
    assert after < 0.6 * before
    assert "The old man looked at her and said" in shown


def test_own_pruner_does_what_it_says():
    own = runpy.run_path(str(EXAMPLES / "own_pruner.py"))
    weight, inputs = torch.randn(8, 16), torch.randn(40, 16) * torch.arange(16) + 5
    keep = torch.ones(8, 16, dtype=torch.bool)
    statistic = own["collect"](own["collect"](None, inputs[:30]), inputs[30:])
    [solution] = own["solve"]([weight], [keep], statistic, [0.5], Pattern(), 1.0)
    score = weight**2 * inputs.var(0, correction=0)
    assert int((~solution.keep_OI).sum()) == 64 and not solution.weight_OI[~solution.keep_OI].any()
    assert torch.equal(solution.keep_OI, score >= score.sort(dim=1).values[:, 8:9])


def test_own_pruner_works_beside_the_others(run, monkeypatch):
    monkeypatch.setattr("losa.pruning.PRUNERS", PRUNERS.copy())
    shown = run("own_pruner.py")
    assert re.search(r"variance \{'dense': [\d.]+, 'pruned': [\d.]+\}", shown) and "wanda" in shown


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= 40


@pytest.mark.usefixtures("run")
def test_the_notebook_runs(text):
    notebook = json.loads((EXAMPLES / "losa.ipynb").read_text("utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "clear the outputs before committing"
    names, short = {}, {"TOKENS = 200_000": "TOKENS = 2_048"}
    short |= {f'str(assets / "{name}.txt")': repr(str(text)) for name in ("train", "held")}
    for cell in cells:
        for long, cut in short.items():
            cell = cell.replace(long, cut)
        exec(cell, names)
    assert set(names["sparse"].losa_record["perplexity"]) == {"dense", "pruned", "losa"}
    assert (names["folder"] / "packed" / "model.safetensors").is_file()
