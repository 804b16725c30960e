"""Records to texts and conversations, and one policy for those that are neither.

A record is a text, or an object of one of these forms; where an object has several, the first that is not null counts:

- `messages` or `conversations`: a list of turns, each `role` and `content` or `from` and `value`;
- a question (`instruction`, `prompt` or `context`) and its answer (`output`, `completion` or `response`), each a text, or, of
  `prompt` and `completion`, a list of turns; `input`, or `context` beside `instruction` or `prompt`, is the question's input;
- `text`.

`system`, a text, beside the first two is the system's turn where the record has none.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from losa.data.files import Record, read
from losa.system.doors import shown

ROLES = {
    **{name: name for name in ("system", "user", "assistant")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    "developer": "system",
}
TURNS = ("messages", "conversations")
QUESTIONS, ANSWERS = ("instruction", "prompt", "context"), ("output", "completion", "response")
EXPECTED = (
    "'text', 'messages', 'conversations', or a question ('instruction', 'prompt' or 'context') with its answer "
    "('output', 'completion' or 'response')"
)

logger = logging.getLogger(__name__)


class BadRecord(ValueError):  # noqa: N818 - it names what was found
    """A record that nothing can be learned from; the message has its place."""


@dataclass(frozen=True)
class Conversation:
    """Turns to be rendered for a model.

    Attributes:
        place: where it was read.
        turns: role (system, user or assistant) and text of each; at least one is the assistant's.
        extra: the input of a question, which belongs to the first turn of the user.
    """

    place: str
    turns: tuple[tuple[str, str], ...]
    extra: str = ""


Parsed = str | Conversation


class Policy:
    """What is done with bad records: they are refused, or counted and skipped."""

    def __init__(self, source: str, skip: bool) -> None:
        self.source, self.skip = source, skip
        self.bad: list[str] = []

    def settle(self, total: int) -> None:
        """Called when all of `total` records were looked at.

        Raises:
            ValueError: some are bad and not to be skipped, or all are.
        """
        if not self.bad:
            return
        if not self.skip:
            more = f" (and {len(self.bad) - 1} more bad records of {total})" if len(self.bad) > 1 else ""
            raise ValueError(f"{self.bad[0]}{more}; mend it, or leave such records out with --skip-bad-records")
        if len(self.bad) == total:
            raise ValueError(f"{self.source} holds no good record; the first: {self.bad[0]}")
        logger.warning("%s: skipped %d bad records of %d; the first: %s", self.source, len(self.bad), total, self.bad[0])


def load_records(source: str, skip: bool = False, without: str | None = None) -> list[Parsed]:
    """Texts and conversations of a source, in a fixed order, blank texts included.

    Args:
        skip: leave bad records out, and say how many, instead of refusing the first.
        without: see `files.read`.

    Raises:
        ValueError: nothing there, a file that cannot be read, a bad record, or none that is good.
    """
    records, policy = read(source, without), Policy(source, skip)
    parsed = []
    for record in records:
        try:
            parsed.append(parse(record))
        except BadRecord as error:
            policy.bad.append(str(error))
    policy.settle(len(records))
    return parsed


def parse(record: Record) -> Parsed:
    """One record, checked.

    Raises:
        BadRecord: it has none of the forms, a field is not text, or an answer is empty.
    """
    try:
        if record.problem is not None:
            raise BadRecord(record.problem)
        if isinstance(record.value, dict):
            return _parse_fields(record.value, record.place)
        if not isinstance(record.value, str):
            raise BadRecord(f"a record that is {_kind(record.value)}; expected a text, or an object with {EXPECTED}")
        return _text(record.value, "the text")
    except BadRecord as error:
        raise BadRecord(f"{record.place}: {error}") from error


def _parse_fields(fields: dict[str, Any], place: str) -> Parsed:
    forms: list[tuple[str, ...]] = [(key,) for key in TURNS if key in fields]
    question = next((key for key in QUESTIONS if key in fields), None)
    answer = next((key for key in ANSWERS if key in fields), None)
    if question and answer:
        forms.append((question, answer))
    if "text" in fields:
        forms.append(("text",))
    if not forms:
        raise BadRecord(f"an object with {shown(sorted(map(str, fields)))}; expected {EXPECTED}")
    form = next((keys for keys in forms if any(fields[key] is not None for key in keys)), forms[0])
    if form == ("text",):
        return _text(fields["text"], "'text'")
    turns = [turn for key in form for turn in _turns(fields[key], key)]
    if isinstance(fields.get("system"), str) and fields["system"].strip() and turns[0][0] != "system":
        turns.insert(0, ("system", _text(fields["system"], "'system'")))
    _check_turns(turns, form[-1])
    return Conversation(place, tuple(turns), _extra(fields, form[0]))


def _extra(fields: dict[str, Any], question: str) -> str:
    if question not in ("instruction", "prompt"):
        return ""
    key = "input" if fields.get("input") is not None else "context"
    return _text(fields[key], repr(key)) if fields.get(key) is not None else ""


def _turns(value: Any, key: str) -> list[tuple[str, str]]:
    """The turns of a list, or of a text, which is one turn of the question's or the answer's side."""
    side = {**dict.fromkeys(QUESTIONS, "user"), **dict.fromkeys(ANSWERS, "assistant")}.get(key)
    if side and not (isinstance(value, list) and value and key in ("prompt", "completion")):
        return [(side, _text(value, repr(key)))]
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{key!r} is {_kind(value)}, expected a list of turns")
    return [_turn(turn, f"{key!r}, turn {number}") for number, turn in enumerate(value, 1)]


def _turn(turn: Any, where: str) -> tuple[str, str]:
    names = (("role", "content"), ("from", "value"))
    keys = next((pair for pair in names if isinstance(turn, dict) and all(key in turn for key in pair)), None)
    if keys is None:
        found = shown(sorted(map(str, turn))) if isinstance(turn, dict) else _kind(turn)
        raise BadRecord(f"{where} has {found}, expected 'role' and 'content', or 'from' and 'value'")
    if turn.get("tool_calls"):
        raise BadRecord(f"{where} calls tools, expected text alone")
    role = turn[keys[0]]
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord(f"{where} is of {shown(role)}, expected {', '.join(ROLES)}")
    return ROLES[role], _text(turn[keys[1]], f"{where}: {keys[1]!r}")


def _check_turns(turns: Sequence[tuple[str, str]], key: str) -> None:
    answers = [text for role, text in turns if role == "assistant"]
    if not answers:
        raise BadRecord(f"{key!r} has no turn of the assistant, so there is nothing to learn")
    if not all(answer.strip() for answer in answers):
        raise BadRecord(f"an answer in {key!r} is empty")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{name} is {_kind(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise BadRecord(
            f"{name} holds a lone surrogate (U+{code:04X}, character {error.start + 1}), which is no character"
        ) from error
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    for kinds, name in (((int, float), "a number"), ((list, tuple), "a list"), ((dict,), "an object"), ((str,), "text")):
        if isinstance(value, kinds):
            return f"{name} ({value})" if name == "a number" else "an empty list" if name == "a list" and not value else name
    return f"a {type(value).__name__}"
