"""From prompts to experience: rollouts, scores, KL, values, and the advantages of a collect
phase."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coati.experience_maker import advantage as compute
from coati.experience_maker.advantage_registry import GROUP_METHODS
from coati.experience_maker.experience import Experience, concatenate, masks
from coati.experience_maker.kl_controller import KLController
from coati.experience_maker.model_inputs import action_logprobs, state_values, sum_over
from coati.experience_maker.rollout_batch import (
    ExperienceSettings,
    RolloutBatch,
    phase_metrics,
    response_metrics,
    timed,
)
from coati.experience_maker.rollouts.dialogue_rollout import EnvironmentRollout, dialogues_of
from coati.experience_maker.rollouts.judged_groups import REWARD, judged_groups
from coati.experience_maker.rollouts.pending_rollouts import PendingRollouts
from coati.experience_maker.rollouts.rollout_engine import RolloutEngine
from coati.experience_maker.running_moments import RunningNormalization
from coati.experience_maker.scoring import Scorer, begin_scores
from coati.models.generation.detokenize import decode
from coati.models.generation.loop import Generated
from coati.models.generation.response_table import without_stop
from coati.models.generation.row_noise import NoiseRows
from coati.models.policy_loss import explained_variance, kl_per_token
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.parallel.step_work import StepClock
from coati.parallel.weights import published_weights
from coati.rewards.responses import Responses
from coati.utils.distributed import raise_together


class NaiveExperienceMaker:
    """Collects experience with the models of a run.

    Args:
        actor: the policy that is trained.
        rollout: samples responses of the policy.
        scorer: (experience, responses) -> scores (B,), and (B,) scores of each source by name.
        tokenizer: decodes prompts and responses for the scorer.
        reference: the frozen reference policy; None: no KL.
        critic: the value model; required if and only if ``settings.method`` is None.
        kl: the coefficient of the KL penalty; by default 0.
        environment: what responds to the policy; None: each sample is one response.

    ``compares_pairs``: a subclass makes pairs, which take neither a critic nor a group method.

    Raises:
        ValueError: for a critic with a group method, and for neither.
    """

    compares_pairs = False

    def __init__(
        self,
        actor: Engine,
        rollout: RolloutEngine,
        scorer: Callable[..., Any],
        tokenizer: Any,
        settings: ExperienceSettings,
        *,
        reference: InferenceModel | None = None,
        critic: Engine | None = None,
        kl: KLController | None = None,
        environment: EnvironmentRollout | None = None,
    ) -> None:
        if not self.compares_pairs and (critic is None) != (settings.method is not None):
            raise ValueError(
                "PPO takes a critic and no group method; a group method takes no critic"
            )
        self.actor = actor
        self.rollout = rollout
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.settings = settings
        self.reference = reference
        self.critic = None if critic is None else InferenceModel(critic)
        self.kl = kl or KLController(0.0)
        self.environment = environment
        self.normalization = RunningNormalization()
        self.method = None if settings.method is None else GROUP_METHODS[settings.method]
        self.clock = StepClock(actor.device)  # of what scoring is made of
        self._reduce_sum = sum_over(actor)
        self._version = 0  # of the policy as it is now

    def engines(self) -> list[Engine]:
        """Of the models beside the actor whose passes are part of an episode."""
        scorer = self.scorer.model if isinstance(self.scorer, Scorer) else None
        models = (self.critic, self.reference, scorer)
        return [model.engine for model in models if model is not None]

    def publish(self, version: int) -> None:
        """Sample with the policy as it is now, which has ``version`` optimizer steps behind it.
        Every rank must call it."""
        with self.clock.timed("publish"):
            self.rollout.publish(version, published_weights(self.actor))
        self._version = version

    def ask(
        self,
        prompts: dict[str, Any],
        sample_index: Sequence[int],
        episode: int,
        temperature: float = 1.0,
        num_generations: int | None = None,
    ) -> PendingRollouts:
        """Ask the engine for ``num_generations`` responses (``settings`` say how many) to each
        prompt, by the weights that were published last.

        ``prompts``: ``input_ids``, ``attention_mask`` (B, P) padded on the left, ``gt_answer`` a
        list of B; with an environment ``dialogue`` too, whose turns are all waited for here.
        ``sample_index``: indices of the responses among all of the episode
        (:func:`~coati.experience_maker.experience.sample_indices`). Every rank must call it with
        the same number of prompts.
        """
        count = num_generations or self.settings.num_generations
        if self.settings.offline_groups and num_generations is None:
            return self._judged(prompts, list(sample_index), temperature)
        if self.environment is not None:
            return self._ask_environment(
                self.environment, prompts, list(sample_index), count, episode, temperature
            )
        ids = prompts["input_ids"].repeat_interleave(count, 0).to(self.actor.device)
        mask = prompts["attention_mask"].repeat_interleave(count, 0).to(self.actor.device)
        pending = PendingRollouts(prompts, list(sample_index), count, temperature, [])
        size = self._rows_of_an_ask(len(ids))
        noise = NoiseRows(self.settings.seed, episode, pending.sample_index)
        seconds: dict[str, float] = {}
        with timed(seconds, "rollout"):
            for start in range(0, len(ids), size):
                rows = slice(start, start + size)
                part = self.rollout.ask(
                    ids[rows], mask[rows], noise=noise.select(rows), temperature=temperature
                )
                pending.parts.append(part)
        return replace(pending, seconds=seconds["rollout"])

    def _rows_of_an_ask(self, rows: int) -> int:
        """Of ``rows`` in all: all of them of an engine that replaces rows as they end."""
        size = self.settings.rollout_batch_size or rows
        if not getattr(self.rollout, "replaces_rows", False):
            return size
        self.rollout.rows_at_once = size
        return rows

    def _judged(
        self, prompts: dict[str, Any], sample_index: list[int], temperature: float
    ) -> PendingRollouts:
        """The responses that the rows bring: there is nothing to wait for."""
        settings = self.settings
        count = settings.num_generations
        stops = settings.stop_sequences
        found = judged_groups(prompts, count, stops, settings.max_new_tokens)
        device = self.actor.device
        known = found.of_environment or {}
        found = replace(
            found,
            sequences=found.sequences.to(device),
            lengths=found.lengths.to(device),
            stopped=found.stopped.to(device),
            of_environment={name: values.to(device) for name, values in known.items()},
        )
        answer: Future[Generated] = Future()
        answer.set_result(found)
        return PendingRollouts(prompts, sample_index, count, temperature, [answer])

    def _ask_environment(
        self,
        environment: EnvironmentRollout,
        prompts: dict[str, Any],
        sample_index: list[int],
        count: int,
        episode: int,
        temperature: float,
    ) -> PendingRollouts:
        seconds: dict[str, float] = {}
        noise = NoiseRows(self.settings.seed, episode, sample_index)
        size = self.settings.rollout_batch_size or len(sample_index)
        parts = []
        with timed(seconds, "rollout"):
            samples = environment.begin(dialogues_of(prompts), count, noise)
            begun = prompts | environment.prompts(samples, count)
            for start in range(0, len(samples), size):
                rows = slice(start, start + size)
                part: Future[Generated] = Future()
                part.set_result(
                    environment.run(
                        samples[rows],
                        noise.select(rows),
                        temperature,
                        begun["input_ids"].shape[1],
                    )
                )
                parts.append(part)
        return PendingRollouts(begun, sample_index, count, temperature, parts, seconds["rollout"])

    def make_experience(self, pending: PendingRollouts) -> RolloutBatch:
        """One collect step: the responses that were asked for, with advantages that are not
        whitened yet. Every rank must call it.

        Raises:
            ValueError: on every rank, if engine or scorer fails on one.
            RolloutsLost: on every rank, if one has no sampler left.
        """
        return self.finish_experience(self.begin_experience(pending))

    @property
    def scores_beside(self) -> bool:
        """Whether scores wait for something else, while which the next responses can be sampled:
        :meth:`begin_experience` of several batches, then :meth:`finish_experience` of each."""
        return isinstance(self.scorer, Scorer) and self.scorer.beside

    def begin_experience(self, pending: PendingRollouts) -> RolloutBatch:
        """The responses of :meth:`make_experience`, waited for, and the beginning of scores that
        wait for something else; for :meth:`finish_experience`."""
        models = [self.actor] if self.reference is None else [self.actor, self.reference.engine]
        for model in models:
            model.temperature = pending.temperature
        batch = self._receive(pending)
        batch.scores = begin_scores(self.scorer, batch.responses)
        return batch

    def finish_experience(self, batch: RolloutBatch) -> RolloutBatch:
        """What :meth:`make_experience` returns, of what :meth:`begin_experience` returned, in the
        same order. Raises as that does."""
        batch = self._finish(batch)
        with timed(batch.seconds, "scoring"):
            if self.critic is not None:
                experience = batch.experience
                with self.clock.timed("values"):
                    values = state_values(self.critic, experience, self.settings.forward_batch_size)
                batch.experience = replace(experience, values=values)
                batch.samples["value"] = values[experience.action_mask]
            self._add_advantages(batch)
        return batch

    def rollout_and_score(
        self,
        prompts: dict[str, Any],
        sample_index: Sequence[int],
        episode: int,
        temperature: float = 1.0,
        num_generations: int = 1,
    ) -> RolloutBatch:
        """Responses of the weights that were published last, their scores and their KL to the
        reference; arguments as of :meth:`ask`, errors as of :meth:`make_experience`. Does not
        change the state of the run."""
        pending = self.ask(prompts, sample_index, episode, temperature, num_generations)
        return self._finish(self.begin_experience(pending))

    def _finish(self, batch: RolloutBatch) -> RolloutBatch:
        with timed(batch.seconds, "scoring"):
            finish = batch.scores or begin_scores(self.scorer, batch.responses)
            with self.clock.timed("reward"):
                scores, batch.reward_parts = finish(batch.experience)
            batch.scores = None
            if batch.of_environment is not None:
                name = REWARD if self.settings.offline_groups else "environment"
                batch.reward_parts[name] = batch.of_environment["reward"].cpu()
                scores = scores + batch.reward_parts[name]
            experience = replace(batch.experience, reward=scores.to(batch.experience.reward))
            batch.experience = self._add_reference_kl(experience)
        batch.samples = response_metrics(batch, self._version)
        return batch

    def finalize_advantages(
        self, batches: Sequence[RolloutBatch]
    ) -> tuple[list[Experience], dict[str, float]]:
        """The experiences of a collect phase, with advantages whitened over all ranks if the method
        requires it, and the metrics of the phase. Updates the KL coefficient. Every rank must call
        it."""
        phase = concatenate([batch.experience for batch in batches])
        kl = torch.cat([batch.samples["approx_kl"] for batch in batches]).double()
        total, count = self._reduce_sum(torch.stack([kl.sum(), torch.ones_like(kl).sum()]))
        self.kl.update(float(total / count), int(count))
        metrics = phase_metrics(phase, self._reduce_sum)
        if phase.values is not None:
            metrics["explained_variance"] = float(
                explained_variance(phase.values, phase.returns, phase.action_mask, self._reduce_sum)
            )
        if self.settings.whiten and (self.method is None or self.method.whiten):
            whitened = compute.whiten(phase.advantages, phase.action_mask, self._reduce_sum)
            phase = replace(phase, advantages=whitened)
        experiences = []
        start = 0
        for batch in batches:
            end = start + len(batch.experience)
            experiences.append(phase.select(range(start, end)).trimmed())
            start = end
        return experiences, metrics

    def _receive(self, pending: PendingRollouts) -> RolloutBatch:
        """The responses, waited for, as tensors and texts."""
        seconds = {"rollout": pending.seconds}
        with timed(seconds, "rollout"):
            generated = raise_together(pending.result)
        count = pending.num_generations
        prompts = pending.prompts
        ids = prompts["input_ids"].repeat_interleave(count, 0)
        mask = prompts["attention_mask"].repeat_interleave(count, 0)
        experience = self._experience_of(generated, mask, pending.sample_index)
        truths = prompts.get("gt_answer") or [None] * len(prompts["input_ids"])
        truths = [truth for truth in truths for _ in range(count)]
        responses = replace(self._texts(generated, ids, mask, truths), num_generations=count)
        if (sources := prompts.get("source")) is not None:
            repeated = [source for source in sources for _ in range(count)]
            responses = replace(responses, sources=repeated)
        known = generated.of_environment
        if known is not None:
            known = {name: values for name, values in known.items() if name != "last_start"}
        batch = RolloutBatch(experience.trimmed(), responses, {}, seconds=seconds)
        if known is not None:
            batch.of_environment = known
            batch.written = batch.experience.action_mask
        return batch

    def _experience_of(
        self, generated: Generated, prompt_mask: Tensor, sample_index: Sequence[int]
    ) -> Experience:
        """With the log-probs of the policy as it is now, which the actor computes where the rollout
        engine gives none of its own, or those of older weights: these are then
        ``sampled_log_probs``."""
        device = generated.lengths.device
        width = generated.sequences.shape[1] - prompt_mask.shape[1]
        attention_mask, action_mask = masks(prompt_mask.to(device), generated.lengths, width)
        if generated.action_mask is not None:
            action_mask = generated.action_mask
        version = self._version if generated.version is None else generated.version
        stale = version != self._version
        logps = None if stale else generated.logprobs
        sampled = generated.sampled_logprobs
        if stale and sampled is None:
            sampled = generated.logprobs
        of_others = stale or sampled is not None
        rows = torch.full(generated.lengths.shape, version, dtype=torch.long, device=device)
        experience = Experience(
            sequences=generated.sequences,
            attention_mask=attention_mask,
            action_mask=action_mask,
            action_log_probs=torch.zeros(action_mask.shape, device=device)
            if logps is None
            else logps,
            reward=torch.zeros(len(action_mask), device=device),
            sample_index=torch.as_tensor(sample_index, device=device),
            sampled_log_probs=sampled,
            version=rows if of_others else None,
        )
        if logps is not None:
            return experience
        actor = InferenceModel(self.actor)
        logps = action_logprobs(actor, experience, self.settings.forward_batch_size)
        return replace(experience, action_log_probs=logps)

    def _texts(
        self, generated: Generated, ids: Tensor, mask: Tensor, truths: list[str | None]
    ) -> Responses:
        tokenizer = self.tokenizer
        stops = list(self.settings.stop_sequences)
        prompts = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
        responses = generated.responses()
        if generated.of_environment is not None:  # the last turn's
            starts = generated.of_environment["last_start"].tolist()
            responses = [ids[start:] for ids, start in zip(responses, starts, strict=True)]
        responses = [without_stop(response, stops) for response in responses]
        return Responses(
            [decode(tokenizer, prompt, False) for prompt in prompts],
            [decode(tokenizer, response, False) for response in responses],
            truths,
            generated.lengths.tolist(),
            generated.stopped.tolist(),
            self.settings.max_new_tokens,
        )

    def _add_reference_kl(self, experience: Experience) -> Experience:
        """With ``kl`` (B, A), and the reference's log-probs where the loss needs them."""
        if self.reference is None:
            return replace(experience, kl=torch.zeros_like(experience.action_log_probs))
        settings = self.settings
        with self.clock.timed("reference"):
            logps = action_logprobs(self.reference, experience, settings.forward_batch_size)
        mask = experience.action_mask
        kl = kl_per_token(experience.action_log_probs, logps, mask, settings.kl_estimator)
        return replace(
            experience, kl=kl, reference_log_probs=logps if settings.kl_in == "loss" else None
        )

    def _add_advantages(self, batch: RolloutBatch) -> None:
        """Shaped scores to advantages; responses that teach nothing lose their actions."""
        settings = self.settings
        experience = batch.experience
        mask = experience.action_mask
        stopped = torch.tensor(batch.responses.stopped, device=mask.device)
        scores = self._shape_scores(experience, stopped)
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
            advantages = self._critic_free_advantages(experience, scores, kl_coef)
            experience = replace(experience, advantages=advantages)
        dropped = torch.zeros_like(stopped)
        if self.method is not None and self.method.group:
            equal = compute.equal_groups(scores, settings.num_generations)
            batch.samples["equal_groups"] = equal.float()
            dropped |= equal & self.method.drop_equal
        if settings.mask_truncated_completions:
            dropped |= ~stopped
        batch.samples["dropped"] = dropped.float()
        trained, _ = compute.drop_rows(mask, dropped)
        batch.experience = replace(experience, action_mask=trained)

    def _shape_scores(self, experience: Experience, stopped: Tensor) -> Tensor:
        """(B,): penalties, then running normalization, then clipping."""
        settings = self.settings
        scores = compute.penalize_missing_eos(
            experience.reward, stopped, settings.missing_eos_penalty
        )
        if settings.overlong_buffer_len is not None:
            scores = scores + compute.overlong_penalty(
                experience.response_lengths(), settings.max_new_tokens, settings.overlong_buffer_len
            )
        if settings.reward_normalization == "running":
            self.normalization.update(scores, self._reduce_sum)
            scores = self.normalization(scores)
        if settings.reward_clip is not None:
            scores = scores.clamp(-settings.reward_clip, settings.reward_clip)
        return scores

    def _critic_free_advantages(
        self, experience: Experience, scores: Tensor, kl_coef: float
    ) -> Tensor:
        mask = experience.action_mask
        settings = self.settings
        if not self.method.group:
            rewards = compute.token_rewards(experience.kl, scores, mask, kl_coef, None)
            return compute.rewards_to_go(rewards, mask, settings.gamma)
        scores = compute.scores_less_kl(scores, experience.kl, mask, kl_coef)
        advantages = compute.group_advantages(scores, settings.num_generations, settings.method)
        return compute.broadcast_to_tokens(advantages, mask)

    def state_dict(self) -> dict[str, Any]:
        """The KL coefficient and the running normalization, as JSON keeps them."""
        return {"kl": self.kl.state_dict(), "normalization": self.normalization.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, in older checkpoints too."""
        self.kl.load_state_dict(state["kl"])
        normalization = state.get("normalization") or state["normalisation"]
        self.normalization.load_state_dict(normalization)
