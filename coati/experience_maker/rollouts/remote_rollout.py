"""Rollouts by processes elsewhere, whatever carries rows and weights there.

Rank 0 speaks to them for all ranks: rows are gathered when they are asked for and handed out again
when they are waited for, so both are collective, and must happen in one order on all ranks. A
failure is one on every rank.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import torch
from torch import Tensor

from coati.experience_maker.rollouts.pending_rollouts import RolloutsLost
from coati.experience_maker.rollouts.rollout_client import Answer, Row, ServerFailed, Wanted
from coati.experience_maker.rollouts.row_queue import Ask, RowQueue
from coati.experience_maker.rollouts.server_worker import ServerWorker
from coati.experience_maker.rollouts.vllm_rollout import check_head
from coati.experience_maker.rollouts.weight_versions import Weights, WeightVersions
from coati.models.generation.loop import Generated, Sampling
from coati.models.generation.row_noise import NoiseRows
from coati.parallel.engine import Engine
from coati.parallel.weights import checkpoint_weights
from coati.utils.distributed import all_gather_object, broadcast_object, is_rank_0
from coati.utils.errors import RunFailed
from coati.utils.liveness import tick

LOOK_S = 1.0


@dataclass(frozen=True)
class _Share:
    """What one share of the data asks for: ``prompts``, at most ``limits`` tokens after each."""

    dp_rank: int
    prompts: list[list[int]]
    limits: list[int]
    noise: NoiseRows

    def rows(self) -> list[Row]:
        """One for each prompt."""
        noise = self.noise
        return [
            Row(prompt, limit, noise.seed, noise.episode, int(index), noise.turn)
            for prompt, limit, index in zip(self.prompts, self.limits, noise.rows, strict=True)
        ]


@dataclass(frozen=True)
class _Packed:
    """The answers of one share of the data, as they travel to its ranks."""

    tokens: np.ndarray  # (B, N) int32, pad after a response's end
    lengths: np.ndarray  # (B,)
    stopped: np.ndarray  # (B,)
    logprobs: np.ndarray | None  # (B, N) fp32


class RemoteRollout(ABC):
    """A :class:`~coati.experience_maker.rollouts.rollout_engine.RolloutEngine`; every rank must
    make one. Raises ValueError on every rank for samplers that cannot serve this run.

    ``flag``: that names the samplers, and begins each message; ``samplers``: what they are called
    in messages. ``timeout``: seconds that the run waits while none works. ``gives_logprobs``:
    whether responses come with log-probs of the whole distribution that they were sampled from.
    """

    at_once = False
    gives_logprobs = True
    flag: str
    samplers: str

    def __init__(
        self,
        engine: Engine,
        timeout: float,
        *,
        sampling: Sampling,
        stop_sequences: Sequence[list[int]],
        max_new_tokens: int,
        pad_token_id: int,
    ) -> None:
        self.engine = engine
        self.timeout = timeout
        self.sampling = sampling
        self.stops = tuple(tuple(stop) for stop in stop_sequences)
        self.max_new_tokens = max_new_tokens
        self.pad = pad_token_id
        self.version = 0
        self._newest: Weights | None = None
        self._started = False
        check_head(engine, self.flag)
        self.queue = RowQueue()
        self.store: WeightVersions | None = None
        self.workers: list[ServerWorker] = []
        self._same_everywhere(self._connect, ValueError)

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hand the weights over, adapters merged; the first time it is waited until every sampler
        has them, later they move while training goes on."""
        tensors = dict(weights)
        self.version = version
        if self.store is not None:  # on rank 0
            self._newest = self.store.put(version, checkpoint_weights(self.engine, tensors))
        if not self._started:
            self._started = True
            self._same_everywhere(self._first_publish, RunFailed)
        if self.store is not None:
            self.queue.announce(self._newest)
            self.store.keep_only(self.queue.in_use)

    def ask(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        noise: NoiseRows,
        temperature: float,
        limits: Sequence[int] | None = None,
    ) -> "Future[Generated]":
        """Give the rows of all ranks to the samplers."""
        mesh = self.engine.mesh
        prompts = [
            row[real.bool()].tolist() for row, real in zip(input_ids, attention_mask, strict=True)
        ]
        most = [self.max_new_tokens] * len(prompts) if limits is None else [*map(int, limits)]
        mine = _Share(mesh.dp_rank, prompts, most, noise) if mesh.is_loss_rank else None
        ask = None
        found = [each for each in all_gather_object(mine) if each is not None]
        shares = sorted(found, key=lambda share: share.dp_rank)
        if is_rank_0():
            ask = self._add(shares, temperature)
        counts = {share.dp_rank: len(share.prompts) for share in shares}
        return _Answer(self, input_ids, ask, counts, self.version)

    def close(self) -> None:
        """Remove what was published."""
        self.queue.close()
        if self.store is not None:
            self.store.close()

    # On rank 0

    @abstractmethod
    def _connect(self) -> None:
        """Fill ``workers``, and make the ``store``. Raises ServerFailed, ValueError or OSError,
        whose messages go on after ``flag``."""

    def _same_everywhere(self, work: Callable[[], None], kind: type[Exception]) -> None:
        """``work()`` on rank 0; what it raises is raised on every rank."""
        said = None
        cause = None
        if is_rank_0():
            try:
                work()
            except Exception as error:  # the other ranks wait
                known = isinstance(error, ServerFailed | ValueError | OSError)
                said = str(error) if known else f"{type(error).__name__}: {error}"
                cause = error
        said = broadcast_object(said)
        if said is not None:
            self.close()
            raise kind(f"{self.flag} {said}") from cause

    def _first_publish(self) -> None:
        for worker in self.workers:
            worker.take_first(self._newest)
        for worker in self.workers:
            worker.start()

    def _add(self, shares: "list[_Share]", temperature: float) -> Ask:
        rows = [row for share in shares for row in share.rows()]
        wanted = Wanted(replace(self.sampling, temperature=temperature), self.stops)
        # As many rows at once as in the training process: a sampler may have no more memory.
        each = max((len(share.prompts) for share in shares), default=1)
        together = max(min(each, ceil(len(rows) / len(self.workers))), 1)
        ask = Ask(rows, self._newest, wanted, together)
        self.queue.add(ask)
        return ask

    def _wait(self, ask: Ask, counts: dict[int, int]) -> "dict[int, _Packed] | str":
        """The answers by share of the data, or why there are none."""
        since = time.monotonic()
        while not ask.finished.wait(LOOK_S):
            tick()
            out = [worker.out_since for worker in self.workers]
            if None not in out:
                lost = time.monotonic() - max(since, *out)
                if lost >= self.timeout:
                    self.queue.fail(self._nobody())
        self.store.keep_only(self.queue.in_use)
        if any(answer is None for answer in ask.answers):
            return self.queue.failure or "the rollout engine was closed"
        packed = {}
        answers = iter(ask.answers)
        for share, count in counts.items():
            packed[share] = self._pack([next(answers) for _ in range(count)])
        return packed

    def _pack(self, answers: list[Answer | None]) -> _Packed:
        found = [answer for answer in answers if answer is not None]
        width = max((len(answer.tokens) for answer in found), default=0)
        tokens = np.full((len(found), width), self.pad, dtype=np.int32)
        logprobs = np.zeros((len(found), width), dtype=np.float32)
        for row, answer in enumerate(found):
            tokens[row, : len(answer.tokens)] = answer.tokens
            if self.gives_logprobs:
                logprobs[row, : len(answer.tokens)] = answer.logprobs
        return _Packed(
            tokens,
            np.array([len(answer.tokens) for answer in found], dtype=np.int64),
            np.array([answer.stopped for answer in found], dtype=bool),
            logprobs if self.gives_logprobs else None,
        )

    def _nobody(self) -> str:
        reasons = "; ".join(worker.reason for worker in self.workers)
        return (
            f"no {self.samplers} has worked for {self.timeout:g} s (--rollout_timeout): {reasons}"
        )


class _Answer(Future):
    """The responses to this rank's rows; ``result()`` is collective the first time."""

    def __init__(
        self,
        rollout: RemoteRollout,
        input_ids: Tensor,
        ask: Ask | None,
        counts: dict[int, int],
        version: int,
    ) -> None:
        super().__init__()
        self._rollout = rollout
        self._ids = input_ids
        self._ask = ask
        self._counts = counts
        self._version = version

    def result(self, timeout: float | None = None) -> Generated:
        """Waits as long as the samplers may take; every rank must call it. Raises RolloutsLost on
        every rank."""
        if not self.done():
            found = None
            if self._ask is not None:
                found = self._rollout._wait(self._ask, self._counts)
            found = broadcast_object(found)
            if isinstance(found, str):
                self.set_exception(RolloutsLost(found))
            else:
                mine = found[self._rollout.engine.mesh.dp_rank]
                self.set_result(_generated(self._ids, mine, self._version))
        return super().result(timeout)

    def cancel(self) -> bool:
        """The rows are left unanswered; every rank must call it."""
        if not self.done() and self._ask is not None:
            self._rollout.queue.drop(self._ask)
        return super().cancel()


def _generated(input_ids: Tensor, packed: _Packed, version: int) -> Generated:
    device = input_ids.device
    new = torch.from_numpy(packed.tokens).to(device, input_ids.dtype)
    logprobs = packed.logprobs
    return Generated(
        torch.cat([input_ids, new], dim=1),
        torch.from_numpy(packed.lengths).to(device),
        torch.from_numpy(packed.stopped).to(device),
        input_ids.shape[1],
        logprobs=None,
        sampled_logprobs=None if logprobs is None else torch.from_numpy(logprobs).to(device),
        version=version,
    )
