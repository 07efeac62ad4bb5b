"""The settings of a collect phase, and the rollouts of one collect step with their metrics."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coati.experience_maker.advantage import kl_of_responses
from coati.experience_maker.experience import Experience
from coati.experience_maker.running_moments import count_mean_squares
from coati.models.policy_loss import ReduceSum
from coati.models.rollout_correction import RolloutCorrection
from coati.rewards.responses import Responses

PART = "reward/"  # before the name of a source of reward, in metrics


@dataclass(frozen=True)
class ExperienceSettings:
    """How scores become advantages.

    ``method``: a name in :data:`~coati.experience_maker.advantage_registry.GROUP_METHODS`; None:
    GAE with a critic. ``kl_in``: "reward" or "loss". ``reward_at``: only used with a critic.
    ``overlong_buffer_len``: length of the interval before ``max_new_tokens`` over which the soft
    overlong punishment rises (DAPO); None: no punishment. ``mask_truncated_completions``: responses
    without a stop sequence are not trained on. ``rollout_batch_size``, ``forward_batch_size``: rows
    at a time; None: all. ``offline_groups``: responses and scores are those of the rows.
    """

    max_new_tokens: int
    stop_sequences: Sequence[list[int]]
    method: str | None = None
    num_generations: int = 1
    kl_estimator: str = "k1"
    kl_in: str = "reward"
    gamma: float = 1.0
    lam: float = 0.95
    reward_clip: float | None = 5.0
    reward_at: str = "last"
    reward_normalization: str = "none"
    missing_eos_penalty: float = 0.0
    overlong_buffer_len: int | None = None
    mask_truncated_completions: bool = False
    whiten: bool = True
    rollout_batch_size: int | None = None
    forward_batch_size: int | None = None
    seed: int = 42
    offline_groups: bool = False


@dataclass
class RolloutBatch:
    """The rollouts of one collect step: tensors, texts, ``reward_parts`` (B,) by source of reward
    (NaN for a response that it does not score), ``samples`` (n,) by metric, and seconds by phase.
    ``scores``: what gives the scores of its experience, until they are in it. Of samples of several
    turns ``of_environment`` (B,) by name, and ``written`` (B, A), the tokens that the policy
    wrote. ``pairs``: what is trained on, where that is pairs
    (:mod:`coati.experience_maker.pairs`)."""

    experience: Experience
    responses: Responses
    reward_parts: dict[str, Tensor]
    samples: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    scores: Callable[..., Any] | None = None
    of_environment: dict[str, Tensor] | None = None
    written: Tensor | None = None
    pairs: Experience | None = None


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block takes to ``seconds[name]``."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def response_metrics(batch: RolloutBatch, version: int) -> dict[str, Tensor]:
    """The metrics of each response, (B,) by name. ``version``: of the policy as it is now; tokens
    of older weights have importance weights in its KL, without which the KL of a policy that moves
    comes out below 0."""
    experience = batch.experience
    responses = batch.responses
    kl = experience.kl
    mask = experience.action_mask
    sampled = experience.sampled_log_probs
    if sampled is not None:
        stale = experience.version != version
        policy = experience.action_log_probs
        kl = kl * RolloutCorrection().weights(policy, sampled, mask, stale)
    samples = {
        "reward": experience.reward,
        "approx_kl": kl_of_responses(kl, mask),
        "response_length": mask.sum(1).float(),
        "stop_rate": torch.tensor(responses.stopped).float(),
        "empty_responses": torch.tensor([not text.strip() for text in responses.responses]).float(),
    }
    known = batch.of_environment or {}
    samples |= {f"environment/{name}": known[name] for name in known if name != "reward"}
    return samples | {PART + name: values for name, values in batch.reward_parts.items()}


def without_unscored(name: str, values: Tensor) -> Tensor:
    """The ``values`` of the metric ``name`` without those of responses that a source of reward does
    not score (NaN)."""
    return values[~values.isnan()] if name.startswith(PART) else values


def phase_metrics(phase: Experience, reduce_sum: ReduceSum) -> dict[str, float]:
    """Mean and standard deviation of the advantages before whitening, and standard deviation of the
    scores, over all ranks. Every rank calls ``reduce_sum`` four times."""
    advantages = phase.advantages[phase.action_mask]
    count, mean, squares = count_mean_squares(advantages, reduce_sum)
    metrics = {"advantages_mean": mean, "advantages_std": _deviation(count, squares)}
    return metrics | {"reward_std": score_deviation(phase.reward, reduce_sum)}


def score_deviation(scores: Tensor, reduce_sum: ReduceSum) -> float:
    """The standard deviation of ``scores`` (B,) over all ranks. Every rank calls ``reduce_sum``
    twice."""
    count, _, squares = count_mean_squares(scores, reduce_sum)
    return _deviation(count, squares)


def _deviation(count: float, squares: float) -> float:
    return (squares / max(count - 1, 1)) ** 0.5
