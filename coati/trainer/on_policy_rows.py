"""Rows in which the student's own response stands in place of the row's (GKD, arXiv 2306.13649):
which ones, and how they are made."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coati.dataset.load.collator import pad
from coati.models.generation.response_table import left_pad
from coati.models.generation.row_noise import NoiseRows
from coati.models.generation.sampling import Sampling
from coati.models.logprobs import IGNORE_INDEX
from coati.parallel.engine import Engine
from coati.parallel.objective import Batch
from coati.parallel.sharded_generation import sample

_CHOICE = 0x676B64  # separates these draws from those of the noise, seeded alike


@dataclass(frozen=True)
class OnPolicySettings:
    """``share`` of the rows (lambda), in expectation; ``max_length``: tokens of prompt and response
    together; ``batch_size``: responses sampled at once, None: all of an optimizer step."""

    share: float
    stop_sequences: list[list[int]]
    pad_token_id: int
    max_new_tokens: int
    max_length: int
    seed: int = 42
    temperature: float = 0.9
    batch_size: int | None = None


@dataclass(frozen=True)
class _Asked:
    """A row of a micro-batch that is to be answered: its place, its index in the epoch, its
    prompt, at most how many tokens follow it, and what each of them weighs in the loss."""

    batch: int
    row: int
    index: int
    prompt: list[int]
    limit: int
    weight: float = 1.0


@dataclass(frozen=True)
class _Answered:
    """What stands in the place of a row."""

    prompt: list[int]
    response: list[int]
    weight: float


class OnPolicyRows:
    """Puts the student's responses into the micro-batches of an optimizer step.

    Whether a row is answered, and with which noise, is decided by seed, epoch and its index in the
    epoch's order alone: not by batch sizes, processes, or where a run was resumed.
    """

    def __init__(self, engine: Engine, settings: OnPolicySettings) -> None:
        self.engine = engine
        self.settings = settings

    def __call__(self, micro_batches: list[Batch], epoch: int, start: int) -> list[Batch]:
        """``micro_batches`` of this rank, of the global batch at row ``start`` of ``epoch``, with
        ``on_policy`` (B,) bool, and the student's responses in the rows where it is set. Every rank
        must call it."""
        asked = [
            found
            for number, batch in enumerate(micro_batches)
            for found in self._asked(batch, number, epoch, start)
        ]
        responses = self._sample(asked, epoch, micro_batches)
        answered: list[dict[int, _Answered]] = [{} for _ in micro_batches]
        for one, response in zip(asked, responses, strict=True):
            answered[one.batch][one.row] = _Answered(one.prompt, response, one.weight)
        padding = self.settings.pad_token_id
        return [_with(*pair, padding) for pair in zip(micro_batches, answered, strict=True)]

    def chosen(self, epoch: int, index: int) -> bool:
        """Whether the row at ``index`` of the order of ``epoch`` is answered by the student."""
        draw = np.random.default_rng([_CHOICE, self.settings.seed, epoch, index]).random()
        return bool(draw < self.settings.share)

    def _asked(self, batch: Batch, number: int, epoch: int, start: int) -> list[_Asked]:
        mesh = self.engine.mesh
        rows = len(batch["input_ids"])
        first = start + (number * mesh.dp_size + mesh.dp_rank) * rows
        found = []
        for row in range(rows):
            if not self.chosen(epoch, first + row):
                continue
            prompt = prompt_of(*_own(batch, row))
            room = self.settings.max_length - len(prompt)
            if prompt and room > 0:
                limit = min(room, self.settings.max_new_tokens)
                weight = _last_weight(batch, row)
                found.append(_Asked(number, row, first + row, prompt, limit, weight))
        return found

    def _sample(
        self, asked: Sequence[_Asked], epoch: int, micro_batches: list[Batch]
    ) -> list[list[int]]:
        rows = sum(len(batch["input_ids"]) for batch in micro_batches)
        size = self.settings.batch_size or rows
        if not self.engine.mesh.sharded_forward:
            return self._responses(asked, epoch, size) if asked else []
        # Forward passes hold collectives: every rank samples equally often, at least one row.
        found = []
        blank = _Asked(0, 0, 0, [int(micro_batches[0]["input_ids"][0, 0])], 1)
        for i in range(0, rows, size):
            part = asked[i : i + size]
            found += self._responses(part or [blank], epoch)[: len(part)]
        return found

    def _responses(
        self, asked: Sequence[_Asked], epoch: int, at_once: int | None = None
    ) -> list[list[int]]:
        settings = self.settings
        most = max(one.limit for one in asked)
        ids, mask = left_pad([one.prompt for one in asked], settings.pad_token_id)
        noise = NoiseRows(settings.seed, epoch, [one.index for one in asked])
        generated = sample(
            self.engine,
            ids,
            mask,
            sampling=Sampling.at(settings.temperature),
            stop_sequences=settings.stop_sequences,
            max_new_tokens=most,
            limits=[one.limit for one in asked],
            pad_token_id=settings.pad_token_id,
            noise=noise.noise(most),
            rows_at_once=at_once,
        )
        return generated.responses()


def prompt_of(ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The tokens before the last supervised stretch: what the last response of a conversation
    answers. Empty where nothing is supervised, or all from the beginning on."""
    end = next((i for i in reversed(range(len(ids))) if labels[i] != IGNORE_INDEX), -1)
    while end >= 0 and labels[end] != IGNORE_INDEX:
        end -= 1
    return list(ids[: end + 1])


def _own(batch: Batch, row: int) -> tuple[list[int], list[int]]:
    """Ids and labels of a row, without its padding."""
    real = batch["attention_mask"][row].bool()
    return batch["input_ids"][row][real].tolist(), batch["labels"][row][real].tolist()


def _last_weight(batch: Batch, row: int) -> float:
    """That of the last supervised token, in whose place the response comes."""
    if "loss_weights" not in batch:
        return 1.0
    supervised = (batch["labels"][row] != IGNORE_INDEX).nonzero()
    return float(batch["loss_weights"][row][supervised[-1, 0]])


def _with(batch: Batch, answered: dict[int, _Answered], padding: int) -> Batch:
    """``batch`` with prompts and responses in place of the rows that were answered, right-padded;
    of these nothing but the response is supervised, with the weight of what it replaces."""
    rows = len(batch["input_ids"])
    on_policy = torch.tensor([row in answered for row in range(rows)])
    if not answered:
        return batch | {"on_policy": on_policy}
    ids = []
    labels = []
    weights = []
    for row in range(rows):
        if row in answered:
            own = answered[row]
            blank = [IGNORE_INDEX] * len(own.prompt)
            mine = (own.prompt + own.response, blank + own.response)
            weights.append(torch.full((len(mine[0]),), own.weight))
        else:
            mine = _own(batch, row)
            if "loss_weights" in batch:
                weights.append(batch["loss_weights"][row][batch["attention_mask"][row].bool()])
        ids.append(mine[0])
        labels.append(mine[1])
    width = max(map(len, ids))
    made = {
        "input_ids": pad(ids, width, padding),
        "attention_mask": pad([[1] * len(row) for row in ids], width, 0),
        "labels": pad(labels, width, IGNORE_INDEX),
        "on_policy": on_policy,
    }
    if "loss_weights" in batch:
        padded = [torch.nn.functional.pad(row, (0, width - len(row))) for row in weights]
        made["loss_weights"] = torch.stack(padded)
    return made
