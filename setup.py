"""Builds the CPU kernels (csrc/) as `losa/_kernels`, where torch's headers and a compiler are at hand; otherwise goes on without.

The kernels need no Python and, through LibTorch's stable ABI, no particular torch: only torch >= 2.10's headers while building.
torch is not a build requirement, because pip would then download its largest build, gigabytes of CUDA, into every isolated
build. So the headers are those of the torch that is already installed: install torch first, then losa. Everything else about
the package is in pyproject.toml.
"""

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup


def installed_torch() -> Path | None:
    """The folder of the torch that is importable, or installed where this build's result will go; None when older than 2.10."""
    spec = importlib.util.find_spec("torch")
    found = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    # pip's isolated builds hide the environment's packages from the import system, but run its interpreter.
    for torch in [*found, *(Path(sysconfig.get_path(kind), "torch") for kind in ("platlib", "purelib"))]:
        version = re.search(r"^__version__ = '(\d+)\.(\d+)", _read(torch / "version.py"), re.MULTILINE)
        if version and tuple(map(int, version.groups())) >= (2, 10):
            return torch
    return None


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def kernels() -> list[Extension]:
    """The extension, or nothing, with the reason on the screen (`pip install -v`)."""
    torch = installed_torch()
    if torch is None or sys.platform == "win32":
        print("losa: no torch >= 2.10 to build against, so the CPU kernels are left out; `losa doctor` says how to add them")
        return []
    return [
        Extension(
            "losa._kernels",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            language="c++",
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # the stable ABI as of torch 2.10
            # Nobody reads floating-point exceptions, for whose sake gcc would not make vectors of a loop with a comparison.
            extra_compile_args=["-std=c++17", "-O3", "-fno-trapping-math", "-fvisibility=hidden", "-w"],
            extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
            py_limited_api=True,  # no Python in it at all: one file for every version
            optional=True,  # a compiler that fails costs the kernels, not the installation
        )
    ]


setup(ext_modules=kernels())
