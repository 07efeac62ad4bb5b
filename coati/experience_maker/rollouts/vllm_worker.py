"""What runs inside vLLM's server: an extension of its workers that takes published weights, and a
guard of all its routes. Lives in vLLM's environment, so it imports little."""

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from coati.experience_maker.rollouts.model_facts import facts_of
from coati.experience_maker.rollouts.weight_files import Place, read_index, read_weights

TOKEN_VARIABLE = "COATI_ROLLOUT_TOKEN"


class RolloutWorker:
    """vLLM's ``--worker-extension-cls``: a base class of its workers, whose methods
    ``/collective_rpc`` runs. They take and give what JSON can hold."""

    def describe_model(self) -> dict[str, Any]:
        """What a client compares before it publishes."""
        config = self.vllm_config.model_config  # type: ignore[attr-defined]
        return {
            "engine": "vllm",
            "facts": facts_of(config.hf_config),
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
            "logprobs_mode": str(getattr(config, "logprobs_mode", "")),
            "world": self.vllm_config.parallel_config.world_size,  # type: ignore[attr-defined]
        }

    def load_published(self, place: str) -> dict[str, Any]:
        """Take the weights at a :class:`~coati.experience_maker.rollouts.weight_files.Place`, as
        JSON, one file after the other. Raises ValueError for ones that are damaged: the weights are
        then mixed, and the version stays unsaid."""
        wanted = Place.from_json(place)
        index = read_index(wanted)
        self.reload_weights(  # type: ignore[attr-defined]
            weights_iterator=read_weights(wanted, index, getattr(self, "rank", 0))
        )
        return {"name": index["name"]}


class TokenGuard:
    """ASGI middleware: every route but ``/health`` needs the bearer token of the variable
    :data:`TOKEN_VARIABLE`. vLLM's own ``--api-key`` leaves its development routes open."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ[TOKEN_VARIABLE]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] in ("http", "websocket") and scope["path"] != "/health":
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(sent, self.expected):
                start = {"type": "http.response.start", "status": 401, "headers": []}
                await send(start)
                return await send({"type": "http.response.body", "body": b""})
        return await self.app(scope, receive, send)
