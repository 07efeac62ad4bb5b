"""The web server around an InferenceEngine: OpenAI's protocol, the older /generate, metrics,
health, and the chat page."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from coati.dataset.chat.message_forms import texts_of
from coati.dataset.chat.response_reader import Reader
from coati.dataset.rows.row_errors import RowError
from coati.inference.chat_templates import ChatTemplate
from coati.inference.serve import protocol
from coati.inference.serve.event_stream import (
    ChatShape,
    CompletionShape,
    Shape,
    generate_events,
    streamed,
    whole,
)
from coati.inference.serve.inference_engine import (
    ChatPrompt,
    FirstCall,
    InferenceEngine,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    StreamChunk,
)
from coati.inference.serve.inference_engine import Request as Submitted
from coati.inference.serve.middleware import (
    add_middleware,
    asset_response,
    check_bearer,
    page_response,
)
from coati.inference.serve.not_served import Refused, ignored_fields
from coati.inference.serve.protocol import (
    ChatRequest,
    GenerateRequest,
    OpenAIRequest,
    ResponseLimits,
)
from coati.inference.serve.stop_strings import word_pattern
from coati.inference.serve.text_completions import CompletionRequest, TextCompletion
from coati.inference.serve.tool_fields import ToolUse
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
Task = tuple[list[int], SamplingParams]  # a prompt and how one response to it is generated
PROMPT_FIELDS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/generate": "history",
    "/generate/stream": "history",
}
NO_TOOLS = ToolUse()
_EVENTS = {200: {"content": {"text/event-stream": {}}}}


@dataclass(frozen=True)
class WebSettings:
    """Settings of the server besides its model. ``token`` None: no authentication; ``hosts``: Host
    headers that are accepted, empty for any. ``max_new_tokens``: of a response at most; None: what
    the model has room for."""

    model_name: str
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
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
    streamed_too = {"responses": _EVENTS}
    closed.post("/v1/chat/completions", response_model=protocol.ChatCompletion, **streamed_too)(
        api.chat
    )
    closed.post("/v1/completions", response_model=TextCompletion, **streamed_too)(api.completions)
    closed.get("/v1/models")(api.models)
    closed.get("/v1/models/{model_id:path}")(api.model)
    closed.post("/generate")(api.generate)
    closed.post("/generate/stream", response_class=StreamingResponse, **streamed_too)(
        api.generate_stream
    )
    closed.get("/metrics", response_class=Response)(api.metrics)
    app.include_router(closed)
    app.get("/health", responses={503: {"model": protocol.Health}})(api.health)
    app.get("/", include_in_schema=False)(page_response)
    app.get("/assets/{name}", include_in_schema=False)(asset_response)
    return app


def _said(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Every text of the messages that a client wrote."""
    for message in messages:
        yield message["content"]
        yield message.get("reasoning_content", "")
        yield from message.get("thought_marks", ())
        for call in message.get("tool_calls", ()):
            yield from texts_of([call["function"]["name"], call["function"]["arguments"]])


def _reader(template: ChatTemplate, prompt: ChatPrompt, use: ToolUse, begun: bool) -> Reader:
    """A reader of one response to ``prompt``, which has read what the prompt begins it with."""
    reader = template.format.reader(prompt.text, use.tools, begun)
    if prompt.forced:
        reader.push(prompt.forced)
    return reader


class Api:
    """The routes."""

    def __init__(self, engine: InferenceEngine, settings: WebSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.started = int(time.time())
        self.words = word_pattern(engine.words)
        self.limits = ResponseLimits(settings.max_new_tokens, engine.max_length, engine.limited)

    async def check_token(self, request: Request) -> None:
        check_bearer(request, self.settings.token)

    async def chat(self, body: ChatRequest, request: Request, response: Response):
        """A chat completion, whole or streamed."""
        body.check_served()
        self._check_model(body.model)
        try:
            messages, begun = body.dialogue()
            use = body.tool_use()
            template = await self._template(body.chat_template_kwargs, body.reasoning_effort)
            prompt = await self._encode_chat(template, messages, begun, use)
        except RecursionError:
            raise Refused(400, "a value in the body is nested too deeply") from None
        reader = partial(_reader, template, prompt, use, bool(begun))
        params = replace(
            self._params(body, prompt.ids),
            continues=bool(begun or prompt.forced),
            shown=template.format.shown_of_calls if use.tools else template.format.shown,
            one_call=(lambda: FirstCall(reader(), len(prompt.forced))) if use.single else None,
        )
        tasks = [(prompt.ids, each) for each in body.choices(params)]
        scored = params.logprobs is not None
        shape = ChatShape(self.settings.model_name, scored, reader, use.single)
        return await self._answer(body, tasks, shape, request, response)

    async def completions(self, body: CompletionRequest, request: Request, response: Response):
        """Texts that continue prompts, whole or streamed; no chat template is used."""
        body.check_served()
        self._check_model(body.model)
        tasks = []
        prompts = body.prompts()
        self._check_number(len(prompts) * (body.n or 1))  # before thousands are tokenized
        for prompt in prompts:
            self._check_words([prompt] if isinstance(prompt, str) else [], "prompt")
            try:
                ids = await run_in_threadpool(self.engine.encode_text, prompt)
            except ValueError as error:
                raise Refused(400, f"prompt: {error}", param="prompt") from None
            params = replace(self._params(body, ids), continues=True)
            tasks += [(ids, each) for each in body.choices(params)]
        shape = CompletionShape(self.settings.model_name, body.logprobs is not None)
        return await self._answer(body, tasks, shape, request, response)

    async def _answer(
        self,
        body: OpenAIRequest,
        tasks: list[Task],
        shape: Shape,
        request: Request,
        response: Response,
    ):
        """The responses of ``tasks``, in the schema that ``shape`` knows."""
        ignored = ignored_fields(body)
        headers = {"X-Ignored-Fields": ignored} if ignored else {}
        prompt_tokens = sum(len(prompt) for prompt, _ in tasks) // (body.n or 1)
        stream = self._stream(tasks, request)
        if body.stream:
            events = shape.events(stream, prompt_tokens, body.include_usage)
            return await streamed(events, headers)
        response.headers.update(headers)
        return shape.whole(await whole(stream), prompt_tokens)

    async def generate(self, body: GenerateRequest, request: Request) -> str:
        """The response's text."""
        [response] = await whole(self._stream([await self._older(body)], request))
        return response.text

    async def generate_stream(self, body: GenerateRequest, request: Request):
        """Events `generate`, each with a part of the response, and `end`."""
        return await streamed(generate_events(self._stream([await self._older(body)], request)))

    async def _older(self, body: GenerateRequest) -> Task:
        messages = body.messages()
        protocol.check_last(messages)
        prompt = await self._encode_chat(await self._template(), messages)
        return prompt.ids, self._params(body, prompt.ids)

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

    def _params(self, body: OpenAIRequest | GenerateRequest, prompt: list[int]) -> SamplingParams:
        return body.params(self.settings.sampling, self.limits, len(prompt))

    def _check_words(self, texts: Sequence[str], field: str = "messages") -> None:
        if self.words and any(self.words.search(text) for text in texts):
            raise Refused(
                400,
                f"{field}: a word in it is one that this server does not take",
                param=field,
                code="content_filter",
            )

    def _check_number(self, responses: int) -> None:
        if responses > self.engine.max_batch + self.engine.max_queue:
            raise Refused(400, f"{responses} responses are more than this server takes at once")

    async def _template(
        self, args: dict[str, Any] | None = None, effort: str | None = None
    ) -> ChatTemplate:
        try:
            return await run_in_threadpool(self.engine.template, args, effort)
        except ValueError as error:
            field, _, said = str(error).splitlines()[0].partition(": ")
            if field != "reasoning_effort":
                field = "chat_template_kwargs"
                said = str(error).partition("template_args: ")[2] or str(error).splitlines()[0]
            raise Refused(400, f"{field}: {said}", param=field) from None

    async def _encode_chat(
        self,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        begun: str = "",
        use: ToolUse = NO_TOOLS,
    ) -> ChatPrompt:
        self._check_words([*_said(messages), begun])
        if use.tools and (lacking := template.lacking()):
            raise Refused(
                400, f"tools: this model's chat template has none: {lacking}", param="tools"
            )
        try:
            return await run_in_threadpool(
                self.engine.encode_chat,
                template,
                messages,
                begun,
                use.tools,
                self._forced(template, begun, use),
            )
        except RowError as error:
            raise Refused(
                400, f"the chat template refuses these messages: {error.args[1]}", param="messages"
            ) from None

    def _forced(self, template: ChatTemplate, begun: str, use: ToolUse) -> str:
        """How a response begins that has to call a tool."""
        if use.forced is None:
            return ""
        forced = template.format.forced(use.forced or None)
        if begun or not forced:
            why = (
                "the last message is to be continued"
                if begun
                else "nothing begins a call in its chat template"
            )
            raise Refused(
                400,
                f"tool_choice: a call cannot be forced, {why}; send 'auto'",
                param="tool_choice",
            )
        return forced

    def _submit(
        self, tasks: Sequence[Task], deliver: Callable[[int, StreamChunk], None], field: str
    ) -> list[Submitted]:
        """Queue all of ``tasks`` or none. Raises Refused; ``field`` of a request holds the
        prompts."""
        submitted: list[Submitted] = []
        try:
            self._check_number(len(tasks))
            for number, (prompt, params) in enumerate(tasks):
                submitted.append(self.engine.submit(prompt, params, partial(deliver, number)))
        except Exception as error:
            for each in submitted:
                each.cancel()
            if isinstance(error, PromptTooLong):
                code = "context_length_exceeded"
                raise Refused(400, str(error), param=field, code=code) from None
            if isinstance(error, QueueFull):
                raise Refused(429, str(error), "rate_limit_error", code="queue_full") from None
            raise
        return submitted

    async def _stream(
        self, tasks: Sequence[Task], request: Request
    ) -> AsyncIterator[tuple[int, StreamChunk]]:
        """The chunks of the responses, each with its task's number. A client that disconnects frees
        its place, also while it waits in the queue. Raises Refused when one of them does not become
        whole."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, StreamChunk]] = asyncio.Queue()
        submitted = self._submit(
            tasks,
            lambda number, chunk: loop.call_soon_threadsafe(arrived.put_nowait, (number, chunk)),
            PROMPT_FIELDS[request.url.path],
        )

        def cancel() -> None:
            for each in submitted:
                each.cancel()

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            cancel()

        watching = asyncio.ensure_future(watch())
        left = len(tasks)
        try:
            while left:
                number, chunk = await arrived.get()
                if chunk.finish in FAILED:
                    raise Refused(*FAILED[chunk.finish])
                left -= chunk.finish is not None
                yield number, chunk
        finally:
            watching.cancel()
            cancel()
