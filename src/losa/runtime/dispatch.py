"""Which code multiplies a packed weight: the compiled kernels of this CPU, Triton's on a GPU, or the reference in plain torch.

The compiled operator is `torch.ops.losa.sparse_linear`; it takes the number of its kernel as an argument, so that nothing here
or there is global. That of the GPU is `torch.ops.losa.sparse_linear_cuda` (`losa.runtime.triton`).
`LOSA_KERNELS=reference|portable|avx2|avx512|amx` forces one, for tests and for reports of trouble; `reference` on GPUs too.
"""

import functools
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from losa.runtime.format import PackedWeight
from losa.runtime.format import linear as unpack_and_multiply

REFERENCE, TRITON = "reference", "triton"
COMPILED = ("portable", "avx2", "avx512", "amx", "avx512-a8", "amx-a8")  # their numbers in csrc/tensors.h; slowest first
ROUNDING = {"avx512": "avx512-a8", "amx": "amx-a8"}  # the same, but activations of up to three tokens are rounded to int8
ACTIVATIONS = ("bfloat16", "int8")

logger = logging.getLogger(__name__)


@functools.cache
def available() -> tuple[str, ...]:
    """The kernels that run here, slowest first; loads the compiled ones. Says once, in the log, when there are none."""
    found = sorted(Path(__file__).parents[1].glob("_kernels*.so"))
    try:
        torch.ops.load_library(found[-1])
    except (IndexError, OSError) as error:
        reason = "were not built when losa was installed" if isinstance(error, IndexError) else f"do not load ({error})"
        logger.warning(
            "losa's CPU kernels %s: packed layers are unpacked at every call, slower than dense ones. With torch and a C++ "
            "compiler installed, build them, in losa's sources: pip install --no-build-isolation --force-reinstall --no-deps .",
            reason,
        )
        return (REFERENCE,)
    torch.library.register_fake("losa::sparse_linear", _shape)
    torch.library.register_fake("losa::dense_linear", lambda x, weight, kernel: x.new_empty(weight.shape[0]))
    bits = torch.ops.losa.cpu_kernels()
    return (REFERENCE, *(name for number, name in enumerate(COMPILED) if bits >> number & 1))


def _shape(
    x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, scale: Tensor | None, groups: Tensor | None, bias: Tensor | None,
    rows: int, columns: int, values_type: int, kernel: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], rows)


@functools.cache
def triton_runs() -> bool:
    """Whether the GPU's operator is there; loads it. Says once, in the log, when it is not."""
    try:
        import losa.runtime.triton  # noqa: F401 - defines the operator
    except ImportError as error:
        logger.warning("no Triton (%s): packed layers on a GPU are unpacked at every call; pip install triton", error)
        return False
    return True


def choose(device: str = "cpu", activations: str = "bfloat16") -> str:
    """The fastest kernel that runs here, or the one that `LOSA_KERNELS` asks for.

    Args:
        device: type of the device that holds the layer.
        activations: `int8` allows to round them, where there is a kernel that is faster for it.

    Raises:
        ValueError: `LOSA_KERNELS` names none that runs here.
    """
    asked = os.environ.get("LOSA_KERNELS")
    if device == "cuda":
        return TRITON if asked != REFERENCE and triton_runs() else REFERENCE
    if device not in ("cpu", "meta"):
        return REFERENCE
    if asked and asked not in available():
        raise ValueError(f"LOSA_KERNELS is {asked!r}; this machine and installation run {', '.join(available())}")
    found = asked or available()[-1]
    return ROUNDING.get(found, found) if activations == "int8" else found


def linear(x: Tensor, weight: PackedWeight, bias_O: Tensor | None, kernel: str, index: Tensor | None = None) -> Tensor:
    """`x W^T + b`.

    Args:
        x: `[..., I]` bfloat16; on a GPU float16 as well.
        weight: packed `[O, I]`.
        bias_O: bfloat16, or None.
        kernel: one of `available()`, or `triton`, as `choose` found for the device.
        index: the weight's `format.chunk_index`, for `triton`.

    Raises:
        ValueError: an input of another width.
    """
    if x.shape[-1] != weight.columns:
        raise ValueError(f"found {x.shape[-1]} features in the input of a packed layer of {weight.columns}")
    if kernel == REFERENCE:
        return unpack_and_multiply(x, weight, bias_O)
    x_TI = x.reshape(-1, x.shape[-1])
    parts, scales, kind = (weight.mask, weight.values, weight.offsets), (weight.scale, weight.groups), weight.type.number
    y_TO: Tensor
    if kernel == TRITON:
        y_TO = torch.ops.losa.sparse_linear_cuda(x_TI, *parts, index, *scales, bias_O, weight.rows, kind)
    else:
        shape, number = (weight.rows, weight.columns), COMPILED.index(kernel)
        y_TO = torch.ops.losa.sparse_linear(x_TI, *parts, *scales, bias_O, *shape, kind, number)
    return y_TO.view(*x.shape[:-1], weight.rows)
