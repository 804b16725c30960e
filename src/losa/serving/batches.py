"""Continuous batching as transformers does it, with what its server leaves out: requests that draw each in their own way, and
texts that stop where the client said.

Every step is one forward of all requests that are under way. transformers takes the likeliest token of each; a request that
draws, or whose model penalises repetition, brings logits processors of its own, those of `losa generate`.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar
from uuid import uuid4

import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.cli.serving.utils import (
    CBGenerateManager,
    CBStreamer,
    CBWorkerDeadError,
    ToolCall,
    _StreamError,
    response_events_to_chunks,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from losa.models import max_length
from losa.runtime.sampling import logits_processors
from losa.serving.requests import refused

PAGE = 256  # tokens of the cache that a request gets at once
BATCH = 512  # tokens of one forward: a longer prompt takes several, and others decode in between
ROOM = 8  # requests whose whole windows the cache has room for, as far as CACHE_BYTES go; more share the room, or wait
CACHE_BYTES = 1 << 28


class Batches(CBGenerateManager):
    """The requests for one model, computed by a thread of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(_cache(model))
        self.window, self.device = max_length(model.config), model.device
        greedy = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, do_sample=False, use_cache=False)
        self.engine = model.init_continuous_batching(greedy, self._cb_config)
        self.engine.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Own()]))
        self.engine.logit_processor.tensors_required = 1
        self.engine.start()
        self._cb = self.engine

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> "tuple[asyncio.Queue[Any], Streamer]":
        """As transformers' own; the text ends in front of the first of `gen_config.stop_strings`, and a parser passes on what it
        cannot read.

        `gen_config.max_new_tokens` is None once an answer has ended otherwise than by that number: transformers' handlers tell
        "length" from "stop" by it.

        Raises:
            HTTPException: 400, the prompt is empty or fills the window.
        """
        self._check_alive(request_id)
        ids = list(inputs["input_ids"])
        if not 0 < len(ids) < self.window:
            raise refused(
                f"the prompt has {len(ids)} tokens, expected at least 1 and fewer than the model's window, {self.window}"
            )
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, self.window - len(ids))
        unique = f"{request_id}-{uuid4().hex}"  # what clients call their requests need not be
        parser = response_parser and _Patient(response_parser)
        streamer = Streamer(self.engine, unique, processor._tokenizer, gen_config, parser)
        self.engine.register_result_handler(unique, streamer.receive)
        steps = _steps(gen_config, self.device)
        self.engine.add_request(
            ids,
            request_id=unique,
            max_new_tokens=gen_config.max_new_tokens,
            eos_token_id=gen_config.eos_token_id,
            streaming=True,
            **({"steps": steps} if steps else {}),
        )
        return streamer.queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """As transformers' own; the text ends in front of the first of `gen_config.stop_strings`."""
        _, tokens = await self.whole(model, processor, inputs, gen_config, request_id)
        text = cut(processor.decode(tokens, skip_special_tokens=True), gen_config.stop_strings or [])
        return text, len(inputs["input_ids"]), tokens

    async def whole(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, parser: Any = None
    ) -> tuple[list[Any], list[int]]:
        """All that a stream says, and the tokens of it.

        Raises:
            RuntimeError: the engine failed.
        """
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id, parser)
        said = []
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, _StreamError):
                    dead = self.engine.background_thread_status.fatal_error is not None
                    raise CBWorkerDeadError(item.msg) if dead else RuntimeError(item.msg)
                said.append(item)
        except asyncio.CancelledError:
            streamer.cancel()
            raise
        return said, streamer.tokens

    def stop(self) -> None:
        """Ends the thread; requests that are under way fail."""
        self.engine.stop(block=True, timeout=5, hard_stop=True)


class Streamer(CBStreamer):
    """What a request has said so far.

    Attributes:
        queue: pieces of text, then None; whatever could be the beginning of a stop string is held back until it is known.
        tokens: the ids, with those of a stop string.
    """

    def __init__(self, engine: Any, request_id: str, tokenizer: Any, config: Any, parser: Any) -> None:
        self.config, self.stops, self.held, self.open, self.tokens = config, config.stop_strings or [], "", True, list[int]()
        named = config.eos_token_id
        self.ends = named if isinstance(named, list) else [named]
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.raw: asyncio.Queue[Any] = asyncio.Queue()
        super().__init__(engine, request_id, tokenizer, asyncio.get_running_loop(), self.raw, parser)
        self._queue = self.raw

    def receive(self, output: Any) -> None:
        """Takes what the engine has made of the request; called on the event loop, token by token."""
        if not self.open:
            return
        self.tokens = said = output.generated_tokens
        if said and said[-1] in self.ends:  # no text, though a parser is shown special tokens as well
            self.config.max_new_tokens = None
            output = replace(output, generated_tokens=said[:-1])
        try:
            self.put(output)
            self.total_tokens = len(self.tokens)
            if output.error is None and output.is_finished():
                self.end()
            while self.open and not self.raw.empty():
                self._pass(self.raw.get_nowait())
        except Exception as error:  # of a decoder or a parser: the client hears of it, and others go on
            self._close(_error(error))
            self.cancel()
        if self.open and output.error is not None:
            self._close(_error(output.error))

    def cancel(self) -> None:
        """Has the engine forget the request."""
        self.open = False
        super().cancel()
        with self._cb.output_router._lock:
            self._cb.output_router.result_handlers.pop(self._request_id, None)

    def _pass(self, item: Any) -> None:
        if type(item) is not str:  # the end, or what a parser has made of the text
            self._say(self.held)
            self.held = ""
            self._close(None) if item is None else self.queue.put_nowait(item)
            return
        text = self.held + item
        if (end := cut(text, self.stops)) != text:
            self._say(end)
            self.config.max_new_tokens = None
            self._close(None)
            self.cancel()
            return
        kept = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._say(text[: len(text) - kept])
        self.held = text[len(text) - kept :]

    def _say(self, text: str) -> None:
        if text:
            self.queue.put_nowait(text)

    def _close(self, last: Any) -> None:
        self.open = False
        self.queue.put_nowait(last)


class _Patient:
    """A parser of transformers; from where it fails on what a model has written, the text is passed on as it is."""

    def __init__(self, parser: Any) -> None:
        self.parser, self.initial_events, self.open = parser, parser.initial_events, True
        self.unsaid = ""  # what the parser has taken since it last made something of it

    def feed(self, text: str) -> list[dict[str, Any]]:
        """The events that more text leads to."""
        self.unsaid += text
        return self._events(lambda: self.parser.feed(text))

    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """No message, and the last events."""
        return {}, self._events(lambda: self.parser.finalize()[1])

    def _events(self, step: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if self.open:
            try:
                events = step()
                for item in response_events_to_chunks(events):  # fails on a call without a name
                    if isinstance(item, ToolCall) and not isinstance(item.name, str):
                        raise TypeError("a call of something that is no name")
            except Exception:  # whatever a model can write: broken JSON, a call cut off by the limit of tokens
                self.open = False
        if not self.open:
            events = [{"type": "region_chunk", "field": "content", "text": self.unsaid}]
        settled = False
        for event in events:  # the mark that opens a region of JSON is text if the region cannot be read
            if event["type"] != "region_chunk":
                settled = event["type"] == "region_close"
            elif not event.get("dirty"):
                settled = True
        if settled:
            self.unsaid = ""
        return events


def cut(text: str, stops: list[str]) -> str:
    """What is in front of the first stop string."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _error(found: object) -> _StreamError:
    """As transformers puts it between quotation marks of JSON."""
    return _StreamError(json.dumps(str(found))[1:-1])


def _steps(config: Any, device: torch.device) -> LogitsProcessorList:
    """What a request's logits go through before the likeliest token is taken; nothing, in plain greedy decoding."""
    steps = LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        steps.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.do_sample:
        steps.extend(logits_processors(config, config.temperature, config.seed, device))
    return steps


class _Own(ContinuousBatchingLogitsProcessor):
    """Takes each request's logits through the processors that it brought."""

    supported_kwargs: ClassVar[dict[str, type]] = {"steps": LogitsProcessorList}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self.states: list[Any] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing of it is in tensors."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Notes whose logits come next, row by row."""
        self.states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self.states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Logits `[requests, vocabulary]`."""
        own = [(row, steps) for row, state in enumerate(self.states) if (steps := state.logit_processor_kwargs.get("steps"))]
        if not own:
            return scores
        scores = scores.float()
        for row, steps in own:
            state = self.states[row]
            ids = torch.tensor([[*state.initial_tokens, *state.generated_tokens]], device=scores.device)
            scores[row] = steps(ids, scores[row : row + 1])[0]
        return scores


def _cache(model: PreTrainedModel) -> ContinuousBatchingConfig:
    """Room for the keys and values of `ROOM` whole windows, within `CACHE_BYTES`, and of one window in any case."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    page_bytes = 2 * PAGE * config.num_hidden_layers * heads * width * model.dtype.itemsize
    window = -(-max_length(config) // PAGE)
    pages = max(window, min(ROOM * window, CACHE_BYTES // page_bytes))
    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=pages + 1,
        max_batch_tokens=BATCH,
        max_memory_percent=0.9,
        use_async_batching=False,  # `_Own` notes whose turn it is
        use_cuda_graph=False,
    )
