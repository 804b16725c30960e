"""`M * (W + s B A)` in one kernel, for GPUs, in Triton. Import it only where triton is installed.

Base weight and mask bits are read once and the result is written once, 4 1/8 bytes a bfloat16 weight. The panels of
`adapter/function.py` pass a float32 sum, a copy of it and a byte a weight through the memory as well: about 30 bytes.

Legend: O out_features, I in_features, R rank; a program builds a tile of P rows x Q columns, K components at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # P and Q
COMPONENTS = 16  # K: ranks are rarely larger


@triton.jit
def _build(
    W, bits, A, B, result, scale, rows, columns, rank, A_stride, B_stride,
    P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile; +0 wherever the mask is False."""
    row = (tl.program_id(0) * P + tl.arange(0, P)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * Q + tl.arange(0, Q))[None, :]
    update = tl.zeros((P, Q), tl.float32)
    for first in range(0, rank, K):
        component = first + tl.arange(0, K)
        B_PK = tl.load(B + row * B_stride + component[None, :], mask=(row < rows) & (component < rank)[None, :], other=0)
        A_KQ = tl.load(A + component[:, None] * A_stride + column, mask=(component < rank)[:, None] & (column < columns), other=0)
        update = tl.dot(B_PK, A_KQ, update, input_precision="ieee")
    inside = (row < rows) & (column < columns)
    place = row * columns + column
    kept = (tl.load(bits + (place >> 3), mask=inside, other=0) >> (place & 7).to(tl.uint8)) & 1
    merged = tl.load(W + place, mask=inside, other=0).to(tl.float32) + scale * update
    tl.store(result + place, tl.where(kept != 0, merged, 0).to(result.dtype.element_ty), mask=inside)


def build(W_OI: Tensor, bits: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, result_OI: Tensor) -> Tensor:
    """Fills `result_OI`, and returns it.

    Args:
        W_OI: base weight, contiguous, any float type.
        bits: the keep-mask, packed by `masks.pack_bits`.
        A_RI, B_OR: float32; each may be a slice, if its last dimension is contiguous.
        result_OI: contiguous, any float type.
    """
    rows, columns = W_OI.shape
    with torch.cuda.device_of(W_OI):
        _build[triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)](
            W_OI, bits, A_RI, B_OR, result_OI, scale, rows, columns, A_RI.shape[0], A_RI.stride(0), B_OR.stride(0),
            P=TILE, Q=TILE, K=COMPONENTS, num_warps=8,
        )  # fmt: skip
    return result_OI
