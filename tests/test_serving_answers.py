"""How answers of `losa serve` end, and what is made of them, in streams and without: an engine of the test says the tokens."""

import asyncio
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from test_serving import MODEL
from transformers import AutoTokenizer, GenerationConfig

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from losa.serving import app, batches

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{{ '<|im_start|>assistant\\n' }}"
BROKEN = '<tool_call> {"name": x}'


class Engine:
    """Says one text, token by token, as far as it is asked to."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.background_thread_status = SimpleNamespace(fatal_error=None)
        self.output_router = SimpleNamespace(_lock=nullcontext(), result_handlers={})

    def register_result_handler(self, request_id, receive):
        self.receive = receive

    def add_request(self, ids, request_id, max_new_tokens, eos_token_id, streaming):
        for count, token in enumerate(self.tokens, 1):
            ended = token == eos_token_id or token in (eos_token_id if isinstance(eos_token_id, list) else [])
            status = RequestStatus.FINISHED if ended or count in (max_new_tokens, len(self.tokens)) else RequestStatus.DECODING
            output = GenerationOutput(request_id, generated_tokens=self.tokens[:count], status=status)
            asyncio.get_running_loop().call_soon(self.receive, output)
            if status == RequestStatus.FINISHED:
                return

    def cancel_request(self, request_id):
        pass


def ask(text, kind="qwen3", completion=False, **body):
    """The answers of a model of that kind that says `text`, then the tokenizer's EOS, then more; not streamed, and streamed.

    Returns:
        content, reasoning, names of tools, finish_reason; twice.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    engine = Engine([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, 9, 9])
    running = batches.Batches.__new__(batches.Batches)
    running.engine = running._cb = engine
    running.window, running.device = 256, "cpu"
    defaults = GenerationConfig(eos_token_id=tokenizer.eos_token_id if completion else 7, do_sample=False)
    model = SimpleNamespace(
        config=SimpleNamespace(model_type=kind), generation_config=defaults, init_continuous_batching=None, name_or_path="m"
    )
    handler = (app._Completion if completion else app._Chat)(app._OneModel("m", model, tokenizer), app._OneState(running))
    body |= {"prompt": "hi"} if completion else {"messages": [{"role": "user", "content": "hi"}]}

    async def both():
        whole = await handler.handle_request(dict(body), "whole")
        stream = await handler.handle_request({**body, "stream": True}, "stream")
        return json.loads(whole.body)["choices"], [event async for event in stream.body_iterator]

    whole, events = asyncio.run(both())
    lines = [line for line in "".join(events).splitlines() if line.startswith("data: {")]
    return said(whole), said([choice for line in lines for choice in json.loads(line.removeprefix("data: "))["choices"]])


def said(choices):
    parts = [choice.get("message") or choice.get("delta") or choice for choice in choices]
    content = "".join(part.get("content") or part.get("text") or "" for part in parts)
    reasoning = "".join(part.get("reasoning_content") or "" for part in parts)
    tools = [call["function"]["name"] for part in parts for call in part.get("tool_calls") or []]
    return content.strip(), reasoning.strip(), tools, choices[-1]["finish_reason"]


@pytest.mark.parametrize("text", [BROKEN, BROKEN + "</tool_call> so", '<tool_call> {"name": 3, "arguments": {}}'])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_tool_call_that_cannot_be_read_is_said_as_it_is(text, kind):
    assert ask(text, kind) == ((text, "", [], "stop"),) * 2


def test_what_a_parser_reads_in_front_of_a_broken_call_stays_read():
    call = '<tool_call> {"name": "f", "arguments": {}}</tool_call>'
    assert ask(call) == (("", "", ["f"], "tool_calls"),) * 2
    assert ask(f"<think> so</think> {call} {BROKEN}") == ((BROKEN, "so", ["f"], "tool_calls"),) * 2
    assert ask(f"<think> so</think> {BROKEN}") == ((BROKEN, "so", [], "stop"),) * 2
    assert ask(f"So {BROKEN}")[0] == (f"So {BROKEN}", "", [], "stop")
    (text, *_, reason), streamed = ask(BROKEN, max_tokens=10)
    assert BROKEN.startswith(text) and "{" in text and reason == "length" and streamed[0] == text


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_an_answer_ends_with_what_the_tokenizer_ends_a_text_with(kind):
    """Also where `generation_config.json` names another token, as `losa generate` has it."""
    assert ask("one two", kind) == (("one two", "", [], "stop"),) * 2


@pytest.mark.parametrize("options", [{}, {"kind": "llama"}, {"completion": True}], ids=["parser", "chat", "completion"])
def test_an_answer_says_why_it_ended(options):
    """Only the limit is "length": not a stop string that the last token completes, nor an EOS that is the last token."""
    tokens = len(AutoTokenizer.from_pretrained(MODEL)("one two three", add_special_tokens=False)["input_ids"])
    for more, expected in (
        ({"max_tokens": tokens}, ("one two three", "", [], "length")),
        ({"max_tokens": tokens, "stop": ["three"]}, ("one two", "", [], "stop")),
        ({"max_tokens": tokens + 1}, ("one two three", "", [], "stop")),
    ):
        assert ask("one two three", **options, **more) == (expected,) * 2


def test_stop_strings_are_those_of_the_answer_not_of_its_reasoning():
    assert ask("<think> one two</think> so two three", stop="two") == (("so", "one two", [], "stop"),) * 2
