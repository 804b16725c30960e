"""Promised: a model with a chat template is asked in its form and answers in turns; any other goes on with the text."""

import io
import re
import time

import pytest
import torch
from helpers import save_toy
from test_cli import assert_one_line_error, losa_main

from losa.models import load
from losa.runtime.files import pack_checkpoint
from losa.runtime.generate import chat, encode, generate, stop_tokens

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role | upper }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy, the same with a chat template, and that packed."""
    folder = tmp_path_factory.mktemp("generate")
    for name in ("plain", "chat"):
        save_toy(folder / name, torch.bfloat16)
    _, tokenizer = load(folder / "chat")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "chat")
    pack_checkpoint(folder / "chat", folder / "packed")
    return folder


def asked(folder, name, prompt, **options):
    """The tokens that the model was given, and what came of it."""
    model, tokenizer = load(folder / name)
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    answer = generate(model, tokenizer, prompt, lambda piece: None, 4, **options)
    return tokenizer.decode(seen[0][0]).replace(" ", ""), answer


@pytest.mark.parametrize("name", ["chat", "packed"])
def test_a_chat_model_is_asked_in_its_form(folder, name):
    given, answer = asked(folder, name, "HELLO", raw=False)
    assert given == "[USER]HELLO[ASSISTANT]"
    assert 1 <= answer.tokens <= 4


@pytest.mark.parametrize(("name", "raw"), [("chat", True), ("plain", False)])
def test_raw_and_without_a_template_the_text_is_continued(folder, name, raw):
    assert asked(folder, name, "HELLO", raw=raw)[0] == "HELLO"


def test_stop_tokens_are_those_of_the_generation_configuration_and_of_the_tokenizer(folder):
    model, tokenizer = load(folder / "chat")
    model.generation_config.eos_token_id = [5, 7]
    assert stop_tokens(model, tokenizer, True) == [5, 7, tokenizer.eos_token_id]
    assert stop_tokens(model, tokenizer, False) == [5, 7]
    model.generation_config.eos_token_id = None
    first = generate(model, tokenizer, "HELLO", lambda piece: None, 1).text
    model.generation_config.eos_token_id = encode(tokenizer, first)["input_ids"][0].tolist()
    assert generate(model, tokenizer, "HELLO", lambda piece: None, 9).tokens == 1


def test_the_speed_is_of_the_tokens_after_the_first(folder, monkeypatch, capsys):
    model, tokenizer = load(folder / "plain")
    slow = model.register_forward_pre_hook(lambda *_: (slow.remove(), time.sleep(0.5))[0])
    answer = generate(model, tokenizer, "HELLO", lambda piece: None, 5)
    assert 0.5 < answer.first < answer.seconds and answer.rate > answer.tokens / answer.seconds
    answer = generate(model, tokenizer, "HELLO", lambda piece: None, 1)
    assert (answer.tokens, answer.rate) == (1, None)
    _, _, err = losa_main(monkeypatch, capsys, "generate", folder / "plain", "--prompt", "HELLO", "--tokens", "5")
    assert re.search(r"\d tokens in [\d.]+ s, the first after [\d.]+ s, then [\d.]+ a second, by ", err)


def test_turns_remember_clear_and_exit(folder):
    model, tokenizer = load(folder / "chat")
    done = []
    turns = chat(model, tokenizer, ["HI", " ", "HO", "/exit", "NO"], lambda piece: None, system="BE", tokens=3, done=done.append)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn["content"] for turn in turns[1::2]] == ["HI", "HO"]
    assert [turn["content"] for turn in turns[2::2]] == [answer.text.strip() for answer in done]
    assert len(chat(model, tokenizer, ["HI", "/clear", "HO"], lambda piece: None, tokens=3)) == 2


def test_old_turns_are_forgotten_when_the_window_is_full(folder):
    model, tokenizer = load(folder / "chat")
    turns = chat(model, tokenizer, ["ONE", "TWO", "THREE"], lambda piece: None, system="BE", tokens=4)
    assert turns[0]["content"] == "BE"
    assert "ONE" not in [turn["content"] for turn in turns]
    with pytest.raises(ValueError, match="the model's window 64"):
        chat(model, tokenizer, ["A" * 90], lambda piece: None)


def test_ctrl_c_ends_an_answer_not_the_conversation(folder):
    model, tokenizer = load(folder / "chat")

    def interrupt(piece):
        raise KeyboardInterrupt

    turns = chat(model, tokenizer, ["HI", "HO"], interrupt, tokens=3)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2


def test_what_the_template_refuses_is_one_sentence(folder):
    _, tokenizer = load(folder / "chat")
    with pytest.raises(ValueError, match="refuses the roles tool: no tools"):
        encode(tokenizer, [{"role": "tool", "content": "A"}])


@pytest.mark.parametrize("name", ["chat", "packed"])
def test_chat_reads_a_pipe(folder, name, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("HI\nHO\n/exit\nNO\n"))
    code, out, err = losa_main(monkeypatch, capsys, "chat", folder / name, "--tokens", "3")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2
    assert "HI" not in out


def test_a_question_beyond_the_window_is_told_of_and_forgotten(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"HI\n{'A' * 90}\nHO\n"))
    code, out, err = losa_main(monkeypatch, capsys, "chat", folder / "chat", "--tokens", "3")
    assert (code, len(out.splitlines()), len(err.splitlines())) == (0, 2, 1)
    assert "the model's window 64; shorten it" in err
    failed = []
    turns = chat(*load(folder / "chat"), ["HI", "A" * 90, "HO"], lambda piece: None, tokens=3, fail=failed.append)
    assert [turn["content"] for turn in turns[::2]] == ["HI", "HO"] and len(failed) == 1


def test_chat_ends_at_ctrl_c(folder, monkeypatch, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert losa_main(monkeypatch, capsys, "chat", folder / "chat")[:2] == (0, "")


def test_a_model_without_a_template_is_not_for_chat(folder, monkeypatch, capsys):
    assert_one_line_error(losa_main(monkeypatch, capsys, "chat", folder / "plain"), "has no chat template")
    code, out, _ = losa_main(monkeypatch, capsys, "generate", folder / "chat", "--prompt", "HI", "--tokens", "3")
    assert (code, out.startswith("HI")) == (0, False)
    code, out, _ = losa_main(monkeypatch, capsys, "generate", folder / "chat", "--prompt", "HI", "--tokens", "3", "--raw")
    assert (code, out.startswith("HI")) == (0, True)
