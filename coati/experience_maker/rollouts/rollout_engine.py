"""The boundary between training and what samples for it: an engine is told of new weights and is
asked for responses, in the order in which they are to happen."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from coati.models.generation.loop import Generated, Sampling
from coati.models.generation.row_noise import NoiseRows
from coati.parallel.engine import Engine
from coati.parallel.sharded_generation import cannot_sample, replaces_rows, sample


class RolloutEngine(Protocol):
    """Samples responses of the policy as it was when it was last published. ``at_once``: an answer
    is there when :meth:`ask` returns, on every rank. ``gives_logprobs``: responses come with
    log-probs of the whole distribution that sampled them."""

    at_once: bool
    gives_logprobs: bool

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Sample with ``weights`` from here on: whole tensors by the plain model's names, given out
        one by one. What was asked before is still sampled with the weights of then.

        ``version``: the optimizer steps behind them. Every rank calls it; rank 0's weights are
        sent. An engine that samples with the trained model itself leaves ``weights`` alone.
        """
        ...

    def ask(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        noise: NoiseRows,
        temperature: float,
        limits: Sequence[int] | None = None,
    ) -> "Future[Generated]":
        """Continue prompts (B, P), padded on the left with ``attention_mask`` 0; the result is
        waited for, and errors are raised, by the future's ``result()``.

        ``noise`` decides the tokens (:func:`~coati.models.generation.row_noise.row_noise`).
        ``logprobs`` of the result are log_softmax(logits / temperature) at each token, without
        top-k, top-p and penalties; None: the caller must recompute them with the policy.
        ``limits``: tokens that each row may get; None: as many as the engine gives. Every rank must
        ask equally often, and take the results in one order.
        """
        ...

    def close(self) -> None:
        """End what the engine started; nothing is asked afterward."""
        ...


class ModelRollout:
    """The policy samples by itself, with the weights that it is trained with. ``replaces_rows``:
    whether it can be asked for more than the ``rows_at_once`` that it samples at a time, of which
    one that has ended gives its place to the next (None: all that are asked for)."""

    at_once = True
    gives_logprobs = True

    def __init__(
        self,
        engine: Engine,
        *,
        sampling: Sampling,
        stop_sequences: Sequence[list[int]],
        max_new_tokens: int,
        pad_token_id: int,
    ) -> None:
        """``sampling.temperature`` gives way to the one that :meth:`ask` is called with.
        Raises ValueError where the plugin cannot sample."""
        if reason := cannot_sample(engine):
            raise ValueError(reason)
        self.engine = engine
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.replaces_rows = replaces_rows(engine)
        self.rows_at_once: int | None = None
        self.settings = {"stop_sequences": stop_sequences, "pad_token_id": pad_token_id}
        self.version = 0

    def publish(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Only the number is kept: the weights are those that are trained."""
        self.version = version

    def ask(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        noise: NoiseRows,
        temperature: float,
        limits: Sequence[int] | None = None,
    ) -> "Future[Generated]":
        """Samples at once: a result that is waited for later is of the weights of now."""
        answer: Future[Generated] = Future()
        generated = sample(
            self.engine,
            input_ids,
            attention_mask,
            sampling=replace(self.sampling, temperature=temperature),
            noise=noise.noise(self.max_new_tokens),
            return_logprobs=True,
            max_new_tokens=self.max_new_tokens,
            limits=limits,
            rows_at_once=self.rows_at_once,
            **self.settings,
        )
        answer.set_result(replace(generated, version=self.version))
        return answer

    def close(self) -> None:
        """There is nothing to end."""
