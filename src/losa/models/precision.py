"""What a model computes in, where that is not what it is stored in.

A processor without instructions for a 16-bit float multiplies such an order of magnitude more slowly than float32, or two
(docs/LOG.md); many have some for bfloat16 and none for float16. There a model is widened to float32, which is exact, for as long
as it computes, and rounded to what it came in before it is saved or handed back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

NARROW = (torch.bfloat16, torch.float16)


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of a dtype are not slower there than those of float32. Known of the processor, not timed: the same run
    must find the same answer."""
    if device.type != "cpu" or dtype not in NARROW:
        return True
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    mkldnn = torch.ops.mkldnn
    return bool(mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported())


def computing_dtype(stored: torch.dtype, device: torch.device, asked: str = "auto") -> torch.dtype:
    """What a model of dtype `stored` computes in on a device.

    Args:
        asked: the configuration's `dtype`; any other than `auto` is obeyed.
    """
    return torch.float32 if asked == "auto" and not multiplies(stored, device) else stored


def name_of(dtype: torch.dtype) -> str:
    """As configurations write it: `float32`."""
    return str(dtype).removeprefix("torch.")


def tensors_of(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Names of its parameters and buffers of that dtype. Some tables, such as rotary frequencies, are float32 in any model."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if tensor.dtype == dtype]


def cast_(model: PreTrainedModel, names: Sequence[str], dtype: torch.dtype) -> None:
    """Gives parameters and buffers another dtype, in place; what shares one goes on sharing it."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in names:
        named[name].data = named[name].data.to(dtype)


def widen_(model: PreTrainedModel, device: torch.device, asked: str = "auto") -> list[str]:
    """Puts a model into what it computes in, and returns the names of what changed, for `cast_` to put it back. Packed layers
    compute in what they are made for."""
    stored = model.dtype
    dtype = computing_dtype(stored, device, asked)
    names = tensors_of(model, stored) if dtype != stored and getattr(model, "hf_quantizer", None) is None else []
    cast_(model, names, dtype)
    return names


@contextmanager
def computing(model: PreTrainedModel, device: torch.device, asked: str = "auto") -> Iterator[None]:
    """Has a model in what it computes in, while it lasts."""
    stored = model.dtype
    names = widen_(model, device, asked)
    try:
        yield
    finally:
        cast_(model, names, stored)
