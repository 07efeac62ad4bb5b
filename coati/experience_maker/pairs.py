"""Pairs of responses to one prompt, as online DPO trains on them: of each group of responses the
one with the highest and the one with the lowest score.

A pair is two rows of an experience, 2i chosen and 2i + 1 rejected.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coati.experience_maker.advantage import drop_rows
from coati.experience_maker.experience import Experience
from coati.experience_maker.maker import NaiveExperienceMaker
from coati.experience_maker.rollout_batch import RolloutBatch, score_deviation
from coati.experience_maker.rollouts.pending_rollouts import PendingRollouts
from coati.models.generation.loop import Generated


def best_and_worst(scores: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Rows (P,) of the highest and of the lowest of ``scores`` (B,) in each of the P groups, whose
    rows lie together; the first where several are equal. Where all of a group are equal, and so
    neither is better, both are its first row.

    Raises ValueError for groups of one, and for rows left over.
    """
    if group_size < 2 or len(scores) % group_size:
        raise ValueError(
            f"{len(scores)} responses are no whole groups of {group_size}: a pair takes two or "
            "more responses to each prompt"
        )
    groups = scores.view(-1, group_size)
    start = torch.arange(0, len(scores), group_size, device=scores.device)
    # argmax and argmin alone do not say which of several equal ones they take.
    best = (groups == groups.amax(1, keepdim=True)).long().argmax(1)
    worst = (groups == groups.amin(1, keepdim=True)).long().argmax(1)
    return start + best, start + worst


def pair_indices(sample_index: Tensor, group_size: int) -> Tensor:
    """(P,) indices of the pairs among all of the episode, over all ranks, from those of the
    responses (:func:`~coati.experience_maker.experience.sample_indices`) that they are made of:
    that pair i of step s has the index i steps + s, like a single response to each prompt."""
    steps = sample_index[1] - sample_index[0]
    first = sample_index[::group_size]
    return (first // steps // group_size) * steps + first % steps


def pairs_of(experience: Experience, scores: Tensor, group_size: int) -> tuple[Experience, Tensor]:
    """The pairs (2P rows) that ``experience`` (B rows) and its shaped ``scores`` (B,) make, and
    which of them (P,) are ties, whose actions do not count. Their ``sample_index`` is twice that
    of the pair, and one more for the rejected row."""
    best, worst = best_and_worst(scores, group_size)
    tied = best == worst
    # Of a tie two rows of the same group stand in for a pair, so that every rank has as many.
    worst = torch.where(tied, worst + 1, worst)
    pairs = experience.select(torch.stack([best, worst], 1).flatten())
    index = 2 * pair_indices(experience.sample_index, group_size)
    trained, _ = drop_rows(pairs.action_mask, tied.repeat_interleave(2))
    pairs = replace(
        pairs,
        reward=scores.to(pairs.reward)[torch.stack([best, worst], 1).flatten()],
        sample_index=torch.stack([index, index + 1], 1).flatten(),
        action_mask=trained,
    )
    return pairs.trimmed(), tied


class PairMaker(NaiveExperienceMaker):
    """Collects pairs instead of advantages. Log-probs are those of temperature 1, whatever
    responses are sampled at: DPO compares the policy itself with its reference."""

    compares_pairs = True
    _tempered = False  # whether responses are sampled at another temperature than 1

    def _receive(self, pending: PendingRollouts) -> RolloutBatch:
        for model in [self.actor, *([] if self.reference is None else [self.reference.engine])]:
            model.temperature = 1.0
        self._tempered = pending.temperature != 1.0
        return super()._receive(pending)

    def _experience_of(
        self, generated: Generated, prompt_mask: Tensor, sample_index: Sequence[int]
    ) -> Experience:
        if self._tempered:  # the sampler's log-probs are of another temperature
            generated = replace(generated, logprobs=None, sampled_logprobs=None)
        return super()._experience_of(generated, prompt_mask, sample_index)

    def _add_advantages(self, batch: RolloutBatch) -> None:
        """The pairs of the batch, by its scores less the penalty of a missing end."""
        experience = batch.experience
        size = self.settings.num_generations
        stopped = torch.tensor(batch.responses.stopped, device=experience.action_mask.device)
        scores = self._shape_scores(experience, stopped)
        lengths = experience.response_lengths().float()
        pairs, tied = pairs_of(experience, scores, size)
        batch.pairs = pairs
        if experience.version is not None and experience.sampled_log_probs is None:
            # Otherwise said with the gap between the log-probs.
            batch.samples["staleness"] = (self._version - experience.version).float()
        groups = scores.view(-1, size)
        best, worst = best_and_worst(scores, size)
        batch.samples |= {
            "win_margin": groups.amax(1) - groups.amin(1),
            "ties": tied.float(),
            "chosen_length": lengths[best][~tied],
            "rejected_length": lengths[worst][~tied],
        }

    def finalize_advantages(
        self, batches: Sequence[RolloutBatch]
    ) -> tuple[list[Experience], dict[str, Any]]:
        """The pairs of a collect phase and the spread of its scores. Every rank must call it."""
        rewards = torch.cat([batch.experience.reward for batch in batches])
        metrics = {"reward_std": score_deviation(rewards, self._reduce_sum)}
        return [batch.pairs for batch in batches if batch.pairs is not None], metrics
