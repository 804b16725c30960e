"""The server: transformers' handlers for chat, completions and the list of models, with one model that is there from the start.

transformers' own server would load any model of the hub that a request names, and answers 500 to what a client got wrong; here
its other routes are left out, and requests are checked first.
"""

from collections.abc import AsyncIterator
from inspect import signature
from random import SystemRandom
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from openai.types import CompletionUsage
from starlette.exceptions import HTTPException
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerationState, ReasoningText, ToolCall, build_response_parser

from losa.runtime.generate import stop_tokens
from losa.runtime.sampling import COLDEST, HOTTEST, settings
from losa.serving.batches import Batches
from losa.serving.requests import Chat, Completion, check, refused
from losa.system.doors import shown

# What transformers is not told: it would seed whatever else draws, and a penalty of zero, the only one that is let through, would
# take the place of the model's own `repetition_penalty`.
KEPT = ("seed", "frequency_penalty", "presence_penalty")
# What `chat_template_kwargs` may not name: all that rendering and tokenizing take themselves. A client's own template could keep
# the server busy without end.
OPTIONS = {*signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "load_audio_from_video"} - {"documents"}
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")


def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[FastAPI, Batches]:
    """The application, and the thread behind it.

    Raises:
        ValueError: the tokenizer or `generation_config.json` cannot be used.
    """
    if not tokenizer.is_fast:
        raise ValueError("the model's tokenizer has no tokenizer.json, which streaming needs")
    model.generation_config = _defaults(model)
    batches = Batches(model)
    manager, state = _OneModel(name, model, tokenizer), _OneState(batches)
    app = build_server(manager, _Chat(manager, state), _Completion(manager, state), None, None, None, state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    return app, batches


def _defaults(model: PreTrainedModel) -> GenerationConfig:
    """What holds where a request says nothing: the model's own settings, also whether it draws and how freely."""
    found, defaults = model.generation_config, settings(model)
    temperature = getattr(found, "temperature", None)
    temperature = 1.0 if temperature is None else temperature
    defaults.do_sample = bool(getattr(found, "do_sample", False)) and temperature != 0
    if defaults.do_sample and not (isinstance(temperature, int | float) and COLDEST <= temperature <= HOTTEST):
        raise ValueError(
            f"temperature in generation_config.json is {temperature}, expected a number in [{COLDEST:g}, {HOTTEST:g}]"
        )
    defaults.temperature = float(temperature)  # transformers draws by no whole number
    return defaults


class _OneModel(ModelManager):
    """A model that is loaded, and no other."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._loaded = model, tokenizer
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is."""
        return model_id

    def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
        return self._loaded[0]

    def _load_processor(self, *_: Any, **__: Any) -> PreTrainedTokenizerBase:
        return self._loaded[1]


class _OneState(GenerationState):
    """The requests of that model."""

    def __init__(self, batches: Batches) -> None:
        super().__init__(continuous_batching=True)
        self._cb_manager: Batches = batches

    def get_manager(self, model_id: str, use_cb: bool = False) -> Batches:
        """There is one."""
        return self._cb_manager


class _Checked(BaseHandler):
    """What both kinds of requests have in common."""

    kind: Any

    def _validate_request(self, body: dict[str, Any]) -> None:
        unknown = body.keys() - getattr(self._valid_params_class, "__mutable_keys__", body.keys())
        if unknown:  # transformers' own answer is 422
            raise refused(f"{shown(min(unknown))} is no field of such a request; leave it out")
        super()._validate_request(body)
        check(body, self.kind)

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        seed = body.get("seed")
        passed = {name: value for name, value in body.items() if name not in KEPT}
        config = super()._build_generation_config(passed, model_generation_config, use_cb=use_cb)
        config.seed = SystemRandom().randrange(2**63) if seed is None else seed
        if body.get("temperature"):
            config.do_sample, config.temperature = True, max(float(body["temperature"]), COLDEST)
        stop = body.get("stop") or []
        config.stop_strings = [stop] if isinstance(stop, str) else stop
        return config

    def _streaming(self, *arguments: Any, **named: Any) -> Any:
        response = super()._streaming(*arguments, **named)
        response.body_iterator = _ended(response.body_iterator)
        return response


class _Completion(_Checked, CompletionHandler):
    kind = Completion


class _Chat(_Checked, ChatCompletionHandler):
    kind = Chat

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        tokenizer = self.model_manager._loaded[1]
        if not tokenizer.chat_template:
            raise refused("the model has no chat template; ask /v1/completions")
        options = body.get("chat_template_kwargs") or {}
        if taken := options.keys() & OPTIONS:
            raise refused(f"chat_template_kwargs: {shown(min(taken))} is no variable of the model's chat template; leave it out")
        try:
            messages = self.get_processor_inputs_from_messages(
                body["messages"], self.model_manager.get_model_modality(None, tokenizer)
            )
            tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tools=body.get("tools"), tokenize=False, **options
            ).encode()  # half of a character is no text
        except Exception as error:  # a template is a program, and fails in its own ways
            raise refused(f"the model's chat template does not take these messages: {error}") from error

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        model, tokenizer = self.model_manager._loaded
        config.eos_token_id = stop_tokens(model, tokenizer, answering=True)
        return config

    async def _non_streaming(
        self,
        request_id: str,
        model: Any,
        processor: Any,
        model_id: str,
        inputs: Any,
        gen_config: Any,
        gen_manager: Any,
        tools: Any = None,
    ) -> Any:
        """As transformers' own, whose parser fails on what it cannot read. Where there is one, this is what a stream says."""
        parser = build_response_parser(processor, model, inputs["input_ids"], tools=tools)
        if parser is None:
            return await super()._non_streaming(
                request_id, model, processor, model_id, inputs, gen_config, gen_manager=gen_manager
            )
        said, tokens = await gen_manager.whole(model, processor, inputs, gen_config, request_id, parser)
        calls = [
            {
                "id": f"{request_id}_tool_call_{n}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for n, call in enumerate(item for item in said if isinstance(item, ToolCall))
        ]
        given = len(inputs["input_ids"])
        answer = self._build_completion(
            request_id,
            "".join(item for item in said if type(item) is str).strip(),
            model_id,
            finish_reason="tool_calls" if calls else "stop" if gen_config.max_new_tokens is None else "length",
            usage=CompletionUsage(prompt_tokens=given, completion_tokens=len(tokens), total_tokens=given + len(tokens)),
            tool_calls=calls or None,
            reasoning_content="".join(item for item in said if isinstance(item, ReasoningText)).strip() or None,
        )
        return JSONResponse(answer)


async def _ended(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events of a stream, and the line that ends one in OpenAI's protocol."""
    async for event in events:
        yield event
    yield "data: [DONE]\n\n"


async def _answer(_: Request, error: Any) -> JSONResponse:
    """What was wrong with a request, as OpenAI's clients expect it."""
    if isinstance(error, RequestValidationError):
        status, said = 400, f"the body is not a JSON object: {error.errors()[0]['msg']}"
    else:
        status, said = error.status_code, str(error.detail)
    return JSONResponse({"error": {"message": said, "type": "invalid_request_error", "code": status}}, status)
