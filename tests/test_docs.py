"""What the documentation shows, works: commands and code of README and pages run on a toy checkpoint, links and names lead
somewhere, every configuration file loads."""

import importlib
import json
import re
import shlex
import tomllib
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from helpers import save_tasks
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from losa import LosaConfig, SparseLinear
from losa.adapter import MaskedLinear
from losa.cli import app
from losa.commands.toy import TOY, toy_tokenizer
from losa.comparison import CompareConfig, measure
from losa.runtime import bench
from losa.runtime.files import pack_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("start", "usage", "data", "recipes"))]  # whose commands run
PROSE = sorted(path for folder in (".", "docs", "docs/decisions", "csrc", "benchmarks") for path in (ROOT / folder).glob("*.md"))
# What stands in for hub names, which no test machine reaches, and what makes the run short.
STAND_INS = {
    "meta-llama/Llama-2-7b-hf": "toy",
    "my-model": "toy",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "toy",
    "vicgalle/alpaca-gpt4": "text.txt",
    "Salesforce/wikitext:wikitext-2-raw-v1:test": "text.txt",
    "allenai/c4:en": "text.txt",
    "wikitext2": "text.txt",
}
MODEL = "src/losa/demo_assets/novels-4m"  # of configs/experiments
SHORT = "calibration: {sequences: 8, rmi_sequences: 8, length: 32}\ntrain: {tokens: 4096, length: 32}\neval: {windows: 4}\n"


@pytest.fixture
def toy_home(tmp_path, monkeypatch):
    """A directory with a toy checkpoint, a text and a configuration that keeps runs short."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TOY, max_position_embeddings=64)).save_pretrained(tmp_path / "toy")
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    (tmp_path / "text.txt").write_text("THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG. " * 1000)
    turns = [{"role": "user", "content": "WHY?"}, {"role": "assistant", "content": "THE LAZY DOG."}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 200)
    (tmp_path / "short.yaml").write_text(SHORT)
    save_tasks(tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(text: str) -> str:
    for name, local in STAND_INS.items():
        text = text.replace(name, local)
    return text


def code_blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def commands() -> list[str]:
    """Every `losa` command of the pages, once, in the order of a reader."""
    lines = chain.from_iterable(block.splitlines() for page in PAGES for block in code_blocks("bash", page))
    return list(dict.fromkeys(line.split("  #")[0].strip() for line in lines if line.startswith("losa ")))


def test_every_losa_command_of_the_pages_runs(toy_home, paper_tasks, quick_probe, monkeypatch):
    monkeypatch.setattr(bench.bandwidth, "__defaults__", (1 << 20, 1))  # test_bench.py reads as much as it says
    for name in ("check_installed", "serve"):  # ends at once; test_serving.py has it answer
        monkeypatch.setattr(f"losa.serving.start.{name}", lambda *_: None)
    (toy_home / "configs").symlink_to(ROOT / "configs")
    compare = ["--methods", "dense,Wanda,Wanda + LoSA", "--targets", "0.7", "--seeds", "0"]
    compare += [f"--set={key}" for key in ("train.tokens=4096", "calibration.sequences=8", "calibration.rmi_sequences=8")]
    compare += [f"--set={part}.length=32" for part in ("calibration", "train", "eval")]
    assert {shlex.split(command)[1] for command in commands()} >= {
        "plan",
        "run",
        "inspect",
        "eval",
        "report",
        "pack",
        "unpack",
        "generate",
        "serve",
        "bench",
        "compare",
    }
    for command in commands():
        arguments = shlex.split(stand_in(command))[1:]
        if "--tasks" in arguments:
            arguments += ["--task-data", "tasks"]
        if "-c" not in arguments:
            arguments += {"run": ["-c", "short.yaml"], "plan": ["-c", "short.yaml"]}.get(arguments[0], [])
        arguments += {"bench": ["--prompt", "8", "--new", "4"], "compare": compare}.get(arguments[0], [])
        assert not app(arguments, standalone_mode=False), command


def test_the_python_of_the_pages_runs(toy_home):
    arguments = partial(TrainingArguments, use_cpu=True, report_to="none", save_strategy="no")
    [readme], [opening], [packed, method, going_on] = (code_blocks("python", page) for page in PAGES[:3])
    [family] = code_blocks("python", DOCS / "extending.md")
    short = ', "train.tokens": 4096, "train.length": 32, "calibration.length": 32, "calibration.sequences": 64}'
    names = {}
    exec(stand_in(method).replace("}", short, 1), names)
    assert names["sparse"].losa_record["sparsity"]["achieved"] == pytest.approx(0.7, abs=1e-3)
    names["sparse"].save_pretrained("llama-sparse")
    toy_tokenizer().save_pretrained("llama-sparse")
    exec(opening, names)
    for name in ("llama-packed", "smol-packed"):
        pack_checkpoint("llama-sparse", name)
    for block in (packed, readme):
        exec(block, names)
        assert isinstance(names["model"].model.layers[0].mlp.up_proj, SparseLinear)
    names |= {"rows": [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8, "Trainer": Trainer, "TrainingArguments": arguments}
    exec(going_on, names)
    assert (names["model"].model.layers[0].mlp.up_proj.weight == 0).float().mean() > 0.5
    exec(family, names)
    assert isinstance(names["model"].model.layers[0].mlp.up_proj, MaskedLinear)


@pytest.mark.parametrize("page", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_compiles_and_links_and_names_lead_somewhere(page):
    text = page.read_text("utf-8")
    for block in code_blocks("python", page):
        compile(block, page, "exec")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        to = page.parent / target if target else page
        assert to.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(to), f"{page.name} links to {link}"
    if page.name in ("LOG.md", "CHANGELOG.md"):  # they speak of what was
        return
    for name in re.findall(r"`(losa(?:\.\w+)+)(?:\(.*?\))?`", prose):
        assert named(name), f"{page.name} names {name}, which is not there"
    folders = "src|tests|benchmarks|csrc|configs|docs|examples"
    for path in re.findall(rf"`((?:{folders})/[\w./*-]+)", prose):
        place = Path(path).parent if "*" in path else path  # of a family of files, the folder
        assert (ROOT / place).exists() or "NAME" in path, f"{page.name} names {path}, which is not there"


def anchors(page: Path) -> set[str]:
    """What a link can jump to: headings, as GitHub and the site spell them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def named(name: str) -> bool:
    """Whether a dotted name is a module of the package, or something in one."""
    if name == "losa.json":
        return True
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_every_page_of_the_site_is_in_its_navigation():
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:")[1]
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    elsewhere = dict(re.findall(r'"(.+\.md)": "(.+\.md)"', (DOCS / "pages.py").read_text("utf-8")))
    assert set(re.findall(r"[\w/-]+\.md", nav)) == pages | set(elsewhere.values())
    assert all((ROOT / source).is_file() for source in elsewhere)


def test_there_is_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_readme_is_one_screen():
    assert len(README.split()) <= 900
    assert (
        max(len(line) for block in re.findall(r"```(?:bash|python)\n(.*?)```", README, re.DOTALL) for line in block.splitlines())
        <= 80
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_file_loads(path):
    config = LosaConfig.load(str(path))
    assert LosaConfig.load(overrides=config.to_dict()) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_file_runs(path, toy_home):
    text = stand_in(path.read_text("utf-8"))
    (toy_home / "run.yaml").write_text(text)
    short = [
        f"--set={key}"
        for key in ("calibration.sequences=8", "calibration.rmi_sequences=8", "train.tokens=4096", "eval.windows=4")
    ]
    lengths = [f"--set={part}.length=32" for part in ("calibration", "train", "eval")]
    arguments = ["run", "toy", "--output", "out", "--data", "text.txt", "-c", "run.yaml", *short, *lengths]
    assert not app(arguments, standalone_mode=False)
    assert (toy_home / "out" / "losa.json").is_file()


COMPARISONS = [*sorted((ROOT / "configs" / "experiments").glob("*.yaml")), ROOT / "benchmarks" / "pareto.yaml"]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_experiment_loads_and_its_first_row_runs(path, toy_home, request):
    text = (
        path.read_text("utf-8")
        .replace("data/bench", "tasks")
        .replace(MODEL, "toy")
        .replace("run:\n  train", "run:\n  model: toy\n  train")
    )
    text = re.sub(r"\bdata/[^,}\s]+", "text.txt", text)
    if re.search("^tasks:", text, re.MULTILINE):
        request.getfixturevalue("paper_tasks")
    (toy_home / "experiment.yaml").write_text(text)
    lengths = {f"{part}.length": 32 for part in ("calibration", "train", "eval")}
    short = {"calibration.sequences": 8, "calibration.rmi_sequences": 8, "train.tokens": 4096, "eval.windows": 4}
    rows = CompareConfig.load("experiment.yaml", lengths | short).rows()
    assert len({(row.name, row.target, row.seed) for row in rows}) == len(rows)
    assert measure(rows[0])["perplexity"] > 1


def test_every_experiment_has_its_place_in_the_page():
    page = (ROOT / "docs" / "experiments.md").read_text("utf-8")
    tables = re.findall(r"<!-- table (\S+) -->\n\|", page)
    names = {path.stem for path in (ROOT / "configs" / "experiments").glob("*.yaml")}
    assert {name.removesuffix("-context") for name in tables} == names


def test_make_targets_of_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    found = {target for page in PROSE for target in re.findall(r"^make (\w+)", page.read_text("utf-8"), re.MULTILINE)}
    assert found >= {"demo", "test"}
    for target in found:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_has_no_placeholder():
    assert not re.search(r"^[A-Z]+(_[A-Z]+)*$", README, re.MULTILINE)
