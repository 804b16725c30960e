"""Opening a model, and refusing, in one sentence, what LoSA cannot prune honestly. Its blocks are found in `losa.blocks`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from losa.blocks import (
    BlockInputs,
    Decoder,
    block_inputs,
    block_linears,
    find_decoder,
    logits_by_block,
    on_device,
    place,
    try_blocks,
)
from losa.config import LosaConfig

__all__ = [
    "BlockInputs",
    "Decoder",
    "block_inputs",
    "block_linears",
    "check_supported",
    "find_decoder",
    "load",
    "logits_by_block",
    "max_length",
    "on_device",
    "one_line",
    "place",
    "skeleton",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)  # their weights are three-dimensional and no stacks of matrices


def load(model: str | Path | LosaConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, from safetensors only: no pickle is ever opened. Packed checkpoints open packed.

    Args:
        model: a directory or hub name, dense, sparse or packed; or a configuration that names one, with dtype and trust.

    Raises:
        ValueError: nothing there, or nothing that transformers opens.
    """
    from losa.runtime import plugin  # noqa: F401 - importing it lets transformers open packed checkpoints; it imports this module

    config = model if isinstance(model, LosaConfig) else LosaConfig.from_dict({"model": str(model)})
    trust = {"trust_remote_code": config.trust_remote_code}
    with one_line(config.model):
        tokenizer = AutoTokenizer.from_pretrained(config.model, **trust)
        loaded = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype, use_safetensors=True, **trust)
    return loaded, tokenizer


def skeleton(source: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The dense model without weights, on the meta device.

    Raises:
        ValueError: nothing there, or nothing that transformers knows or LoSA supports.
    """
    with one_line(str(source)):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model.eval()


def check_model(source: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """Refuses what `check_supported` refuses before any weight is loaded; returns the model's skeleton.

    Raises:
        ValueError: as `skeleton` and `check_supported`.
    """
    with one_line(str(source)):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    _check_dense(config, str(source))
    model = skeleton(source, trust_remote_code)
    check_supported(model)
    return model


def _check_dense(config: Any, name: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised; LoSA prunes bf16, fp16 or fp32 weights, so load the original checkpoint")


def _check_directory(model: Path) -> None:
    """Says what a local directory lacks, where transformers would guess or look on the hub.

    Raises:
        ValueError: a path that does not exist, an adapter, an interrupted run, or something else that is no model.
    """
    from losa.checkpoint import work_dir  # it imports this module

    if not model.exists():
        if model.is_absolute() or str(model).startswith((".", "~")):
            raise ValueError(f"there is no model at {model}")
        return  # a name on the hub
    if (model / "config.json").is_file():
        pickled = sorted(model.glob("pytorch_model*.bin"))
        if pickled and not any(model.glob("*.safetensors")):
            convert = f"AutoModelForCausalLM.from_pretrained('{model}', use_safetensors=False).save_pretrained('{model}')"
            raise ValueError(f"{model} has its weights in {pickled[0].name}, a pickle; LoSA opens none, so convert it: {convert}")
        return
    if (model / "adapter_config.json").is_file():
        raise ValueError(
            f"{model} is an adapter, not a model; merge it into its base first (peft's merge_and_unload) and save that"
        )
    if work_dir(model).is_dir():
        raise ValueError(f"{model} holds an interrupted run, not a model yet; finish it with --resume")
    raise ValueError(f"{model} is not the directory of a model: it has no config.json")


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Turns what transformers says about a model that does not open into one line with its name.

    Raises:
        ValueError: that line; or, before anything is opened, what a local directory lacks.
    """
    _check_directory(Path(name))
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot open the model {name!r}: {' '.join(str(error).split())}") from error


def check_supported(model: PreTrainedModel) -> None:
    """Refuses, in one sentence, what LoSA cannot prune honestly.

    Raises:
        ValueError: quantised base, Conv1D, fused experts, encoder-decoder, multi-modal, weights that are not finite or not float,
            blocks that cannot be run alone.
    """
    kind = type(model).__name__
    _check_dense(model.config, kind)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder; LoSA supports causal language models")
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"{kind} is multi-modal; LoSA takes text models, so load its language model alone")
    decoder = find_decoder(model)
    for name, module in decoder.blocks.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape[1:]) > 1 and not isinstance(module, CONVOLUTIONS):
                found = f"{decoder.name}.{name}.{own} {tuple(parameter.shape)}"
                what = "fused experts" if "expert" in found else "a stack of matrices"
                raise ValueError(f"{kind} keeps {what} in {found}; LoSA needs one nn.Linear per matrix")
    for name, linear in decoder.linears().items():
        if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
            raise ValueError(f"{name} is a {type(linear).__name__} of {linear.weight.dtype}, expected a plain float nn.Linear")
        real = linear.weight.device.type != "meta" and not isinstance(linear.weight.data, FakeTensor)
        if real and not torch.isfinite(linear.weight).all():
            raise ValueError(f"{name} holds NaN or infinite weights; the checkpoint is damaged")
    try_blocks(model)
    for name, module in decoder.blocks.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise ValueError(f"{kind} is an encoder: in {decoder.name}.{name}, tokens see later ones; LoSA needs a causal model")


def max_length(config: Any) -> int:
    """Longest window the model allows, in tokens (`max_position_embeddings`), or 2048 where it does not say."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2048)
