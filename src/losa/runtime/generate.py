"""`losa generate` and `losa chat`: a model goes on with a text, or answers in turns, token by token.

A tokenizer with a chat template belongs to a model that was taught to answer: it is asked in the template's form, and what it was
taught to end an answer with ends it. Any other model, and any with `raw`, goes on with the text as it is.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import BatchEncoding, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from losa.models import max_length
from losa.runtime.clock import Clock
from losa.runtime.decode import road
from losa.runtime.sampling import check_arguments, for_generation, logits_processors

Message = dict[str, str]  # `role` (system, user or assistant) and `content`


@dataclass(frozen=True)
class Generated:
    """The continuation, how long it took, and by which road (`decode.road`): `first`, seconds until the first token, and `rate`,
    tokens per second after it, both as `losa bench` has them; None where there are too few tokens to say."""

    text: str
    tokens: int
    seconds: float
    first: float | None
    rate: float | None
    road: str


class _Pieces(TextStreamer):
    """Hands every piece of finished text on, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, receive: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.receive, self.pieces, self.clock = receive, list[str](), Clock()

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with every token."""
        self.clock.put(value)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `generate` whenever a word is complete."""
        self.pieces.append(text)
        self.receive(text)


def is_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer says how turns of a conversation are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message]) -> BatchEncoding:
    """A text as it is, or turns of a conversation in the template's form, up to where the answer begins.

    Raises:
        ValueError: the template does not take these turns.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt, return_tensors="pt")
    try:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in prompt)
        raise ValueError(f"the chat template refuses the roles {roles}: {error}") from error


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answering: bool) -> list[int]:
    """What ends a text: all that the generation configuration names. What ends an answer: also what the tokenizer ends a text
    with, which is the end of a turn in most chat templates, and missing from many a generation configuration."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    tokens = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id if answering else None}
    return sorted(token for token in tokens if token is not None)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[Message],
    receive: Callable[[str], None],
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = True,
) -> Generated:
    """Continues `prompt`, handing text to `receive` as it comes. Stopped by Ctrl-C, it returns what there is.

    Args:
        prompt: a text, or turns of a conversation.
        tokens: at most so many new ones, and no more than fit into the model's window.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        seed: of the draw, which has its own generator: threads that share a model draw what each would draw alone.
        raw: a text is continued as it is; False asks it as a question, in the form of the chat template, where there is one.

    Raises:
        ValueError: an empty prompt, one that fills the window, or numbers out of range.
    """
    check_arguments(
        "".join(turn["content"] for turn in prompt) if isinstance(prompt, list) else prompt, tokens, temperature, seed
    )
    if isinstance(prompt, str) and not raw and is_chat(tokenizer):
        prompt = [{"role": "user", "content": prompt}]
    inputs = encode(tokenizer, prompt).to(model.device)
    inputs.pop("token_type_ids", None)
    window, given = max_length(model.config), inputs["input_ids"].shape[1]
    if given >= window:
        raise ValueError(f"the prompt has {given} tokens, the model's window {window}; shorten it")
    if not given:
        raise ValueError("the prompt has no tokens; expected some text")
    model, streamer = for_generation(model), _Pieces(tokenizer, receive)
    wanted = model.generation_config
    assert wanted is not None
    stop = stop_tokens(model, tokenizer, not isinstance(prompt, str))
    wanted.eos_token_id, wanted.max_new_tokens = stop or None, min(tokens, window - given)
    if wanted.pad_token_id is None:
        wanted.pad_token_id = stop[0] if tokenizer.pad_token_id is None and stop else tokenizer.pad_token_id
    draw = logits_processors(wanted, temperature, seed, model.device) if temperature else []
    clock = streamer.clock
    with suppress(KeyboardInterrupt):  # what was shown by then is the answer
        model.generate(**inputs, streamer=streamer, logits_processor=LogitsProcessorList(draw))
    seconds, made = time.perf_counter() - clock.times[0], max(len(clock.times) - 2, 0)
    first, rate = clock.first if made else None, clock.rate if made > 1 else None
    return Generated("".join(streamer.pieces), made, seconds, first, rate, road(model))


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Iterable[str],
    receive: Callable[[str], None],
    *,
    system: str | None = None,
    tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    done: Callable[[Generated], None] = lambda answer: None,
    fail: Callable[[ValueError], None] | None = None,
) -> list[Message]:
    """Answers questions in turn, each in the knowledge of the turns before. `/clear` forgets them, `/exit` ends.

    Where the turns grow beyond the model's window, the oldest are forgotten.

    Args:
        system: what the model is told before the first turn.
        tokens: of an answer, at most.
        done: called after every answer.
        fail: called with what is wrong with a question that alone fills the window, or that the template refuses; it is
            forgotten.

    Returns:
        The turns that were not forgotten.

    Raises:
        ValueError: the tokenizer has no chat template, or there is no `fail` to tell of a question that cannot be asked.
    """
    if not is_chat(tokenizer):
        raise ValueError(
            f"the tokenizer of {model.config.name_or_path} has no chat template, so the model was not taught to answer; "
            "losa generate goes on with a text"
        )
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    turns: list[Message] = []
    for question in map(str.strip, questions):
        if question in ("/exit", "/quit"):
            break
        if question == "/clear":
            turns = []
        if not question or question == "/clear":
            continue
        asked = [*turns, {"role": "user", "content": question}]
        room = max_length(model.config) - min(tokens, max_length(model.config) // 4)
        try:
            while len(asked) > 1 and encode(tokenizer, opening + asked)["input_ids"].shape[1] > room:
                del asked[:2]  # a question and its answer
            answer = generate(model, tokenizer, opening + asked, receive, tokens, temperature, seed + len(asked))
        except ValueError as error:
            if fail is None:
                raise
            fail(error)
            continue
        turns = [*asked, {"role": "assistant", "content": answer.text.strip()}]
        done(answer)
    return opening + turns
