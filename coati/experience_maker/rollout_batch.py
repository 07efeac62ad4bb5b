"""What a collect step is asked for and what it brings: settings, responses with their numbers,
figures of a phase."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from coati.experience_maker.advantage import ReduceSum, kl_of_responses
from coati.experience_maker.experience import Experience
from coati.models.generation.loop import Generated
from coati.rewards.responses import Responses


@dataclass(frozen=True)
class ExperienceSettings:
    """How scores become advantages.

    ``method``: a name of :data:`~coati.experience_maker.advantage_registry.GROUP_METHODS`; None: a
    critic and GAE.
    ``kl_in``: "reward" or "loss". ``reward_at`` holds with a critic. ``overlong_margin``: tokens
    before ``max_new_tokens`` from which on a response is punished. ``filter_truncated``: responses
    that did not end by themselves are not trained on. ``rollout_batch_size``,
    ``forward_batch_size``: rows at a time; None: all.
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
    overlong_margin: int | None = None
    filter_truncated: bool = False
    whiten: bool = True
    rollout_batch_size: int | None = None
    forward_batch_size: int | None = None
    seed: int = 42


@dataclass
class RolloutBatch:
    """What one collect step brought: ``samples`` (n,) by metric, ``parts`` (B,) by source of
    reward, and the texts."""

    experience: Experience
    responses: Responses
    parts: dict[str, Tensor]
    samples: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds to ``seconds[name]`` what the block takes."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def joined(made: list[Generated], prompt_length: int) -> Generated:
    """One result of several; the narrower are filled on the right."""
    width = max(each.sequences.shape[1] for each in made)
    wide = [F.pad(each.sequences, (0, width - each.sequences.shape[1])) for each in made]
    logprobs = None
    if all(each.logprobs is not None for each in made):
        answers = width - prompt_length
        logprobs = torch.cat(
            [F.pad(each.logprobs, (0, answers - each.logprobs.shape[1])) for each in made]
        )
    lengths, stopped = (
        torch.cat([getattr(each, name) for each in made]) for name in ("lengths", "stopped")
    )
    return Generated(torch.cat(wide), lengths, stopped, prompt_length, logprobs)


def samples_of(collected: RolloutBatch) -> dict[str, Tensor]:
    """What is logged of each response, (B,) each."""
    experience, responses = collected.experience, collected.responses
    samples = {
        "reward": experience.reward,
        "approx_kl": kl_of_responses(experience.kl, experience.action_mask),
        "response_length": experience.response_lengths().float(),
        "stop_rate": torch.tensor(responses.stopped).float(),
        "empty_responses": torch.tensor([not text.strip() for text in responses.responses]).float(),
    }
    return samples | {f"reward/{name}": values for name, values in collected.parts.items()}


def moments(whole: Experience, reduce_sum: ReduceSum) -> dict[str, float]:
    """Mean and spread of advantages before whitening, and the spread of the scores, over all
    ranks."""
    figures = {}
    for name, values in (
        ("advantages", whole.advantages[whole.action_mask]),
        ("reward", whole.reward),
    ):
        values = values.double()
        count, total = reduce_sum(
            torch.stack([torch.ones_like(values).sum(), values.sum()])
        ).tolist()
        mean = total / max(count, 1)
        squares = float(reduce_sum((values - mean).square().sum()))
        figures |= {f"{name}_mean": mean, f"{name}_std": (squares / max(count - 1, 1)) ** 0.5}
    del figures["reward_mean"]  # it is logged as reward
    return figures
