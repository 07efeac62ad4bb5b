"""Rows to train on from scored responses: the best of n, those above a threshold (rejection
sampling), pairs of the best and the worst, and whole groups."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coati.inference.evaluate.generate_responses import Prompt
from coati.inference.samples.score_samples import Scored
from coati.utils.statistics import best_of_k, bootstrap_interval

Row = dict[str, Any]


@dataclass(frozen=True)
class Selection:
    """``threshold``: the least score of a response that is learned by rejection sampling, and
    ``keep`` how many of a prompt at most; ``margin``: how far apart the scores of a pair are at
    least; ``truncated``: whether responses that ended at the limit may be learned."""

    threshold: float = -math.inf
    keep: int | None = None
    margin: float = 0.0
    truncated: bool = False


@dataclass(frozen=True)
class Group:
    """A prompt and its responses that have a score, in their order."""

    prompt: Prompt
    scored: Sequence[Scored] = field(default_factory=list)

    @classmethod
    def of(cls, prompt: Prompt, scored: Sequence[Scored]) -> "Group":
        return cls(prompt, [each for each in scored if each.score is not None])

    @property
    def scores(self) -> list[float]:
        return [float(each.score) for each in self.scored if each.score is not None]

    def best_first(self, truncated: bool) -> list[tuple[float, Scored]]:
        """Different texts and calls by falling scores, of equal ones the first drawn; without empty
        ones and, unless ``truncated``, those that ended at the limit."""
        seen: set[str] = set()
        found = []
        for score, each in zip(self.scores, self.scored, strict=True):
            calls = each.drawn.message.get("tool_calls")
            said = each.text + json.dumps(calls, sort_keys=True) if calls else each.text
            if said.strip() and said not in seen and (each.stopped or truncated):
                seen.add(said)
                found.append((score, each))
        return sorted(found, key=lambda pair: -pair[0])


def best_of_n(group: Group, selection: Selection) -> list[Row]:
    """The conversation with the best response."""
    return [_talk(group.prompt, one) for _, one in group.best_first(selection.truncated)[:1]]


def rejection(group: Group, selection: Selection) -> list[Row]:
    """A conversation for each response that reaches the threshold, the best ``keep`` of them."""
    good = [
        one for score, one in group.best_first(selection.truncated) if score >= selection.threshold
    ]
    return [_talk(group.prompt, one) for one in good[: selection.keep]]


def pairs(group: Group, selection: Selection) -> list[Row]:
    """The best response as chosen, the worst one, cut off or not, as rejected."""
    good = group.best_first(selection.truncated)
    bad = group.best_first(truncated=True)
    if not good or not bad:
        return []
    highest, chosen = good[0]
    lowest, rejected = bad[-1]
    if highest <= lowest or highest - lowest < selection.margin:
        return []
    return [
        {
            "prompt": group.prompt.messages,
            "chosen": [chosen.drawn.message],
            "rejected": [rejected.drawn.message],
            **_tools(group.prompt),
        }
    ]


def groups(group: Group, selection: Selection) -> list[Row]:
    """The prompt, its responses and their scores, of which there are at least two; nothing else is
    left out."""
    del selection
    if len(group.scored) < 2:
        return []
    truth = {} if group.prompt.gt_answer is None else {"gt_answer": group.prompt.gt_answer}
    return [
        {
            "prompt": group.prompt.messages,
            "responses": [[one.drawn.message] for one in group.scored],
            "scores": group.scores,
            **truth,
            **_tools(group.prompt),
        }
    ]


# --write NAME -> what makes the rows of NAME.jsonl
SELECTORS: dict[str, Callable[[Group, Selection], list[Row]]] = {
    "best": best_of_n,
    "rejection": rejection,
    "pairs": pairs,
    "groups": groups,
}


def _talk(prompt: Prompt, one: Scored) -> Row:
    return {"messages": [*prompt.messages, one.drawn.message], **_tools(prompt)}


def _tools(prompt: Prompt) -> Row:
    return {"tools": prompt.tools} if prompt.tools else {}


@dataclass(frozen=True)
class BestOfK:
    """The expected score of the best of ``k`` responses to a prompt, over the prompts, with its 95%
    interval; ``gain``: over a single response, paired by prompt, with its interval."""

    k: int
    value: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float


def best_of_table(found: Sequence[Group], seed: int = 0) -> list[BestOfK]:
    """For k of 1, 2, 4, ... and n; every prompt with as many scores as the fewest of them have."""
    scores = [group.scores for group in found if group.scored]
    if not scores:
        return []
    most = min(map(len, scores))
    counts = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
    single = [best_of_k(each, 1) for each in scores]
    rows = []
    for k in counts:
        values = [best_of_k(each, k) for each in scores]
        gains = [more - one for more, one in zip(values, single, strict=True)]
        low, high = bootstrap_interval(values, seed)
        gain_low, gain_high = bootstrap_interval(gains, seed)
        mean = math.fsum(values) / len(values)
        gain = math.fsum(gains) / len(gains)
        rows.append(BestOfK(k, mean, low, high, gain, gain_low, gain_high))
    return rows
