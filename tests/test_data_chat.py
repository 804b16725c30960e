"""Conversations are rendered as the model will meet them, and the loss counts the assistant's tokens and no others."""

import math

import pytest
import torch
from conftest import FAMILIES
from helpers import toy_model
from test_data_kinds import CHAT, lines
from transformers import AutoTokenizer

from losa.adapter import attach
from losa.commands.demo import assets
from losa.commands.toy import toy_tokenizer
from losa.config import TrainConfig
from losa.data import Marked, Packed, calibration_windows, load_documents, padded_samples, show_example, training_blocks
from losa.data.blocks import encode
from losa.data.chat import by_template, plain
from losa.data.files import Record
from losa.data.records import BadRecord, Conversation, parse
from losa.evaluation import perplexity
from losa.loss import causal_loss
from losa.training import collate, train

TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = TURNS + PROMPT
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}" + PROMPT
)
# Earlier answers lose their reasoning, as those of reasoning models do.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
COUNTING = "{{ messages | length }}" + CHATML  # no rendering begins with the one before
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
DATED = "{{ strftime_now('%d %B %Y') }} {{ date_string }}" + CHATML

Q, A = ("user", "Who was it?"), ("assistant", " It was the old man. ")
LONG = Conversation("a.jsonl, line 1", (("system", "Be brief."), Q, A, Q, ("assistant", "\nNobody")))


@pytest.fixture(scope="module")
def real():
    """A tokenizer of a real model, made to know ChatML's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(assets() / "novels-4m")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.fixture
def chatty(real):
    def with_template(template: str):
        real.chat_template = template
        return real

    yield with_template
    real.chat_template = None


@pytest.fixture
def toy():
    """The character tokenizer with a template whose turns all end with EOS, as ChatML's do in many models."""
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '[' + message['role'][0] | upper + ']' + message['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}[A]{% endif %}"
    )
    return tokenizer


def shown(document: Marked) -> str:
    text = document.text
    for start, end in reversed(document.counted):
        text = f"{text[:start]}>>>{text[start:end]}<<<{text[end:]}"
    return text


def counted_text(document: Marked, tokenizer) -> list[str]:
    """What the counted tokens say, run by run."""
    (encoded,) = encode([document], tokenizer)
    runs, before = [], False
    for token, counts in zip(encoded.ids, encoded.counted, strict=True):
        if counts:
            runs += [] if before else [[]]
            runs[-1].append(token)
        before = counts
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["prefixes", "generation"])
def test_the_answers_and_what_ends_them_count(chatty, template):
    tokenizer = chatty(template)
    (document,) = by_template(LONG, tokenizer)
    assert document.text == tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in LONG.turns], tokenize=False
    )
    assert [run.strip() for run in counted_text(document, tokenizer)] == ["It was the old man. <|im_end|>", "Nobody<|im_end|>"]


def test_prefixes_find_what_the_template_itself_marks(chatty):
    (found,) = by_template(LONG, chatty(CHATML))
    first = list(encode([found], chatty(CHATML)))
    (marked,) = by_template(LONG, chatty(GENERATION))
    assert first == list(encode([marked], chatty(GENERATION)))


def test_tokens_are_those_of_the_template_with_nothing_added(chatty):
    tokenizer = chatty(CHATML)
    (document,) = by_template(LONG, tokenizer)
    (encoded,) = encode([document], tokenizer)
    messages = [{"role": role, "content": text} for role, text in LONG.turns]
    assert encoded.ids == tokenizer.apply_chat_template(messages)["input_ids"]


def test_a_template_that_renders_earlier_turns_anew_gives_a_document_an_answer(chatty):
    documents = by_template(LONG, chatty(THINKING))
    assert [counted_text(document, chatty(THINKING))[0].count("<think>") for document in documents] == [1, 1]
    assert [len(document.counted) for document in documents] == [1, 1]
    assert (
        documents[0].text == documents[1].text[: len(documents[0].text)].replace("was", "was") or "<think>" in documents[0].text
    )
    assert "<think></think>\nNobody" in shown(documents[1]) and documents[1].text.count("<think>") == 1


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (COUNTING, LONG.turns, r"^a\.jsonl, line 1: .* cannot be told apart; set train\.loss_on: all"),
        (STRICT, LONG.turns, r"^a\.jsonl, line 1: the chat template refuses it: System role not supported"),
        (CHATML, (A,), r"^a\.jsonl, line 1: its only answer answers nothing"),
        (GENERATION.replace("'assistant' %}{% gen", "'nobody' %}{% gen"), (Q, A), "marks nothing in it as generated"),
        ("{{ messages[0].name.first }}", LONG.turns, "the chat template refuses it"),
    ],
    ids=["no prefixes", "refused", "no question", "unmarked", "broken"],
)
def test_what_a_template_cannot_render_is_a_bad_record(chatty, template, turns, message):
    with pytest.raises(BadRecord, match=message):
        by_template(Conversation(LONG.place, turns), chatty(template))


def test_such_records_are_skipped_when_asked(chatty, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": "Who?", "completion": "Me."}, CHAT))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: the chat template refuses it"):
        load_documents(str(tmp_path / "a.jsonl"), chatty(STRICT))
    assert len(load_documents(str(tmp_path / "a.jsonl"), chatty(STRICT), skip=True)) == 1


def test_counting_all_needs_no_prefixes(chatty):
    (document,) = by_template(LONG, chatty(COUNTING), "all")
    assert document.counted == ((0, len(document.text)),)
    (encoded,) = encode([document], chatty(COUNTING))
    assert all(encoded.counted)


def test_the_date_in_a_template_is_the_same_tomorrow(chatty):
    (document,) = by_template(Conversation("", (Q, A)), chatty(DATED))
    assert document.text.startswith("26 July 2024 26 Jul 2024<|im_start|>")


def test_an_instruction_is_a_turn_of_the_user(chatty):
    record = parse(Record("", {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "### Instruction: Add."}))
    (document,) = by_template(record, chatty(CHATML))
    assert shown(document) == "<|im_start|>user\nAdd.\n\n1, 2<|im_end|>\n<|im_start|>assistant\n>>>3<|im_end|><<<\n"


def test_the_plain_form_of_turns():
    text = shown(plain(LONG, eos="</s>"))
    assert text == (
        "Be brief.\n\n### Instruction:\nWho was it?\n\n### Response:\n>>> It was the old man. </s><<<"
        "\n\n### Instruction:\nWho was it?\n\n### Response:\n>>>\nNobody<<<"
    )


def test_the_end_of_a_plain_answer_counts_and_the_prompt_does_not(real):
    document = plain(Conversation("", (Q, A)))
    (encoded,) = encode([document], real)
    assert encoded.ids[-1] == real.eos_token_id and encoded.counted[-1] and not encoded.counted[0]
    assert counted_text(document, real)[0].strip() == "It was the old man. " + real.eos_token


def chats(count: int, path) -> str:
    words = "ABCDEFGH"
    records = [
        {
            "messages": [
                {"role": "user", "content": words[number % 8] * (number % 5)},
                {"role": "assistant", "content": words[(number + 1) % 8] * (1 + number % 7)},
                {"role": "user", "content": "WHY"},
                {"role": "assistant", "content": f"{number:03d}"},
            ]
        }
        for number in range(count)
    ]
    path.write_bytes(lines(*records))
    return str(path)


def test_packed_rows_are_the_joined_conversations(toy, tmp_path):
    documents = load_documents(chats(50, tmp_path / "a.jsonl"), toy)
    rows = training_blocks(documents, toy, 32, 10)
    assert isinstance(rows, Packed) and rows.ids_ST.shape == (10, 32)
    each = [toy(document.text, add_special_tokens=False)["input_ids"] for document in documents]
    stream, starts = [], []
    for ids in each:
        starts += [True] + [False] * (len(ids) - 1)
        stream += ids
    assert rows.ids_ST.flatten().tolist() == stream[:320]
    assert rows.starts_ST.flatten().tolist() == starts[:320]
    text = "".join(
        chr(token + 32) if counts else "-" for token, counts in zip(stream[:41], rows.counted_ST.flatten()[:41], strict=True)
    )
    assert text == "-------B_----------000_--------CC_----------001_"[:41]
    assert torch.equal(rows[3]["labels"], rows.ids_ST[3].where(rows.counted_ST[3], -100))
    assert calibration_windows(documents, toy, 32, 10).equal(rows.ids_ST)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "opt"])
def test_packed_conversations_are_as_if_alone(tiny_model, toy, tmp_path, family):
    """EOS ends turns here: turns see each other, conversations do not. Loss and gradients are those of each alone."""
    documents = load_documents(chats(6, tmp_path / "a.jsonl"), toy)
    encoded = list(encode(documents, toy))
    length = sum(len(document.ids) for document in encoded)
    model = attach(tiny_model(family))
    rows = training_blocks(documents, toy, length, 1)
    expected, count = 0.0, sum(sum(document.counted[1:]) for document in encoded)
    for document in encoded:
        ids = torch.tensor([document.ids])
        labels = ids.where(torch.tensor([document.counted]), -100)
        loss = causal_loss(model(input_ids=ids).logits, labels) / count
        loss.backward()
        expected += loss.item()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    batch = collate([rows[0]])
    labels = batch.pop("labels")
    assert int((labels != -100).sum()) == count
    loss = causal_loss(model(**batch, use_cache=False).logits, labels) / count
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6)


def test_a_model_that_cannot_keep_conversations_apart_gets_them_joined(tiny_model, toy, tmp_path, monkeypatch):
    rows = training_blocks(load_documents(chats(20, tmp_path / "a.jsonl"), toy), toy, 32, 8)
    joined = collate([rows.joined()[0]])
    assert "position_ids" in collate([rows[0]]) and "position_ids" not in joined
    assert torch.equal(joined["labels"][0], rows[0]["labels"])
    model, seen = attach(tiny_model("opt")), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **kwargs: seen.append("position_ids" in kwargs) or forward(*args, **kwargs)
    )
    monkeypatch.setattr("losa.training.trainer.separates_documents", lambda model: False)
    config = TrainConfig(lr=1e-3, batch_size=8, distill=0.0)
    train(model, rows, config, name="training", seed=0, work_dir=tmp_path, eos=toy.eos_token_id)
    assert seen == [False]


def test_texts_beside_conversations_are_separated_at_eos_as_ever(toy, tmp_path):
    documents = ["AB</s>CD", *load_documents(chats(3, tmp_path / "a.jsonl"), toy)]
    rows = training_blocks(documents, toy, 8, 2)
    assert rows.starts_ST.flatten().tolist()[:7] == [True, False, False, True, False, False, True]
    assert rows.counted_ST.flatten().tolist()[:9] == [True] * 6 + [False] * 3


def test_samples_have_labels_and_keep_an_answer(toy, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        lines(
            {"prompt": "A" * 20, "completion": "B"}, {"prompt": "A", "completion": "BC"}, {"prompt": "A", "completion": "D" * 20}
        )
    )
    samples = padded_samples(load_documents(str(tmp_path / "a.jsonl"), toy), toy, 12, 2)
    assert [len(sample["input_ids"]) for sample in samples] == [11, 12]
    assert [token for token in samples[0]["labels"] if token != -100] == [34, 35, toy.eos_token_id]
    batch = collate(samples)
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 12)
    assert batch["labels"][0, -1] == -100 and (batch["labels"] != -100).sum() == 3 + 12 - 8


def test_rows_without_any_answer_are_refused(toy, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": "A" * 99, "completion": "B"}))
    with pytest.raises(
        ValueError, match=r"the first 2 blocks of 16 tokens hold no answer; .*train\.length or train\.loss_on: all"
    ):
        training_blocks(load_documents(str(tmp_path / "a.jsonl"), toy), toy, 16, 2)


def test_a_slow_tokenizer_is_told_to_count_all(toy, tmp_path, monkeypatch):
    documents = load_documents(chats(3, tmp_path / "a.jsonl"), toy)
    monkeypatch.setattr(type(toy), "is_fast", False)
    with pytest.raises(ValueError, match=r"does not tell which characters a token is made of.*train\.loss_on: all"):
        list(encode(documents, toy))


def test_the_example_shows_what_counts(toy, tmp_path):
    rows = training_blocks(load_documents(chats(9, tmp_path / "a.jsonl"), toy), toy, 40, 3)
    assert show_example(rows, toy).replace(" ", "") == "[U]</s>[A]>>>B</s><<<[U]WHY</s>[A]>>>000</s><<<"
    texts = training_blocks(["ONE,TWO", "THREE"], toy, 12, 1)
    assert show_example(texts, toy).replace(" ", "") == ">>>ONE,TWO</s><<<"
    long = show_example(training_blocks(["A" * 5000], toy, 4000, 1), toy)
    assert len(long) < 1300 and long.startswith(">>>A") and "characters ...]" in long and long.endswith("A<<<")


def test_perplexity_of_answers_equals_its_definition(toy, tmp_path):
    rows = training_blocks(load_documents(chats(30, tmp_path / "a.jsonl"), toy), toy, 32, 6)
    model = toy_model()
    total, count = 0.0, 0
    for ids, counted in zip(rows.ids_ST, rows.counted_ST, strict=True):
        log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for place in range(1, 32):
            if counted[place]:
                total -= log_p[place - 1, ids[place]].item()
                count += 1
    assert perplexity(model, rows.ids_ST, counted_ST=rows.counted_ST) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_forms_without_a_system_take_it_from_beside(tmp_path):
    record = parse(Record("", {"system": "Be brief.", "instruction": "Add.", "output": "3"}))
    assert record.turns == (("system", "Be brief."), ("user", "Add."), ("assistant", "3"))
    assert parse(Record("", CHAT | {"system": "Be long."})).turns[0] == ("system", "Be brief.")
