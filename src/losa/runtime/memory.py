"""Where the weights of a model that runs on the CPU live: one anonymous region, in huge pages.

`from_pretrained` leaves weights in the mapped file, 4 KiB a page. A layer that streams every weight once per token then spends
much of its time on address translation. In 2 MiB pages (transparent huge pages, Linux) both dense and packed layers are faster.
"""

import ctypes
import gc
import mmap
import sys

import psutil
import torch
from torch import Tensor, nn

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


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Moves the parameters of a model on the CPU into one huge region, one at a time; tied parameters stay tied.

    Each has a storage of its own in there: `torch.save` writes storages, and of one that several types share it writes none.
    Does nothing for a model that is not wholly on the CPU.
    """
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.numel()}
    if any(parameter.device.type != "cpu" for parameter in parameters.values()):
        return
    region = _huge_pages(sum(-(-parameter.nbytes // 64) * 64 for parameter in parameters.values()))
    used, homes = _start(region), {}
    for address, parameter in parameters.items():
        home = torch.frombuffer(region, dtype=parameter.dtype, count=parameter.numel(), offset=used).view(parameter.shape)
        homes[address] = home.copy_(parameter)
        used += -(-parameter.nbytes // 64) * 64
    for parameter in model.parameters():
        if parameter.numel():
            parameter.data = homes[parameter.data_ptr()]


def resident_bytes() -> int:
    """Resident memory of this process, after garbage and freed blocks have gone back to the system."""
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return int(psutil.Process().memory_info().rss)
