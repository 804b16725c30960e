"""`losa serve`: a real process, asked by OpenAI's own client."""

import asyncio
import copy
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from types import SimpleNamespace

import processes
import psutil
import pytest
import torch
from test_cli import assert_one_line_error, losa_main
from transformers import AutoModelForCausalLM, AutoTokenizer

import losa
from losa.models import find_decoder
from losa.runtime.files import pack_checkpoint
from losa.runtime.generate import generate
from losa.serving import start

MODEL = resources.files("losa") / "demo_assets/novels-4m"
WINDOW = 256
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }} {% endfor %}{% if add_generation_prompt %}Once{% endif %}"
)
PROMPTS = ["Once upon a time", "Lily", "The dog ran to", "Tom and Sam", "One day, a bird", "In the park", "Mom said", "The cat"]
TOKENS = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not start.is_serve_available():
        pytest.skip('needs pip install "losa[serve]"')
    import openai

    folder = tmp_path_factory.mktemp("serving")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    for linear in find_decoder(model).linears().values():
        linear.weight.data[linear.weight.abs() < linear.weight.abs().float().quantile(0.1)] = 0
    model.save_pretrained(folder / "sparse")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "sparse")
    pack_checkpoint(folder / "sparse", folder / "packed")
    name = str(folder / "packed")
    process, url = serve(folder / "log", name)
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    yield SimpleNamespace(client=client, url=url, name=name, process=process, opened=losa.load(name))
    process.terminate()
    process.join(30)


def serve(log, *arguments):
    """A server on a free port, and its address once it listens."""
    process = processes.start(log, processes.losa, ["serve", *arguments, "--port", "0"])
    for _ in range(600):
        said = log.read_text() if log.exists() else ""
        if " at http" in said:
            return process, said.split(" at ")[1].split()[0]
        assert process.is_alive(), said
        time.sleep(0.1)
    raise AssertionError(f"not up after a minute: {said}")


def complete(server, prompt, tokens=TOKENS, **options):
    options = {"temperature": 0, **options}
    return server.client.completions.create(model=server.name, prompt=prompt, max_tokens=tokens, **options)


def alone(server, prompt, tokens=TOKENS):
    """How `generate` continues a prompt, as far as its choices are clear, and in how many tokens. Where requests share a forward,
    sums are rounded in another order: where the two best logits are within two last bits of bfloat16, either may win."""
    model, tokenizer = server.opened
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": tokens, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    done = model.generate(input_ids=ids, **options)
    clear = 0
    for logits in done.logits:
        best, second = logits[0].float().topk(2).values
        if best - second <= 2 * best.abs() * 2**-7:
            break
        clear += 1
    return tokenizer.decode(done.sequences[0, ids.shape[1] :][:clear], skip_special_tokens=True), clear


def test_eight_clients_at_once_get_what_generate_says(server):
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        answers = list(clients.map(lambda prompt: complete(server, prompt), PROMPTS))
    compared = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        said, clear = alone(server, prompt)
        compared += clear
        assert answer.choices[0].text.startswith(said)
        assert answer.usage.completion_tokens == TOKENS
        assert answer.choices[0].finish_reason == "length"
    assert compared > 60


def test_chat_and_streams_say_the_same(server):
    said = complete(server, "Tell me of Lily. Once").choices[0].text
    assert said.startswith(alone(server, "Tell me of Lily. Once")[0])
    asked = {
        "model": server.name,
        "messages": [{"role": "user", "content": "Tell me of Lily."}],
        "max_tokens": TOKENS,
        "temperature": 0,
    }
    answer = server.client.chat.completions.create(**asked)
    assert (answer.choices[0].message.content, answer.choices[0].message.role) == (said, "assistant")
    pieces = list(server.client.chat.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said
    assert len(pieces) > 10
    assert pieces[-1].choices[0].finish_reason == "length"
    pieces = list(complete(server, "Tell me of Lily. Once", stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == said


def test_a_stream_ends_as_the_protocol_says(server):
    body = {"model": server.name, "prompt": "Once", "max_tokens": 2, "stream": True}
    status, said = post(server, "/v1/completions", json.dumps(body).encode())
    assert status == 200
    assert said.endswith("data: [DONE]\n\n")


def test_texts_stop_in_front_of_what_was_asked(server):
    said = complete(server, "Once upon a time").choices[0].text
    stop = said[30:36]
    expected = said[: said.index(stop)]
    for stops in (stop, ["nowhere to be found", stop, "§"]):
        answer = complete(server, "Once upon a time", stop=stops)
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < TOKENS
        pieces = list(complete(server, "Once upon a time", stop=stops, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == expected
    assert complete(server, "Once upon a time", stop=said[-3:] + "?").choices[0].text == said  # held back to the end, and said


def test_requests_draw_each_in_their_own_way(server):
    asked = [{"temperature": 0}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.5, "seed": 2}]
    asked.append({"temperature": 1.5, "top_p": 0.001, "seed": 3})  # nothing but the likeliest is left
    with ThreadPoolExecutor(len(asked)) as clients:
        greedy, first, other, narrow = (
            answer.choices[0].text for answer in clients.map(lambda options: complete(server, "Lily", **options), asked)
        )
    assert len({greedy, first, other}) == 3
    assert greedy.startswith(alone(server, "Lily")[0])
    assert narrow.startswith(alone(server, "Lily")[0])
    again = [complete(server, "Lily", temperature=1.5, seed=1).choices[0].text for _ in range(2)]
    assert again[0] == again[1]


def test_the_model_is_listed_and_nothing_else_is_served(server):
    assert [model.id for model in server.client.models.list()] == [server.name]
    for path in ("/load_model", "/reset", "/docs", "/openapi.json", "/v1/responses", "/v1/systemone"):
        assert post(server, path, b"{}")[0] == 404, path


BAD = {
    "no prompt": {"prompt": None},
    "an empty prompt": {"prompt": ""},
    "a list of prompts": {"prompt": ["a", "b"]},
    "a prompt beyond the window": {"prompt": "one two three " * 400},
    "no tokens": {"max_tokens": 0},
    "tokens in words": {"max_tokens": "ten"},
    "a cold temperature": {"temperature": -1},
    "a temperature that is none": {"temperature": "hot"},
    "no probability": {"top_p": 0},
    "two answers": {"n": 2},
    "an empty stop": {"stop": ""},
    "a number to stop at": {"stop": 3},
    "log-probabilities": {"logprobs": 1},
    "a penalty": {"frequency_penalty": 0.5},
    "a seed that is none": {"seed": "x"},
    "half a character": {"prompt": "\ud800"},
    "half a character of a name": {"model": "\ud800"},
    "a configuration": {"generation_config": "{"},
    "another model": {"model": "gpt"},
    "a field of nobody": {"colour": "red"},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_bad_completions(server, change):
    body = {"model": server.name, "prompt": "Once", "max_tokens": 2, **change}
    status, said = post(server, "/v1/completions", json.dumps(body).encode())
    assert 400 <= status < 500
    assert len(json.loads(said)["error"]["message"]) > 10


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_an_unknown_field_is_named(server, path):
    body = {"model": server.name, "prompt": "Once", "messages": [{"role": "user", "content": "Once"}], "colour": "red"}
    del body["prompt" if path.startswith("chat") else "messages"]
    status, said = post(server, f"/v1/{path}", json.dumps(body).encode())
    message = json.loads(said)["error"]["message"]
    assert (status, message) == (400, "'colour' is no field of such a request; leave it out")


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        [{}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}],
    ],
)
def test_bad_chats(server, messages):
    body = {"model": server.name, "messages": messages, "max_tokens": 2}
    assert 400 <= post(server, "/v1/chat/completions", json.dumps(body).encode())[0] < 500


def test_a_chat_in_another_format_is_refused_and_the_plain_one_is_not(server):
    asked = {"model": server.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "presence_penalty": 0.0}
    for kind, expected in (("text", 200), ("json_object", 400)):
        body = {**asked, "response_format": {"type": kind}}
        assert post(server, "/v1/chat/completions", json.dumps(body).encode())[0] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"enable_thinking": False, "documents": []}, 200),
        ({"chat_template": "Once"}, 400),  # a loop in it would keep the server busy
        ({"truncation": True, "max_length": 2}, 400),
        ({"return_dict": False}, 400),
        ({"load_audio_from_video": True}, 400),
        ({"bos_token": "\ud800"}, 400),
        ({"messages": []}, 400),
    ],
)
def test_a_client_sets_variables_of_the_chat_template_and_nothing_else(server, options, expected):
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "chat_template_kwargs": options}
    assert post(server, "/v1/chat/completions", json.dumps(body).encode())[0] == expected


ASKED = {
    "tool_choice": ("auto", "required"),
    "top_logprobs": (0, 3),
    "modalities": (["text"], ["audio"]),
    "functions": (None, [{"name": "f"}]),
    "function_call": (None, "auto"),
    "reasoning_effort": (None, "high"),
    "verbosity": (None, "low"),
    "web_search_options": (None, {}),
    "audio": (None, {"voice": "x"}),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_would_change_an_answer_is_refused(server, name):
    asked = {"model": server.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    for value, expected in zip(ASKED[name], (200, 400), strict=True):
        status, said = post(server, "/v1/chat/completions", json.dumps(asked | {name: value}).encode())
        assert status == expected
    assert f"{name} is " in (message := json.loads(said)["error"]["message"]) and message.endswith("leave it out")


def test_whole_numbers_of_a_model_and_a_penalty_of_nothing(server):
    """A model's `temperature: 1` and `repetition_penalty: 2` are used, and stay where a client sends a penalty of zero."""
    from losa.serving import app, batches

    model, tokenizer = losa.load(server.name)
    model.generation_config.update(do_sample=True, temperature=1, repetition_penalty=2)
    assert generate(model, tokenizer, "Once", lambda _: None, tokens=4, temperature=1).tokens == 4
    config = app._defaults(model)
    assert (config.temperature, config.repetition_penalty) == (1.0, 2.0)
    assert len(batches._steps(config.__class__(**config.to_dict(), seed=0), torch.device("cpu"))) > 1
    handler = app._Completion.__new__(app._Completion)
    handler.generation_state = SimpleNamespace(_compile=False, _continuous_batching=True)
    for more in ({}, {"frequency_penalty": 0.0}, {"presence_penalty": 0}):
        assert handler._build_generation_config({"prompt": "a"} | more, config, use_cb=True).repetition_penalty == 2.0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff"])
def test_bodies_that_are_no_objects(server, body):
    status, said = post(server, "/v1/completions", body)
    assert status == 400
    assert json.loads(said)["error"]["type"] == "invalid_request_error"


def post(server, path, body):
    request = urllib.request.Request(server.url.removesuffix("/v1") + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_an_answer_ends_with_the_window(server):
    answer = complete(server, "Once upon a time", tokens=100_000)
    assert answer.usage.total_tokens <= WINDOW
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_a_client_that_goes_away_is_forgotten(server):
    for _ in range(20):
        with complete(server, "Once", tokens=200, stream=True) as stream:
            next(iter(stream))
    assert complete(server, "Lily").choices[0].text.startswith(alone(server, "Lily")[0])


def ask_many(server, count):
    def one(number):
        options = [{}, {"stop": "."}, {"temperature": 1, "seed": number}][number % 3]
        complete(server, PROMPTS[number % 8], tokens=16, **options)

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(one, range(count)))


def test_more_text_than_the_cache_holds_waits(server, monkeypatch):
    batches = pytest.importorskip("losa.serving.batches")
    monkeypatch.setattr(batches, "PAGE", 16)
    monkeypatch.setattr(batches, "BATCH", 32)  # prompts take several forwards
    monkeypatch.setattr(batches, "ROOM", 1)
    model, tokenizer = losa.load(server.name)
    prompts = [f"{prompt} " + "the old man said that he had been in the house, and " * 6 for prompt in PROMPTS]
    running = batches.Batches(model)

    async def ask(prompt):
        config = copy.deepcopy(model.generation_config)
        config.max_new_tokens, config.do_sample = TOKENS, False
        inputs = {"input_ids": tokenizer(prompt)["input_ids"]}
        return await running.generate_non_streaming(model, tokenizer, inputs, config, "same")

    async def ask_all():
        return await asyncio.gather(*map(ask, prompts))

    try:
        for prompt, (text, given, tokens) in zip(prompts, asyncio.run(ask_all()), strict=True):
            assert given > 64
            assert len(tokens) == TOKENS
            assert text.startswith(alone(server, prompt)[0])
    finally:
        running.stop()


@pytest.mark.nightly
def test_memory_is_steady_over_five_hundred_requests(server):
    process = psutil.Process(server.process.pid)
    ask_many(server, 100)
    before = process.memory_info().rss
    ask_many(server, 500)
    assert process.memory_info().rss - before < 8 * 2**20


def test_sigterm_lets_answers_finish_and_is_no_failure(server, tmp_path):
    import openai

    process, url = serve(tmp_path / "log", server.name)
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    answers = []

    def ask():
        with client.completions.create(model=server.name, prompt="Once", max_tokens=60, temperature=0, stream=True) as stream:
            answers.extend(stream)

    asking = threading.Thread(target=ask)
    asking.start()
    while not answers:
        time.sleep(0.01)
    process.terminate()
    asking.join()
    process.join(30)
    assert process.exitcode == 0
    assert answers[-1].choices[0].finish_reason == "length"
    assert (tmp_path / "log").read_text().splitlines()[-1] == "stopped"


def test_a_port_that_is_taken(monkeypatch, capsys):
    monkeypatch.setattr(start, "is_serve_available", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line_error(losa_main(monkeypatch, capsys, "serve", "nowhere", "--port", port), f"port {port}")


def test_what_serving_needs_is_said(monkeypatch, capsys):
    monkeypatch.setattr(start, "is_serve_available", lambda: False)
    assert_one_line_error(losa_main(monkeypatch, capsys, "serve", "nowhere"), 'pip install ".[serve]"')
