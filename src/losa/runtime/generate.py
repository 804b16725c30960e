"""`losa generate`: a model goes on with a text, token by token."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from losa.models import max_length


@dataclass(frozen=True)
class Generated:
    """The continuation, and how long it took."""

    text: str
    tokens: int
    seconds: float


class _Pieces(TextStreamer):
    """Hands every piece of finished text on."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, receive: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.receive = receive

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `generate` whenever a word is complete."""
        self.receive(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    receive: Callable[[str], None],
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generated:
    """Continues `prompt`, handing text to `receive` as it comes.

    Args:
        tokens: at most so many new ones, and no more than fit into the model's window.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        seed: of the draw.

    Raises:
        ValueError: an empty prompt, one that fills the window, or numbers out of range.
    """
    if not prompt or tokens < 1 or temperature < 0:
        raise ValueError(
            f"found {len(prompt)} characters, {tokens} tokens, temperature {temperature}; expected a prompt, >= 1 and >= 0"
        )
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    window, given = max_length(model.config), inputs["input_ids"].shape[1]
    if given >= window:
        raise ValueError(f"the prompt has {given} tokens, the model's window {window}; shorten it")
    torch.manual_seed(seed)
    start = time.perf_counter()
    pieces: list[str] = []

    def both(piece: str) -> None:
        pieces.append(piece)
        receive(piece)

    ids = model.generate(**inputs, max_new_tokens=min(tokens, window - given), streamer=_Pieces(tokenizer, both), **sampling)
    return Generated("".join(pieces), ids.shape[1] - given, time.perf_counter() - start)
