"""HTTP endpoints that take and give JSON: requests with a time limit and retries, and a reward that
is one."""

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

from coati.rewards.failures import Rejected, RowFailed, Unreachable
from coati.rewards.responses import Responses
from coati.utils.redaction import HIDDEN, without_credentials

TOKEN_VARIABLE = "COATI_REWARD_TOKEN"
BACKOFF_S = (0.5, 1.0, 2.0, 4.0)  # between tries; the last one from then on
TRIES_WITHOUT_LIMIT = 8
PASSING = (408, 425, 429, 500, 502, 503, 504)  # states that may be over at the next try
OF_THE_PLACE = (401, 403, 404, 405, 407, 501)  # whatever was sent
LARGEST = 64 * 2**20  # bytes of an answer
SHOWN = 160


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its body."""

    def redirect_request(self, *_: Any) -> None:
        return None


def bearer(variable: str) -> dict[str, str]:
    """The header that carries the token of an environment variable; none without it. Raises
    ValueError naming the variable, not what it holds."""
    token = os.environ.get(variable, "").strip()
    if not token:
        return {}
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"the environment variable {variable} holds no token: expected ASCII")
    return {"Authorization": f"Bearer {token}"}


def post_json(
    url: str, body: Any, *, timeout: float | None, headers: Mapping[str, str] | None = None
) -> Any:
    """The JSON that ``url`` answers ``body`` with.

    What may be over at the next try (no connection, status 429 or 5xx) is tried again, with longer
    waits, until ``timeout`` seconds have passed for all tries together; None: eight tries without
    limit.

    Raises:
        Unreachable: where no answer came in time, for one that is no JSON, and where the status
            says that it is the wrong place or token.
        Rejected: for another status than 200.
    """
    ends = None if timeout is None else time.monotonic() + timeout
    data = json.dumps(body).encode()
    number = 0
    while True:
        left = None if ends is None else max(ends - time.monotonic(), 0.01)
        try:
            return _answer(url, data, left, headers or {})
        except (Unreachable, Rejected) as error:
            number += 1
            wait = BACKOFF_S[min(number, len(BACKOFF_S)) - 1]
            over = number >= TRIES_WITHOUT_LIMIT if ends is None else _late(ends, wait)
            if over or not error.passing:
                tries = f" ({number} tries)" if number > 1 else ""
                error.args = (_without(headers, f"{error}{tries}"),)
                raise
        time.sleep(wait)


def _late(ends: float, wait: float) -> bool:
    return time.monotonic() + wait >= ends


def _answer(url: str, data: bytes, timeout: float | None, headers: Mapping[str, str]) -> Any:
    kind = {"Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(url, data, {**kind, **headers}, method="POST")
    host = urllib.parse.urlsplit(url).hostname
    direct = [urllib.request.ProxyHandler({})] if host in ("localhost", "127.0.0.1", "::1") else []
    opener = urllib.request.build_opener(_NoRedirects, *direct)
    ends = None if timeout is None else time.monotonic() + timeout
    try:
        with opener.open(request, timeout=timeout) as response:
            text = _read(response, ends)
            status = response.status
    except urllib.error.HTTPError as error:
        raise _rejected(error) from None
    except Unreachable:
        raise
    except TimeoutError as error:
        raise Unreachable(f"did not answer within {timeout:.3g} s") from error
    except (OSError, HTTPException, ValueError) as error:  # ValueError: of a header
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise Unreachable(f"did not answer within {timeout:.3g} s") from error
        said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise Unreachable(f"cannot be reached ({said})") from error
    if status != 200:
        raise Unreachable(f"answered status {status}; expected 200", passing=False)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        said = f"answered {_short(text)}, which is no JSON; is this the right URL?"
        raise Unreachable(said, passing=False) from error


def _read(response: Any, ends: float | None) -> bytes:
    """The body, which may come slowly: a socket's time limit counts from each part of it."""
    parts = []
    size = 0
    while part := response.read1(2**16):
        parts.append(part)
        size += len(part)
        if ends is not None and time.monotonic() > ends:
            raise TimeoutError
        if size > LARGEST:
            raise Unreachable(f"answered more than {LARGEST >> 20} MiB", passing=False)
    return b"".join(parts)


def _rejected(error: urllib.error.HTTPError) -> Rejected | Unreachable:
    """What an error status means; the endpoint may name a response by its ``index``."""
    with error:
        try:
            text = error.read(2**16)
        except (OSError, HTTPException):
            text = b""
    said = _short(text)
    row = None
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        if isinstance(found, dict):
            said = str(found.get("message", found))[:SHOWN]
            index = found.get("index")
            row = index if isinstance(index, int) and not isinstance(index, bool) else None
        elif isinstance(found, str):
            said = found[:SHOWN]
    except (ValueError, RecursionError):
        pass
    where = error.headers.get("Location") if 300 <= error.code < 400 else None
    more = f" to {without_credentials(where)}; name that URL" if where else f": {said}"
    if error.code in (401, 403):
        more += f"; its token is read from the environment ({TOKEN_VARIABLE} for rewards)"
    told = f"answered status {error.code}{more}"
    if where or error.code in OF_THE_PLACE:
        return Unreachable(told, passing=False)
    return Rejected(told, row, error.code in PASSING)


def _without(headers: Mapping[str, str] | None, text: str) -> str:
    """``text``, which may quote the token that was sent, without it."""
    token = (headers or {}).get("Authorization", "").removeprefix("Bearer ")
    return text.replace(token, HIDDEN) if token else text


def _short(text: bytes) -> str:
    shown = text.decode("utf-8", "replace").strip()
    return repr(shown if len(shown) <= SHOWN else shown[:SHOWN] + "...") if shown else "nothing"


def endpoint_reward(url: str) -> Callable[[Responses, float | None], list[Any]]:
    """A reward function that asks ``url``, within a time limit: it is sent the lists of
    :class:`~coati.rewards.responses.Responses` by their names, of this rank's rows, and answers
    ``{"scores": [...]}``, a number for each response, or that list alone."""
    headers = bearer(TOKEN_VARIABLE)

    def ask(batch: Responses, limit: float | None) -> list[Any]:
        body = {**batch.columns(), "max_new_tokens": batch.max_new_tokens, "tags": batch.tags}
        try:
            found = post_json(url, body, timeout=limit, headers=headers)
        except Rejected as error:
            if error.row is not None and 0 <= error.row < len(batch):
                raise RowFailed(str(error), error.row) from error
            raise
        scores = found.get("scores") if isinstance(found, dict) else found
        if not isinstance(scores, list):
            shown = _short(json.dumps(found).encode())
            said = f'answered {shown}; expected {{"scores": [a number each]}}'
            raise Unreachable(said, passing=False)
        return scores

    return ask
