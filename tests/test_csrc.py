"""The C++ kernels by themselves: warnings, corrupt weights under sanitizers, AMX on an emulator."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
HARNESSES = ROOT / "tests" / "csrc"
NAMES = ("portable", "avx2", "avx2_integer", "avx512", "avx512_integer")
PORTABLE, *AVX2 = (CSRC / f"{name}.cpp" for name in NAMES[:3])
AVX512 = [CSRC / f"{name}.cpp" for name in NAMES[3:]]
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
# gcc 12 warns in its own intrinsics, which make undefined registers of uninitialized variables.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


@pytest.fixture
def compiler() -> str:
    found = next(filter(None, (shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if found is None:
        pytest.skip("no C++ compiler: neither $CXX nor c++, g++ or clang++ is on the path")
    return found


def compile_cpp(compiler: str, *arguments: object) -> None:
    done = subprocess.run([compiler, "-std=c++17", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def output_of(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_compile_without_warnings(compiler):
    sources = sorted(CSRC.glob("*.cpp"))
    assert sources
    headers = ["-isystem", Path(torch.__file__).parent / "include", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    compile_cpp(compiler, "-Wall", "-Wextra", "-Werror", *QUIET, *headers, "-fsyntax-only", *sources)


def test_lines_end_at_120_characters():
    long = [
        f"{path.name}:{n}" for path in CSRC.glob("*.[ch]*") for n, line in enumerate(path.open(), 1) if len(line.rstrip()) > 120
    ]
    assert not long, "clang-format -i csrc/*.cpp csrc/*.h"


@pytest.mark.skipif(not HAS_AVX512, reason="AMX is emulated, the AVX-512 instructions around it are this CPU's")
def test_amx_multiplies_as_the_portable_kernels_do(compiler, tmp_path):
    program = tmp_path / "amx_emulated"
    compile_cpp(compiler, "-O0", *QUIET, HARNESSES / "amx_emulated.cpp", PORTABLE, *AVX512, "-o", program)
    assert "largest error" in output_of(program)


@pytest.mark.slow
def test_corrupt_weights_are_never_read_out_of_bounds(compiler, tmp_path):
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    linked = subprocess.run([compiler, *SANITIZERS, tmp_path / "empty.cpp", "-o", tmp_path / "empty"], capture_output=True)
    if linked.returncode != 0 or subprocess.run([tmp_path / "empty"], capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} has no runtime for the address and undefined behaviour sanitizers")
    program, quick = tmp_path / "fuzz_kernels", ["-O0", "-c", *QUIET]
    checked, linked_only = [PORTABLE, *AVX2, *AVX512], []
    if not HAS_AVX512:  # what cannot run here is not instrumented, which would take as long as all that is
        checked, linked_only = [PORTABLE, *AVX2], [tmp_path / f"{path.stem}.o" for path in AVX512]
        for path, made in zip(AVX512, linked_only, strict=True):
            compile_cpp(compiler, *quick, path, "-o", made)
    harness = HARNESSES / "fuzz_kernels.cpp"
    compile_cpp(compiler, "-O1", *QUIET, *SANITIZERS, harness, *checked, *linked_only, "-o", program)
    assert "1000 rounds: portable" in output_of(program, "1000")
