"""What the stored values of a packed weight may be: one row of a table, which every other file reads.

A type is what the files hold, how many bits one value takes, how many columns a word of the mask covers, and what scales the
values. `csrc/kernels.h` has the same rows under the same numbers. A further type: docs/extending.md.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ValueType:
    """One kind of stored values.

    Attributes:
        name: in headers and on the command line.
        number: in csrc/kernels.h.
        stored: dtype of the tensor of values; several small values share one of its elements, lowest bits first.
        bits: of one value.
        columns: of a word of the mask: 16 rows x `columns`, a bit each.
        largest: magnitude of integers, of which each row has a float32 scale; None: weights are stored as they are.
        group: columns of a row that share an 8-bit scale beside the row's; None: only the row's.
    """

    name: str
    number: int
    stored: torch.dtype
    bits: int
    columns: int
    largest: int | None
    group: int | None

    @property
    def rounds(self) -> bool:
        """Whether packing changes weights."""
        return self.largest is not None

    def elements(self, count: int) -> int:
        """Elements of the tensor that stores `count` values."""
        return -(-count * self.bits // (8 * self.stored.itemsize))

    def bytes_per_weight(self, density: float) -> float:
        """Mean bytes of a packed weight, where `density` (ratio) of them are not zero; without padding, offsets, rows' scales."""
        return 1 / 8 + density * self.bits / 8 + (1 / self.group if self.group else 0)


BFLOAT16 = ValueType("bfloat16", 0, torch.bfloat16, bits=16, columns=2, largest=None, group=None)
INT8 = ValueType("int8", 1, torch.int8, bits=8, columns=4, largest=127, group=None)
INT4 = ValueType("int4", 2, torch.uint8, bits=4, columns=4, largest=8, group=64)
TYPES = {made.name: made for made in (BFLOAT16, INT8, INT4)}
HEADS = tuple(name for name, made in TYPES.items() if made.rounds)  # for a layer that has no zeros
