"""Responses as they are sent: whole, or as server-sent events."""

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import StreamingResponse

from coati.inference.serve import protocol
from coati.inference.serve.inference_engine import StreamChunk
from coati.inference.serve.not_served import Refused
from coati.inference.serve.text_completions import TextChoice, TextCompletion, text_logprobs
from coati.inference.serve.token_logprobs import TokenLogprob

Chunks = AsyncIterator[tuple[int, StreamChunk]]  # each with the number of its response


@dataclass
class Whole:
    """A whole response."""

    text: str = ""
    finish: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)


async def whole(stream: Chunks) -> list[Whole]:
    """The responses, by their number."""
    found: dict[int, Whole] = {}
    async for number, chunk in stream:
        response = found.setdefault(number, Whole())
        response.text += chunk.text
        response.logprobs += chunk.logprobs
        response.finish = chunk.finish or ""
        response.tokens = chunk.tokens
    return [found[number] for number in sorted(found)]


async def streamed(
    events: AsyncIterator[str], headers: dict[str, str] | None = None
) -> StreamingResponse:
    """Server-sent events, once there is a first one: an error before it has its own HTTP status."""
    first = await anext(events)

    async def all_events() -> AsyncIterator[str]:
        yield first
        try:
            async for event in events:
                yield event
        except Refused as error:
            yield _event(error.body)

    return StreamingResponse(
        all_events(),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )


class Shape(ABC):
    """The schema of a response, whole and in chunks. ``scored``: whether log-probs were asked
    for."""

    def __init__(self, model: str, scored: bool) -> None:
        self.model = model
        self.scored = scored

    @abstractmethod
    def whole(self, responses: Sequence[Whole], prompt_tokens: int) -> Any: ...

    @abstractmethod
    def head(self) -> dict[str, Any]:
        """The fields that every chunk begins with."""

    @abstractmethod
    def choices(self, number: int, chunk: StreamChunk, first: bool) -> list[dict[str, Any]]:
        """What ``chunk`` of response ``number`` becomes, each a chunk of its own."""

    async def events(self, stream: Chunks, prompt_tokens: int, usage: bool) -> AsyncIterator[str]:
        head = self.head()
        tokens: dict[int, int] = {}
        async for number, chunk in stream:
            for choice in self.choices(number, chunk, number not in tokens):
                yield _event(head | {"choices": [choice]})
            tokens[number] = chunk.tokens
        if usage:
            counted = protocol.usage(prompt_tokens, sum(tokens.values())).model_dump()
            yield _event(head | {"choices": [], "usage": counted})
        yield "data: [DONE]\n\n"


class ChatShape(Shape):
    """Of chat completions."""

    def head(self) -> dict[str, Any]:
        return protocol.head("chat.completion.chunk", "chatcmpl", self.model)

    def whole(self, responses: Sequence[Whole], prompt_tokens: int) -> protocol.ChatCompletion:
        return protocol.ChatCompletion(
            **protocol.head("chat.completion", "chatcmpl", self.model),
            choices=[
                protocol.Choice(
                    index=number,
                    message=protocol.ResponseMessage(content=each.text),
                    finish_reason=each.finish,
                    logprobs=protocol.chat_logprobs(each.logprobs) if self.scored else None,
                )
                for number, each in enumerate(responses)
            ],
            usage=protocol.usage(prompt_tokens, sum(each.tokens for each in responses)),
        )

    def choices(self, number: int, chunk: StreamChunk, first: bool) -> list[dict[str, Any]]:
        def choice(delta: dict[str, str], finish: str | None = None, scored: Any = None):
            return {"index": number, "delta": delta, "logprobs": scored, "finish_reason": finish}

        made = [choice({"role": "assistant", "content": ""})] if first else []
        if chunk.text or chunk.logprobs:
            scored = protocol.chat_logprobs(chunk.logprobs).model_dump() if self.scored else None
            made.append(choice({"content": chunk.text}, scored=scored))
        return [*made, choice({}, chunk.finish)] if chunk.finish else made


class CompletionShape(Shape):
    """Of text completions."""

    def head(self) -> dict[str, Any]:
        return protocol.head("text_completion", "cmpl", self.model)

    def whole(self, responses: Sequence[Whole], prompt_tokens: int) -> TextCompletion:
        return TextCompletion(
            **self.head(),
            choices=[
                self._choice(number, each.text, each.finish, each.logprobs)
                for number, each in enumerate(responses)
            ],
            usage=protocol.usage(prompt_tokens, sum(each.tokens for each in responses)),
        )

    def choices(self, number: int, chunk: StreamChunk, first: bool) -> list[dict[str, Any]]:
        return [self._choice(number, chunk.text, chunk.finish, chunk.logprobs).model_dump()]

    def _choice(
        self, number: int, text: str, finish: str | None, logprobs: Sequence[TokenLogprob]
    ) -> TextChoice:
        scored = text_logprobs(logprobs) if self.scored else None
        return TextChoice(index=number, text=text, finish_reason=finish, logprobs=scored)


async def generate_events(stream: Chunks) -> AsyncIterator[str]:
    """Those of the older protocol: `generate`, each with a part of the response, and `end`."""
    async for _, chunk in stream:
        if chunk.text:
            lines = "".join(f"data: {line}\n" for line in chunk.text.split("\n"))
            yield f"event: generate\n{lines}\n"
    yield "event: end\ndata:\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
