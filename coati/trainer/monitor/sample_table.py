"""What is measured of the responses of an episode, and the table that shows some of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from os.path import commonprefix

from coati.utils.text_table import table, terminal_width, wrap

NUMBER = 8  # places of a column of numbers, "-1.2e+06" among them
LONGEST_NAME = 12  # places of a name above it
_ENDS = "\n>]:"  # of a template's markers
_BEGINNINGS = "\n<["
LEAST_TEXT = 18  # narrower columns of text are not read but guessed


def distinct_2(responses: Sequence[Sequence[int]]) -> float:
    """Different bigrams over all bigrams of ``responses`` (token ids), between 0 and 1 (Li et al.,
    arXiv 1510.03055).

    A bigram is two tokens that follow each other in one response; those of all responses are
    counted together, so both a response that repeats itself and responses that are alike lower it,
    and so do more or longer responses. Without any bigram it is 1: nothing was repeated.
    """
    bigrams = [pair for response in responses for pair in pairwise(response)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def stop_rate(stopped: Sequence[bool]) -> float:
    """The share of responses that ended by themselves, not at the longest length allowed; 1 of
    none."""
    return sum(map(bool, stopped)) / len(stopped) if len(stopped) else 1.0


@dataclass(frozen=True)
class SampleRow:
    """One response for people to look at.

    ``reward``: the score that is trained on; ``parts``: what each reward function (and the reward
    model) gave to it;
    ``kl``: toward the reference, summed over the response's tokens, None without a reference.
    """

    prompt: str
    response: str
    reward: float
    parts: dict[str, float] = field(default_factory=dict)
    kl: float | None = None

    def numbers(self) -> dict[str, float]:
        """The columns of numbers by name."""
        return {"reward": self.reward, **self.parts} | ({} if self.kl is None else {"KL": self.kl})


def sample_table(
    rows: Sequence[SampleRow], width: int | None = None, among: Sequence[str] = ()
) -> str:
    """Prompt, response, reward, each function's reward and KL of ``rows``, in ``width`` places
    (None: the terminal's).

    Where that leaves too little for the texts, each row stands below the other instead of beside.
    What a template puts around every prompt is left out, as the prompts ``among`` which these are
    show it: those of one group are all alike.
    """
    width = terminal_width(width)
    own = own_parts([row.prompt for row in rows], among)
    rows = [replace(row, prompt=prompt) for row, prompt in zip(rows, own, strict=True)]
    names = _names(rows)
    # Long names are wrapped after "_" and "/".
    titles = [name.replace("_", "_ ").replace("/", "/ ") for name in names]
    columns = [
        max([NUMBER, *(min(len(part), LONGEST_NAME) for part in title.split())]) for title in titles
    ]
    left = width - sum(columns) - 3 * (len(names) + 1)
    if left < 2 * LEAST_TEXT:
        return "\n".join([_block(row, width) for row in rows])
    texts = [left * 2 // 5, left - left * 2 // 5]
    cells = [[row.prompt or " ", row.response or " ", *_shown(row, names)] for row in rows]
    return table(
        ["prompt", "response", *titles],
        cells,
        [*texts, *columns],
        [False, False, *(True for _ in names)],
    )


def sample_rows(rows: Sequence[SampleRow]) -> tuple[list[str], list[list]]:
    """Column names and rows as ``wandb.Table(columns=..., data=...)`` takes them; None where a row
    lacks a number."""
    names = _names(rows)
    return ["prompt", "response", *names], [
        [row.prompt, row.response, *(row.numbers().get(name) for name in names)] for row in rows
    ]


def own_parts(prompts: list[str], among: Sequence[str] = ()) -> list[str]:
    """``prompts`` without what all, those ``among`` which they are too, begin and end with, up to
    the last and from the first sign that a template's marker could end or begin with: words that
    questions share are theirs."""
    together = [*prompts, *among]
    before = commonprefix(together)
    start = max(before.rfind(sign) for sign in _ENDS) + 1
    after = commonprefix([prompt[start:][::-1] for prompt in together])
    end = max(after.rfind(sign) for sign in _BEGINNINGS) + 1
    return [prompt[start : len(prompt) - end].strip() or prompt for prompt in prompts]


def _names(rows: Sequence[SampleRow]) -> list[str]:
    """Every number that a row has, in the order reward, parts, KL."""
    found = dict.fromkeys(name for row in rows for name in row.numbers())
    return sorted(found, key=lambda name: (name != "reward") + (name == "KL"))


def _shown(row: SampleRow, names: list[str]) -> list[str]:
    numbers = row.numbers()
    return [_short(numbers[name]) if name in numbers else "" for name in names]


def _short(value: float) -> str:
    """At most :data:`NUMBER` places, two decimals where they fit."""
    if abs(value) < 1000 or math.isnan(value):
        return f"{value:.2f}"
    return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.1e}"


def _block(row: SampleRow, width: int) -> str:
    numbers = "  ".join(f"{name} {_short(value)}" for name, value in row.numbers().items())
    lines = wrap(numbers, width)
    for name, text in (("prompt", row.prompt), ("response", row.response)):
        first, *others = wrap(text, width - 10)
        lines += [f"{name:<10}{first}", *(f"{'':10}{other}" for other in others)]
    return "\n".join([*lines, "-" * min(width, 40)])
