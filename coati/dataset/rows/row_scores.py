"""Scores of whole conversations and of the two responses of a pair, under the names that data sets
give them."""

from coati.dataset.rows.column_use import Fields
from coati.dataset.rows.numerals import number_of
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import RATING, SourceRow

SCORES = ("score", "reward", RATING)
SIDES = {
    side: tuple(
        name
        for kind in ("score", "reward", "rating")
        for name in (f"{side}_{kind}", f"{kind}_{side}")
    )
    for side in ("chosen", "rejected")
}
MOST = 1e38  # as fp32, in which rows hold it


def add_scores(found: SourceRow, row: Fields) -> None:
    """The scores of ``row``, where its format has not read them. Raises RowError for what is no
    finite number."""
    if found.chosen or found.rejected:
        found.chosen_reward = _score(row, SIDES["chosen"])
        found.rejected_reward = _score(row, SIDES["rejected"])
    elif found.reward is None:
        found.reward = _score(row, SCORES)
        for one in found.branches:
            one.reward = found.reward


def _score(row: Fields, names: tuple[str, ...]) -> float | None:
    key = row.first(names)
    if key is None:
        return None
    given = row[key]
    score = number_of(given)
    if isinstance(given, bool):
        return score
    if not abs(score) < MOST:
        raise RowError("bad_scores", f"{key} is {given!r:.60}, expected a number")
    return score
