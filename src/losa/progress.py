"""One progress bar for the whole project: an ETA on long loops, on a terminal or in a log, on the first process only."""

import os
from collections.abc import Iterable

from tqdm.auto import tqdm


def progress(items: Iterable | None, label: str, total: int | None = None, done: int = 0) -> tqdm:
    """A tqdm bar over `items`, or one to update by hand when `items` is None, of which `done` are done. Gone from the screen when
    done."""
    quiet = os.environ.get("LOSA_PROGRESS") == "0" or os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=label, total=total, initial=done, leave=False, disable=quiet, dynamic_ncols=True, mininterval=0.5)
