"""Benchmarks are a family: each is on the page, none imports another, and what they import is there. None is run here: they
take minutes, and speed is no test."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SHARED = "common"
BENCHMARKS = sorted(path for path in FOLDER.glob("*.py") if path.stem != SHARED)


def imports(path: Path) -> list[tuple[str, list[str]]]:
    """Modules that a file imports anywhere in it, and the names taken from each."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    whole = [(alias.name, []) for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    parts = [(node.module, [a.name for a in node.names]) for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return whole + parts


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_no_benchmark_imports_another(path):
    assert not {module for module, _ in imports(path)} & {other.stem for other in BENCHMARKS}


@pytest.mark.parametrize("path", [FOLDER / f"{SHARED}.py", *BENCHMARKS], ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path):
    shared = {node.name for node in ast.parse((FOLDER / f"{SHARED}.py").read_text("utf-8")).body if hasattr(node, "name")}
    shared |= {"SHAPES", "RANK", "Step"}
    for module, names in imports(path):
        if module == SHARED:
            assert set(names) <= shared
        elif module.partition(".")[0] == "losa":
            found = importlib.import_module(module)
            for name in names:
                is_module = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}")
                assert is_module or hasattr(found, name), f"{path.name}: no {name} in {module}"


def test_every_benchmark_is_on_the_page_with_its_question():
    rows = dict(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \| (.+\?) \|", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE))
    assert set(rows) == {path.stem for path in BENCHMARKS}


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_says_how_it_is_run(path):
    assert f"python benchmarks/{path.name}" in (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "")
