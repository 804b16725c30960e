"""Where the weights of a model that runs on the CPU live: in huge pages what every token reads, in the file what is looked up.

`from_pretrained` leaves weights in the mapped file, 4 KiB a page. A layer that streams every weight once per token then spends
much of its time on address translation. In 2 MiB pages (transparent huge pages, Linux) both dense and packed layers are faster.
Of an embedding a token reads one row: in the file, the rows that were read are all that takes memory.
"""

import ctypes
import gc
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from losa.system.doors import read_tensors

HUGE = 2 << 20  # bytes of a huge page on x86-64; aarch64 with 4 KiB base pages too


def huge_region(size: int) -> Tensor:
    """`[size]` bytes, aligned to a huge page, not resident until written. Ordinary pages where there are no huge ones."""
    region = _huge_pages(size)
    return torch.frombuffer(region, dtype=torch.uint8)[_start(region) :][:size]


def _huge_pages(size: int) -> mmap.mmap:
    """At least `size` bytes after `_start`."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size + HUGE)
    region = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # Linux
    region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _start(region: mmap.mmap) -> int:
    """Bytes before the first huge page of a region."""
    return -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % HUGE


class HugePages:
    """Memory in huge pages for tensors that come one after the other; a region at a time, each kept as long as a tensor in it."""

    def __init__(self, region_bytes: int = 64 << 20) -> None:
        self.region_bytes = region_bytes
        self._region: mmap.mmap | None = None
        self._used = self._end = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in this process or another, begins with regions of its own."""
        return HugePages, (self.region_bytes,)

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor again, in here, aligned to a cache line, with a storage of its own: `torch.save` writes storages, and of one
        that several types share it writes none."""
        size = -(-tensor.nbytes // 64) * 64
        if self._region is None or self._used + size > self._end:
            room = max(size, self.region_bytes)
            self._region = _huge_pages(room)
            self._used = _start(self._region)
            self._end = self._used + room
        home = torch.frombuffer(self._region, dtype=tensor.dtype, count=tensor.numel(), offset=self._used).view(tensor.shape)
        self._used += size
        return home.copy_(tensor)


@torch.no_grad()
def move_to_huge_pages(model: nn.Module, pages: HugePages | None = None, files: Iterable[str | Path] = ()) -> None:
    """Moves the parameters of a model on the CPU into huge pages, one at a time; tied parameters stay tied.

    Does nothing for a model that is not wholly on the CPU.

    Args:
        pages: where to; None: a region as large as the model.
        files: the safetensors files that the model was opened from: embeddings that no other layer shares stay in there.
    """
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.numel()}
    if any(parameter.device.type != "cpu" for parameter in parameters.values()):
        return
    for table in _leave_in_files(model, files):
        parameters.pop(table)
    pages = pages or HugePages(sum(-(-parameter.nbytes // 64) * 64 for parameter in parameters.values()))
    homes = {address: pages.copy(parameter) for address, parameter in parameters.items()}
    for parameter in model.parameters():
        parameter.data = homes.get(parameter.data_ptr(), parameter.data)


def _leave_in_files(model: nn.Module, files: Iterable[str | Path]) -> list[int]:
    """Maps the weights of embeddings anew, each by itself: the mapping that they come with counts what was read of all others.
    Returns the addresses at which they were."""
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    others = {parameter.data_ptr() for layer in layers for parameter in layer.parameters(recurse=False)}
    embeddings = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    tables = {name: module.weight for name, module in embeddings.items() if module.weight.data_ptr() not in others}
    left = []
    for file in files if tables else ():
        for name, found in read_tensors(Path(file), lambda name, shape: name in tables and shape == list(tables[name].shape)):
            if found.dtype == tables[name].dtype:
                left.append(tables[name].data_ptr())
                tables[name].data = found
    return left


def resident_bytes() -> int:
    """Resident memory of this process, after garbage and freed blocks have gone back to the system."""
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return int(psutil.Process().memory_info().rss)
