"""Models that say what a test tells them, in the place of engines: no process group, no weights."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from coati.models.generation.loop import Generated
from coati.models.generation.row_noise import NoiseRows
from coati.models.head_outputs import HeadRequest
from coati.parallel.footprint.model_flops import PassFlops
from coati.parallel.options import ParallelOptions
from coati.parallel.step_work import PassWork, StepClock
from coati.parallel.token_budget import TokenBudget


class StubEngine:
    """``say(batch)`` is what the model makes of a batch. ``others``: what all other ranks add to
    every sum of numbers, by how many numbers are summed."""

    def __init__(
        self, say: Callable[[dict], Any] | None = None, others: dict[int, list[float]] | None = None
    ) -> None:
        self.say, self.others = say, others or {}
        self.device, self.temperature = torch.device("cpu"), 1.0
        self.engine = self.module = self
        self.mesh = SimpleNamespace(dp_rank=0, dp_size=1, is_loss_rank=True)
        self.lr_scheduler = None
        self.plugin = None
        self.booster = None
        self.dtype = torch.float32
        self.options = ParallelOptions()
        self.work = PassWork(PassFlops(2.0, 0.0, 0.0), PassFlops(6.0, 0.0, 0.0))
        self.clock = StepClock()
        self.batches: list[dict[str, Tensor]] = []

    def forward_only(
        self,
        batch: dict[str, Tensor],
        read: Callable,
        head_request: HeadRequest | None = None,
        rows_together: int | None = None,
    ) -> Tensor:
        """As :class:`~coati.parallel.engine.Engine` and
        :class:`~coati.parallel.inference_model.InferenceModel` have it."""
        self.batches.append(batch)
        return read(self.say(batch), batch)

    def token_budget(self, lengths: list[int], rows: int | None = None) -> TokenBudget:
        """As these have it, of a model that needs no padding: the order of the rows stays."""
        return TokenBudget(max(lengths) * (rows or len(lengths)), padded=False)

    def on_device(self) -> AbstractContextManager:
        return nullcontext()

    def shares_prefixes(self, training: bool) -> bool:
        return False

    def sum_tensor_over_dp(self, sums: Tensor) -> Tensor:
        others = self.others.get(sums.numel(), [0.0] * sums.numel())
        return sums.double() + torch.tensor(others, dtype=torch.float64).view(sums.shape)


def log_probs(value: float | Callable[[Tensor], Tensor]) -> Callable[[dict], Tensor]:
    """A policy whose log-prob of each label is ``value``, or a function of the labels."""

    def say(batch: dict) -> Tensor:
        labels = batch["labels"][batch["labels"] != -100].float()
        return value(labels) if callable(value) else torch.full_like(labels, value)

    return say


class StubRollout:
    """Answers each prompt with the next of ``answers``; a response that ends in ``stop`` has
    stopped. ``elsewhere``: log-probs are those of an engine that is not the policy."""

    elsewhere = False
    version: int | None = None

    def __init__(
        self, answers: list[list[int]], logprob: float | None = -1.0, stop: int = 2
    ) -> None:
        self.answers, self.logprob, self.stop = list(answers), logprob, stop
        self.temperatures: list[float] = []

    def publish(self, version: int, weights: Any) -> None:
        self.version = version

    def ask(
        self, input_ids: Tensor, attention_mask: Tensor, *, noise: NoiseRows, temperature: float
    ) -> "Future[Generated]":
        self.temperatures.append(temperature)
        mine, self.answers = self.answers[: len(input_ids)], self.answers[len(input_ids) :]
        width = max(map(len, mine))
        made = torch.tensor([answer + [9] * (width - len(answer)) for answer in mine])
        lengths = torch.tensor([len(answer) for answer in mine])
        logprobs = None
        if self.logprob is not None:
            logprobs = torch.full(made.shape, self.logprob).masked_fill(
                torch.arange(width) >= lengths[:, None], 0.0
            )
        stopped = torch.tensor([answer[-1] == self.stop for answer in mine])
        answer: Future[Generated] = Future()
        answer.set_result(
            Generated(
                torch.cat([input_ids, made], 1),
                lengths,
                stopped,
                input_ids.shape[1],
                None if self.elsewhere else logprobs,
                logprobs if self.elsewhere else None,
                self.version,
            )
        )
        return answer


class Words:
    """A tokenizer whose tokens are numbers."""

    def decode(self, ids: list[int], **_: bool) -> str:
        return " ".join(map(str, ids))


def prompts(*rows: list[int], truths: list[str] | None = None) -> dict[str, Any]:
    """As the collator makes them: padded on the left."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[8] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "gt_answer": truths or [None] * len(rows),
    }
