"""How a model behaves while it is trained: activations checkpointed, no block left out, the outputs of blocks collected."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from losa.adapter import masked_linears
from losa.models import find_decoder


@contextmanager
def activation_checkpointing(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Checkpoints activations block by block while it lasts. Nothing when not `on`."""
    if not on:
        yield
        return
    layers = masked_linears(model).values()
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # newer and older transformers
    getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False})
    for layer in layers:
        layer.keep_effective = True
    try:
        yield
    finally:
        getattr(model, f"{word}_checkpointing_disable")()
        for layer in layers:
            layer.keep_effective = False


@contextmanager
def every_block(model: nn.Module) -> Iterator[None]:
    """While it lasts, no block is left out at random (layerdrop): what is trained must have a gradient in every update."""
    dropping = {module: module.layerdrop for module in model.modules() if getattr(module, "layerdrop", 0)}
    try:
        for module in dropping:
            vars(module)["layerdrop"] = 0.0
        yield
    finally:
        for module, rate in dropping.items():
            vars(module)["layerdrop"] = rate


@contextmanager
def block_outputs(model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """Collects the output of every decoder block while it lasts. Nothing when not wanted."""
    outputs: list[Tensor] = []

    def note(block: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(note) for block in (find_decoder(model).blocks if wanted else [])]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
