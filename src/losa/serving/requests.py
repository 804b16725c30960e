"""What a request may ask for. Everything that would change an answer and is not done is refused, never ignored."""

from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from losa.system.doors import shown

STOPS = 16  # strings to stop at; OpenAI takes 4
OPEN = {  # fields that may say something; all others only what changes nothing
    *("model", "messages", "prompt", "temperature", "top_p", "seed", "stream", "stop"),
    *("max_tokens", "max_completion_tokens", "chat_template_kwargs"),
}


def _whole(text: str) -> str:
    """The text; ValueError where half of a character stands alone, which no tokenizer takes."""
    text.encode()
    return text


Whole = Annotated[str, AfterValidator(_whole)]
Text = Annotated[Whole, Field(min_length=1)]


class _Asked(BaseModel):
    """Of a chat and of a completion. What is not listed is let be if OpenAI's schema has it, and changes no answer."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Text | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool | None = None
    stop: Text | Annotated[list[Text], Field(max_length=STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: Literal[1] | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    generation_config: None = None


class _Part(BaseModel):
    type: Literal["text"]
    text: Whole


class _Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Text
    content: Whole | list[_Part] | None = None


class _Format(BaseModel):
    type: Literal["text"]


class Chat(_Asked):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    response_format: _Format | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    tool_choice: Literal["auto"] | None = None
    top_logprobs: Literal[0] | None = None
    modalities: list[Literal["text"]] | None = None
    functions: None = None
    function_call: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    audio: None = None


class Completion(_Asked):
    """The body of `/v1/completions`."""

    prompt: Text
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


def check(body: dict[str, Any], kind: type[_Asked]) -> None:
    """Raises an HTTP 400 that names the first thing wrong with a request."""
    try:
        kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if name not in OPEN:
            raise refused(f"{name} is {shown(body[name])}, which this server does not do; leave it out") from None
        raise refused(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def refused(message: str) -> HTTPException:
    """An HTTP 400."""
    return HTTPException(400, message)
