"""The web server of a reward model: scores of responses, as rewards of a run elsewhere."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, StrictBool, StrictStr

from coati.dataset.chat.conversation import Conversation
from coati.inference.evaluate.score_rows import ScoredRow, score
from coati.inference.serve.middleware import add_middleware, check_bearer
from coati.inference.serve.not_served import Refused
from coati.models.positions import within_positions

MOST_BYTES = 64 * 2**20
MAX_LENGTH = 2**20  # where neither a flag nor the model says one


class ScoreRequest(BaseModel):
    """B prompts and responses as texts, prompts as the chat template wrote them; ``stopped``:
    whether a response ended by itself, by default all did. What else a run sends is not needed."""

    model_config = ConfigDict(extra="ignore")

    prompts: list[StrictStr]
    responses: list[StrictStr]
    stopped: list[StrictBool] | None = None


class RowRefused(Exception):
    """``row`` of a request cannot be scored."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


class RewardScorer:
    """A reward model for texts. ``max_length``: tokens of the longest row; None: what the model
    has; ``batch_size``: rows per forward."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        conversation: Conversation,
        max_length: int | None = None,
        batch_size: int = 8,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = within_positions(model.config, max_length or MAX_LENGTH, hard_only=True)
        self.batch_size = batch_size
        ends = [list(ids) for ids in conversation.stop_ids if ids]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.end = ends[0] if ends else eos
        self._alone = threading.Lock()

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], stopped: Sequence[bool]
    ) -> list[float]:
        """A score for each response. Raises RowRefused for one that is too long, or whose score is
        not finite."""
        rows = []
        for number, parts in enumerate(zip(prompts, responses, stopped, strict=True)):
            prompt, response, whole = parts
            ids = self._ids(prompt) + self._ids(response) + (self.end if whole else [])
            if not ids or len(ids) > self.max_length:
                raise RowRefused(
                    number, f"it has {len(ids)} tokens; expected 1 to {self.max_length}"
                )
            rows.append(ScoredRow("", "sft", ids=[ids]))
        pad = self.tokenizer.pad_token_id
        with self._alone:  # one batch at a time in the memory of a GPU
            score(self.model, rows, 0 if pad is None else pad, self.batch_size)
        scores = [row.scores[0] for row in rows]
        for number, value in enumerate(scores):
            if not -float("inf") < value < float("inf"):
                raise RowRefused(number, f"the model's score of it is {value}")
        return scores

    def _ids(self, text: str) -> list[int]:
        # The text of a prompt has the special tokens that its template wrote.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def make_reward_app(
    scorer: RewardScorer, name: str, token: str | None = None, hosts: Sequence[str] = ()
) -> FastAPI:
    """The application: ``POST /score`` and ``GET /health``. ``token``: what clients have to send;
    ``hosts``: Host headers that are accepted, empty for any."""
    app = FastAPI(title="coati", docs_url=None, redoc_url=None)
    add_middleware(app, (), hosts, MOST_BYTES)
    routes = APIRouter()

    @routes.post("/score")
    async def scores(body: ScoreRequest, request: Request) -> Any:
        check_bearer(request, token)
        count = len(body.responses)
        stopped = [True] * count if body.stopped is None else body.stopped
        if not len(body.prompts) == count == len(stopped):
            raise Refused(
                422,
                f"there are {len(body.prompts)} prompts, {count} responses and {len(stopped)} of "
                "stopped; expected as many of each",
            )
        try:
            found = await run_in_threadpool(scorer, body.prompts, body.responses, stopped)
        except RowRefused as error:
            said = Refused(422, f"response {error.row}: {error}", param="responses").body
            said["error"]["index"] = error.row
            return JSONResponse(said, 422)
        return {"model": name, "scores": found}

    @routes.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    app.include_router(routes)
    return app
