"""A bit a weight: how masks are held in memory and in files. A byte a weight would be half of a bfloat16 model.

Eight weights a byte, lowest bit first.
"""

import torch
from torch import Tensor


def pack_bits(keep: Tensor) -> Tensor:
    """Bool mask of any shape -> uint8, flattened row-major; the last byte is padded with 0."""
    flat = keep.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def byte_table(device: torch.device) -> Tensor:
    """Byte -> its eight bits as eight bytes 0 or 1, which together are one int64; `(256,)`."""
    bits = (torch.arange(256, dtype=torch.uint8, device=device)[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    return bits.view(torch.int64).flatten()


def unpack_bytes(packed: Tensor, table: Tensor) -> Tensor:
    """Bytes of packed bits -> uint8, eight values 0 or 1 for each byte: one look-up a byte, not eight shifts."""
    return table[packed.int()].view(torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Inverse of `pack_bits`.

    Raises:
        ValueError: the byte count does not fit `shape`.
    """
    numel = torch.Size(shape).numel()
    if packed.numel() != -(-numel // 8):
        raise ValueError(f"a packed mask of {packed.numel()} bytes cannot be of shape {tuple(shape)}")
    return unpack_bytes(packed, byte_table(packed.device))[:numel].view(shape).bool()
