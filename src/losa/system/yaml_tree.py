"""Plain values to a tree of dataclasses and back: YAML, dotted keys, conversion, the nearest known key, and what differs.

Nothing here knows which keys there are. A field that had another name in earlier versions says so in its metadata, as
`field(metadata=renamed_from("old"))`, and the old name keeps working.
"""

import dataclasses
import difflib
import functools
import logging
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from losa.system.doors import YAML_BYTES, door, read_text, read_yaml, shown

OLD_NAME = "renamed_from"

logger = logging.getLogger(__name__)


class _Loader(yaml.SafeLoader):
    """Leaves numbers as text, for `_convert` knows what a field wants. YAML 1.1 reads 2:4 as 124 and 1e-3 as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text, numbers still as text; `name` says where it is from."""
    return read_yaml(text, _Loader, name)


def read_config(path: str) -> dict[str, Any]:
    """A YAML file of keys and values, numbers still as text.

    Raises:
        ValueError: it cannot be read, or is not a mapping.
    """
    with door(f"the config {path}"):
        text = read_text(Path(path), YAML_BYTES)
    loaded = parse_yaml(text, f"the config {path}")
    require(isinstance(loaded, dict), f"the config {path}", type(loaded).__name__, "a mapping of keys to values")
    values: dict[str, Any] = loaded
    return values


def require(condition: bool, name: str, found: object, expected: str) -> None:
    """Raises the `ValueError` "name is found, expected ..." unless `condition`."""
    if not condition:
        raise ValueError(f"{name} is {shown(found)}, expected {expected}")


def parse_set(items: list[str]) -> dict[str, Any]:
    """`["train.lr=1e-3"]` -> `{"train.lr": "1e-3"}`; values are read as YAML.

    Raises:
        ValueError: an item without `=`.
    """
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        require(bool(equals and key), "--set", item, "key=value, such as train.lr=1e-3")
        pairs[key] = parse_yaml(value, f"--set {item}")
    return pairs


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old -> new` for all leaves that differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    """`{"train.lr": 1}` -> `{"train": {"lr": 1}}`."""
    values: dict[str, Any] = {}
    for key, value in dotted.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        merge(values, value)
    return values


def merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    """Puts `values` into `into`, key by key at every depth."""
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def build(cls: Any, values: Any, prefix: str = "") -> Any:
    """A configuration dataclass from plain values, converted and checked; see `config.LosaConfig.from_dict`."""
    require(isinstance(values, dict), prefix.rstrip(".") or "the config", values, "a mapping of keys to values")
    hints, values = typing.get_type_hints(cls), current_names(cls, values, prefix)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys are {', '.join(hints)}"
            raise ValueError(f"unknown key {prefix}{key}; {hint}")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def renamed_from(old: str) -> dict[str, str]:
    """Metadata of a field that was called `old`."""
    return {OLD_NAME: old}


def current_names(cls: Any, values: Any, prefix: str = "") -> Any:
    """Plain values in which keys that had another name in earlier versions have the one of now, at every depth, with one warning
    each. Done before values from several places are merged, so that the last one wins under any name."""
    if not isinstance(values, dict):
        return values
    names = {part.metadata[OLD_NAME]: part.name for part in dataclasses.fields(cls) if OLD_NAME in part.metadata}
    hints, found = typing.get_type_hints(cls), dict[str, Any]()
    for key, value in values.items():
        name: Any = names.get(key, key)
        if name != key:
            warn_of_old_name(prefix + key, prefix + name)
        inside = dataclasses.is_dataclass(hints.get(name))
        found[name] = current_names(hints[name], value, f"{prefix}{name}.") if inside else value
    return found


@functools.cache
def warn_of_old_name(old: str, new: str) -> None:
    """Said once in a process, for one file may be read many times."""
    logger.warning("the key %s is called %s now", old, new)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, name + ".")
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is list:
        values = value.split(",") if isinstance(value, str) else value
        require(isinstance(values, list), name, value, "a list")
        return [_convert(typing.get_args(kind)[0], item, f"{name}[{index}]") for index, item in enumerate(values)]
    kind = typing.get_origin(kind) or kind
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-3 as a string
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if kind is float and number == number:
            return number
        if kind is int and number.is_integer() and abs(number) < 2**63:
            return int(value) if isinstance(value, int) or str(value).isdecimal() else int(number)  # a float has but 53 bits
    elif type(value) is kind:
        return value
    raise ValueError(f"{name} is {shown(value)}, expected {'a whole number' if kind is int else kind.__name__}")
