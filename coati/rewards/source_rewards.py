"""Rewards by where a row comes from: each source has functions of its own, beside those that score
every row."""

import math
from collections.abc import Callable, Mapping

from coati.rewards.responses import Responses
from coati.rewards.scorer import RewardResult, Rewards
from coati.rewards.source_sets import OTHERS


class SourceRewards:
    """The reward functions of a run with several sources; called as
    :class:`~coati.rewards.scorer.Rewards` are.

    Args:
        sets: by source; those of :data:`~coati.rewards.source_sets.OTHERS` are of all others.
        everywhere: score every row; None: nothing does.
    """

    def __init__(self, sets: Mapping[str, Rewards], everywhere: Rewards | None = None) -> None:
        self.sets = dict(sets)
        self.everywhere = everywhere
        own = {} if everywhere is None else everywhere.weights
        self.weights = dict(own)
        for one in self.sets.values():
            if both := sorted(own.keys() & one.weights.keys()):
                raise ValueError(
                    f"reward {both[0]} is among --reward_functions, which score every row, and in "
                    "--source_rewards; name it once"
                )
            self.weights |= one.weights

    @property
    def timeout(self) -> float | None:
        """Seconds that a function may take, the same for all."""
        return next((one.timeout for one in self._all()), None)

    @property
    def needs_gt_answer(self) -> bool:
        """Whether every row needs one; :meth:`needs_gt_answer_of` says of which others do."""
        return self.everywhere is not None and self.everywhere.needs_gt_answer

    def needs_gt_answer_of(self, source: str | None) -> bool:
        """Whether a function of ``source`` compares with the ground truth."""
        found = self._set_of(source)
        return self.needs_gt_answer or (found is not None and found.needs_gt_answer)

    @property
    def beside(self) -> bool:
        """Whether a function waits for something outside of this thread."""
        return any(one.beside for one in self._all())

    def _all(self) -> list[Rewards]:
        return [*self.sets.values(), *([] if self.everywhere is None else [self.everywhere])]

    def _set_of(self, source: str | None) -> Rewards | None:
        known = self.sets.get(source) if source is not None else None
        return known or self.sets.get(OTHERS)

    def knows(self, source: str | None) -> bool:
        """Whether rows of ``source`` have functions of their own."""
        return self._set_of(source) is not None

    def __call__(self, batch: Responses) -> RewardResult:
        """As :meth:`~coati.rewards.scorer.Rewards.__call__`; ``parts`` are NaN for the rows that a
        function does not score."""
        return self.begin(batch)()

    def begin(self, batch: Responses) -> Callable[[], RewardResult]:
        """As :meth:`~coati.rewards.scorer.Rewards.begin`.

        Raises ValueError for a row whose source has no functions.
        """
        rows: dict[int, tuple[Rewards, list[int]]] = {}
        for row, source in enumerate(batch.sources or [None] * len(batch)):
            found = self._set_of(source)
            if found is None:
                raise ValueError(f"no reward is named for the source {source!r} of a row")
            rows.setdefault(id(found), (found, []))[1].append(row)
        begun = [(found.begin(batch.select(own)), own) for found, own in rows.values()]
        if self.everywhere is not None:
            begun.append((self.everywhere.begin(batch), list(range(len(batch)))))

        def result() -> RewardResult:
            total = [0.0] * len(batch)
            parts: dict[str, list[float]] = {
                label: [math.nan] * len(batch) for label in self.weights
            }
            for finish, own in begun:
                scored = finish()
                for place, row in enumerate(own):
                    total[row] += scored.total[place]
                    for label, values in scored.parts.items():
                        parts[label][row] = values[place]
            return RewardResult(total, parts)

        return result
