"""The online training loop: roll out, update, report, episode after episode."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from coati.experience_buffer.buffer import NaiveExperienceBuffer
from coati.experience_maker.experience import Experience
from coati.experience_maker.maker import NaiveExperienceMaker
from coati.experience_maker.model_inputs import sum_over
from coati.experience_maker.rollouts.pending_rollouts import RolloutsLost
from coati.parallel.checkpoint import RunningState, clean, save_models
from coati.parallel.engine import Engine
from coati.parallel.objective import Batch, LossPart, NonFiniteLoss, Step
from coati.parallel.weights import ModelAssets
from coati.trainer.callbacks import Callback, CallbackList
from coati.trainer.collecting import EpisodeCollector, correction_metrics
from coati.trainer.episodes import Episodes, update_shape, why_over
from coati.trainer.monitor.rl_checks import RLChecks
from coati.trainer.monitor.rl_reporter import SAMPLES, RLReporter, current_names
from coati.trainer.monitor.sample_table import sample_rows, sample_table
from coati.trainer.policy_objective import (
    PolicyObjective,
    PolicySettings,
    PtxObjective,
    ValueObjective,
)
from coati.trainer.progress import ProgressBar
from coati.trainer.rl_evaluation import PassAt, evaluate_policy
from coati.trainer.run_log import RunLog
from coati.trainer.schedule import RunSchedule
from coati.trainer.stop import GracefulStop
from coati.trainer.throughput import Throughput
from coati.utils.distributed import any_rank
from coati.utils.errors import RunFailed
from coati.utils.liveness import at_forced_end, note
from coati.utils.logging import get_logger

logger = get_logger(__name__)


class OLTrainer:
    """Trains a policy on its own responses. An episode rolls out ``num_collect_steps`` batches of
    prompts and scores the responses, then makes passes over them.

    Args:
        actor: the engine of the policy.
        critic: the engine of the value model (PPO); None for GRPO and its variants.
        objective: the policy's loss, by default the clipped one of ``policy``.
        value_clip, vf_coef: clip range and coefficient of the critic's loss.
        ptx_coef: c of (1 - c) x policy loss + c x supervised loss of ``ptx`` rows.
        schedule: its intervals count episodes here.
        assets: what is saved beside the weights of each model, by name.
        buffer_state: from :func:`~coati.parallel.checkpoint.buffer_states_by_rank`, of a run that
            was stopped inside an episode.
        rollouts: from :func:`~coati.parallel.checkpoint.rollouts_by_rank`, of a run that asks for
            responses ahead.
        checks: the training diagnostics; None: none.
        pass_at: what evaluations estimate beside reward, length and KL.
        settings: the run's settings, for wandb and TensorBoard.
        callbacks: told what happens, on every rank.
    """

    method: str | None = None  # of a subclass, in its reports

    def __init__(
        self,
        actor: Engine,
        maker: NaiveExperienceMaker,
        buffer: NaiveExperienceBuffer,
        episodes: Episodes,
        *,
        critic: Engine | None = None,
        policy: PolicySettings | None = None,
        objective: PolicyObjective | None = None,
        value_clip: float = 0.2,
        vf_coef: float = 1.0,
        ptx_coef: float = 0.0,
        schedule: RunSchedule | None = None,
        state: RunningState | None = None,
        assets: dict[str, ModelAssets] | None = None,
        buffer_state: dict[str, Any] | None = None,
        rollouts: dict[str, Any] | None = None,
        checks: RLChecks | None = None,
        pass_at: PassAt | None = None,
        settings: dict[str, Any] | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self.engine = actor
        self.critic = critic
        self.maker = maker
        self.buffer = buffer
        buffer.by_prompt = actor.shares_prefixes(training=True)
        self.episodes = episodes
        self.ptx_coef = ptx_coef
        self.vf_coef = vf_coef
        self.pass_at = pass_at
        self.name = self.method or ("grpo" if critic is None else "ppo")
        self.schedule = schedule or RunSchedule()
        self.state = state or RunningState()
        self.models = {"actor": actor} | ({} if critic is None else {"critic": critic})
        self.model_assets = assets or {
            name: ModelAssets.of(each.module) for name, each in self.models.items()
        }
        if objective is None:
            objective = PolicyObjective(policy or PolicySettings(), sum_over(actor))
        self.policy_objective = objective
        self.collector = EpisodeCollector(actor, maker, self.state, rollouts)
        self.value_objective = ValueObjective(value_clip)
        self.ptx_objective = PtxObjective()
        self.callbacks = CallbackList(callbacks)
        self.stopped_early = False
        self._lr: dict[str, float] = {}  # of each model's last step
        trained = current_names(self.state.trainer)
        self.episode: int = trained.get("episode", 0)
        self._position: tuple[int, int] = (0, 0)  # the pass and the step of it that come next
        # How the responses in the buffer were sampled, whatever a resumed run samples with.
        self._sampled: dict[str, Any] = {}
        self._ptx_at: list[int] = list(trained.get("ptx", [0, 0]))  # epoch and row
        self._start_log(trained, settings, checks)
        self._resume(buffer_state, trained)

    def _start_log(self, trained: dict, settings: dict | None, checks: RLChecks | None) -> None:
        self.log = RunLog(self.name, self.schedule, trained, settings, default_metric="reward")
        self.throughput = Throughput(
            self.engine,
            [*self.models.values(), *self.maker.engines()],
            [self.maker.clock],
            rate="tokens/s of rollouts",
        )
        ahead = self.episodes.ahead > 0
        self.reporter = RLReporter(self.log, checks, trained, self.throughput, ahead)

    def _resume(self, buffer_state: dict[str, Any] | None, trained: dict[str, Any]) -> None:
        if "maker" in trained:
            self.maker.load_state_dict(trained["maker"])
        if buffer_state is None:
            return
        kl_in_loss = bool(self.policy_objective.settings.kl_coef)
        reason = why_over(buffer_state, trained, self._update_shape(), kl_in_loss)
        if reason is not None:
            logger.info(
                f"the run was stopped inside an episode {reason}: that episode starts over."
            )
            return
        self._sampled = trained.get("sampled", {})  # older checkpoints do not say
        self._position = tuple(trained["position"])
        self.buffer.load_state_dict(buffer_state)

    def _update_shape(self) -> list[int]:
        return update_shape(self.episodes, self.buffer.sample_batch_size)

    @property
    def assets(self) -> ModelAssets:
        """What is saved beside the policy's weights."""
        return self.model_assets["actor"]

    @property
    def first_evaluation(self) -> dict[str, float]:
        """The metrics of the first evaluation."""
        return self.log.first_evaluation

    @property
    def last_evaluation(self) -> dict[str, float]:
        """The metrics of the last evaluation."""
        return self.log.last_evaluation

    @property
    def best(self) -> dict[str, float]:
        """The best ``metric_for_best`` so far and its step."""
        return self.log.best

    def run(
        self,
        prompts: Any,
        evaluation: Any = None,
        ptx: Any = None,
        log_dir: str | None = None,
        use_wandb: bool = False,
        report_to: Sequence[str] = (),
    ) -> None:
        """Train.

        Args:
            prompts: a :class:`~coati.dataset.load.loader.GlobalBatchLoader`; a global batch holds
                the prompts of one episode.
            evaluation: an :class:`~coati.dataset.load.loader.EvaluationLoader` of other prompts.
            ptx: a :class:`~coati.dataset.load.loader.GlobalBatchLoader` of supervised rows; each
                optimizer step takes one global batch.

        Raises:
            NonFiniteLoss: naming the episode; the last checkpoint stays as it was.
            ValueError: on every rank, for a reward function that fails on one.
        """
        total = self.episodes.num_episodes
        self.log.open(self.episode, log_dir, use_wandb, total, "episode", report_to)
        if self.episode == 0 and self.first_evaluation:
            # Of a run stopped in its first episode, whose metrics file is new.
            self.log.tracker.log(self.first_evaluation, 0)
        bar = ProgressBar(self.episodes.num_episodes, self.episode, self.name, unit="episode")
        try:
            note(phase="training", step=self.state.step, saved=self.state.step or None)
            with GracefulStop() as stop, at_forced_end(self._fail):
                self.callbacks.call("on_train_begin", self)
                try:
                    self._run_episodes(prompts, evaluation, ptx, bar, stop)
                except RolloutsLost:
                    with bar.paused("saving a checkpoint"):
                        self.save(self.buffer.state_dict() or None, lost=True)
                    raise
                self.callbacks.call("on_train_end", self)
            self.log.log_memory(self.episode, self.throughput.summary())
            self.log.finish(self.episode, self.stopped_early)
        except BaseException as error:
            self.log.fail(error, self.episode)
            raise
        finally:
            bar.close()
            self.log.close()

    def _run_episodes(
        self, prompts: Any, evaluation: Any, ptx: Any, bar: ProgressBar, stop: GracefulStop
    ) -> None:
        """Raises RolloutsLost where nothing is left that could sample, between two episodes."""
        self.maker.publish(self.state.step)
        self.throughput.prepare()
        if self.episode == 0 and not self.first_evaluation:
            self._evaluate(evaluation, bar)
        while self.episode < self.episodes.num_episodes and not self.stopped_early:
            if self.log.stop_early("episode", self.episode):
                break
            self._run_episode(prompts, evaluation, ptx, bar, stop)

    def _fail(self, message: str) -> None:
        self.log.fail(RunFailed(message), self.episode)

    def rehearse(self, prompts: Any, ptx: Any = None) -> dict[str, float]:
        """The first collect phase and two optimizer steps, the second with the optimizer states of
        the first; nothing is logged or saved. What an episode would log. Every rank must call
        it."""
        bar = ProgressBar(1, 0, self.name, unit="episode")
        never = GracefulStop()
        try:
            self._publish()
            self._collect(prompts, bar, never, replace(self.episodes, num_episodes=1))
            batches = self.buffer.global_batches(
                self.episodes.steps_per_pass, seed=self.episodes.seed, episode=self.episode
            )
            first = next(batches)
            for micro_batches in (first, next(batches, first)):
                self.policy_objective.first_pass = micro_batches is first
                self._step(micro_batches, ptx, never)
        finally:
            bar.close()
        return self._metrics()

    def _run_episode(
        self, prompts: Any, evaluation: Any, ptx: Any, bar: ProgressBar, stop: GracefulStop
    ) -> None:
        if not len(self.buffer) and not self._collect(prompts, bar, stop, self.episodes):
            self.stopped_early = True
            with bar.paused("saving a checkpoint"):
                self.save()
            return
        with self.log.record.timed("updates"):
            updated = self._update(ptx, bar, stop)
        if not updated:
            self.stopped_early = True
            with bar.paused("saving a checkpoint"):
                self.save(self.buffer.state_dict())
            return
        self.buffer.clear()
        self.throughput.count(0.0, steps=1)
        self._position = (0, 0)
        self.episode += 1
        if "next" in self._sampled:
            self.state.epoch, self.state.sample_start_index = self._sampled["next"]
        else:
            self.state.sample_start_index += self._sampled.get("prompts", prompts.rows_per_step)
        self._publish()
        if self.episode % max(self.schedule.log_interval, 1):
            bar.step()
        else:
            metrics = self._metrics()
            self.reporter.log_episode(metrics, self.episode, bar)
            self.callbacks.call("on_log", self, _named_train(metrics))
        last = self.episode == self.episodes.num_episodes
        if self._due(self.schedule.eval_interval) or last:
            self._evaluate(evaluation, bar)
        asked = stop.requested or self.callbacks.asked_to_stop
        self.stopped_early = any_rank(asked) and not last
        if self._due(self.schedule.save_interval) or self.stopped_early:
            with bar.paused("saving a checkpoint"):
                self.save()

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.episode % interval == 0

    # Collecting

    def _publish(self) -> None:
        """From here on responses are those of the policy as it is now. Every rank must call it."""
        started = time.perf_counter()
        self.maker.publish(self.state.step)
        self.reporter.add_seconds(time.perf_counter() - started)

    def _collect(
        self, prompts: Any, bar: ProgressBar, stop: GracefulStop, episodes: Episodes
    ) -> bool:
        """Fill the buffer; False, with everything as it was before, when a rank was asked to
        stop."""
        with self.log.record.timed("rollouts and scoring"):
            found = self.collector.collect(self.episode, prompts, episodes, bar, stop)
        if found is None:
            return False
        asked, collected = found
        self._sampled = {"temperature": asked.temperature, "prompts": asked.prompts}
        experiences, metrics = self.maker.finalize_advantages(collected)
        if asked.refilled is not None:
            self._sampled["next"] = [asked.refilled.epoch, asked.refilled.start]
            metrics |= asked.refilled.metrics()
        for experience in experiences:
            self.buffer.append(experience)
        metrics |= correction_metrics(
            experiences, self.policy_objective.settings.correction, self.state.step, self.engine
        )
        metrics["kl_coef"] = self.maker.kl.kl_coef
        self.reporter.add_rollouts(collected, metrics, self.engine.mesh.is_loss_rank)
        interval = episodes.sample_interval
        if interval and self.episode % interval == 0:
            self.reporter.show_samples(collected, self.episode + 1, bar)
        return True

    # Updating

    def _update(self, ptx: Any, bar: ProgressBar, stop: GracefulStop) -> bool:
        """The passes over the buffer, from where an interrupted run stood; False when a rank was
        asked to stop."""
        episodes = self.episodes
        steps = episodes.steps_per_pass
        total = episodes.num_update_steps * steps
        first, start = self._position
        self._begin_update(self.state.step - first * steps - start)
        for number in range(first, episodes.num_update_steps):
            batches = self.buffer.global_batches(
                steps, seed=episodes.seed, episode=self.episode, update=number, start=start
            )
            for index, micro_batches in enumerate(batches, start):
                done = number * steps + index + 1
                bar.phase(f"update {done}/{total}")
                self.policy_objective.first_pass = done == 1
                if self._step(micro_batches, ptx, stop) and done < total:
                    self._position = divmod(done, steps)
                    return False
            start = 0
        return True

    def _begin_update(self, version: int) -> None:
        """Tell the objective what holds for this episode, whose update began with the weights of
        ``version`` optimizer steps."""
        objective = self.policy_objective
        now = self.episodes.temperature(self.episode)
        objective.temperature = self._sampled.get("temperature", now)
        if objective.settings.kl_coef:
            objective.kl_coef = self.maker.kl.kl_coef
        objective.version = version

    def _step(self, micro_batches: list[Experience], ptx: Any, stop: GracefulStop) -> bool:
        """One update of every model; whether a rank was asked to stop."""
        started = time.perf_counter()
        self._lr = {
            name: engine.lr_scheduler.get_last_lr()[0]
            for name, engine in self.models.items()
            if engine.lr_scheduler is not None
        }
        aux = []
        if self.ptx_coef:
            aux = [LossPart(self._next_ptx(ptx), self.ptx_objective, self.ptx_coef)]
        try:
            batches = self.policy_objective.batches(micro_batches)
            step = self.engine.train_step(
                batches,
                self.policy_objective,
                stop.requested,
                weight=1 - self.ptx_coef,
                aux_losses=aux,
            )
            value_step = self._critic_step(micro_batches)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(self._describe(error)) from error
        self.state.step += 1
        note(step=self.state.step)
        self.reporter.add_step(step, value_step, time.perf_counter() - started)
        self.callbacks.call("on_step", self, _of_step(step, value_step, self._lr))
        return step.stop

    def _critic_step(self, micro_batches: list[Experience]) -> Step | None:
        if self.critic is None:
            return None
        batches = self.value_objective.batches(micro_batches)
        return self.critic.train_step(batches, self.value_objective, weight=self.vf_coef)

    def _next_ptx(self, ptx: Any) -> list[Batch]:
        epoch, start = self._ptx_at
        while start + ptx.rows_per_step > ptx.count(epoch):
            epoch = epoch + 1
            start = 0
        self._ptx_at = [epoch, start + ptx.rows_per_step]
        return next(islice(ptx.global_batches(epoch, start), 1))

    def _describe(self, error: NonFiniteLoss) -> str:
        return (
            f"{error} (episode {self.episode + 1}, optimizer step {self.state.step + 1}); "
            f"{self.log.what_is_kept()}. Lower --lr, --critic_lr or --grad_clip, or use "
            "--mixed_precision bf16 or fp32 instead of fp16"
        )

    # Reporting and saving

    def _metrics(self) -> dict[str, float]:
        """Of the episodes since the last call; every rank must call it."""
        episodes = self.episodes
        metrics = self.reporter.take_metrics(episodes.num_update_steps * episodes.steps_per_pass)
        metrics["optimizer_steps"] = self.state.step
        return metrics | {f"lr_{name}": lr for name, lr in self._lr.items()}

    def _evaluate(self, evaluation: Any, bar: ProgressBar) -> None:
        """As :func:`~coati.trainer.rl_evaluation.evaluate_policy`."""
        if evaluation is None:
            return
        with (
            self.log.record.timed("evaluation"),
            bar.paused("evaluating"),
            self.throughput.paused(),
        ):
            self._run_evaluation(evaluation, bar)
        self.log.record.update(self.episode)

    def _run_evaluation(self, evaluation: Any, bar: ProgressBar) -> None:
        temperature = self.episodes.temperature(self.episode)
        found = evaluate_policy(self.maker, evaluation, temperature, self.pass_at, bar.over)
        shown = found.shown[:SAMPLES]
        self.log.evaluated(found.metrics, self.episode)
        bar.write(f"episode {self.episode}: on prompts of --eval_prompt_dataset {found.summary()}")
        bar.write(sample_table(shown))
        self.log.tracker.table(*sample_rows(shown), self.episode, "evaluation")
        best = self.log.keep_best(self.engine, self.assets, self.state.step, episode=self.episode)
        if best:
            bar.write(f"episode {self.episode}: {best}")
        self.callbacks.call("on_evaluate", self, dict(self.last_evaluation))

    def save(self, buffer_state: dict[str, Any] | None = None, lost: bool = False) -> Path | None:
        """Write a checkpoint of where the run stands now; None without ``save_dir``. Waits for what
        was asked for ahead, unless its sampler is ``lost``. Every rank must call it."""
        save_dir = self.schedule.save_dir
        if save_dir is None:
            return None
        self.throughput.add_to(self.log.meter)
        self.state.trainer = self.state_dict() | self.log.state_dict() | self.reporter.state_dict()
        models = {name: (engine, self.model_assets[name]) for name, engine in self.models.items()}
        with self.log.record.timed("checkpoints"):
            rollouts = self.collector.state_dict(lost)
            path = save_models(save_dir, models, self.state, buffer_state, rollouts)
            clean(save_dir, self.schedule.keep_last_k)
        note(saved=self.state.step)
        self.log.record.update(self.episode)
        self.callbacks.call("on_save", self, path)
        return path

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, optimizers, the buffer and what is not logged
        yet; JSON keeps it exactly."""
        return {
            "episode": self.episode,
            "position": list(self._position),
            "cut": self._update_shape(),
            "sampled": self._sampled,
            "ptx": self._ptx_at,
            "maker": self.maker.state_dict(),
        }


def _named_train(metrics: dict[str, float]) -> dict[str, float]:
    """``metrics`` under their names in ``metrics.jsonl``."""
    return {f"train/{name}": value for name, value in metrics.items()}


def _of_step(step: Step, value_step: Step | None, lr: dict[str, float]) -> dict[str, float]:
    """What callbacks are told of an optimizer step of every model."""
    found = {"policy_loss": step.loss, "tokens": step.tokens, "grad_norm": step.grad_norm}
    found |= {f"lr_{name}": value for name, value in lr.items()}
    if step.aux_losses:
        found["ptx_loss"] = step.aux_losses[0]
    if value_step is not None:
        found |= {"value_loss": value_step.loss, "critic_grad_norm": value_step.grad_norm}
    return _named_train({name: float(value) for name, value in found.items() if value is not None})
