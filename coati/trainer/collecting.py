"""Collecting the responses of an episode, and asking for those of the episodes after it while it is
trained.

What is asked for is decided by the episode that asks: its prompts, temperature, noise and the
weights of then. What is made of the answers (rewards, KL and its coefficient, values,
normalization) is of the time at which they are collected.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from coati.experience_maker.experience import Experience, sample_indices
from coati.experience_maker.maker import NaiveExperienceMaker
from coati.experience_maker.rollout_batch import RolloutBatch
from coati.experience_maker.rollouts.pending_rollouts import PendingRollouts, RolloutsLost
from coati.models.rollout_correction import RolloutCorrection, gap_metrics, gap_per_action
from coati.parallel.checkpoint import RunningState
from coati.parallel.engine import Engine
from coati.trainer.dynamic_sampling import Refilled, refill
from coati.trainer.episodes import Episodes
from coati.trainer.progress import ProgressBar
from coati.trainer.stop import GracefulStop
from coati.utils.distributed import all_gather_object, any_rank, raise_together
from coati.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass
class AskedEpisode:
    """An episode that was asked for: ``prompts`` rows over all ranks from row ``start`` of
    ``epoch`` on, in ``batches``; of the first of them scores are ``begun``. ``lasting``: a
    checkpoint has to hold the answers, since newer weights would give others. ``refilled``: what
    dynamic sampling has added."""

    epoch: int
    start: int
    prompts: int
    temperature: float
    batches: list[PendingRollouts]
    lasting: bool
    begun: list[RolloutBatch] = field(default_factory=list)
    refilled: Refilled | None = None

    def fits(self, prompts: Any, num_generations: int) -> bool:
        """Whether an episode of now has as many prompts and responses."""
        generations = {batch.num_generations for batch in self.batches}
        return self.prompts == prompts.rows_per_step and generations == {num_generations}


class EpisodeCollector:
    """The episodes that are asked for and not collected yet.

    Args:
        engine: the policy's; its place in the mesh decides which responses a rank asks for.
        state: the run's position; it moves to an episode's prompts when that is collected.
        stored: what :meth:`state_dict` gave.
    """

    def __init__(
        self,
        engine: Engine,
        maker: NaiveExperienceMaker,
        state: RunningState,
        stored: dict[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.maker = maker
        self.state = state
        self._asked: dict[int, AskedEpisode] = {}
        for number, held in (stored or {}).items():
            pending = [PendingRollouts.of_state(one, engine.device) for one in held["batches"]]
            self._asked[int(number)] = AskedEpisode(**(held | {"batches": pending}), lasting=True)

    def collect(
        self, episode: int, prompts: Any, episodes: Episodes, bar: ProgressBar, stop: GracefulStop
    ) -> tuple[AskedEpisode, list[RolloutBatch]] | None:
        """Ask for all episodes up to ``episodes.ahead`` after ``episode`` that are not asked for
        yet, then wait for this one. None, with everything as it was before, when a rank was asked
        to stop. Every rank must call it.

        Raises:
            ValueError: on every rank, for what fails on one.
            RolloutsLost: on every rank, with everything as it was before.
        """
        before = self.maker.state_dict()
        collected: list[RolloutBatch] | None = None
        self._leave_out_unfit(episode, prompts)
        try:
            if self._ask_up_to(episode, prompts, episodes, bar, stop):
                collected = self._receive(self._asked[episode], bar, stop)
            if collected is not None and episodes.refill_rounds:
                asked = self._asked[episode]
                rounds = episodes.refill_rounds
                parts = {"maker": self.maker, "prompts": prompts, "bar": bar, "stop": stop}
                asked.refilled = refill(collected, asked, episode, rounds, **parts)
                collected = None if asked.refilled is None else collected
        finally:
            if collected is None:
                self.maker.load_state_dict(before)
                self._drop_passing()
        return None if collected is None else (self._asked.pop(episode), collected)

    def _ask_up_to(
        self, first: int, prompts: Any, episodes: Episodes, bar: ProgressBar, stop: GracefulStop
    ) -> bool:
        """Whether all were asked for; not, when a rank was asked to stop."""
        last = min(first + episodes.ahead, episodes.num_episodes - 1)
        for episode in range(first, max(first, last) + 1):
            epoch, start = self._place_of(episode, prompts)
            if episode == first:
                self.state.epoch = epoch
                self.state.sample_start_index = start
            if episode in self._asked:
                continue
            asked = AskedEpisode(
                epoch,
                start,
                prompts.rows_per_step,
                episodes.temperature(episode),
                [],
                lasting=episodes.ahead > 0,
            )
            # Judged while the next ones are sampled; servers are asked for all of them first.
            early = episode == first and self.maker.scores_beside and self.maker.rollout.at_once
            if not self._ask(asked, episode, prompts, bar, stop, early):
                return False
            self._asked[episode] = asked
        return True

    def _place_of(self, episode: int, prompts: Any) -> tuple[int, int]:
        """Epoch and row at which the prompts of ``episode`` begin."""
        if episode in self._asked:
            return self._asked[episode].epoch, self._asked[episode].start
        before = self._asked.get(episode - 1)
        epoch = self.state.epoch
        start = self.state.sample_start_index
        if before is not None:
            epoch = before.epoch
            start = before.start + before.prompts
        while start + prompts.rows_per_step > prompts.count(epoch):
            epoch = epoch + 1
            start = 0
        return epoch, start

    def _ask(
        self,
        asked: AskedEpisode,
        episode: int,
        prompts: Any,
        bar: ProgressBar,
        stop: GracefulStop,
        early: bool,
    ) -> bool:
        """Whether all batches were asked for. ``early``: each is judged from here on."""
        batches = next(iter(prompts.global_batches(asked.epoch, asked.start)))
        for number, batch in enumerate(batches):
            if any_rank(stop.requested):
                for pending in asked.batches:
                    pending.drop()
                return False
            bar.phase(f"rollout {number + 1}/{len(batches)}")
            count = len(batch["input_ids"]) * self.maker.settings.num_generations
            indices = sample_indices(number, len(batches), self.engine.mesh.dp_rank * count, count)
            pending = self.maker.ask(batch, indices, episode, asked.temperature)
            asked.batches.append(pending)
            if early:
                asked.begun.append(self.maker.begin_experience(pending))
        return True

    def _receive(
        self, asked: AskedEpisode, bar: ProgressBar, stop: GracefulStop
    ) -> list[RolloutBatch] | None:
        beside = self.maker.scores_beside
        make = self.maker.begin_experience if beside else self.maker.make_experience
        collected = list(asked.begun)
        for number, pending in enumerate(asked.batches[len(collected) :], len(collected)):
            if any_rank(stop.requested):
                return None
            bar.phase(f"scoring {number + 1}/{len(asked.batches)}")
            collected.append(make(pending))
        if beside:
            bar.phase("waiting for rewards")
            collected = [self.maker.finish_experience(begun) for begun in collected]
        return collected

    def _leave_out_unfit(self, episode: int, prompts: Any) -> None:
        """Of a resumed run: episodes that are over, or of another size than those of now."""
        generations = self.maker.settings.num_generations
        unfit = [n for n, one in self._asked.items() if not one.fits(prompts, generations)]
        if unfit:
            logger.info(
                "responses that were asked for ahead are of other numbers of prompts or "
                "generations: they are asked for again, of the weights of now."
            )
            self._asked.clear()
        self._asked = {n: one for n, one in self._asked.items() if n >= episode}

    def _drop_passing(self) -> None:
        """What is asked for again after a checkpoint, with the same answers."""
        for number, asked in list(self._asked.items()):
            if not asked.lasting:
                for pending in asked.batches:
                    pending.drop()
                del self._asked[number]

    def state_dict(self, lost: bool = False) -> dict[str, Any] | None:
        """What was asked for and has to outlive a checkpoint, waited for; None if there is nothing.
        Every rank must call it; errors as of :meth:`collect`. ``lost``: nothing answers any more;
        what is not there on every rank is left out, and said."""
        states = {}
        for number, asked in sorted(self._asked.items()):
            if not asked.lasting:
                continue
            try:
                states[str(number)] = raise_together(partial(_state_of, asked))
            except RolloutsLost:
                if not lost:
                    raise
                logger.warning(
                    "responses that were asked for ahead have not come: a resumed run asks for "
                    "them again, of its own weights, and is another than this one would have been"
                )
        return states or None


def _state_of(asked: AskedEpisode) -> dict[str, Any]:
    """As :class:`AskedEpisode` takes it, but for the batches."""
    return {
        "epoch": asked.epoch,
        "start": asked.start,
        "prompts": asked.prompts,
        "temperature": asked.temperature,
        "batches": [batch.state_dict() for batch in asked.batches],
    }


def correction_metrics(
    experiences: Sequence[Experience],
    correction: RolloutCorrection,
    version: int,
    engine: Engine,
) -> dict[str, float]:
    """What :func:`~coati.models.rollout_correction.gap_metrics` says of an episode's responses over
    all ranks, the largest gap of a token, and ``staleness``: by how many optimizer steps
    ``version`` is ahead of the weights that sampled. Nothing where the policy itself sampled. Every
    rank must call it."""
    others = [one for one in experiences if one.sampled_log_probs is not None]
    if not others:
        return {}
    sums = torch.zeros(11, dtype=torch.float64)
    largest = 0.0
    for one in others:
        both = one.action_log_probs, one.sampled_log_probs, one.action_mask
        behind = version - one.version
        found = [correction.sums(*both, behind != 0), behind.sum()[None], behind.numel()]
        sums += torch.cat([torch.as_tensor(each).double().reshape(-1).cpu() for each in found])
        largest = max(largest, float(gap_per_action(*both).max()))
    sums = engine.sum_tensor_over_dp(sums.to(engine.device)).cpu()
    return gap_metrics(sums[:9]) | {
        "rollout_gap_max": max(all_gather_object(largest)),
        "staleness": float(sums[9] / sums[10]),
    }
