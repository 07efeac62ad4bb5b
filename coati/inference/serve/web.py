"""The web server around an InferenceEngine: OpenAI's protocol, the older /generate, metrics,
health, and the chat page."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from coati.dataset.rows.row_errors import RowError
from coati.inference.serve import protocol
from coati.inference.serve.inference_engine import (
    InferenceEngine,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    StreamChunk,
)
from coati.inference.serve.middleware import add_middleware, page_response
from coati.inference.serve.protocol import ChatRequest, Chunks, GenerateRequest, Refused, usage
from coati.inference.serve.stop_strings import word_pattern
from coati.models.generation.sampling import Sampling

# Why there is no whole response: status, message, error type.
FAILED = {
    "timeout": (
        504,
        "the response took longer than this server allows (--timeout)",
        "timeout_error",
    ),
    "error": (500, "generation failed; the server's log says why", "server_error"),
    "closed": (503, "the server is shutting down", "server_error"),
    "canceled": (499, "the client left", "server_error"),
}
_ERRORS = {
    status: {"model": protocol.ErrorBody}
    for status in (400, 401, 404, 413, 422, 429, 499, 500, 503, 504)
}
_EVENTS = {200: {"content": {"text/event-stream": {}}}}


@dataclass(frozen=True)
class WebSettings:
    """Settings of the server besides its model. ``token`` None: no authentication; ``hosts``: Host
    headers that are accepted, empty for any."""

    model_name: str
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 512
    token: str | None = None
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


def make_app(engine: InferenceEngine, settings: WebSettings) -> FastAPI:
    """The application; its shutdown closes ``engine``."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await run_in_threadpool(engine.close)

    # The documentation pages of FastAPI load scripts from elsewhere.
    app = FastAPI(title="coati", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_middleware(app, settings.cors_origins, settings.hosts)
    api = Api(engine, settings)
    closed = APIRouter(dependencies=[Depends(api.check_token)], responses=_ERRORS)
    streamed = {"responses": _EVENTS}
    closed.post("/v1/chat/completions", response_model=protocol.ChatCompletion, **streamed)(
        api.chat
    )
    closed.get("/v1/models")(api.models)
    closed.get("/v1/models/{model_id:path}")(api.model)
    closed.post("/generate")(api.generate)
    closed.post("/generate/stream", response_class=StreamingResponse, **streamed)(
        api.generate_stream
    )
    closed.get("/metrics", response_class=Response)(api.metrics)
    app.include_router(closed)
    app.get("/health", responses={503: {"model": protocol.Health}})(api.health)
    app.get("/", include_in_schema=False)(page_response)
    return app


class Api:
    """The routes."""

    def __init__(self, engine: InferenceEngine, settings: WebSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.started = int(time.time())
        self.words = word_pattern(engine.words)

    async def check_token(self, request: Request) -> None:
        if self.settings.token is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.settings.token.encode())
        if kind.lower() != "bearer" or not right:
            raise Refused(
                401,
                "wrong or missing token; send the header Authorization: Bearer TOKEN",
                "authentication_error",
                code="invalid_api_key",
            )

    async def chat(self, body: ChatRequest, request: Request):
        """A chat completion, whole or streamed."""
        body.check_served()
        self._check_model(body.model)
        prompt, params = await self._prepare([message.plain() for message in body.messages], body)
        stream = self._stream(prompt, params, request)
        if body.stream:
            include = body.stream_options is not None and body.stream_options.include_usage
            return await _streamed(
                _chat_events(stream, Chunks(self.settings.model_name), len(prompt), include)
            )
        text, last = await _whole(stream)
        choice = protocol.Choice(
            message=protocol.ResponseMessage(content=text), finish_reason=last.finish
        )
        return protocol.ChatCompletion(
            id=protocol.new_id(),
            created=int(time.time()),
            model=self.settings.model_name,
            choices=[choice],
            usage=usage(len(prompt), last.tokens),
        )

    async def generate(self, body: GenerateRequest, request: Request) -> str:
        """The response's text."""
        prompt, params = await self._prepare(body.messages(), body)
        text, _ = await _whole(self._stream(prompt, params, request))
        return text

    async def generate_stream(self, body: GenerateRequest, request: Request):
        """Events `generate`, each with a part of the response, and `end`."""
        prompt, params = await self._prepare(body.messages(), body)
        return await _streamed(_generate_events(self._stream(prompt, params, request)))

    async def models(self) -> protocol.ModelList:
        """The model that is served."""
        return protocol.ModelList(data=[await self.model(self.settings.model_name)])

    async def model(self, model_id: str) -> protocol.Model:
        self._check_model(model_id)
        return protocol.Model(
            id=model_id, created=self.started, max_model_len=self.engine.max_length
        )

    async def health(self, response: Response) -> protocol.Health:
        """Whether the engine is alive, and how many requests it has."""
        engine = self.engine
        response.status_code = 200 if engine.alive else 503
        status = "ok" if engine.alive else "the engine has ended"
        return protocol.Health(status=status, running=engine.running, waiting=engine.waiting)

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        return Response(self.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    def _check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            raise Refused(
                404,
                f"the model {name[:100]!r} is not served here, but {self.settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

    async def _prepare(
        self, messages: list[dict], body: ChatRequest | GenerateRequest
    ) -> tuple[list[int], SamplingParams]:
        if messages[-1]["role"] != "user":
            raise Refused(
                400,
                "the last message must be the user's",
                param="messages",
            )
        if self.words and any(self.words.search(message["content"]) for message in messages):
            raise Refused(
                400,
                "a message holds a word that this server does not take",
                param="messages",
                code="content_filter",
            )
        try:
            prompt = await run_in_threadpool(self.engine.encode, messages)
        except RowError as error:
            raise Refused(
                400, f"the chat template refuses these messages: {error.args[1]}", param="messages"
            ) from None
        room = self.engine.max_length - len(prompt)
        return prompt, body.params(self.settings.sampling, self.settings.max_new_tokens, room)

    async def _stream(
        self, prompt: list[int], params: SamplingParams, request: Request
    ) -> AsyncIterator[StreamChunk]:
        """The chunks of the response. A client that disconnects frees its place, also while it
        waits in the queue. Raises Refused when there is no whole response."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[StreamChunk] = asyncio.Queue()
        try:
            submitted = self.engine.submit(
                prompt, params, lambda chunk: loop.call_soon_threadsafe(arrived.put_nowait, chunk)
            )
        except PromptTooLong as error:
            raise Refused(
                400, str(error), param="messages", code="context_length_exceeded"
            ) from None
        except QueueFull as error:
            raise Refused(429, str(error), "rate_limit_error", code="queue_full") from None

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            submitted.cancel()

        watching = asyncio.ensure_future(watch())
        try:
            while True:
                chunk = await arrived.get()
                if chunk.finish in FAILED:
                    raise Refused(*FAILED[chunk.finish])
                yield chunk
                if chunk.finish:
                    return
        finally:
            watching.cancel()
            submitted.cancel()


async def _whole(stream: AsyncIterator[StreamChunk]) -> tuple[str, StreamChunk]:
    """The whole text, and the last chunk."""
    chunks = [chunk async for chunk in stream]
    return "".join(chunk.text for chunk in chunks), chunks[-1]


async def _streamed(events: AsyncIterator[str]) -> StreamingResponse:
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
        all_events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _chat_events(
    stream: AsyncIterator[StreamChunk], chunks: Chunks, prompt: int, include_usage: bool
):
    role = {"role": "assistant", "content": ""}
    async for chunk in stream:
        if role:
            yield _event(chunks.delta(role))
            role = None
        if chunk.text:
            yield _event(chunks.delta({"content": chunk.text}))
    yield _event(chunks.delta({}, chunk.finish))
    if include_usage:
        yield _event(chunks.usage(usage(prompt, chunk.tokens)))
    yield "data: [DONE]\n\n"


async def _generate_events(stream: AsyncIterator[StreamChunk]):
    async for chunk in stream:
        if chunk.text:
            lines = "".join(f"data: {line}\n" for line in chunk.text.split("\n"))
            yield f"event: generate\n{lines}\n"
    yield "event: end\ndata:\n\n"


def _event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
