"""Request and response bodies: OpenAI's chat completions, and this library's older /generate."""

import time
import uuid
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from coati.inference.serve.inference_engine import SamplingParams
from coati.models.generation.sampling import Sampling

# Fields of OpenAI's protocol that are not supported, with the values that ask for nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
}
Text = Annotated[str, Field(min_length=1)]


class Refused(Exception):
    """A request that is refused with an error in OpenAI's format. ``kind``: its type, ``param``:
    the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """{role, content} as a conversation template takes it."""
        text = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    include_usage: bool = False


class SamplingFields(BaseModel):
    """Sampling parameters; a field left out is the server's default."""

    model_config = ConfigDict(allow_inf_nan=False)

    temperature: float | None = Field(None, ge=0, le=2, description="0: greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31, description="0: off")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)

    def sampling_params(
        self, field: str, asked: int | None, default: Sampling, most: int, room: int, **others: Any
    ) -> SamplingParams:
        """``default`` with the request's own fields. ``asked``: new tokens, the value of ``field``;
        by default what ``room`` the prompt leaves, at most the server's limit ``most``."""
        if asked is not None and asked > most:
            raise Refused(400, f"{field} is {asked}, at most {most} are given here", param=field)
        named = {name: getattr(self, name) for name in ("top_p", "top_k", "repetition_penalty")}
        given = {name: value for name, value in named.items() if value is not None}
        if self.temperature is not None:
            # Smaller ones are greedy all the same, and would overflow the logits.
            given["do_sample"] = self.temperature >= 1e-3
            given["temperature"] = max(self.temperature, 1e-3)
        limit = asked or max(1, min(most, room))
        return SamplingParams(replace(default, **given), limit, **others)


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions. Fields that are not supported are refused when they
    ask for something."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None

    def check_served(self) -> None:
        """Raise Refused for a field that asks for what is not supported."""
        for name, silent in NOT_SERVED.items():
            value = (self.model_extra or {}).get(name)
            if value not in silent:
                wanted = silent[1] if len(silent) > 1 else None
                raise Refused(
                    400, f"{name} is not served; leave it out or send {wanted!r}", param=name
                )

    def params(self, default: Sampling, most: int, room: int) -> SamplingParams:
        """``most``: the server's limit in tokens, ``room``: what the prompt leaves."""
        asked = self.max_completion_tokens or self.max_tokens
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = None if self.seed is None else self.seed % 2**64
        return self.sampling_params("max_tokens", asked, default, most, room, stop=stop, seed=seed)


class Dialogue(BaseModel):
    """One round of the older protocol; the last one's response is empty."""

    instruction: str = Field(min_length=1)
    response: str = ""


class GenerateRequest(SamplingFields):
    """The body of POST /generate and /generate/stream."""

    history: list[Dialogue] = Field(min_length=1)
    max_new_tokens: int | None = Field(None, ge=1)

    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": role, "content": content}
            for turn in self.history
            for role, content in (("user", turn.instruction), ("assistant", turn.response))
            if content
        ]

    def params(self, default: Sampling, most: int, room: int) -> SamplingParams:
        return self.sampling_params("max_new_tokens", self.max_new_tokens, default, most, room)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ResponseMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int = 0
    message: ResponseMessage
    finish_reason: str
    logprobs: None = None


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


class Chunks:
    """The chunks of one streamed response, as dictionaries."""

    def __init__(self, model: str) -> None:
        self.head = {
            "id": new_id(),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def delta(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        return self.head | {
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        }

    def usage(self, counted: Usage) -> dict[str, Any]:
        return self.head | {"choices": [], "usage": counted.model_dump()}


def new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
