"""The server's middleware: errors in OpenAI's format, a limit on bodies, CORS, allowed hosts; and
the chat page."""

import base64
import functools
import hashlib
import hmac
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from coati.inference.serve.not_served import OFFERED, Refused

ASSETS = ("markdown-it.min.js", "purify.min.js")
MOST_BYTES = 4 * 2**20  # of a body: many times what any prompt that fits a model takes


def check_bearer(request: Request, token: str | None) -> None:
    """Raise Refused where ``request`` does not bring ``token``; None: it need not."""
    if token is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), token.encode())
    if kind.lower() != "bearer" or not right:
        raise Refused(
            401,
            "wrong or missing token; send the header Authorization: Bearer TOKEN",
            "authentication_error",
            code="invalid_api_key",
        )


def add_middleware(
    app: FastAPI, cors_origins: Sequence[str], hosts: Sequence[str], most_bytes: int = MOST_BYTES
) -> None:
    """Add exception handlers and middleware to ``app``.

    Without ``cors_origins`` no page of another origin may read responses; ``hosts``: Host headers
    that are accepted (any, when empty); ``most_bytes``: of a body.
    """
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(BodyLimit, most=most_bytes)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["X-Ignored-Fields"],
        )
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)


async def _refused(request: Request, error: Refused) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body, error.status, headers)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    # Not what was found there: it may be long, or no JSON.
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        why = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return await _refused(request, Refused(422, f"the body is not JSON: {why}"))
    field = _field(first["loc"])
    same = [each for each in errors if _field(each["loc"])[: len(field)] == field]
    best = max(same, key=lambda each: _depth(each["loc"]))
    place = ".".join(map(str, _field(best["loc"])))
    said = best["msg"].removeprefix("Value error, ")
    message = f"{place}: {said}" if place else said
    return await _refused(request, Refused(422, message, param=place or None))


def _field(place: Sequence[str | int]) -> list[str | int]:
    """Names and numbers of ``place``, without the types that pydantic tried for a union."""
    return [
        step for step in place if step not in ("body", "str") and not re.search(r"\W", str(step))
    ]


def _depth(place: Sequence[str | int]) -> tuple[int, int]:
    """How far into a value pydantic came with one type of a union: the closest is meant."""
    return len(place), place[-1] if place and isinstance(place[-1], int) else -1


async def _http(request: Request, error: HTTPException) -> JSONResponse:
    message = str(error.detail)
    if error.status_code == 404 and request.url.path.startswith("/v1/"):
        message = f"{request.url.path[:100]} is not served; this server offers {OFFERED}"
    response = await _refused(request, Refused(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return await _refused(
        request, Refused(500, "an unexpected error; the server's log says more", "server_error")
    )


class BodyLimit:
    """ASGI middleware that refuses a body of more than ``most`` bytes, whatever its header says."""

    def __init__(self, app, most: int) -> None:
        self.app = app
        self.most = most

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        taken = 0

        async def counted():
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:
                raise HTTPException(413, f"the body has more than {self.most} bytes")
            return message

        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.most:
            refused = Refused(
                413, f"the body has {int(announced)} bytes, at most {self.most} are read"
            )
            return await JSONResponse(refused.body, 413)(scope, receive, send)
        with suppress(ClientDisconnect):  # the client is gone: not an error
            return await self.app(scope, counted, send)


def asset_response(name: str) -> Response:
    """A library of the chat page."""
    if name not in ASSETS:
        raise HTTPException(404, "Not Found")
    file = Path(__file__).parent / "vendor" / name
    headers = {"Cache-Control": "max-age=3600", "X-Content-Type-Options": "nosniff"}
    return FileResponse(file, media_type="text/javascript", headers=headers)


async def page_response() -> Response:
    """The chat page, which may load nothing but itself and its libraries."""
    html, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(html, headers=headers | {"Cache-Control": "no-cache"})


@functools.cache
def _page() -> tuple[str, str]:
    html = (Path(__file__).parent / "chat_page.html").read_text(encoding="utf-8")
    script, style = (
        re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1] for tag in ("script", "style")
    )
    return html, (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"script-src 'self' {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; "
        "img-src data:"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
