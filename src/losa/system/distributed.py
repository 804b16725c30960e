"""Several processes, started by `torchrun` or `accelerate launch`: who am I, and what they say to each other.

torch.distributed carries the tensors, accelerate and FSDP2 the training. With one process, everything here does nothing.

What is shared: calibration sequences (statistics are summed), solving (each group of layers by one process, which sends its
answer to the others), evaluation windows, and the rows of a training batch. So all processes hold the same masks and adapters,
and the same configuration gives the same result, up to the order of floating-point sums, on any number of them.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def launched() -> int:
    """How many processes the launcher started, before they are joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device, alone: bool = False) -> None:
    """Joins the processes, if a launcher started several: NCCL between GPUs, gloo for what is on the host.

    Args:
        alone: makes a group of a single process too, which FSDP wants even where it only streams weights from the host.
    """
    if dist.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if launched() > 1:
        dist.init_process_group(backend)
    elif alone:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def world_size() -> int:
    """The number of joined processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This one's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files and shows progress. Known from the launcher before they are joined."""
    return int(os.environ.get("RANK", "0")) == 0


def part(rows: Tensor) -> Tensor:
    """This process's share of rows: every `world_size`-th."""
    return rows[rank() :: world_size()]


def own(indices: Tensor) -> Tensor:
    """Of indices into all rows, those of this process's share, as indices into that share (`part`)."""
    return indices[indices % world_size() == rank()] // world_size()


def sum_(tensor: Tensor) -> Tensor:
    """Sums over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_(tensor: Tensor) -> Tensor:
    """The largest over processes, element by element, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def send_(tensor: Tensor, source: int) -> Tensor:
    """Process `source` sends, all others receive, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, which hold equally many, in the order of `part`'s argument: the inverse of `part`."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def wait() -> None:
    """Until all are here."""
    if world_size() > 1:
        dist.barrier()


def whole(value: Tensor) -> Tensor:
    """A tensor that may be spread over all processes, whole on each of them."""
    if not isinstance(value, DTensor):
        return value
    on_device = value.to(value.device_mesh.device_type)  # from the host, where that is where it was updated
    assert isinstance(on_device, DTensor)
    return on_device.full_tensor()


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, spread over them and placed as `like` is: the inverse of `whole`. One of another
    shape, such as a count of steps, is left as it is."""
    if value.shape != like.shape:
        return value
    if isinstance(like, DTensor):
        mesh = like.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, like.placements)
    return value.to(like.device)
