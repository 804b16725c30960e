"""What `losa` writes to the terminal goes through here: two consoles, plain lines, and libraries kept quiet."""

import logging
import os
import sys
import warnings

from rich.console import Console

OTHERS = os.environ.get("RANK", "0") != "0"  # under torchrun, only the first process speaks
out, err = Console(quiet=OTHERS), Console(stderr=True)


def say(text: str, console: Console = out, end: str = "\n") -> None:
    """Prints a text as it is: not wrapped, so that paths can be copied, and nothing in it is markup or obeyed by the terminal."""
    from losa.system.doors import printable

    console.print(printable(text), end=end, highlight=False, markup=False, soft_wrap=True)


def heavy(level: int = logging.INFO) -> None:
    """Before work that takes minutes: memory settings for the CPU, quiet libraries, our own log lines from `level` up."""
    from losa.system.environment import keep_freed_memory

    keep_freed_memory()
    quiet(level)


def quiet(level: int = logging.INFO) -> None:
    """Quiet libraries, our own log lines from `level` up."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("losa").setLevel(logging.ERROR if OTHERS else level)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate's to fix
