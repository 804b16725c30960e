"""What is refused before anything expensive starts: requests, targets, precisions and shares of work that cannot be."""

import logging
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import get_available_reporting_integrations

from losa.allocation import layer_rates
from losa.config import LosaConfig
from losa.data import check_sources
from losa.models import Decoder, check_supported, find_decoder
from losa.models.precision import cast_, tensors_of
from losa.pruning import Pattern, get_pruner
from losa.rotation import find_value_paths
from losa.system import distributed
from losa.system.environment import check_memory
from losa.system.output import check_free

FEW_WINDOWS = 4
LAUNCHER = {  # what `accelerate launch` may ask for and these trainings do not take: its variable, when it does not, what to do
    "ACCELERATE_USE_FSDP": ("false", "FSDP", "leave that out and set shard: true (--shard) instead"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "DeepSpeed", "leave that out and set shard: true (--shard) instead"),
    "ACCELERATE_MIXED_PRECISION": (
        "no", "mixed precision", "add --mixed_precision no to accelerate launch: --dtype says what losa computes in"
    ),
}  # fmt: skip

logger = logging.getLogger(__name__)


def check_parts(config: LosaConfig, processes: int, windows: int | None = None) -> None:
    """Refuses work that several processes cannot share.

    Args:
        windows: of evaluation; None when not known yet.

    Raises:
        ValueError: fewer rows than processes, or rows that do not divide by them.
    """
    calibrating = config.calibration
    assert calibrating.sequences is not None and config.train.batch_size is not None
    for name, count, evenly in (
        ("calibration.sequences", calibrating.sequences, False),
        ("calibration.error_sequences", min(calibrating.error_sequences, calibrating.sequences), False),
        ("reconstruct.sequences", config.reconstruct.sequences, False),
        ("calibration.rmi_sequences", config.importance_sequences or processes, True),
        ("train.batch_size", config.train.batch_size, True),
        ("eval.windows", processes if windows is None else windows, False),
    ):
        if count < processes or (evenly and count % processes):
            expected = f"a multiple of the {processes} processes" if evenly else f"at least one for each of {processes} processes"
            raise ValueError(f"{name} is {count}, expected {expected}")


def check_precision(model: PreTrainedModel) -> None:
    """Trains a float16 checkpoint in bfloat16: in float16, without loss scaling, most of a token's gradient is below the
    smallest number."""
    if model.dtype == torch.float16:
        logger.warning("the checkpoint is float16; training and saving it in bfloat16, as gradients underflow in float16")
        cast_(model, tensors_of(model, torch.float16), torch.bfloat16)


def check_reporting(name: str) -> None:
    """Refuses a service for training curves that transformers does not know, or whose package is not installed.

    Raises:
        ValueError: with those that are.
    """
    found = ["none", "all", *get_available_reporting_integrations()]
    if name not in found:
        raise ValueError(f"train.report_to is {name!r}, expected one of those installed here: {', '.join(found)}")


def check_architecture(model: PreTrainedModel, config: LosaConfig, training: bool) -> Decoder:
    """Refuses what cannot be done with this model, which needs no weights for it, and returns its decoder.

    Raises:
        ValueError: as `check_supported` and `check_decoder`; rotation, activation checkpointing or a dtype that does not suit it.
    """
    check_supported(model)
    decoder = find_decoder(model)
    check_decoder(decoder, config)
    if config.rotate:
        find_value_paths(model)
    if training and config.dtype == "float16":
        raise ValueError("dtype is 'float16', expected bfloat16 or float32: gradients underflow in float16")
    if training and config.train.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ValueError(f"train.gradient_checkpointing is True, which {type(model).__name__} does not support; leave it out")
    return decoder


def check_decoder(decoder: Decoder, config: LosaConfig) -> None:
    """Refuses a target that these blocks cannot meet.

    Raises:
        ValueError: n:m where a layer's in_features is not a multiple of m; blocks to protect that do not exist, or so many that
            the others cannot lose enough.
    """
    pattern = Pattern.parse(config.pattern)
    for name, linear in decoder.linears().items():
        if pattern.structured and linear.in_features % pattern.m:
            found = f"{name} has {linear.in_features} inputs"
            raise ValueError(f"{found}, not a multiple of {pattern.m}; pattern {pattern.n}:{pattern.m} cannot be applied")
    sizes = decoder.sizes()
    if config.protect and max(config.protect) >= len(sizes):
        raise ValueError(f"protect is {config.protect}, expected block numbers below {len(sizes)}, the model's blocks")
    assert config.sparsity is not None
    layer_rates(sizes, sizes, config.sparsity, 0.0, protected=config.protect)


def warn_of_zeros(decoder: Decoder) -> None:
    """Says that a model to be pruned has zeros already: what the tables call dense is then this model."""
    weights = [linear.weight for linear in decoder.linears().values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    if zeros > 0.1:
        logger.warning("the model is %.0f %% zeros already; what is called dense below is this model", 100 * zeros)


def warn_of_little_text(evaluation_ST: Tensor, most: int | None) -> None:
    """Says that perplexity will be a noisy figure: of fewer windows than anyone asked for."""
    count, length = evaluation_ST.shape
    if count < FEW_WINDOWS <= (most or FEW_WINDOWS):
        found = f"{count} window{'s' * (count > 1)} of {length} tokens"
        logger.warning("perplexity will be that of %s only, a noisy figure; --eval-data takes a longer text", found)


def check_request(
    config: LosaConfig, *, training: bool, pruning: bool = True, resume: bool = False, overwrite: bool = False
) -> None:
    """Refuses missing texts and an output directory that holds something else, before any model is loaded.

    Raises:
        ValueError: a text is missing; the output is the source model, or `output.check_free` refuses it.
    """
    check_sources(config, training)
    check_reporting(config.train.report_to if training else "none")
    if pruning and get_pruner(config.pruner).from_training and (config.steps == 1 or not training):
        found = f"steps is {config.steps}" if training else "nothing is trained here"
        raise ValueError(
            f"pruner is {config.pruner!r}, whose scores come from training, but {found}; expected `run` with steps >= 2"
        )
    calibration = config.calibration_sequences * (config.calibration.length or 1)
    check_memory({"train.tokens": 8 * config.train.tokens * training, "calibration.sequences": 8 * calibration})
    for variable, (off, found, way_out) in LAUNCHER.items():
        if os.environ.get(variable, off).lower() != off:
            raise ValueError(f"the accelerate configuration asks for {found}; {way_out}")
    if config.shard and distributed.launched() == 1:
        raise ValueError("shard is True, expected several processes; start losa with torchrun or accelerate launch")
    if config.output is None or not distributed.is_main():
        return
    if config.model and Path(config.output).resolve() == Path(config.model).resolve():
        raise ValueError(f"output {config.output} is the model itself; choose another directory")
    check_free(config.output, overwrite, resume)
