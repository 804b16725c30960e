"""What is taken from a model's own generation configuration, and how tokens are drawn: with a generator of their own."""

import copy

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from losa.runtime.loop import Generate, attach
from losa.system.doors import shown

COLDEST, HOTTEST = 1e-3, 1e3  # temperatures to draw at; far below, logits over the temperature overflow
TOP_K = 50  # of transformers, where the model names none


def check_arguments(prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Checks arguments of `generate`, before a model is loaded.

    Raises:
        ValueError: an empty prompt, or numbers out of range.
    """
    if not prompt or tokens < 1:
        raise ValueError(f"found {len(prompt)} characters of prompt and {tokens} tokens, expected at least 1 of each")
    if temperature and not COLDEST <= temperature <= HOTTEST:
        raise ValueError(f"temperature is {temperature:g}, expected 0, or a number in [{COLDEST:g}, {HOTTEST:g}]")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, expected a number in [0, 2^63)")


def for_generation(model: PreTrainedModel, config: GenerationConfig | None = None) -> PreTrainedModel:
    """The model, with the same weights, as it generates here: with `config`, or `settings`, and nothing else from its files."""
    twin = copy.copy(model)
    twin.generation_config = config or settings(model)
    if isinstance(vars(twin).get("generate"), Generate):
        attach(twin)  # its own: that of the model goes by the model's configuration
    return twin


def settings(model: PreTrainedModel) -> GenerationConfig:
    """What is taken from a model's `generation_config.json`: the ends of a text, `top_k`, `top_p` and `repetition_penalty`.

    Raises:
        ValueError: one of them cannot be used.
    """
    found, rows = model.generation_config, model.get_input_embeddings().weight.shape[0]
    tokens = {name: getattr(found, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in tokens.items():
        several = value if isinstance(value, list) and value and name == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int and abs(token) < 2**31 for token in several):
            raise ValueError(f"{name} in generation_config.json is {shown(value)}, expected a token's number")
    if tokens["pad_token_id"] is not None and not 0 <= tokens["pad_token_id"] < rows:
        tokens["pad_token_id"] = None  # as models say that they have none
    bounds = {"top_k": (TOP_K, 0, 2**31), "top_p": (1.0, 1e-6, 1), "repetition_penalty": (1.0, 1e-3, 1e3)}
    numbers: dict[str, float] = {}
    for name, (default, least, most) in bounds.items():
        value = getattr(found, name, None)
        value = default if value is None else value
        if not isinstance(value, int | float) or (type(default) is int and type(value) is not int) or not least <= value <= most:
            raise ValueError(f"{name} in generation_config.json is {shown(value)}, expected a number in [{least:g}, {most:g}]")
        numbers[name] = type(default)(value)  # transformers refuses a penalty of 2 and takes 2.0
    return GenerationConfig(**tokens, **numbers)


class _Draw(LogitsProcessor):
    """Draws a token and leaves nothing else to take. With a generator of its own, so that neither a thread beside this one nor
    anything else that draws changes what comes."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chances = scores.float().softmax(-1)
        if not torch.isfinite(chances).all():
            raise FloatingPointError("the model's logits are not finite; its weights are damaged")
        drawn = torch.multinomial(chances, 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def logits_processors(wanted: GenerationConfig, temperature: float, seed: int, device: torch.device) -> list[LogitsProcessor]:
    """What sampling does to the logits: temperature, then `top_k` and `top_p` of what is wanted, then the draw."""
    steps: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
    if wanted.top_k:
        steps.append(TopKLogitsWarper(wanted.top_k))
    if wanted.top_p < 1:
        steps.append(TopPLogitsWarper(wanted.top_p))
    return [*steps, _Draw(seed, device)]
