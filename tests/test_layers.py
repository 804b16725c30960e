"""Promised: nothing imports what stands above it, nothing goes round in circles, and files and functions stay small.

Imports inside functions count, those for type checkers alone do not. `losa/__init__.py` only names the public functions and is
in no layer.
"""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import losa

# From the ground up. A module belongs to the longest name here that it begins with, and may import its own layer and those above
# it in this list. What packs, runs and serves a model so never knows how it was made.
LAYERS = {
    "the machine": "system bits",
    "mathematics": "importance allocation loss pruning rules",
    "configuration": "config",
    "packed layers": "runtime",
    "model": "models",
    "data and what is trained": "data adapter zeros",
    "packed models": "runtime.files runtime.generate runtime.bench integrations serving",
    "stages": "walk calibration rates rotation reconstruction training evaluation",
    "run": "method baselines session planning",
    "reports and commands": "api cost report comparison commands",
    "command line": "cli __main__",
}
LEVELS = {name: level for level, names in enumerate(LAYERS.values()) for name in names.split()}
SOURCE = Path(losa.__file__).parent
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCE.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items() if name != "__init__"}


def level(module: str) -> int:
    return LEVELS[max((name for name in LEVELS if f"{module}.".startswith(f"{name}.")), key=len)]


def imported(module: str) -> set[str]:
    """Modules of ours that a module imports, with the packages that they are in, unless it is in them itself."""
    nodes = [node for node in _executed(TREES[module]) if isinstance(node, ast.Import | ast.ImportFrom)]
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    parts = [name.split(".")[1:] for name in named if name.startswith("losa.")]
    found = {".".join(part[:count]) for part in parts for count in range(1, len(part) + 1)}
    return {name for name in found if name in TREES and not f"{module}.".startswith(f"{name}.")}


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from _executed(child)


def test_nothing_imports_what_stands_above_it():
    backward = [f"{name} -> {other}" for name in TREES for other in imported(name) if level(other) > level(name)]
    assert not backward


def test_no_import_goes_round_in_circles():
    TopologicalSorter({name: imported(name) for name in TREES}).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_small(name):
    text = FILES[name].read_text("utf-8")
    assert len(text.splitlines()) <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 80] == []
