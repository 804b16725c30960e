"""`torch.ops.losa.sparse_linear_cuda`: packed layers on an NVIDIA GPU, in Triton. Import it only where triton is installed.

The kernels read the packed tensors as they are stored (`losa.runtime.format`), and one small index made when a layer comes to the
GPU: how many values of its strip come before each *chunk*, 16 rows x 64 columns, 1,024 mask bits (`format.chunk_index`, 4 bytes a
chunk). So any chunk can be decoded by itself, and what is left to count lies inside 32 words:

    before a word      a running sum of population counts over the 32 words of the chunk, in registers
    before a byte      the population count of the word below it
    before a bit       one addition a bit; a lane walks the 8 bits of its byte and loads where one is set

Neighbouring lanes walk neighbouring bytes, so a warp's loads fall into a line or two, and every value leaves the memory once.

    1 to 32 tokens     `_stream`: decoded chunks go straight to the tensor cores, the weight is never written; float32 sums
    more tokens        `_expand` writes a panel of rows, cuBLAS multiplies it

Legend: O out_features, I in_features, T tokens, C chunks decoded side by side, P rows of a panel, D splits along I.
"""

import functools
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from losa.runtime.values import TYPES, ValueType

NUMBERED = {kind.number: kind for kind in TYPES.values()}
STREAMED = 32  # tokens at most that multiply while the weight streams by: beyond, activations are read more than weights
PANEL_BYTES = 32 << 20  # of an expanded panel: under the L2 cache of data-centre GPUs, a whole 4096 x 4096 layer
WARPS_A_PROCESSOR = 16  # that hide the latency of memory, roughly: what splitting along I aims at


@triton.jit
def _popcount(word):
    """Bits set in each uint32. LLVM recognises the sum and emits the machine's own instruction; the interpreter just adds."""
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _take(values, at, byte, position: tl.constexpr, BITS: tl.constexpr):
    """The value of one bit of each byte, 0 where it is not set, and where the next one is."""
    stored = (byte & (1 << position)) != 0
    if BITS < 8:  # codes that share a byte, of numbers without a zero (`losa.runtime.integers`)
        shift: tl.constexpr = 3 - BITS // 2  # a byte has 8 / BITS = 2^shift of them
        byte_of = tl.load(values + (at >> shift), mask=stored, other=0).to(tl.int32)
        code = (byte_of >> ((at & ((1 << shift) - 1)) * BITS)) & ((1 << BITS) - 1)
        value = tl.where(stored, code - (1 << (BITS - 1)) + (code >> (BITS - 1)), 0).to(tl.int8)
    else:
        value = tl.load(values + at, mask=stored, other=0)
    return value, at + stored.to(tl.int32)


@triton.jit
def _begin(values, offsets, strip, BITS: tl.constexpr):
    """Where the values of a strip begin: a pointer, and how many values that is too early."""
    first = tl.load(offsets + strip)
    if BITS < 8:
        shift: tl.constexpr = 3 - BITS // 2
        return values + (first >> shift), (first & ((1 << shift) - 1)).to(tl.int32)
    return values + first, 0


@triton.jit
def _scaled(W_COI, groups, strip, first, chunks, C: tl.constexpr):
    """Chunks in float32, times the scales of their 64 columns (`losa.runtime.integers.levels`), where the type has any."""
    W_COI = W_COI.to(tl.float32)
    if groups is not None:
        chunk = first + tl.arange(0, C)[:, None]
        place = (strip * chunks + chunk) * 16 + tl.arange(0, 16)[None, :]
        byte = tl.load(groups + place, mask=chunk < chunks, other=0).to(tl.int32)
        W_COI *= ((byte << 19) + (112 << 23)).to(tl.float32, bitcast=True)[:, :, None]
    return W_COI


@triton.jit
def _fetch(mask, index, first, end, words, C: tl.constexpr):
    """Words `[C, 32]` uint32 of chunks `first` to `first + C` of a strip, and how many values come before each chunk.

    Args:
        mask: first of the strip's `words` uint32.
        index: its first entry in the chunk index.
        end: chunk past the last one wanted; zeros from there on.
    """
    chunk = first + tl.arange(0, C)
    place = chunk[:, None] * 32 + tl.arange(0, 32)[None, :]
    word = tl.load(mask + place, mask=place < min(words, end * 32), other=0).to(tl.uint32, bitcast=True)
    return word, tl.load(index + chunk, mask=chunk < end, other=0)


@triton.jit
def _decode(word, before_chunk, values, C: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr):
    """`[C, 16, 64]`, dense, of the values' type.

    Args:
        word, before_chunk: as `_fetch` brings them.
        values: the strip's first value.
        GROUP, BITS: columns of a word, 2 or 4, and bits of a value.
    """
    count = _popcount(word)
    before_word = before_chunk[:, None] + tl.cumsum(count, 1) - count
    shift = tl.arange(0, 4)[None, None, :] * 8
    at = before_word[:, :, None] + _popcount(word[:, :, None] & ((1 << shift) - 1).to(tl.uint32))
    byte = word[:, :, None] >> shift
    v0, at = _take(values, at, byte, 0, BITS)
    v1, at = _take(values, at, byte, 1, BITS)
    v2, at = _take(values, at, byte, 2, BITS)
    v3, at = _take(values, at, byte, 3, BITS)
    v4, at = _take(values, at, byte, 4, BITS)
    v5, at = _take(values, at, byte, 5, BITS)
    v6, at = _take(values, at, byte, 6, BITS)
    v7, at = _take(values, at, byte, 7, BITS)
    # Dimensions: chunk, word, byte of the word, then the three bits of the position, lowest first.
    decoded = tl.join(tl.join(tl.join(v0, v1), tl.join(v2, v3)), tl.join(tl.join(v4, v5), tl.join(v6, v7)))
    if GROUP == 2:  # 8 byte + bit = 2 row + column
        decoded = tl.permute(decoded, (0, 2, 5, 4, 1, 3))
    else:  # two uint32 a word: 32 half + 8 byte + bit = 4 row + column
        decoded = tl.permute(tl.reshape(decoded, (C, 16, 2, 4, 2, 2, 2)), (0, 2, 3, 6, 1, 5, 4))
    return tl.reshape(decoded, (C, 16, 64))


@triton.jit
def _finish(sums, row, keep, scale, bias):
    """Scale of the row and bias, where there are any, in float32."""
    if scale is not None:
        sums *= tl.load(scale + row, mask=keep, other=0)
    if bias is not None:
        sums += tl.load(bias + row, mask=keep, other=0).to(tl.float32)
    return sums


@triton.jit(do_not_specialize=["tokens", "chunks_a_split"])
def _stream(
    x, mask, values, offsets, index, scale, groups, bias, y,
    tokens, rows, columns, words, chunks, chunks_a_split,
    C: tl.constexpr, T: tl.constexpr, FINISH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """`y = x W^T`, one strip of 16 rows and one of D shares of the columns a program; C warps decode side by side.

    The masks of the next chunks are on their way while these are decoded: values can be asked for only once their mask is there,
    and two waits for the memory, one after the other, would take longer than decoding. With `FINISH` (one share) `y` is
    the result, `[tokens, O]`; else it takes the float32 sums of every share, `[D, tokens, O]`.
    """
    strip, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mask += strip * words
    values, early = _begin(values, offsets, strip, BITS)
    index += strip * chunks
    token = tl.arange(0, T)
    sums = tl.zeros((C, 16, T), tl.float32)
    start, end = share * chunks_a_split, min(chunks, (share + 1) * chunks_a_split)
    word, before = _fetch(mask, index, start, end, words, C)
    for first in range(start, end, C):
        next_word, next_before = _fetch(mask, index, first + C, end, words, C)
        column = (first + tl.arange(0, C))[:, None, None] * 64 + tl.arange(0, 64)[None, None, :]
        inside = (token < tokens)[None, :, None] & (column < columns)
        x_CTI = tl.load(x + token[None, :, None] * columns + column, mask=inside, other=0)
        W_COI = _scaled(_decode(word, before + early, values, C, GROUP, BITS), groups, strip, first, chunks, C)
        W_COI = W_COI.to(x_CTI.dtype)  # by float32: costs bfloat16 nothing; int8 has no other way in the interpreter
        sums = tl.dot(W_COI, tl.permute(x_CTI, (0, 2, 1)), sums)
        word, before = next_word, next_before
    row = (strip * 16 + tl.arange(0, 16))[:, None]
    keep = (row < rows) & (token < tokens)[None, :]
    result = tl.sum(sums, 0)
    if FINISH:
        result = _finish(result, row, row < rows, scale, bias)
    tl.store(y + (share * tokens + token)[None, :] * rows + row, result.to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["tokens"])
def _add_shares(partial, scale, bias, y, tokens, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    """`y = sum over D of partial`, in order, finished."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = place < tokens * rows
    sums = tl.zeros((BLOCK,), tl.float32)
    for share in tl.static_range(D):
        sums += tl.load(partial + share * tokens * rows + place, mask=keep, other=0)
    sums = _finish(sums, place % rows, keep, scale, bias)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["first_strip"])
def _expand(
    mask, values, offsets, index, scale, groups, panel, first_strip, rows, columns, words, chunks,
    C: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Writes `rows` rows from strip `first_strip` on, `[P, I]`, in the panel's type; C chunks of a strip a program."""
    local, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * C
    strip = first_strip + local
    word, before = _fetch(mask + strip * words, index + strip * chunks, first, chunks, words, C)
    values, early = _begin(values, offsets, strip, BITS)
    W_COI = _scaled(_decode(word, before + early, values, C, GROUP, BITS), groups, strip, first, chunks, C)
    row = (local * 16 + tl.arange(0, 16))[None, :, None]
    column = (first + tl.arange(0, C))[:, None, None] * 64 + tl.arange(0, 64)[None, None, :]
    result = _finish(W_COI, first_strip * 16 + row, row < rows, scale, None)
    tl.store(panel + row * columns + column, result.to(panel.dtype.element_ty), mask=(row < rows) & (column < columns))


class Weight(NamedTuple):
    """A packed weight as the kernels take it: the mask as int32, and the index, where each chunk begins."""

    mask: Tensor
    values: Tensor
    offsets: Tensor
    begins: Tensor
    scale: Tensor | None
    groups: Tensor | None
    type: ValueType

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the type, in the order of the kernels' arguments."""
        return self[:-1]


class Config(NamedTuple):
    """How `_stream` is launched: warps of a program, each with a chunk of its own, and shares of the columns."""

    warps: int
    splits: int


_fastest: dict[tuple[object, ...], Config] = {}  # by device, shape, types and padded tokens; lives as long as the process


def configs(strips: int, chunks: int, processors: int, tokens: int) -> list[Config]:
    """What is tried for a shape, the likeliest first: enough programs to fill the GPU, or twice as many.

    Warps of a program share the cost of adding up and wait for each other; a single warp waits for nobody. For more than 16
    `tokens` the activations of 8 warps would not fit into the shared memory of smaller GPUs.
    """
    found = []
    for warps in (8, 4, 1) if tokens <= 16 else (4,):
        enough = WARPS_A_PROCESSOR * processors // (warps * strips)
        for splits in (enough, 2 * enough):
            found.append(Config(warps, max(1, min(splits, -(-chunks // warps), 16))))
    return list(dict.fromkeys(found))


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 on the CPU, where Triton's interpreter runs the kernels one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def sparse_linear(
    x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, index: Tensor, scale: Tensor | None, groups: Tensor | None,
    bias: Tensor | None, rows: int, values_type: int,
) -> Tensor:  # fmt: skip
    """`x W^T + b`.

    Launches only: nothing is read back, so it can be captured in a CUDA graph; what it allocates comes from torch's allocator,
    which gives a graph memory of its own. Where many configurations may be the fastest, the first call of a shape outside of a
    capture times them.

    Args:
        x: `[T, I]` bfloat16 or float16; the result is of its type.
        mask, values, offsets, scale, groups: of a `PackedWeight`.
        index: its `format.chunk_index`.
        bias: `[O]`, any type, or None.
        rows: O.
        values_type: number of the type of the values.

    Raises:
        ValueError: activations of another type.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"packed layers compute in bfloat16 or float16 on a GPU, found {x.dtype}; load the model in one of them")
    y = x.new_empty(x.shape[0], rows)
    if not y.numel():
        return y
    weight = Weight(mask.view(torch.int32), values, offsets, index, scale, groups, NUMBERED[values_type])
    with torch.cuda.device_of(x):
        if x.shape[0] > STREAMED:
            _by_panels(x, weight, bias, y)
        else:
            _stream_by(_choose(x, weight, bias, y), x.contiguous(), weight, bias, y)
    return y


def _shape(
    x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, index: Tensor, scale: Tensor | None, groups: Tensor | None,
    bias: Tensor | None, rows: int, values_type: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], rows)


# By hand: `torch.library.custom_op` takes twice as long a call, and a token of a 7B model makes 224 without graphs.
_library = torch.library.Library("losa", "FRAGMENT")
_library.define(f"sparse_linear_cuda{torch.library.infer_schema(sparse_linear, mutates_args=())}")
for _key in ("CUDA", "CPU"):  # the CPU for Triton's interpreter
    _library.impl("sparse_linear_cuda", sparse_linear, _key)
torch.library.register_fake("losa::sparse_linear_cuda", _shape, lib=_library)


def _choose(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> Config:
    """The fastest configuration, timed at the first call of a shape; the likeliest while a graph is captured, and on the CPU."""
    key = (x.device, x.dtype, weight.type, weight.mask.shape, x.shape[1], _padded(x.shape[0]))
    if key not in _fastest:
        strips, chunks = weight.begins.shape
        found = configs(strips, chunks, _processors(x.device), x.shape[0])
        if x.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return found[0]
        times = {}
        for config in found:
            work = functools.partial(_stream_by, config, x.contiguous(), weight, bias, y)
            times[config] = _milliseconds(work)
        _fastest[key] = min(times, key=lambda config: times[config])
    return _fastest[key]


def _milliseconds(work: Callable[[], None]) -> float:
    """Median time of a few launches, each out of memory, not out of the L2 cache."""
    work()  # compiles
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(20):
        for _ in range(2):  # long enough for the host to be ahead: what launching costs it, a graph hides
            flush.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(median(times))


def _padded(tokens: int) -> int:
    """Columns of the tensor cores' product: 8, 16 or 32."""
    return max(8, int(triton.next_power_of_2(tokens)))


def _stream_by(config: Config, x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """Up to `STREAMED` tokens, `[T, I]` contiguous; fills `y`."""
    (warps, splits), (tokens, rows) = config, y.shape
    scale, (strips, chunks) = weight.scale, weight.begins.shape
    each = -(-chunks // (splits * warps)) * warps
    sums = y if splits == 1 else torch.empty(splits, tokens, rows, dtype=torch.float32, device=y.device)
    _stream[strips, splits](
        x, *weight.tensors, bias, sums, tokens, rows, x.shape[1], weight.mask.shape[1], chunks, each,
        C=warps, T=_padded(tokens), FINISH=splits == 1, GROUP=weight.type.columns, BITS=weight.type.bits, num_warps=warps,
    )  # fmt: skip
    if splits > 1:
        _add_shares[(triton.cdiv(tokens * rows, 1024),)](sums, scale, bias, y, tokens, rows, D=splits, BLOCK=1024)


def _by_panels(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """Any number of tokens; fills `y`. The panel goes back to torch's allocator, which hands it to the next layer."""
    (strips, chunks), (rows, columns) = weight.begins.shape, (y.shape[1], x.shape[1])
    panels = triton.cdiv(rows * columns * x.element_size(), PANEL_BYTES)
    height = triton.cdiv(strips, panels) * 16
    panel = x.new_empty(min(height, rows), columns)
    for start in range(0, rows, height):
        part = slice(start, min(start + height, rows))
        W_PI = panel[: part.stop - start]
        _expand[triton.cdiv(len(W_PI), 16), triton.cdiv(chunks, 4)](
            *weight.tensors, W_PI, start // 16, len(W_PI), columns, weight.mask.shape[1], chunks,
            C=4, GROUP=weight.type.columns, BITS=weight.type.bits, num_warps=4,
        )  # fmt: skip
        if bias is None:
            torch.mm(x, W_PI.T, out=y[:, part])
        else:
            torch.addmm(bias[part].to(x.dtype), x, W_PI.T, out=y[:, part])
