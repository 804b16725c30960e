"""Conversations to texts in which the assistant's part is marked: by the tokenizer's chat template, or in a plain form.

Where a template says itself what the assistant generates (`{% generation %}`), that is taken. Elsewhere a turn of the assistant
is what rendering the conversation up to it adds to rendering what came before it, with the generation prompt: that is right only
if each rendering begins with the one before, which is checked. A template that renders earlier turns in another way (leaving out
their reasoning, say) gives a document for each answer, every one with what the model would have seen.

The plain form, for tokenizers without a template, is Alpaca's, turn after turn: see `plain`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from losa.data.records import BadRecord, Conversation, Policy, load_records

PREAMBLE = "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the request."
HEADINGS = {"system": "System", "user": "Instruction", "assistant": "Response"}  # of turns in the plain form
GENERATION = re.compile(r"\{%-?\s*generation\b")
DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
TODAY = datetime(2024, 7, 26)  # of templates that write the date, so that a run of tomorrow has the same text; Llama 3.1's own

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Marked:
    """A text of which the loss counts parts.

    Attributes:
        text: all of it.
        counted: begin and end, in characters, of each part that counts.
        complete: whether the text has its special tokens; if not, the tokenizer adds what it begins with, and EOS is added.
    """

    text: str
    counted: Spans
    complete: bool


Document = str | Marked  # a text of which all counts, or parts


def text_of(document: Document) -> str:
    """The text, whatever counts of it."""
    return document if isinstance(document, str) else document.text


def read_documents(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loss_on: str = "assistant",
    skip: bool = False,
    without: str | None = None,
) -> list[Document]:
    """All documents of a source, blank ones too, in a fixed order.

    Args:
        tokenizer: whose chat template renders conversations; the plain form if it has none, or None.
        loss_on: "assistant", or "all" to count every token of a conversation.
        skip: leave bad records out, and say how many, instead of refusing.
        without: see `files.read`.

    Raises:
        ValueError: nothing there, nothing readable in it, or bad records.
    """
    records, policy = load_records(source, skip, without), Policy(source, skip)
    eos = (tokenizer.eos_token if tokenizer is not None else None) or ""
    documents: list[Document] = []
    for record in records:
        if isinstance(record, str):
            documents.append(record)
        elif tokenizer is None or tokenizer.chat_template is None:
            documents.append(plain(record, loss_on, eos))
        else:
            try:
                documents += by_template(record, tokenizer, loss_on)
            except BadRecord as error:
                policy.bad.append(str(error))
    policy.settle(len(records))
    return documents


def plain(conversation: Conversation, loss_on: str = "assistant", eos: str = "") -> Marked:
    """The conversation as Alpaca wrote its own: a preamble, or the system's text in its place, then `### Instruction:` and
    `### Response:` for every turn, and `### Input:` where an instruction has one. Every answer but the last is ended by `eos`, as
    packing ends the last."""
    turns = list(conversation.turns)
    with_input = ", paired with an input that provides further context" if conversation.extra else ""
    text = turns.pop(0)[1] if turns[0][0] == "system" else PREAMBLE.format(with_input=with_input)
    extra, counted = conversation.extra, []
    for number, (role, said) in enumerate(turns, 1):
        text += f"\n\n### {HEADINGS[role]}:\n"
        start = len(text)
        text += said
        if role == "assistant":
            text += eos if number < len(turns) else ""
            counted.append((start, len(text)))
        elif role == "user" and extra:
            text, extra = f"{text}\n\n### Input:\n{extra}", ""
    return Marked(text, ((0, len(text)),) if loss_on == "all" else tuple(counted), False)


def by_template(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, loss_on: str = "assistant") -> list[Marked]:
    """The conversation as the tokenizer's template writes it; more than one document only for a template that writes earlier
    turns in another way than the last.

    Raises:
        BadRecord: the template refuses it, or does not tell which part is the assistant's.
    """
    messages = _messages(conversation)

    def apply(count: int, **options: Any) -> Any:
        try:
            template = DATE.sub(lambda call: repr(TODAY.strftime(call[2])), tokenizer.get_chat_template())
            date = TODAY.strftime("%d %b %Y")
            return tokenizer.apply_chat_template(messages[:count], chat_template=template, date_string=date, **options)
        except Exception as error:  # a template is foreign code, and may raise anything
            raise BadRecord(f"the chat template refuses it: {' '.join(str(error).split())}") from error

    def render(count: int, prompt: bool = False) -> str:
        return str(apply(count, tokenize=False, add_generation_prompt=prompt))

    try:
        text = render(len(messages))
        if loss_on == "all":
            return [Marked(text, ((0, len(text)),), True)]
        if GENERATION.search(tokenizer.get_chat_template()):
            how = {"return_dict": True, "return_assistant_tokens_mask": True}
            return [
                Marked(text, _generated(apply(len(messages), **how, tokenizer_kwargs={"return_offsets_mapping": True})), True)
            ]
        answers = [index for index, turn in enumerate(messages) if turn["role"] == "assistant" and index]
        return _by_prefixes(answers, render, text, _ending(tokenizer))
    except BadRecord as error:
        raise BadRecord(f"{conversation.place}: {error}") from error


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    messages = [{"role": role, "content": text} for role, text in conversation.turns]
    first = next((message for message in messages if message["role"] == "user"), None)
    if conversation.extra and first:
        first["content"] += f"\n\n{conversation.extra}"
    return messages


def _generated(encoded: Any) -> Spans:
    """What lies between `{% generation %}` and `{% endgeneration %}`, in characters: the tokens of the mask, side by side."""
    spans: list[tuple[int, int]] = []
    before = 0  # whether the token before counts
    for (start, end), counts in zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True):
        if counts:
            spans[-1:] = [(spans[-1][0], end)] if before else [*spans[-1:], (start, end)]
        before = counts
    if not spans:
        raise BadRecord("the chat template marks nothing in it as generated by the assistant")
    return tuple(spans)


def _ending(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """Where a turn ends: behind its last special token, if only space is behind that, which no model is to generate."""
    special = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())

    def end(text: str) -> int:
        short = text.rstrip()
        return len(short) if short.endswith(special) else len(text)

    return end


def _by_prefixes(answers: list[int], render: Callable[..., str], text: str, end: Callable[[str], int]) -> list[Marked]:
    """One document with all answers; or one for each, where earlier answers are rendered in another way than the last."""
    if not answers:
        raise BadRecord("its only answer answers nothing")
    found = [(text, _added(answers, render, text, end))]
    if found[0][1] is None:
        alone = [(index, render(index + 1)) for index in answers]
        found = [(until, _added([index], render, until, end)) for index, until in alone]
    documents = [Marked(text, spans, True) for text, spans in found if spans is not None]
    if len(documents) < len(found):
        raise BadRecord(
            "the chat template does not write an answer behind what it writes as its prompt, so the two cannot be told apart; "
            "set train.loss_on: all, or give the tokenizer a template with {% generation %}"
        )
    return documents


def _added(answers: list[int], render: Callable[..., str], text: str, end: Callable[[str], int]) -> Spans | None:
    """What each answer adds to what is rendered before it; None if a rendering does not begin with the one before."""
    spans = []
    for index in answers:
        before, until = render(index, prompt=True), render(index + 1)
        if not (until.startswith(before) and text.startswith(until) and len(before) < end(until)):
            return None
        spans.append((len(before), end(until)))
    return tuple(spans)
