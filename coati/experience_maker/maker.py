"""From prompts to experience: responses, their scores, KL and values, and the advantages of a whole
collect phase."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coati.experience_maker import advantage as compute
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.experience_maker.experience import Experience, concatenate, masks
from coati.experience_maker.model_inputs import action_logprobs, state_values, sum_over
from coati.experience_maker.rollout import RolloutEngine
from coati.experience_maker.rollout_batch import (
    ExperienceSettings,
    RolloutBatch,
    joined,
    moments,
    samples_of,
    timed,
)
from coati.experience_maker.running_moments import KLController, RunningNormalization
from coati.experience_maker.scoring import Scorer
from coati.models.generation.loop import Generated
from coati.models.generation.response_table import without_stop
from coati.models.generation.row_noise import row_noise
from coati.models.policy_loss import explained_variance
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.rewards.responses import Responses


class NaiveExperienceMaker:
    """Collects experience with the models of a run.

    Args:
        actor: the policy that is trained.
        rollout: what samples for it.
        reference: None: there is no KL.
        critic: with ``settings.method`` None.

    Raises:
        ValueError: for a critic where none is used, or none where one is.
    """

    def __init__(
        self,
        actor: Engine,
        rollout: RolloutEngine,
        scorer: Scorer,
        tokenizer: Any,
        settings: ExperienceSettings,
        *,
        reference: InferenceModel | None = None,
        critic: Engine | None = None,
        kl: KLController | None = None,
    ) -> None:
        if (critic is None) != (settings.method is not None):
            raise ValueError(
                "PPO takes a critic and no group method; a group method takes no critic"
            )
        self.actor, self.rollout, self.scorer, self.tokenizer = actor, rollout, scorer, tokenizer
        self.settings, self.reference = settings, reference
        self.critic = None if critic is None else InferenceModel(critic)
        self.kl = kl or KLController(0.0)
        self.normalization = RunningNormalization()
        self.method = None if settings.method is None else GROUP_METHODS[settings.method]
        self._sum = sum_over(actor)

    def make_experience(
        self, prompts: dict[str, Any], rows: Sequence[int], episode: int, temperature: float = 1.0
    ) -> RolloutBatch:
        """``prompts``: ``input_ids``, ``attention_mask`` (B, P) padded on the left, ``gt_answer`` a
        list of B.

        ``rows``: indices of the B x num_generations responses among all of the episode
        (:func:`~coati.experience_maker.experience.collect_rows`). Every rank must call it with
        equally many.
        """
        collected = self.judge(prompts, rows, episode, temperature, self.settings.num_generations)
        experience = collected.experience
        with timed(collected.seconds, "scoring"):
            if self.critic is not None:
                values = state_values(self.critic, experience, self.settings.forward_batch_size)
                experience = replace(experience, values=values)
                collected.samples["value"] = values[experience.action_mask]
            collected.experience = self._with_advantages(experience, collected)
        return collected

    def judge(
        self,
        prompts: dict[str, Any],
        rows: Sequence[int],
        episode: int,
        temperature: float = 1.0,
        times: int = 1,
    ) -> RolloutBatch:
        """``times`` responses to each prompt, their scores and their KL; nothing of it changes the
        run."""
        for model in filter(None, (self.actor, self.reference and self.reference.engine)):
            model.temperature = temperature
        collected = self._respond(prompts, rows, episode, temperature, times)
        with timed(collected.seconds, "scoring"):
            raw, collected.parts = self.scorer(collected.experience, collected.responses)
            experience = replace(collected.experience, reward=raw.to(collected.experience.reward))
            collected.experience = self._toward_reference(experience)
        collected.samples = samples_of(collected)
        return collected

    def _respond(
        self,
        prompts: dict[str, Any],
        rows: Sequence[int],
        episode: int,
        temperature: float,
        times: int,
    ) -> RolloutBatch:
        settings = self.settings
        ids, mask = (
            prompts[name].repeat_interleave(times, 0) for name in ("input_ids", "attention_mask")
        )
        seconds: dict[str, float] = {}
        with timed(seconds, "rollout"):
            noise = row_noise(settings.seed, episode, rows, settings.max_new_tokens)
            made = self._generate(
                ids.to(self.actor.device), mask.to(self.actor.device), noise, temperature
            )
        attention, actions = masks(
            mask.to(made.lengths.device), made.lengths, made.sequences.shape[1] - ids.shape[1]
        )
        experience = Experience(
            made.sequences,
            attention,
            actions,
            torch.zeros(actions.shape, device=actions.device)
            if made.logprobs is None
            else made.logprobs,
            torch.zeros(len(ids), device=actions.device),
            torch.as_tensor(rows, device=actions.device),
        )
        if made.logprobs is None:
            old = action_logprobs(
                InferenceModel(self.actor), experience, settings.forward_batch_size
            )
            experience = replace(experience, action_log_probs=old)
        truths = prompts.get("gt_answer") or [None] * (len(ids) // times)
        responses = self._texts(made, ids, mask, [truth for truth in truths for _ in range(times)])
        return RolloutBatch(experience.trimmed(), responses, {}, seconds=seconds)

    def finish(
        self, collected: Sequence[RolloutBatch]
    ) -> tuple[list[Experience], dict[str, float]]:
        """The experiences of a whole collect phase, whitened over all ranks where that is asked
        for, and what can only be said of all of them. Moves the KL coefficient. Every rank must
        call it."""
        whole = concatenate([each.experience for each in collected])
        kl = torch.cat([each.samples["approx_kl"] for each in collected]).double()
        total, count = self._sum(torch.stack([kl.sum(), torch.ones_like(kl).sum()]))
        self.kl.update(float(total / count), int(count))
        figures = moments(whole, self._sum)
        if whole.values is not None:
            figures["explained_variance"] = float(
                explained_variance(whole.values, whole.returns, whole.action_mask, self._sum)
            )
        if self.settings.whiten and (self.method is None or self.method.whiten):
            whole = replace(
                whole, advantages=compute.whiten(whole.advantages, whole.action_mask, self._sum)
            )
        sizes, start, parts = [len(each.experience) for each in collected], 0, []
        for size in sizes:
            parts.append(whole.select(range(start, start + size)).trimmed())
            start += size
        return parts, figures

    def _generate(self, ids: Tensor, mask: Tensor, noise: Tensor, temperature: float) -> Generated:
        size = self.settings.rollout_batch_size or len(ids)
        made = [
            self.rollout.generate(ids[part], mask[part], noise=noise[part], temperature=temperature)
            for part in (slice(start, start + size) for start in range(0, len(ids), size))
        ]
        return made[0] if len(made) == 1 else joined(made, ids.shape[1])

    def _texts(
        self, made: Generated, ids: Tensor, mask: Tensor, truths: list[str | None]
    ) -> Responses:
        decode, stops = self.tokenizer.decode, list(self.settings.stop_sequences)
        prompts = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
        answers = [without_stop(answer, stops) for answer in made.responses()]
        return Responses(
            [decode(prompt, skip_special_tokens=False) for prompt in prompts],
            [decode(answer, skip_special_tokens=False) for answer in answers],
            truths,
            made.lengths.tolist(),
            made.stopped.tolist(),
            self.settings.max_new_tokens,
        )

    def _toward_reference(self, experience: Experience) -> Experience:
        """With ``kl`` (B, A), and the reference's log-probs where the loss needs them."""
        if self.reference is None:
            return replace(experience, kl=torch.zeros_like(experience.action_log_probs))
        logps = action_logprobs(self.reference, experience, self.settings.forward_batch_size)
        mask, estimator = experience.action_mask, self.settings.kl_estimator
        kl = compute.kl_per_token(experience.action_log_probs, logps, mask, estimator)
        return replace(
            experience, kl=kl, reference_log_probs=logps if self.settings.kl_in == "loss" else None
        )

    def _with_advantages(self, experience: Experience, collected: RolloutBatch) -> Experience:
        """Penalties, then normalization, then clipping, then advantages; responses that teach
        nothing lose their actions."""
        settings, mask = self.settings, experience.action_mask
        stopped = torch.tensor(collected.responses.stopped, device=mask.device)
        scores = compute.without_end_penalty(
            experience.reward, stopped, settings.missing_eos_penalty
        )
        if settings.overlong_margin is not None:
            lengths = experience.response_lengths()
            scores = scores + compute.overlong_penalty(
                lengths, settings.max_new_tokens, settings.overlong_margin
            )
        if settings.reward_normalization == "running":
            self.normalization.update(scores, self._sum)
            scores = self.normalization(scores)
        if settings.reward_clip is not None:
            scores = scores.clamp(-settings.reward_clip, settings.reward_clip)
        kl_coef = self.kl.kl_coef if settings.kl_in == "reward" else 0.0
        if self.method is None:
            rewards = compute.token_rewards(
                experience.kl, scores, mask, kl_coef, None, settings.reward_at
            )
            advantages, returns = compute.gae(
                rewards, experience.values, mask, settings.gamma, settings.lam
            )
            experience = replace(experience, advantages=advantages, returns=returns)
        else:
            experience = replace(
                experience, advantages=self._without_critic(experience, scores, kl_coef)
            )
        dropped = torch.zeros_like(stopped)
        if self.method is not None and self.method.group:
            equal = compute.equal_groups(scores, settings.num_generations)
            collected.samples["equal_groups"] = equal.float()
            dropped |= equal & self.method.drop_equal
        if settings.filter_truncated:
            dropped |= ~stopped
        kept, _ = compute.drop_rows(mask, dropped)
        collected.samples["dropped"] = dropped.float()
        return replace(experience, action_mask=kept)

    def _without_critic(self, experience: Experience, scores: Tensor, kl_coef: float) -> Tensor:
        mask, settings = experience.action_mask, self.settings
        if not self.method.group:
            rewards = compute.token_rewards(experience.kl, scores, mask, kl_coef, None)
            return compute.rewards_to_go(rewards, mask, settings.gamma)
        scores = compute.scores_less_kl(scores, experience.kl, mask, kl_coef)
        return compute.broadcast_to_tokens(
            compute.group_advantages(scores, settings.num_generations, settings.method), mask
        )

    def state_dict(self) -> dict[str, Any]:
        return {"kl": self.kl.state_dict(), "normalization": self.normalization.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl.load_state_dict(state["kl"])
        self.normalization.load_state_dict(state["normalization"])
