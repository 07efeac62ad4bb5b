"""Request and response bodies: OpenAI's chat completions, and this library's older /generate."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from coati.inference.serve.inference_engine import SamplingParams
from coati.inference.serve.not_served import (
    MESSAGE_FIELDS,
    Refused,
    part_text,
    refuse_fields,
)
from coati.inference.serve.token_logprobs import MOST_ALTERNATIVES, TokenLogprob, TokenText
from coati.inference.serve.tool_fields import (
    CallFields,
    CallOut,
    Text,
    ToolChoice,
    ToolFields,
    ToolUse,
    check_results,
    tool_use,
)
from coati.models.generation.sampling import Sampling

MOST_STOPS = 4  # as OpenAI documents
MOST_CHOICES = 16
DEFAULT_NEW_TOKENS = 512  # where neither the request nor the server says how many


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {json.dumps(value)}")
    if isinstance(value, str):
        raise ValueError("must be a number, not a string")
    return value


# Pydantic takes true for 1, and "5" for 5.
Whole = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Message(BaseModel):
    """``content``: a text or text parts; null where an assistant said nothing.
    ``reasoning_content``, ``thought_marks`` (see :class:`ResponseMessage`), ``tool_calls``: of the
    assistant; ``tool_call_id``: of the call whose result a message of the role tool is."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[dict[str, Any]] | None = None
    reasoning_content: Text | None = None
    thought_marks: Annotated[list[Text], Field(min_length=2, max_length=2)] | None = None
    tool_calls: list[CallFields] | None = None
    tool_call_id: Text | None = None

    def plain(self, place: str) -> dict[str, Any]:
        """As a conversation template takes it: {role, content}, and reasoning_content,
        thought_marks, tool_calls, tool_call_id where they are. Raises Refused for what is no text
        or has no place there."""
        if self.role == "function":
            raise Refused(
                400,
                f"{place}.role: 'function' is not served; send the result as role 'tool' with "
                "tool_call_id",
                param=f"{place}.role",
            )
        refuse_fields(self.model_extra, MESSAGE_FIELDS, f"{place}.")
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": self._text(place),
            **self._own_fields(place),
        }

    def _own_fields(self, place: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        assistants = ("reasoning_content", "thought_marks", "tool_calls")
        of_role = {"tool": ("tool_call_id",), "assistant": assistants}
        for name in (*assistants, "tool_call_id"):
            value = getattr(self, name)
            if not value:
                continue
            if name not in of_role.get(self.role, ()):
                field = f"{place}.{name}"
                raise Refused(400, f"{field} has no place in role {self.role!r}", param=field)
            if name == "tool_calls":
                field = f"{place}.tool_calls"
                value = [each.plain(f"{field}.{number}") for number, each in enumerate(value)]
            found[name] = value
        return found

    def _text(self, place: str) -> str:
        content = self.content
        if content is None and self.role != "assistant":
            raise Refused(400, f"{place}.content is null; send a text", param=f"{place}.content")
        if isinstance(content, list):
            content = "".join(
                part_text(part, f"{place}.content.{number}") for number, part in enumerate(content)
            )
        return content or ""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: StrictBool | None = None


def _none_if_unlimited(value: int) -> int | None:
    if value == 0:
        raise ValueError("must be at least 1; null or -1: up to what the server gives")
    return None if value == -1 else value


NewTokens = Annotated[
    Annotated[Whole, Field(ge=-1), AfterValidator(_none_if_unlimited)] | None,
    Field(description="null or -1: no limit of the request's own"),
]


@dataclass(frozen=True)
class ResponseLimits:
    """How many tokens a response may have. ``told``: what the server was told to give at most;
    ``max_length``: of prompt and response together; ``strict``: it was told that one too."""

    told: int | None
    max_length: int
    strict: bool

    def new_tokens(self, field: str, asked: int | None, prompt: int) -> int:
        """What a request gets that asks for ``asked`` new tokens, the value of ``field``: cut to
        the room that a prompt of ``prompt`` tokens leaves, unless the server was told a limit.
        Raises Refused beyond a limit that it was told."""
        if asked is not None and self.told is not None and asked > self.told:
            raise Refused(400, f"{field} is {asked}, at most {self.told} are given", param=field)
        room = max(1, self.max_length - prompt)
        if asked is None:
            return min(self.told or DEFAULT_NEW_TOKENS, room)
        return asked if self.strict else min(asked, room)


class SamplingFields(BaseModel):
    """Sampling parameters; a field left out or null is the server's default."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    temperature: Number | None = Field(None, ge=0, le=2, description="0: greedy")
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=-1, le=2**31, description="0 or -1: off")
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, ge=0.1, le=10)

    def sampling(self, default: Sampling) -> Sampling:
        """``default`` with the request's own fields."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty")
        named = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in named.items() if value is not None}
        if given.get("top_k") == -1:  # as other servers write it
            given["top_k"] = 0
        if self.temperature is not None:
            # Smaller ones are greedy all the same, and would overflow the logits.
            given["do_sample"] = self.temperature >= 1e-3
            given["temperature"] = max(self.temperature, 1e-3)
        return replace(default, **given)


class OpenAIRequest(SamplingFields):
    """What chat and text completions have in common. Fields that are not supported are refused when
    they ask for something; unknown ones are listed in the header X-Ignored-Fields."""

    model: str
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: NewTokens = None
    n: Whole | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = Field(None, description=f"at most {MOST_STOPS} strings")

    def check_served(self) -> None:
        """Raise Refused for a field that asks for what is not supported."""
        refuse_fields(self.model_extra)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def stops(self) -> list[str]:
        """The stop strings; "" stands for none."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        stops = [stop for stop in given if stop]
        if len(stops) > MOST_STOPS:
            raise Refused(
                400,
                f"stop holds {len(stops)} strings, at most {MOST_STOPS} are taken",
                param="stop",
            )
        return stops

    def asked(self) -> tuple[str, int | None]:
        """How many new tokens at most, and the field that says so."""
        return "max_tokens", self.max_tokens

    def alternatives(self) -> int | None:
        """How many likeliest tokens beside each log-prob; None: no log-probs."""
        return None

    def choices(self, params: SamplingParams) -> list[SamplingParams]:
        """``params`` of each of the ``n`` responses to a prompt."""
        return [replace(params, choice=number) for number in range(self.n or 1)]

    def params(self, default: Sampling, limits: ResponseLimits, prompt: int) -> SamplingParams:
        """For a prompt of ``prompt`` tokens."""
        return SamplingParams(
            self.sampling(default),
            limits.new_tokens(*self.asked(), prompt),
            stop=self.stops(),
            seed=None if self.seed is None else self.seed % 2**64,
            logprobs=self.alternatives(),
        )


class ChatRequest(OpenAIRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: NewTokens = None
    logprobs: StrictBool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    continue_final_message: StrictBool | None = Field(
        None, description="a last message of the assistant is the beginning of the response"
    )
    tools: list[ToolFields] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="further variables of the chat template, such as enable_thinking"
    )

    def check_served(self) -> None:
        super().check_served()
        if self.top_logprobs and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true beside it", param="top_logprobs")

    def tool_use(self) -> ToolUse:
        """Raises Refused."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    def dialogue(self) -> tuple[list[dict[str, Any]], str]:
        """The messages up to the last of the user or of a tool, and what the response begins with:
        the text of a last message of the assistant. Raises Refused."""
        plain = [each.plain(f"messages.{number}") for number, each in enumerate(self.messages)]
        begun = ""
        check_results(plain)
        if plain[-1]["role"] == "assistant" and self.continue_final_message is not False:
            last = plain.pop()
            begun = last["content"]
            if others := ", ".join(last.keys() - {"role", "content"}):
                raise Refused(
                    400,
                    f"messages: the last one, which is the assistant's and is continued, holds "
                    f"{others}; send the results of its calls, or its content alone",
                    param="messages",
                )
        elif self.continue_final_message:
            raise Refused(
                400,
                "continue_final_message: the last message is not the assistant's",
                param="continue_final_message",
            )
        check_last(plain)
        return plain, begun

    def asked(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return super().asked()
        return "max_completion_tokens", self.max_completion_tokens

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def check_last(messages: list[dict[str, Any]]) -> None:
    """Raise Refused unless ``messages`` end with the user or the result of a tool."""
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise Refused(
            400,
            "the last message must be the user's or a tool's, or one of the assistant that is to "
            "be continued after one of these",
            param="messages",
        )


class Dialogue(BaseModel):
    """One round of the older protocol; the last one's response is empty."""

    instruction: Text = Field(min_length=1)
    response: Text = ""


class GenerateRequest(SamplingFields):
    """The body of POST /generate and /generate/stream."""

    history: list[Dialogue] = Field(min_length=1)
    max_new_tokens: NewTokens = None

    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": role, "content": content}
            for turn in self.history
            for role, content in (("user", turn.instruction), ("assistant", turn.response))
            if content
        ]

    def params(self, default: Sampling, limits: ResponseLimits, prompt: int) -> SamplingParams:
        new = limits.new_tokens("max_new_tokens", self.max_new_tokens, prompt)
        return SamplingParams(self.sampling(default), new)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ResponseMessage(BaseModel):
    """``content`` is null beside calls without a text. ``thought_marks``: what the model wrote
    before the thought and between it and the content; a client that sends the message back with it
    has the next prompt hold what the model wrote, to the letter."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    thought_marks: list[str] | None = None
    tool_calls: list[CallOut] | None = None


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ScoredToken(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[ScoredToken]
    refusal: None = None


def chat_logprobs(scored: Sequence[TokenLogprob]) -> ChatLogprobs:
    def entry(token: TokenText, logprob: float) -> dict[str, Any]:
        return {"token": token.text, "logprob": logprob, "bytes": token.bytes}

    return ChatLogprobs(
        content=[
            ScoredToken(
                **entry(each.token, each.logprob),
                top_logprobs=[Alternative(**entry(*other)) for other in each.alternatives],
            )
            for each in scored
        ]
    )


class Choice(BaseModel):
    index: int = 0
    message: ResponseMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    """``max_model_len``: tokens of prompt and response together."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "coati"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: str
    running: int
    waiting: int


def usage(prompt: int, response: int) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=response, total_tokens=prompt + response)


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """The fields that every response and every chunk of it begin with."""
    id = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}
