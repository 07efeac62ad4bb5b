"""Policies that say what a test tells them, and environments that do, for dialogues of several
turns."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from coati.dataset.chat.conversation import Conversation
from coati.environments.multi_turn import Environment, Turn
from coati.environments.turn_tokens import TurnTokens
from coati.experience_maker.rollouts.dialogue_rollout import EnvironmentRollout, TurnLimits
from coati.models.generation.loop import Generated
from coati.models.generation.row_noise import NoiseRows
from tests.experience_maker.stubs import StubEngine


def tool(name: str = "lookup", **arguments: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in (arguments or {"word": "string"}).items()}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks a word up.",
            "parameters": {"type": "object", "properties": properties, "required": []},
        },
    }


def call(name: str = "lookup", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


class Told(Environment):
    """Answers each response with the next of ``answers``, and keeps what it was told."""

    def __init__(self, answers: Sequence[Turn], tools: Sequence[dict] = ()) -> None:
        self.answers = list(answers)
        self.tools = tools
        self.heard: list[dict] = []
        self.row: dict[str, Any] = {}

    def reset(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        self.row = row
        return row["messages"]

    def step(self, response: dict[str, Any]) -> Turn:
        self.heard.append(response)
        return self.answers.pop(0)


class ScriptedPolicy:
    """Row ``noise.rows[k]`` says ``script[row][turn]``; asks are kept. ``logprob`` of each token is
    its place in the sequence, negative."""

    def __init__(self, script: dict[int, list[list[int]]], stops: list[list[int]]) -> None:
        self.script = script
        self.stops = stops
        self.asked: list[tuple[list[int], list[int], int]] = []  # rows, limits, turn
        self.prompts: list[list[list[int]]] = []
        self.version: int | None = 0

    def ask(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        noise: NoiseRows,
        temperature: float,
        limits: Sequence[int] | None = None,
    ) -> "Future[Generated]":
        self.asked.append((list(noise.rows), list(limits or ()), noise.turn))
        real = [
            row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        self.prompts.append(real)
        said = [self.script[row][noise.turn] for row in noise.rows]
        said = [ids[:most] for ids, most in zip(said, limits or [], strict=True)]
        width = max(map(len, said))
        new = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in said])
        lengths = torch.tensor([len(ids) for ids in said])
        starts = torch.tensor([len(row) for row in real])
        logprobs = -(starts[:, None] + torch.arange(width)).float()
        logprobs = logprobs.masked_fill(torch.arange(width) >= lengths[:, None], 0.0)
        stopped = [any(ids[-len(stop) :] == stop for stop in self.stops) for ids in said]
        answer: Future[Generated] = Future()
        answer.set_result(
            Generated(
                torch.cat([input_ids, new], 1),
                lengths,
                torch.tensor(stopped),
                input_ids.shape[1],
                logprobs,
                version=self.version,
            )
        )
        return answer


def mesh(engine: StubEngine) -> StubEngine:
    engine.mesh.tp_group = None
    return engine


def rollout_of(
    conversation: Conversation,
    stops: list[list[int]],
    policy: Any,
    make: Callable[[], Any],
    **limits: Any,
) -> EnvironmentRollout:
    given = {"turns": 8, "tokens": 4000, "prompt": 4000} | limits
    return EnvironmentRollout(
        mesh(StubEngine()),
        policy,
        make,
        TurnTokens(conversation, stops),
        TurnLimits(**given),
        pad_token_id=0,
    )
