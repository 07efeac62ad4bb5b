"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups whose scores are all equal, from
which nothing can be learned, give their place to groups of further prompts.

The places of an episode are numbered over all ranks by the indices of their responses. A round asks
for one further prompt for each place that is still to be filled, in the order of the epoch, and the
rank that has the place samples. So an episode is the same for any number of processes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from coati.experience_maker.experience import concatenate
from coati.experience_maker.maker import NaiveExperienceMaker
from coati.experience_maker.rollout_batch import RolloutBatch
from coati.trainer.progress import ProgressBar
from coati.trainer.stop import GracefulStop
from coati.utils.distributed import all_gather_object, any_rank
from coati.utils.logging import get_logger

logger = get_logger(__name__)


class FirstAsked(Protocol):
    """What was asked for at first: :class:`~coati.trainer.collecting.AskedEpisode`."""

    epoch: int
    start: int
    prompts: int
    temperature: float


@dataclass(frozen=True)
class Refilled:
    """``rounds`` that were sampled, for ``prompts`` further prompts over all ranks; ``left``: the
    places whose groups are equal all the same. The next episode's prompts begin at row ``start`` of
    ``epoch``."""

    rounds: int
    prompts: int
    left: int
    epoch: int
    start: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """As they are logged."""
        return {
            "refill_rounds": float(self.rounds),
            "refill_prompts": float(self.prompts),
            "refill_left": float(self.left),
            "seconds_refill": self.seconds,
        }


def refill(
    collected: list[RolloutBatch],
    asked: FirstAsked,
    episode: int,
    rounds: int,
    *,
    maker: NaiveExperienceMaker,
    prompts: Any,
    bar: ProgressBar,
    stop: GracefulStop,
) -> Refilled | None:
    """Replace the equal groups in the experience of ``collected``, in up to ``rounds`` rounds
    (arXiv 2503.14476, eq. 11, which has no bound). Texts and metrics of the batches stay those of
    the first draw, which tell how good the policy is; only what is trained on changes. None, when a
    rank was asked to stop. Every rank must call it.

    ``prompts``: a :class:`~coati.dataset.load.loader.GlobalBatchLoader`. Errors as of
    :meth:`~coati.experience_maker.maker.NaiveExperienceMaker.make_experience`.
    """
    started = time.perf_counter()
    size = maker.settings.num_generations
    places = _places(collected, size)
    open_places = _of_all_ranks([place for place, one in places.items() if one.equal])
    at = (asked.epoch, asked.start + asked.prompts)
    done = drawn = 0
    while open_places and done < rounds:
        if any_rank(stop.requested):
            return None
        done += 1
        bar.phase(f"refill {done}/{rounds}: {len(open_places)} groups")
        entries, at = prompts.next_entries(*at, len(open_places))
        drawn += len(entries)
        wanted = {n: e for n, e in zip(open_places, entries, strict=True) if n in places}
        shift = done * asked.prompts * size  # past every index of the earlier rounds
        indices = [[shift + index for index in places[n].indices] for n in wanted]
        batch = _batch(prompts, list(wanted.values()), entries[0], indices, shift, size)
        with maker.clock.paused():  # it is the refill's time, not that of scoring
            found = maker.make_experience(maker.ask(*batch, episode, asked.temperature))
        equal = found.samples["equal_groups"][::size].bool().tolist()
        open_places = _of_all_ranks([n for n, one in zip(wanted, equal, strict=False) if one])
        for number, place in enumerate(wanted):
            if place not in open_places:
                at_batch = places[place].batch
                group = places[place].group
                changed = _with_group(collected[at_batch], group, found, number, size)
                collected[at_batch] = changed
    if open_places:
        logger.warning_once(
            f"--dynamic_sampling {rounds}: groups are left whose scores are equal, which teach "
            "nothing; the metric refill_left counts them. More rounds, prompts that are neither "
            "too easy nor too hard, or a larger --num_generations would help"
        )
    seconds = time.perf_counter() - started
    return Refilled(done, drawn, len(open_places), *at, seconds)


@dataclass(frozen=True)
class _Place:
    """A group of this rank: its batch, its number in it, the indices of its responses, and whether
    their scores are equal."""

    batch: int
    group: int
    indices: list[int]
    equal: bool


def _places(collected: Sequence[RolloutBatch], size: int) -> dict[int, _Place]:
    """By the index of the group's first response."""
    places = {}
    for number, batch in enumerate(collected):
        indices = batch.experience.sample_index.tolist()
        equal = batch.samples["equal_groups"][::size].bool().tolist()
        for group, one in enumerate(equal):
            own = indices[group * size : (group + 1) * size]
            places[own[0]] = _Place(number, group, own, one)
    return places


def _of_all_ranks(mine: list[int]) -> list[int]:
    """Those of any rank, in one order: those of a tensor parallel group agree, whatever each has
    been told by its reward functions."""
    return sorted({place for rank in all_gather_object(mine) for place in rank})


def _batch(
    prompts: Any,
    entries: list[Any],
    spare: Any,
    indices: list[list[int]],
    shift: int,
    size: int,
) -> tuple[dict[str, Any], list[int]]:
    """The prompts ``entries`` and the indices of their responses. Every rank asks for equally many:
    one that has fewer repeats ``spare``, whose responses are left out."""
    blanks = max(all_gather_object(len(entries))) - len(entries)
    flat = [index for group in indices for index in group]
    flat += list(range(shift, shift + size)) * blanks
    return prompts.batch_of([*entries, *[spare] * blanks]), flat


def _with_group(
    batch: RolloutBatch, group: int, found: RolloutBatch, number: int, size: int
) -> RolloutBatch:
    """``batch`` with group ``number`` of ``found`` in the place of its own ``group``."""
    order = list(range(len(batch.experience)))
    first = len(order) + number * size
    place = slice(group * size, (group + 1) * size)
    order[place] = range(first, first + size)
    experience = concatenate([batch.experience, found.experience]).select(order)
    experience = replace(experience, sample_index=batch.experience.sample_index)
    dropped = torch.cat([batch.samples["dropped"], found.samples["dropped"]])[order]
    written = batch.written
    if written is not None and found.written is not None:
        written = _joined(written, found.written)[order]
    return replace(
        batch,
        experience=experience,
        written=written,
        samples=batch.samples | {"dropped": dropped},
    )


def _joined(first: Tensor, second: Tensor) -> Tensor:
    width = max(first.shape[1], second.shape[1])
    return torch.cat([F.pad(one, (0, width - one.shape[1])) for one in (first, second)])
