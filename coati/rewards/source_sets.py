"""--source_rewards: which functions score the rows of which source. Light: parsers import it."""

import math
from dataclasses import dataclass, field

from coati.rewards.registry import check_rewards

OTHERS = "*"  # the source of all rows whose own is not named


@dataclass(frozen=True)
class RewardSet:
    """The functions of a source, and their weights."""

    names: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def parse_source_rewards(words: list[str]) -> dict[str, RewardSet]:
    """``SOURCE=NAME[@WEIGHT][,NAME[@WEIGHT]...]`` of each word, aliases resolved.

    Raises ValueError for another form, a source that is named twice, and what
    :func:`~coati.rewards.registry.check_rewards` refuses.
    """
    found: dict[str, RewardSet] = {}
    for word in words:
        source, equals, names = word.partition("=")
        if not (equals and source and names):
            raise ValueError(
                f"--source_rewards {word}: expected SOURCE=NAME[@WEIGHT][,NAME...], such as "
                "math=math_competition,format@0.1"
            )
        if source in found:
            raise ValueError(
                f"--source_rewards {word}: {source} is named twice; separate its functions by "
                "commas"
            )
        pairs = [_weighted(part) for part in names.split(",") if part]
        weights = [weight for _, weight in pairs]
        try:
            resolved = check_rewards([name for name, _ in pairs])
        except ValueError as error:
            raise ValueError(f"--source_rewards {word}: {error}") from error
        if not any(weights):
            raise ValueError(f"--source_rewards {word}: no function would count")
        found[source] = RewardSet(resolved, weights)
    return found


def _weighted(part: str) -> tuple[str, float]:
    name, at, weight = part.rpartition("@")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    return (name, number) if at and math.isfinite(number) else (part, 1.0)
