"""The doors: a file that somebody else wrote comes in through one of these functions, and through nothing else.

Whatever such a file can cause - an exception of any parser, a panic of a Rust library, recursion, memory without end - leaves as
one `ValueError` that names the file. The exception it came from stays its cause, which `LOSA_DEBUG=1` shows.
Checks of what a file says, once it can be read, are where its content is used.
"""

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
JSON_BYTES = 32 << 20  # of a configuration, record or index; parsed, nested lists take twenty times as much
YAML_BYTES, YAML_NODES = 1 << 20, 100_000  # a configuration has a few hundred nodes; aliases count as often as they are used
DAMAGED = "; it is damaged, or not a valid safetensors file"
LONGEST = 400  # characters of somebody else's message


@contextmanager
def door(what: str | Path, verb: str = "read", hint: str = "") -> Iterator[None]:
    """Around code of others that reads a file of others, and as little else as possible.

    Args:
        what: names the file or directory.
        verb: what was tried, as in "cannot read".
        hint: what to do, put at the end.

    Raises:
        ValueError: for anything that was raised inside, but a request to stop.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":  # a panic of Rust code is no Exception
            raise
        said = f"cannot {verb} {what}: "
        if isinstance(error, ValueError) and str(error).startswith(said):  # a door behind this one has said it
            raise
        raise ValueError(f"{said}{reason(error)}{hint}") from error


def reason(error: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    said = " ".join(str(error).split())
    if out_of_memory(error):
        return "it takes more memory than there is" + (f" ({said[:LONGEST]})" if said else "")
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, KeyError):
        return f"it has no {said[:LONGEST]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ValueError | OSError) or type(error).__module__.startswith("safetensors"):
        return said[:LONGEST]
    return f"{type(error).__name__}: {said[:LONGEST]}"


def shown(value: object) -> str:
    """A value as Python writes it; of a long one, the beginning."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def printable(text: str) -> str:
    """A text without what a terminal would obey, or could not show: control characters and halves of surrogate pairs."""
    strange = {sign for sign in set(text) if unicodedata.category(sign) in ("Cc", "Cs")} - set("\n\t")
    return text.translate({ord(sign): None if sign == "\r" else "\N{REPLACEMENT CHARACTER}" for sign in strange})


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of Python, of the host as torch says it, or of a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory", "std::bad_alloc")
    )


def regular(path: Path) -> Path:
    """The path, if it is a file that ends.

    Raises:
        ValueError: nothing there, a link to nothing, a directory, or a pipe, socket or device, which may never end.
    """
    if not path.is_file():
        found = "is a link to nothing" if path.is_symlink() and not path.exists() else "is no ordinary file"
        raise ValueError(f"{path} {found if path.exists() or path.is_symlink() else 'does not exist'}; expected a file to read")
    return path


def read_text(path: Path, most: int | None = None) -> str:
    """A text file of at most `most` bytes.

    Raises:
        ValueError: it cannot be read, is too large, or is not UTF-8.
    """
    if most is not None and regular(path).stat().st_size > most:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected at most {most:,}")
    with door(path):
        return regular(path).read_text("utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it cannot be read, is not JSON, or holds something else.
    """
    with door(path):
        found = json.loads(read_text(path, JSON_BYTES))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def read_yaml(text: str, loader: type[yaml.SafeLoader], name: str) -> Any:
    """The value of a YAML text; `name` says where it is from.

    Raises:
        ValueError: it is not YAML, or too much of it once aliases are followed.
    """
    if len(text) > YAML_BYTES:
        raise ValueError(f"{name} has {len(text):,} characters, expected at most {YAML_BYTES:,}")
    with door(name):
        opened = loader(text)
        try:
            root = opened.get_single_node()
            if root is None:
                return None
            count = _nodes(root, {})
            if count > YAML_NODES:
                raise ValueError(f"its aliases make {count:,} values of it, expected at most {YAML_NODES:,}")
            return opened.construct_document(root)
        finally:
            opened.dispose()


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, each alias counted as what it repeats.

    Raises:
        ValueError: a node that holds itself.
    """
    if id(node) not in known:
        known[id(node)] = 0  # while it is being counted
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in parts)
    elif not known[id(node)]:
        raise ValueError("an alias in it stands for what holds it")
    return known[id(node)]


def read_tensors(file: Path, wanted: Callable[[str, list[int]], bool] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file by name, one at a time in memory.

    Args:
        wanted: of a name and a shape; all when None.

    Raises:
        ValueError: it is not safetensors, or was cut short.
    """
    with door(file.name, hint=DAMAGED):
        opened = safe_open(regular(file), "pt")
        names = list(opened.keys())
    for name in names:
        with door(f"{name} of {file.name}", hint=DAMAGED):
            tensor = opened.get_tensor(name) if wanted is None or wanted(name, opened.get_slice(name).get_shape()) else None
        if tensor is not None:
            yield name, tensor


def tensor_heads(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype, as safetensors calls it, and shape of every tensor of a safetensors file. None is read.

    Raises:
        ValueError: it is not safetensors, or was cut short.
    """
    with door(file.name, hint=DAMAGED), safe_open(regular(file), "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a local checkpoint, which its index, where it has one, may not lead out of.

    Raises:
        ValueError: an index that is damaged or names anything but a safetensors file beside it.
    """
    if (directory / INDEX).exists():
        found = read_json(directory / INDEX).get("weight_map")
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found.values()):
            raise ValueError(f"{directory / INDEX} has no weight_map of names; it is damaged")
        for name in sorted(set(found.values())):
            if Path(name).name != name or not name.endswith(".safetensors") or not (directory / name).is_file():
                raise ValueError(f"{directory / INDEX} names {name!r}, expected a .safetensors file beside it")
    return sorted(path for path in directory.glob("*.safetensors") if path.is_file())


def check_links(directory: Path) -> None:
    """Refuses links that lead out of a directory whose files are to be copied: what they name would be published.

    The links of a snapshot in the hub's cache name files of the same cache entry, and are let through.

    Raises:
        ValueError: such a link, or one to nothing.
    """
    inside = directory.resolve()
    blobs = inside.parent.parent / "blobs"
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            with door(path):
                target = path.resolve()
            if not target.exists():
                raise ValueError(f"{path} is a link to nothing; remove it")
            if not target.is_relative_to(inside) and not (inside.parent.name == "snapshots" and target.is_relative_to(blobs)):
                raise ValueError(f"{path} is a link out of the directory, to {target}; put the file itself there, or remove it")
