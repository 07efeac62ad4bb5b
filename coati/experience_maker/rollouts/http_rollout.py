"""Rollouts by servers: vLLM or the library's own sampler (``coati rollout-server``) in processes
and environments of their own, on this host or others.

Rank 0 speaks to the servers for all ranks: rows are gathered when they are asked for and handed
out again when they are waited for, so both are collective, and must happen in one order on all
ranks. A failure is one on every rank.
"""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coati.experience_maker.rollouts.model_facts import difference
from coati.experience_maker.rollouts.pending_rollouts import RolloutsLost
from coati.experience_maker.rollouts.rollout_client import (
    Answer,
    RolloutServer,
    Row,
    ServerFailed,
    Wanted,
    is_whole,
)
from coati.experience_maker.rollouts.row_queue import Ask, RowQueue
from coati.experience_maker.rollouts.server_worker import ServerWorker
from coati.experience_maker.rollouts.vllm_rollout import check_head
from coati.experience_maker.rollouts.weight_store import Weights, make_store
from coati.models.generation.loop import Generated, Sampling
from coati.models.generation.row_noise import NoiseRows
from coati.parallel.engine import Engine
from coati.parallel.weights import checkpoint_weights
from coati.utils.distributed import all_gather_object, broadcast_object, is_rank_0
from coati.utils.errors import RunFailed
from coati.utils.liveness import tick
from coati.utils.logging import get_logger

logger = get_logger(__name__)

LOOK_S = 1.0


@dataclass(frozen=True)
class ServerOptions:
    """Where the servers are and how weights reach them.

    ``sync``: "disk" or "http" (:class:`~coati.experience_maker.rollouts.weight_store.WeightStore`),
    "ipc" or "nccl" (:class:`~coati.experience_maker.rollouts.weight_store.MemoryStore`).
    ``weights_dir``: a directory of this run alone, which is emptied. ``timeout``: seconds that a
    request may take, and that the run waits while no server works. ``facts``: of the model that is
    trained (:func:`~coati.experience_maker.rollouts.model_facts.facts_of`). ``max_length``: tokens
    of prompt and response; ``temperatures``: the lowest and the highest of the run.
    """

    urls: Sequence[str]
    weights_dir: Path
    facts: dict[str, Any]
    max_length: int
    sync: str = "http"
    timeout: float = 600.0
    token: str | None = None
    temperatures: tuple[float, float] = (1.0, 1.0)


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


class HttpRollout:
    """A :class:`~coati.experience_maker.rollouts.rollout_engine.RolloutEngine`; every rank must
    make one. Raises ValueError on every rank for servers that cannot serve this run."""

    at_once = False

    def __init__(
        self,
        engine: Engine,
        options: ServerOptions,
        *,
        sampling: Sampling,
        stop_sequences: Sequence[list[int]],
        max_new_tokens: int,
        pad_token_id: int,
    ) -> None:
        self.engine = engine
        self.options = options
        self.sampling = sampling
        self.stops = tuple(tuple(stop) for stop in stop_sequences)
        self.max_new_tokens = max_new_tokens
        self.pad = pad_token_id
        self.version = 0
        self._newest: Weights | None = None
        self._started = False
        check_head(engine, "--rollout_url")
        self.queue = RowQueue()
        self.workers: list[ServerWorker] = []
        self._same_everywhere(self._connect, ValueError)

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Hand the weights over to the servers, adapters merged; the first time it is waited until
        every server has them, later they move while training goes on."""
        tensors = dict(weights)
        self.version = version
        if is_rank_0():
            self._newest = self.store.put(version, checkpoint_weights(self.engine, tensors))
        if not self._started:
            self._started = True
            self._same_everywhere(self._first_publish, RunFailed)
        if is_rank_0():
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
        """Give the rows of all ranks to the servers."""
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
        """Leave the servers as they are, and remove what was published."""
        self.queue.close()
        if is_rank_0() and hasattr(self, "store"):
            self.store.close()

    # On rank 0

    def _same_everywhere(self, work, kind: type[Exception]) -> None:
        """``work()`` on rank 0; what it raises is raised on every rank."""
        said = None
        if is_rank_0():
            try:
                work()
            except (ServerFailed, ValueError, OSError) as error:
                said = str(error)
        said = broadcast_object(said)
        if said is not None:
            self.close()
            raise kind(f"--rollout_url {said}")

    def _connect(self) -> None:
        options = self.options
        for url in options.urls:
            server = RolloutServer(url, token=options.token, timeout=options.timeout)
            server.connect()
            self._check(server)
            self.workers.append(ServerWorker(server, self.queue, None))
        self.store = make_store(
            options.weights_dir, options.sync, [*options.urls], self.engine.device, options.timeout
        )
        for worker in self.workers:
            worker.store = self.store
        if not is_whole(self.sampling) and not all(w.server.is_own for w in self.workers):
            logger.warning_once(
                "vLLM gives log-probs of what top-k, top-p and the repetition penalty leave, not "
                "of the whole distribution: its log-probs are not used, and rollouts that are "
                "older than the policy are not corrected"
            )

    def _check(self, server: RolloutServer) -> None:
        """Raises ServerFailed for a server of another model, or that cannot serve this run."""
        if found := difference(server.facts.get("facts") or {}, self.options.facts):
            raise ServerFailed(f"{server.url} serves another model ({server.model}): {found}")
        most = server.facts.get("max_model_len")
        if most is not None and most < self.options.max_length:
            raise ServerFailed(
                f"{server.url} takes {most} tokens of prompt and response, --max_length is "
                f"{self.options.max_length}; start it with a larger --max_length, or lower it here"
            )
        mode = server.facts.get("logprobs_mode")
        if mode != "processed_logprobs" and self.options.temperatures != (1.0, 1.0):
            raise ServerFailed(
                f"{server.url} gives {mode}, which leave the temperature out; start it with "
                "--logprobs-mode processed_logprobs (coati rollout-server does), or sample at "
                "temperature 1"
            )

    def _first_publish(self) -> None:
        for worker in self.workers:
            worker.take_first(self._newest)
        for worker in self.workers:
            worker.start()

    def _add(self, shares: "list[_Share]", temperature: float) -> Ask:
        rows = [row for share in shares for row in share.rows()]
        wanted = Wanted(replace(self.sampling, temperature=temperature), self.stops)
        # As many rows at once as in the training process: the server may have no more memory.
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
                if lost >= self.options.timeout:
                    self.queue.fail(self._nobody())
        self.store.keep_only(self.queue.in_use)
        if any(answer is None for answer in ask.answers):
            return self.queue.failure or "the rollout engine was closed"
        packed = {}
        answers = iter(ask.answers)
        for share, count in counts.items():
            packed[share] = _pack([next(answers) for _ in range(count)], self.pad)
        return packed

    def _nobody(self) -> str:
        reasons = "; ".join(worker.reason for worker in self.workers)
        return (
            f"no rollout server has worked for {self.options.timeout:g} s (--rollout_timeout): "
            f"{reasons}"
        )


class _Answer(Future):
    """The responses to this rank's rows; ``result()`` is collective the first time."""

    def __init__(
        self,
        rollout: HttpRollout,
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
        """Waits as long as the servers may take; every rank must call it. Raises RolloutsLost on
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


def _pack(answers: list[Answer | None], pad: int) -> _Packed:
    found = [answer for answer in answers if answer is not None]
    width = max((len(answer.tokens) for answer in found), default=0)
    tokens = np.full((len(found), width), pad, dtype=np.int32)
    logprobs = np.zeros((len(found), width), dtype=np.float32)
    there = all(answer.logprobs is not None for answer in found)
    for row, answer in enumerate(found):
        tokens[row, : len(answer.tokens)] = answer.tokens
        if there:
            logprobs[row, : len(answer.tokens)] = answer.logprobs
    return _Packed(
        tokens,
        np.array([len(answer.tokens) for answer in found], dtype=np.int64),
        np.array([answer.stopped for answer in found], dtype=bool),
        logprobs if there else None,
    )


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
