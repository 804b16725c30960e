"""One way to find something by the name that a user typed."""

from collections.abc import Mapping
from typing import TypeVar

Row = TypeVar("Row")


def look_up(table: Mapping[str, Row], name: str, what: str) -> Row:
    """The row of a table of named things.

    Args:
        what: what the name is of, for the sentence that refuses it.

    Raises:
        ValueError: no such row.
    """
    if name not in table:
        raise ValueError(f"{what} is {name!r}, expected one of {', '.join(table)}")
    return table[name]
