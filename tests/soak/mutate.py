"""Mutants of files: bytes anyhow, and JSON with its structure kept, also inside of a safetensors file."""

import copy
import gzip
import json
import random
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

NUMBERS = [0, -1, 1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 10**30, 10**400]
NUMBERS += [0.5, -0.0, 1e-40, 1e15, 1e308, float("nan"), float("inf"), float("-inf")]
WORDS = [
    "",
    "x",
    "losa",
    "int8",
    "bfloat16",
    "gptq",
    "../outside",
    "/dev/zero",
    "\0",
    "\ud800",
    "𝄞",
    "[/red]",
    "<script>",
    "%s{}",
]
WORDS += ["a" * 5000, "1e999", "nan", "true", "[0]", "{{ 7 }}", "(a+)+$"]
DEPTH = 5000


def _nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything inside a JSON value, itself first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _nodes(item, (*path, key))
    return found


def _at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def _strange(pick: random.Random, document: Any, paths: list[tuple]) -> Any:
    """A value that nobody expects where it is put."""
    kind = pick.randrange(8)
    if kind == 0:
        return pick.choice(NUMBERS)
    if kind == 1:
        return pick.choice(WORDS)
    if kind == 2:
        return pick.choice([None, True, False, [], {}, [[]], [None], {"": None}])
    if kind == 3:
        return copy.deepcopy(_at(document, pick.choice(paths)))
    if kind == 4:
        return [pick.choice(NUMBERS) for _ in range(pick.choice([1, 3, 1000]))]
    if kind == 5:
        return {str(pick.choice(WORDS)): pick.choice(NUMBERS) for _ in range(3)}
    if kind == 6:
        return str(pick.choice(NUMBERS))
    return pick.choice([2, 3, 5, 8, 64, 100, 1000, 4096, 100_000, 10**7, 10**9])


def mutate_value(pick: random.Random, document: Any) -> Any:
    """The document with one to three places changed: replaced, removed, renamed, repeated, swapped, or nudged."""
    document = copy.deepcopy(document)
    for _ in range(pick.choice([1, 1, 1, 2, 3])):
        paths = _nodes(document)
        path = pick.choice(paths)
        if not path:
            if pick.random() < 0.02:
                return _strange(pick, document, paths)
            continue
        parent, key = _at(document, path[:-1]), path[-1]
        kind = pick.randrange(10)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[pick.choice([str(key) + "x", str(key).upper(), *map(str, WORDS)])] = parent.pop(key)
        elif kind == 2 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 3 and type(parent[key]) in (int, float) and abs(parent[key]) < 1e300:
            parent[key] = pick.choice([parent[key] + 1, parent[key] - 1, -parent[key], parent[key] * 2, parent[key] / 3])
        elif kind == 4:
            other = pick.choice([item for item in paths if item])
            parent[key] = copy.deepcopy(_at(document, other))
        else:
            parent[key] = _strange(pick, document, paths)
    return document


def mutate_bytes(pick: random.Random, data: bytes) -> bytes:
    """Flipped bits, bytes put over, in or out, pieces moved or repeated, an end that is missing."""
    out = bytearray(data)
    for _ in range(pick.choice([1, 1, 2, 8])):
        at, size = pick.randrange(len(out) + 1), pick.choice([1, 1, 4, 16, 256])
        kind = pick.randrange(8)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << pick.randrange(8)
        elif kind == 1 and out:
            out[at % len(out)] = pick.choice([0, 255, 34, 44, 58, 91, 93, 123, 125, 10, 38, 42])
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + size]
        elif kind == 4:
            out[at:at] = pick.randbytes(size)
        elif kind == 5:
            start = pick.randrange(len(out) + 1)
            out[at:at] = out[start : start + size]
        elif kind == 6:
            out[at : at + size] = pick.randbytes(size)
        else:
            out[at:at] = pick.choice([b"[" * DEPTH, b'{"a":' * DEPTH, b"9" * 5000, b"\xff\xfe", b"\0" * 64, b"&a *a", b"1e9"])
    return bytes(out)


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def mutate_json(pick: random.Random, data: bytes) -> bytes:
    """A JSON file: mostly by its structure, else by its bytes."""
    if pick.random() < 0.2:
        return mutate_bytes(pick, data)
    return _dump(mutate_value(pick, json.loads(data)))


def mutate_lines(pick: random.Random, data: bytes) -> bytes:
    """A file of one JSON value a line."""
    if pick.random() < 0.3:
        return mutate_bytes(pick, data)
    lines = data.splitlines()
    at = pick.randrange(len(lines))
    lines[at] = _dump(mutate_value(pick, json.loads(lines[at])))
    return b"\n".join(lines)


def mutate_safetensors(pick: random.Random, data: bytes) -> bytes:
    """A safetensors file: its header by structure, or its bytes, those at its beginning more often."""
    kind = pick.random()
    (size,) = struct.unpack("<Q", data[:8])
    if kind < 0.55:
        header = mutate_json(pick, data[8 : 8 + size])
        length = len(header) if pick.random() < 0.9 else pick.choice([0, 1, len(header) + 8, 2**31, 2**63, 100 << 20])
        return struct.pack("<Q", length) + header + data[8 + size :]
    if kind < 0.7:
        return mutate_bytes(pick, data[: 8 + size]) + data[8 + size :]
    return mutate_bytes(pick, data)


def mutate_yaml(pick: random.Random, data: bytes) -> bytes:
    """A YAML file: by the structure that JSON shares with it, by bytes, or with anchors and aliases."""
    import yaml

    kind = pick.random()
    if kind < 0.5:
        return _dump(mutate_value(pick, yaml.safe_load(data)))
    if kind < 0.9:
        return mutate_bytes(pick, data)
    levels = pick.choice([3, 8, 30])
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    merges = [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    bomb = pick.choice([lines, ["m0: &m0 {a: 1}", *merges], ["a: &a [*a]"], ["a: &a {b: *a}"], ["model: *nothing"]])
    return "\n".join(bomb).encode() + b"\n" + data


def mutate_number(pick: random.Random, data: bytes) -> bytes:
    """A YAML file with one value that is a strange number or word."""
    import yaml

    document = yaml.safe_load(data)
    path = pick.choice([path for path in _nodes(document) if path and not isinstance(_at(document, path), dict | list)])
    _at(document, path[:-1])[path[-1]] = pick.choice([*map(str, NUMBERS), *WORDS])
    return _dump(document)


def mutate_gzip(pick: random.Random, data: bytes) -> bytes:
    """A gzip file: damaged, of damaged content, or a bomb."""
    kind = pick.random()
    if kind < 0.5:
        return mutate_bytes(pick, data)
    if kind < 0.97:
        return gzip.compress(mutate_lines(pick, gzip.decompress(data)), 1)
    return _bomb()


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(300 << 20), 9)


Mutator = Callable[[random.Random, bytes], bytes]
