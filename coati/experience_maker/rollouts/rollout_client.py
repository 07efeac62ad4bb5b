"""One rollout server over HTTP: what it serves, its weights, and responses of it."""

import json
import math
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from coati.experience_maker.rollouts.weight_files import Place, Published
from coati.models.generation.row_noise import row_noise
from coati.models.generation.sampling import Sampling

OWN = "coati"  # the engine whose tokens are those of sampling in the training process
HOW = "start one with `coati rollout-server --model MODEL --port PORT`"


class ServerFailed(Exception):
    """A server that does not do its part now: others may, and it may later."""


class RequestRefused(ServerFailed):
    """A request that no server would answer."""


@dataclass(frozen=True)
class Row:
    """A prompt, at most how many tokens continue it, and the place of its noise
    (:func:`~coati.models.generation.row_noise.row_noise`)."""

    prompt: list[int]
    limit: int
    seed: int
    episode: int
    index: int
    turn: int = 0


@dataclass(frozen=True)
class Answer:
    """The tokens of a response, their log-probs by the sampler (None: it gives none of the whole
    distribution), and whether a stop sequence ended it."""

    tokens: list[int]
    logprobs: list[float] | None
    stopped: bool


@dataclass(frozen=True)
class Wanted:
    """How rows are continued."""

    sampling: Sampling
    stops: tuple[tuple[int, ...], ...]


class RolloutSampler(ABC):
    """What samples elsewhere. ``kind`` and ``url``: what it is called in messages; ``facts``: what
    it serves. Every method raises ServerFailed."""

    kind: str
    url: str
    facts: dict[str, Any]

    @property
    def title(self) -> str:
        """Both names."""
        return f"{self.kind} {self.url}"

    @property
    def is_own(self) -> bool:
        """Whether the library's own sampler is behind it."""
        return self.facts.get("engine") == OWN

    @property
    def model(self) -> str | None:
        """The name of what it serves."""
        return None

    @abstractmethod
    def connect(self) -> None:
        """Ask what it serves; sets ``facts``."""

    @abstractmethod
    def take_weights(self, place: Any) -> None:
        """Sample with the weights at ``place`` from here on."""

    @abstractmethod
    def check_weights(self, name: str) -> None:
        """Raises ServerFailed where other weights than ``name`` are loaded."""

    @abstractmethod
    def compare(self, published: Any) -> int:
        """How many tensors hold the same bytes there as here. Raises ServerFailed naming one that
        differs."""

    @abstractmethod
    def _choices(self, body: dict[str, Any]) -> Any:
        """What answers a request to ``/v1/completions``."""

    def complete(self, rows: Sequence[Row], wanted: Wanted, weights: str) -> list[Answer]:
        """Continue ``rows`` with the ``weights`` of that name, which must be loaded: one row on
        vLLM, whose seed is of a request, any number on the own sampler."""
        body = self._body(rows, wanted)
        if self.is_own:
            noise = {
                "seed": rows[0].seed,
                "episode": rows[0].episode,
                "rows": [row.index for row in rows],
                "turn": rows[0].turn,
            }
            body["coati"] = {
                "weights": weights,
                "noise": noise,
                "stop_sequences": [list(stop) for stop in wanted.stops],
                "max_tokens": [row.limit for row in rows],
            }
        choices = self._choices(body)
        if not isinstance(choices, list) or len(choices) != len(rows):
            count = len(choices) if isinstance(choices, list) else "no"
            raise ServerFailed(f"{self.url}: {count} responses to {len(rows)} prompts")
        ordered = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [
            self._answer(choice, wanted, row.limit)
            for choice, row in zip(ordered, rows, strict=True)
        ]

    def _body(self, rows: Sequence[Row], wanted: Wanted) -> dict[str, Any]:
        sampling = wanted.sampling
        first = rows[0]
        noise = row_noise(first.seed, first.episode, [first.index], 1, first.turn)
        return {
            "model": self.model,
            "prompt": [row.prompt for row in rows],
            "max_tokens": max(row.limit for row in rows),
            "temperature": sampling.temperature if sampling.do_sample else 0.0,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": int(float(noise[0, 0]) * 2**31),
            "logprobs": 0,
            "return_token_ids": True,
            # The stop sequences say what ends a response, not the model's configuration.
            "ignore_eos": True,
            "stop_token_ids": [stop[0] for stop in wanted.stops if len(stop) == 1],
        }

    def _answer(self, choice: dict[str, Any], wanted: Wanted, limit: int) -> Answer:
        ids = choice.get("token_ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise ServerFailed(f"{self.url}: a response without token ids (return_token_ids)")
        if not isinstance(logprobs, list) or len(logprobs) != len(ids):
            raise ServerFailed(f"{self.url}: a response without the log-probs of its tokens")
        tokens, stopped = cut(ids, wanted.stops, limit)
        if not stopped and len(tokens) < limit:
            raise ServerFailed(f"{self.url}: a response of {len(tokens)} tokens that nothing ended")
        mine = logprobs[: len(tokens)]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in mine):
            raise ServerFailed(f"{self.url}: log-probs that are no finite numbers")
        whole = self.is_own or is_whole(wanted.sampling)
        return Answer(tokens, mine if whole else None, stopped)


class RolloutServer(RolloutSampler):
    """The server at ``url``. Every method raises ServerFailed."""

    kind = "rollout server"

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 600) -> None:
        self.url = url.rstrip("/")
        self.token = token
        self.timeout = timeout
        self.facts = {}
        self._model: str | None = None
        # A proxy of the environment leads out of the network that servers are in.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def model(self) -> str | None:
        """The name under which it serves."""
        return self._model

    def connect(self) -> None:
        """Ask what it serves; sets ``model`` and ``facts``."""
        self._call("GET", "/health")
        found = self._call("GET", "/v1/models").get("data") or [{}]
        self._model = found[0].get("id")
        try:
            self._call("GET", "/weight_info")
        except ServerFailed as error:
            raise ServerFailed(
                f"{self.url} has no development routes ({error}): vLLM needs "
                f"VLLM_SERVER_DEV_MODE=1 and release 0.28 or newer; {HOW}"
            ) from error
        try:
            self.facts = dict(self._run("describe_model"))
        except (ServerFailed, TypeError, ValueError) as error:
            raise ServerFailed(
                f"{self.url} does not know describe_model ({error}): its workers lack "
                f"--worker-extension-cls; {HOW}"
            ) from error

    def take_weights(self, place: Place) -> None:
        """Sample with the weights at ``place`` from here on."""
        self._call("POST", "/pause?mode=wait", {})
        found = self._run("load_published", place.to_json())
        loaded = found.get("name") if isinstance(found, dict) else found
        if loaded != place.name:
            raise ServerFailed(f"{self.url} has loaded weights {loaded}, not {place.name}")
        self._call("POST", "/update_weight_version", {"new_version": place.name})
        self._call("POST", "/reset_prefix_cache", {})
        self._call("POST", "/resume", {})
        self.check_weights(place.name)

    def check_weights(self, name: str) -> None:
        """Raises ServerFailed where other weights than ``name`` are loaded."""
        found = self._call("GET", "/weight_info").get("weight_version")
        if found != name:
            raise ServerFailed(
                f"{self.url} says that it has weights {found}, not {name}: another run may be "
                "using it, or it was started anew"
            )

    def compare(self, published: Published) -> int:
        """How many tensors hold the same bytes there as here. Those of another precision there are
        not compared, and of vLLM's, whose kernels join, split and pack matrices, only the vectors:
        norms and biases. Raises ServerFailed naming one that differs."""
        if self.facts.get("world", 1) > 1:
            return 0
        found = self._call("POST", "/weight_checker", {"action": "checksum"})
        theirs = {name.split(":")[-1]: value for name, value in found["checksums"].items()}
        compared = 0
        for name, (sha, dtype, dimensions) in published.digests.items():
            packed = dimensions > 1 and not self.is_own
            if name not in theirs or dtype != self.facts.get("dtype") or packed:
                continue
            if theirs[name] != sha:
                raise ServerFailed(f"{self.url} holds another {name} than was published")
            compared += 1
        return compared

    def _choices(self, body: dict[str, Any]) -> Any:
        return self._call("POST", "/v1/completions", body).get("choices")

    def _run(self, method: str, *arguments: str) -> Any:
        """A method of the server's workers."""
        body = {"method": method, "args": list(arguments), "timeout": self.timeout}
        found = self._call("POST", "/collective_rpc", body).get("results") or [None]
        return found[0]

    def _call(self, verb: str, route: str, body: dict | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + route, data, headers, method=verb)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise self._refused(error, route) from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise ServerFailed(f"{self.url}: nothing answers ({reason})") from error
        except HTTPException as error:  # half an answer, or none that is HTTP
            raise ServerFailed(f"{self.url}{route}: {type(error).__name__}: {error}") from error
        try:
            found = json.loads(text) if text.strip() else {}
        except ValueError as error:
            begin = text[:60].decode(errors="replace")
            raise ServerFailed(
                f"{self.url}{route} answers no JSON but {begin!r}: is another program there?"
            ) from error
        return found if isinstance(found, dict) else {}

    def _refused(self, error: urllib.error.HTTPError, route: str) -> ServerFailed:
        try:
            text = error.read().decode(errors="replace")
        except OSError:
            text = ""
        if error.code == 401:
            return ServerFailed(
                f"{self.url} wants a token: put it into a variable and name that in "
                "--rollout_token_env"
            )
        try:
            found = json.loads(text)["error"]
            text = found["message"] if isinstance(found, dict) else str(found)
        except (KeyError, TypeError, ValueError):
            text = " ".join(text.split())
        said = f"{self.url}{route}: status {error.code} {text[:300]}".rstrip()
        refused = error.code in (400, 413, 422) and route == "/v1/completions"
        return (RequestRefused if refused else ServerFailed)(said)


def is_whole(sampling: Sampling) -> bool:
    """Whether samples are of the whole distribution: vLLM's log-probs are of what it samples
    from."""
    filtered = sampling.top_k or sampling.top_p < 1 or sampling.min_p
    return not filtered and sampling.repetition_penalty == 1


def cut(tokens: list[int], stops: Sequence[tuple[int, ...]], limit: int) -> tuple[list[int], bool]:
    """``tokens`` up to the end of the first stop sequence to be complete, and whether there is one
    within ``limit``."""
    tokens = tokens[:limit]
    for end in range(1, len(tokens) + 1):
        if any(tuple(tokens[max(0, end - len(stop)) : end]) == stop for stop in stops):
            return tokens[:end], True
    return tokens, False
