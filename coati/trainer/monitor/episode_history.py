"""What is remembered of an online run's metrics: its first episodes, its last ones, and the trend
of the reward."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any


@dataclass
class Trend:
    """A least-squares line through (episode, value), kept as running sums about the means (Welford
    1962)."""

    count: int = 0
    x: float = 0.0  # means
    y: float = 0.0
    xx: float = 0.0  # sums of products of distances from the means
    xy: float = 0.0
    yy: float = 0.0
    start: float = 0.0
    end: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Take in a point; ``x`` is above those before it."""
        if not self.count:
            self.start = x
        self.count = self.count + 1
        self.end = x
        step_x = x - self.x
        step_y = y - self.y
        self.x += step_x / self.count
        self.y += step_y / self.count
        self.xx += step_x * (x - self.x)
        self.xy += step_x * (y - self.y)
        self.yy += step_y * (y - self.y)

    @property
    def span(self) -> float:
        """Episodes between the first and the last value."""
        return self.end - self.start

    def rise(self) -> tuple[float, float]:
        """How much the line rises from the first to the last value, and the standard error of
        that."""
        if self.count < 3 or self.xx <= 0:
            return 0.0, math.inf
        slope = self.xy / self.xx
        left = max(self.yy - slope * self.xy, 0.0) / (self.count - 2)
        return slope * self.span, math.sqrt(left / self.xx) * self.span


class History:
    """The first ``window`` values of each metric and the last two windows; values that are not
    finite are left out.

    ``names``: the metrics to remember. Memory does not grow with the episodes.
    """

    def __init__(self, names: Iterable[str], window: int = 10) -> None:
        self.names = tuple(names)
        self.window = window
        self.first: dict[str, list[float]] = {name: [] for name in self.names}
        self.recent: dict[str, list[float]] = {name: [] for name in self.names}
        self.counts: dict[str, int] = dict.fromkeys(self.names, 0)
        self.reward = Trend()
        self.best = -math.inf

    def add(self, metrics: dict[str, float], episode: int) -> None:
        """The metrics of one episode; those that are not there keep their history."""
        for name in self.names:
            value = metrics.get(name)
            if value is None or not math.isfinite(value):
                continue
            if len(self.first[name]) < self.window:
                self.first[name].append(float(value))
            self.recent[name] = [*self.recent[name], float(value)][-2 * self.window :]
            self.counts[name] += 1
            if name == "reward":
                self.reward.add(episode, value)
                if self.counts[name] >= self.window:
                    self.best = max(self.best, self.late(name))

    def early(self, name: str) -> float | None:
        """The mean of the first window, or None before there is one."""
        return fmean(self.first[name]) if len(self.first[name]) == self.window else None

    def late(self, name: str) -> float | None:
        """The mean of the last window, or None before there is one."""
        return (
            fmean(self.recent[name][-self.window :]) if self.counts[name] >= self.window else None
        )

    def before(self, name: str) -> float | None:
        """The mean of the window before the last one, or None before there are two."""
        return (
            fmean(self.recent[name][: self.window])
            if self.counts[name] >= 2 * self.window
            else None
        )

    def middle(self, name: str, count: int) -> float | None:
        """The median of the last ``count`` values (at most two windows), or None before there are
        as many."""
        return median(self.recent[name][-count:]) if self.counts[name] >= count else None

    def noise(self, name: str) -> float:
        """The spread of single values about their course, from the steps between neighbors, which
        no trend widens."""
        values = self.recent[name]
        steps = [(b - a) ** 2 for a, b in zip(values, values[1:], strict=False)]
        return math.sqrt(fmean(steps) / 2) if steps else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it; floats come back as they were."""
        copies = {
            name: {key: list(values) for key, values in held.items()}
            for name, held in (("first", self.first), ("recent", self.recent))
        }
        best = None if self.best == -math.inf else self.best
        return copies | {"counts": dict(self.counts), "reward": asdict(self.reward), "best": best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for name in self.names:  # one that an older version did not remember starts empty
            self.first[name] = list(state["first"].get(name, []))
            self.recent[name] = list(state["recent"].get(name, []))
            self.counts[name] = state["counts"].get(name, 0)
        self.reward = Trend(**state["reward"])
        self.best = -math.inf if state["best"] is None else state["best"]
