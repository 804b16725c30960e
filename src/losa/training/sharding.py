"""Weights spread over several processes while they are trained (FSDP2)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from losa.models import find_decoder
from losa.system.distributed import whole, world_size


def sharded(model: PreTrainedModel, device: torch.device, on_host: bool = False) -> PreTrainedModel:
    """A twin of the model for training, its parameters spread over all processes, block by block (FSDP2). The model stays as it
    is, on the host: FSDP does not undo what it does to a module. Masks, a bit a weight, are not spread.

    Args:
        on_host: each process keeps its part on the host too, and a block visits the device while it computes; adapters are then
            updated on the host.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    memo |= {id(value): value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)}
    twin = copy.deepcopy(model, memo)
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if on_host else OffloadPolicy()
    for module in (*find_decoder(twin).blocks, twin):
        fully_shard(module, mesh=mesh, offload_policy=policy)
    vars(twin)["_is_accelerate_prepared"] = True  # or the Trainer would wrap it for DDP as well
    return twin


@torch.no_grad()
def copy_trained(twin: PreTrainedModel, model: PreTrainedModel) -> None:
    """The trained parameters of a sharded twin, whole, into the model."""
    trained = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(whole(trained[name]))
