"""What `adapter/function.py` does by panels, each in one kernel, for GPUs, in Triton. Import it only where triton is installed.

`build`, `M * (W + s B A)`: base weight and mask bits are read once and the result is written once, 4 1/8 bytes a bfloat16
weight. The panels pass a float32 sum, a copy of it and a byte a weight through the memory as well: about 30 bytes.

`project`, `s B^T (M * G)` and `s (M * G) A^T`: each reads gradient and mask bits once and writes next to nothing, 4 1/4 bytes a
weight together, where the panels take about 25. `G` itself is left as it was.

Legend: O out_features, I in_features, R rank, S shares of a sum; a tile is P rows x Q columns, K components at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # P and Q
SHARE = 16  # tiles that one program adds up: long sums are shared by several, for a GPU has more processors than a layer tiles
COMPONENTS = 16  # K: ranks are rarely larger


@triton.jit
def _kept(bits, place, inside):
    """Which of the weights at `place` the mask keeps."""
    return (tl.load(bits + (place >> 3), mask=inside, other=0) >> (place & 7).to(tl.uint8)) & 1 != 0


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
    merged = tl.load(W + place, mask=inside, other=0).to(tl.float32) + scale * update
    tl.store(result + place, tl.where(_kept(bits, place, inside), merged, 0).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _project(
    G, bits, factor, result, rows, columns, rank, outer_stride, inner_stride,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One share of `(M * G) A^T` for a tile's rows or, with `COLUMNS`, of `(M * G)^T B` for its columns: `[S, O or I, K]`.

    `factor` is A^T or B, `[I or O, R]`, of any strides.
    """
    fixed, share = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1)
    component = tl.arange(0, K)[None, :]
    sums = tl.zeros((TILE, K), tl.float32)
    for step in range(SHARE):
        summed = (share * SHARE + step) * TILE + tl.arange(0, TILE)
        row, column = (summed, fixed) if COLUMNS else (fixed, summed)
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        G_PQ = tl.where(_kept(bits, place, inside), tl.load(G + place, mask=inside, other=0).to(tl.float32), 0)
        there = (summed < (rows if COLUMNS else columns))[:, None] & (component < rank)
        factor_K = tl.load(factor + summed[:, None] * outer_stride + component * inner_stride, mask=there, other=0)
        sums = tl.dot(tl.trans(G_PQ) if COLUMNS else G_PQ, factor_K, sums, input_precision="ieee")
    size = columns if COLUMNS else rows
    place = (share * size + fixed)[:, None] * rank + component
    tl.store(result + place, sums, mask=(fixed < size)[:, None] & (component < rank))


def build(W_OI: Tensor, bits: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, result_OI: Tensor) -> Tensor:
    """Fills `result_OI`, and returns it.

    Args:
        W_OI: base weight, contiguous, any float type.
        bits: the keep-mask, packed by `losa.bits.pack_bits`.
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


def project(G_OI: Tensor, bits: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`dA = s B^T (M * G)` and `dB = s (M * G) A^T`, float32; the same numbers at every run.

    Args:
        G_OI: gradient of the effective weight, contiguous, any float type.
        bits: the keep-mask, packed by `losa.bits.pack_bits`.
        A_RI, B_OR: float32, of any strides; R at most 64, or a tile's sums do not stay in registers.
    """
    with torch.cuda.device_of(G_OI):
        dA_IR = _projected(G_OI, bits, B_OR, columns=True)
        dB_OR = _projected(G_OI, bits, A_RI.T, columns=False)
    return dA_IR.mul_(scale).T.contiguous(), dB_OR.mul_(scale)


def _projected(G_OI: Tensor, bits: Tensor, factor: Tensor, columns: bool) -> Tensor:
    """`(M * G)^T factor` or `(M * G) factor`."""
    summed, rank = factor.shape
    size = G_OI.shape[columns]
    shares = triton.cdiv(summed, TILE * SHARE)
    result = factor.new_empty(shares, size, rank)
    _project[triton.cdiv(size, TILE), shares](
        G_OI, bits, factor, result, *G_OI.shape, rank, *factor.stride(),
        COLUMNS=columns, TILE=TILE, SHARE=SHARE, K=max(COMPONENTS, triton.next_power_of_2(rank)), num_warps=4,
    )  # fmt: skip
    return result.sum(0)
