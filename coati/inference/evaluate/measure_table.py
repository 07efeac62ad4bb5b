"""Measures of a model with what they were on each row, and the comparison of two models row by
row."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coati.utils.statistics import bootstrap_interval, sign_test, wilson_interval

SIGNIFICANT = 0.05
ROUNDING = 1e-9  # values this close are equal
SHARE = "share"
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Measure:
    """One figure. ``rows``: its value on each row, by a key that other runs have too; ``weights``:
    of the rows, where the figure is a weighted mean. ``unit``: "share", "score", or "perplexity",
    whose rows hold nats per token. ``interval``: how ``low`` and ``high``, its 95% interval, were
    found. ``higher_is_better``: False for rates of what a model should not do."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    interval: str
    rows: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] | None = None
    higher_is_better: bool = True

    @property
    def lower_is_better(self) -> bool:
        return self.unit == PERPLEXITY or not self.higher_is_better

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        found = {**vars(self), "count": len(self.rows), "rows": dict(self.rows)}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Measure":
        """What :meth:`as_dict` gave. Raises TypeError for anything else."""
        return cls(**{name: value for name, value in found.items() if name != "count"})


def measure(name: str, rows: Mapping[str, float], unit: str = SHARE, seed: int = 0) -> Measure:
    """The mean over ``rows``, with Wilson's interval where each is right or wrong, else by
    bootstrap over the rows."""
    values = list(rows.values())
    value = math.fsum(values) / len(values)
    if unit == SHARE and set(values) <= {0.0, 1.0}:
        low, high = wilson_interval(math.fsum(values), len(values))
        return Measure(name, value, low, high, unit, "Wilson", rows)
    low, high = bootstrap_interval(values, seed)
    return Measure(name, value, low, high, unit, "bootstrap over rows", rows)


def perplexity_measure(
    name: str, losses: Mapping[str, float], tokens: Mapping[str, float], seed: int = 0
) -> Measure:
    """exp of the mean of ``losses``, nats per token of each row, weighted by the rows' ``tokens``;
    its interval by bootstrap over the rows."""
    weights = [tokens[key] for key in losses]
    total = math.fsum(losses[key] * tokens[key] for key in losses)
    low, high = bootstrap_interval(list(losses.values()), seed, weights=weights)
    value = math.exp(total / math.fsum(weights))
    bounds = _exp_bounds(low, high)
    return Measure(name, value, *bounds, PERPLEXITY, "bootstrap over rows", losses, tokens)


@dataclass(frozen=True)
class Comparison:
    """A measure here and in a baseline, on the rows that both have. ``better`` and ``worse``: on
    how many it differs for the better and the worse; ``p``: of the exact ``test``, two-sided;
    ``difference``: here minus there, with its 95% interval by bootstrap over the rows; of
    perplexities the quotient."""

    name: str
    count: int
    before: float
    now: float
    difference: float
    low: float
    high: float
    better: int
    worse: int
    p: float
    test: str
    unit: str

    @property
    def verdict(self) -> str:
        if self.p >= SIGNIFICANT:
            return "no significant difference"
        return "better" if self.better > self.worse else "worse"

    def __str__(self) -> str:
        ratio = self.unit == PERPLEXITY
        changed = f"x{self.difference:.4g}" if ratio else f"{self.difference:+.4g}"
        return (
            f"{self.name}: {self.before:.4g} -> {self.now:.4g}, {changed} (95% {self.low:.4g} to "
            f"{self.high:.4g}) on {self.count} rows, better on {self.better}, worse on "
            f"{self.worse}; {self.test} p = {self.p:.3g}: {self.verdict}"
        )


def comparison(before: Measure, now: Measure, seed: int = 0) -> Comparison | None:
    """The two on the rows of both; None where there is none, or the measures are of two kinds.

    Raises ValueError for weights that differ."""
    keys = [key for key in now.rows if key in before.rows]
    if not keys or before.unit != now.unit:
        return None
    differences = [now.rows[key] - before.rows[key] for key in keys]
    weights = None if now.weights is None else [now.weights[key] for key in keys]
    if now.weights != before.weights and any(
        now.weights is None or before.weights is None or now.weights[key] != before.weights[key]
        for key in keys
    ):
        raise ValueError(
            f"{now.name}: the rows of the baseline have other numbers of tokens; perplexities of "
            "two tokenizers, or of other texts, cannot be compared"
        )
    low, high = bootstrap_interval(differences, seed, weights=weights)
    means = [_mean([one.rows[key] for key in keys], weights) for one in (before, now)]
    change = means[1] - means[0]
    sign = -1 if now.lower_is_better else 1
    better = sum(sign * each > ROUNDING for each in differences)
    worse = sum(sign * each < -ROUNDING for each in differences)
    binary = {*now.rows.values(), *before.rows.values()} <= {0.0, 1.0}
    if now.unit == PERPLEXITY:
        means = [math.exp(mean) for mean in means]
        change = math.exp(change)
        low, high = _exp_bounds(low, high)
    return Comparison(
        now.name,
        len(keys),
        *means,
        change,
        low,
        high,
        better,
        worse,
        sign_test(better, worse),
        "McNemar's exact test" if binary and now.unit == SHARE else "sign test",
        now.unit,
    )


def _exp_bounds(low: float, high: float) -> tuple[float, float]:
    """exp of an interval; one that is not known stays so."""
    return (math.exp(low), math.exp(high)) if math.isfinite(low) else (low, high)


def _mean(values: Sequence[float], weights: Sequence[float] | None) -> float:
    weighing = weights or [1.0] * len(values)
    products = (value * weight for value, weight in zip(values, weighing, strict=True))
    return math.fsum(products) / math.fsum(weighing)


def comparisons(before: Iterable[Measure], now: Iterable[Measure]) -> list[Comparison]:
    """Of each measure that both have, in the order of ``now``."""
    named = {each.name: each for each in before}
    found = (comparison(named[each.name], each) for each in now if each.name in named)
    return [each for each in found if each is not None]
