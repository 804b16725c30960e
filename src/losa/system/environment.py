"""The machine: what computes, with which packages, on which device, and how its memory behaves."""

import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h


def versions() -> dict[str, str]:
    """What computed the result: packages, Python, processor."""
    packages = ("losa", "torch", "transformers", "accelerate", "safetensors")
    return {name: version(name) for name in packages} | {"python": platform.python_version(), "machine": machine()}


def machine(device: str = "cuda") -> str:
    """The GPU's name where there is one and work goes there, or else the CPU's model and its cores."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        ValueError: no such device here, or another kind of name.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"device is {name!r}, expected auto, cpu or cuda; to choose one of several GPUs, set CUDA_VISIBLE_DEVICES"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes: each has its own GPU
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not usable here: {str(error).splitlines()[0]}") from error
    return device


def check_memory(wanted: Mapping[str, int]) -> None:
    """Refuses numbers that this machine could not hold if it did nothing else.

    Args:
        wanted: bytes that a key of the configuration asks for.

    Raises:
        ValueError: more than the machine has.
    """
    there = psutil.virtual_memory().total
    for key, count in wanted.items():
        if count > there:
            raise ValueError(f"{key} asks for {count:.3g} bytes of memory, this machine has {there:.3g}; lower it")


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep freed memory in the process. For commands; a library should not decide this.

    glibc returns every large freed block to the system and maps it anew, page by page, at the next allocation. A training step
    allocates and frees the same tensors again and again; where page faults are slow, most of its time goes there. No effect on
    results, nor on systems without glibc.

    Returns:
        Whether it took effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # another C library
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_TOP_PAD, 1 << 28)])


def return_freed_memory() -> None:
    """Has glibc hand freed memory back to the system, also what threads hold: tokenizing a long text leaves several times its
    size in theirs, where no tensor could use it. Harmless, and no effect elsewhere."""
    if sys.platform.startswith("linux"):
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
