"""How often responses are right: pass@k, the mean over responses, and the majority vote."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from coati.inference.evaluate.generate_responses import Prompt
from coati.inference.evaluate.measure_table import Measure, measure
from coati.rewards.answers import normalize, same_answer
from coati.rewards.functions import stated_answer, true_answer
from coati.utils.statistics import pass_at_k

if TYPE_CHECKING:
    from coati.inference.samples.score_samples import Scored


def rights(texts: Sequence[str], gt_answer: str, tags: dict | None = None) -> list[bool]:
    """Whether each response states the answer ``gt_answer``
    (:func:`~coati.rewards.answers.same_answer`)."""
    truth = true_answer(gt_answer)
    return [_same(stated_answer(text, tags), truth) for text in texts]


def _same(answer: str | None, truth: str) -> bool:
    return bool(answer) and same_answer(answer, truth)


def majority(texts: Sequence[str], gt_answer: str, tags: dict | None = None) -> float:
    """Whether the answer that most responses state is right, 1 or 0; of several with as many votes
    one is taken, so that it is right in that share of the cases. Responses without an answer do not
    vote."""
    ballots: list[tuple[str, int]] = []
    stated = (stated_answer(text, tags) for text in texts)
    # Equal spellings first: few answers are left to be compared with each other.
    for answer, votes in Counter(normalize(each) for each in stated if each).items():
        place = next(
            (k for k, (other, _) in enumerate(ballots) if same_answer(answer, other)), None
        )
        if place is None:
            ballots.append((answer, votes))
        else:
            ballots[place] = (ballots[place][0], ballots[place][1] + votes)
    most = max((votes for _, votes in ballots), default=0)
    truth = true_answer(gt_answer)
    leading = [same_answer(answer, truth) for answer, votes in ballots if votes == most]
    return sum(leading) / len(leading) if leading else 0.0


def answer_measures(
    prompts: Sequence[Prompt],
    keys: Mapping[int, str],
    right: Mapping[int, Sequence[bool]],
    ks: Sequence[int],
    seed: int = 0,
) -> list[Measure]:
    """avg@n and pass@k for each of ``ks``, over the ``prompts`` that ``right`` knows, n responses
    each. ``keys``: of the rows, by the prompts' numbers."""
    known = [prompt for prompt in prompts if prompt.number in right]
    n = len(right[known[0].number])
    found = []
    for k in ks:
        rows = {keys[prompt.number]: pass_at_k(n, sum(right[prompt.number]), k) for prompt in known}
        found.append(measure(f"pass@{k}", rows, seed=seed))
    if n > 1:
        rows = {keys[prompt.number]: sum(right[prompt.number]) / n for prompt in known}
        found.append(measure(f"avg@{n}", rows, seed=seed))
    return found


def majority_measure(
    prompts: Sequence[Prompt],
    keys: Mapping[int, str],
    texts: Mapping[int, Sequence[str]],
    tags: dict | None,
    seed: int = 0,
) -> Measure:
    """maj@n over the ``prompts`` with a gt_answer."""
    known = [prompt for prompt in prompts if prompt.gt_answer is not None]
    n = len(texts[known[0].number])
    rows = {
        keys[prompt.number]: majority(texts[prompt.number], str(prompt.gt_answer), tags)
        for prompt in known
    }
    return measure(f"maj@{n}", rows, seed=seed)


def score_measure(
    prompts: Sequence[Prompt],
    keys: Mapping[int, str],
    scored: Mapping[int, Sequence["Scored"]],
    seed: int = 0,
) -> Measure | None:
    """The mean score of the responses to a prompt, over prompts; None where none has a score."""
    rows = {}
    for prompt in prompts:
        scores = [each.score for each in scored[prompt.number] if each.score is not None]
        if scores:
            rows[keys[prompt.number]] = sum(scores) / len(scores)
    return measure("score", rows, unit="score", seed=seed) if rows else None


def unique_keys(keys: Sequence[str]) -> list[str]:
    """``keys``, those that stand several times with a number behind them."""
    seen: Counter[str] = Counter()
    found = []
    for key in keys:
        seen[key] += 1
        found.append(key if seen[key] == 1 else f"{key}#{seen[key]}")
    return found
