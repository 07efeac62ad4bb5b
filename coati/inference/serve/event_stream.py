"""Responses as they are sent: whole, or as server-sent events."""

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import StreamingResponse

from coati.dataset.chat.response_parts import CALL, CONTENT, Part, Reply
from coati.dataset.chat.response_reader import Reader
from coati.inference.serve import protocol
from coati.inference.serve.inference_engine import StreamChunk
from coati.inference.serve.not_served import Refused
from coati.inference.serve.text_completions import TextChoice, TextCompletion, text_logprobs
from coati.inference.serve.token_logprobs import TokenLogprob
from coati.inference.serve.tool_fields import CallOut, call_out

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
    """Of chat completions. ``reader`` makes a reader of each response; ``single``: at most one call
    is given."""

    def __init__(
        self, model: str, scored: bool, reader: Callable[[], Reader], single: bool
    ) -> None:
        super().__init__(model, scored)
        self.reader = reader
        self.single = single
        self._streams: dict[int, _ReadResponse] = {}

    def head(self) -> dict[str, Any]:
        return protocol.head("chat.completion.chunk", "chatcmpl", self.model)

    def whole(self, responses: Sequence[Whole], prompt_tokens: int) -> protocol.ChatCompletion:
        return protocol.ChatCompletion(
            **protocol.head("chat.completion", "chatcmpl", self.model),
            choices=[self._choice(number, each) for number, each in enumerate(responses)],
            usage=protocol.usage(prompt_tokens, sum(each.tokens for each in responses)),
        )

    def _choice(self, number: int, response: Whole) -> protocol.Choice:
        read = _ReadResponse(self.reader(), self.single)
        parts = read.push(response.text, final=True)
        reply = Reply().add(parts)
        calls = read.calls or None
        return protocol.Choice(
            index=number,
            message=protocol.ResponseMessage(
                content=None if calls and not reply.content else reply.content,
                reasoning_content=reply.thought or None,
                thought_marks=read.reader.marks,
                tool_calls=calls,
            ),
            finish_reason=read.finish(response.finish),
            logprobs=protocol.chat_logprobs(response.logprobs) if self.scored else None,
        )

    def choices(self, number: int, chunk: StreamChunk, first: bool) -> list[dict[str, Any]]:
        def choice(delta: dict[str, Any], finish: str | None = None):
            return {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish}

        if first:
            self._streams[number] = _ReadResponse(self.reader(), self.single)
        read = self._streams[number]
        deltas = read.deltas(read.push(chunk.text, final=chunk.finish is not None))
        if chunk.logprobs and not deltas:
            deltas = [{"content": ""}]
        made = [choice(delta) for delta in deltas]
        if made and self.scored:
            made[0]["logprobs"] = protocol.chat_logprobs(chunk.logprobs).model_dump()
        if first:
            made.insert(0, choice({"role": "assistant", "content": ""}))
        if not chunk.finish:
            return made
        last = {} if read.reader.marks is None else {"thought_marks": read.reader.marks}
        return [*made, choice(last, read.finish(chunk.finish))]


class _ReadResponse:
    """One response as it is read. ``calls``: those that were read so far."""

    def __init__(self, reader: Reader, single: bool) -> None:
        self.reader = reader
        self.single = single
        self.calls: list[CallOut] = []

    def push(self, text: str, final: bool) -> list[Part]:
        """The parts, of a single call the first alone."""
        parts = []
        for part in self.reader.push(text, final=final):
            if part.call is not None:
                if self.single and self.calls:
                    continue
                self.calls.append(call_out(part.call))
            parts.append(part)
        return parts

    def deltas(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """A call in two: its name, then its arguments, once all of it is known: a broken one would
        be text."""
        made: list[dict[str, Any]] = []
        number = len(self.calls) - sum(part.kind == CALL for part in parts)
        for part in parts:
            if part.kind != CALL:
                name = "content" if part.kind == CONTENT else "reasoning_content"
                made.append({name: part.text})
                continue
            call = self.calls[number].model_dump()
            arguments = call["function"]["arguments"]
            call["function"]["arguments"] = ""
            made.append({"tool_calls": [{"index": number, **call}]})
            piece = {"index": number, "function": {"arguments": arguments}}
            made.append({"tool_calls": [piece]})
            number += 1
        return made

    def finish(self, reason: str | None) -> str:
        """OpenAI's finish reason."""
        return "tool_calls" if self.calls and reason == "stop" else reason or ""


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
