"""Processes of their own, for what only they can show: a SIGKILL, an exit status, a model opened without losa.

They are forked from a server that has imported torch, transformers and all else that a run imports, but not losa, so each starts
at once. This module is imported there, so it must not import losa either.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "typer"]
PRELOADED += ["pydantic", "rich.table", "rich.markdown", "matplotlib.backends.backend_svg"]  # what typer and reports import late
_context.set_forkserver_preload(PRELOADED)


def start(log: Path, function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Runs `function(*args)` in a new process; what it prints goes to the file `log`."""
    process = _context.Process(target=_child, args=(str(log), function, args))
    process.start()
    return process


def preload_losa() -> None:
    """Has later processes start with losa imported, where hundreds of them are started and nothing else needs it absent."""
    _context.set_forkserver_preload([*PRELOADED, "losa.cli", "losa.comparison", "losa.runtime.files", "helpers"])


def call(log: Path, function: Callable[..., None], *args: Any) -> int:
    """As `start`, and waits. Returns the exit status, negative for a signal."""
    process = start(log, function, *args)
    process.join(120)
    if process.is_alive():
        process.kill()
    assert process.exitcode is not None, "still running after two minutes"
    return process.exitcode


def _child(log: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    gc.freeze()  # what the server imported: see `conftest.pytest_collection_finish`
    function(*args)


def ranks(log: Path, count: int, function: Callable[..., None], *args: Any) -> list[int]:
    """Runs `function(*args)` in `count` processes, as torchrun starts them. Returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [start(log.with_suffix(f".{rank}"), _ranked, rank, count, port, function, args) for rank in range(count)]
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [-1 if process.exitcode is None else process.exitcode for process in started]


def _ranked(rank: int, count: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    function(*args)


def losa(arguments: list[str], kill: tuple[str, str] | None = None) -> None:
    """The `losa` command. `kill=("before", name)` sends SIGKILL where a file or directory would get the name `name`, by a rename
    or by changing places with what has it."""
    from losa.cli import main
    from losa.system import output

    if kill is not None:
        Path.rename = _dying(Path.rename, *kill)  # type: ignore[method-assign]
        output.exchange = _dying(output.exchange, *kill)
    sys.argv = ["losa", *arguments]
    main()


def _dying(move: Callable[[Path, Path], Any], when: str, name: str) -> Callable[[Path, Path], Any]:
    def move_and_die(source: Path, target: Path) -> Any:
        if when == "before" and Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        done = move(source, target)
        if when == "after" and Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return move_and_die


def open_without_losa(directory: str, ids_file: str, logits_file: str) -> None:
    """Opens a checkpoint with transformers alone and writes its logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        torch.save(model(input_ids=torch.load(ids_file)).logits, logits_file)
    assert "losa" not in sys.modules


def import_losa_last(directory: str) -> None:
    """Opens a packed checkpoint with transformers, which has been there before losa."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert "losa" not in AUTO_QUANTIZER_MAPPING
    import losa

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert any(isinstance(module, losa.SparseLinear) for module in model.modules())
