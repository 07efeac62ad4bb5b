"""Win rate of a policy against its reference on the same prompts, judged by a reward model or
reward functions, with its confidence interval."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from coati.dataset.rows.row_errors import RowError
from coati.inference.evaluate.generate_responses import Prompt, Response, Skipped
from coati.inference.evaluate.score_rows import ScoredRow, score
from coati.models.loading import find_model, trained_from
from coati.models.positions import positions_of
from coati.rewards import Responses, Rewards
from coati.trainer.monitor.sample_table import distinct_2, stop_rate
from coati.utils.phases import phase
from coati.utils.statistics import wilson_interval
from coati.utils.text_table import table, terminal_width, wrap

SIDES = ("start", "trained")  # reference and policy, as the output file calls them
NAMES = ("reference", "policy")
ROUNDING = 1e-6  # scores this close, relative to their size, differ by arithmetic alone


@dataclass(frozen=True)
class PairResult:
    """One prompt with the responses of both models (reference, policy), their scores, and the parts
    of each score."""

    prompt: Prompt
    responses: tuple[Response, Response]
    scores: tuple[float, float]
    parts: tuple[dict[str, float], dict[str, float]]
    margin: float = 0.0

    @property
    def difference(self) -> float:
        """How much better the policy's response is."""
        return self.scores[1] - self.scores[0]

    @property
    def result(self) -> str:
        """win, loss or tie of the policy; equal responses are a tie whatever their scores."""
        rounding = ROUNDING * max(1.0, *map(abs, self.scores))
        reference, policy = self.responses
        close = abs(self.difference) <= max(self.margin, rounding)
        if close or reference.text == policy.text:
            return "tie"
        return "win" if self.difference > 0 else "loss"

    def as_dict(self) -> dict[str, Any]:
        """One line of the output file."""
        sides = zip(SIDES, self.responses, self.scores, self.parts, strict=True)
        return {
            "row": self.prompt.place,
            "prompt": self.prompt.messages,
            "gt_answer": self.prompt.gt_answer,
            **{
                side: {
                    "response": response.text,
                    "score": value,
                    "parts": parts,
                    "tokens": len(response.ids),
                    "stopped": response.stopped,
                }
                for side, response, value, parts in sides
            },
            "difference": self.difference,
            "result": self.result,
        }


class Judge:
    """Scores of responses: a reward model's, the weighted sum of reward functions, or their sum.

    Args:
        reward_model: model, tokenizer and template, from
            :func:`~coati.inference.evaluate.score_rows.load_reward_model`.
        rewards: reward functions.

    Raises:
        ValueError: without either.
    """

    def __init__(
        self,
        reward_model: tuple | None = None,
        rewards: Rewards | None = None,
        batch_size: int = 16,
    ) -> None:
        if reward_model is None and rewards is None:
            raise ValueError("nothing to judge by: pass a reward model, reward functions, or both")
        self.reward_model = reward_model
        self.rewards = rewards
        self.batch_size = batch_size

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], max_new_tokens: int
    ) -> list[tuple[float, dict[str, float]] | None]:
        """Each response's score and the parts of it by name; None for one that the reward model
        cannot read."""
        scores = [0.0] * len(responses)
        parts: list[dict[str, float]] = [{} for _ in responses]
        if self.rewards is not None:
            batch = Responses(
                [each.prompt for each in responses],
                [each.text for each in responses],
                [each.gt_answer for each in prompts],
                [each.tokens for each in responses],
                [each.stopped for each in responses],
                max_new_tokens,
            )
            found = self.rewards(batch)
            scores = found.total
            parts = [
                {name: values[row] for name, values in found.parts.items()}
                for row in range(len(responses))
            ]
        if self.reward_model is None:
            return list(zip(scores, parts, strict=True))
        by_model = self._by_reward_model(prompts, responses)
        return [
            None if value is None else (total + value, part | {"reward_model": value})
            for total, part, value in zip(scores, parts, by_model, strict=True)
        ]

    def _by_reward_model(
        self, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> list[float | None]:
        """Scores of the whole conversation, in the reward model's own template; None where it does
        not fit into its context."""
        model, tokenizer, conversation = self.reward_model
        positions = positions_of(model.config)
        longest = None if positions is None else positions.count
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            messages = [*prompt.messages, {"role": "assistant", "content": response.text}]
            try:
                ids = [conversation.encode_response(messages, longest, prompt.tools).input_ids]
            except RowError:
                ids = []
            rows.append(ScoredRow(prompt.place, "sft", ids=ids))
        score(model, rows, tokenizer.pad_token_id or 0, self.batch_size)
        return [row.scores[0] if row.ids else None for row in rows]


@phase("judging responses")
def compare(
    prompts: Sequence[Prompt],
    reference: dict[int, Response],
    policy: dict[int, Response],
    judge: Judge,
    max_new_tokens: int,
    margin: float = 0.0,
) -> tuple[list[PairResult], list[Skipped]]:
    """Results of the prompts that have a scored response of both models, and the prompts that the
    judge could not score.

    ``reference``, ``policy``: responses by the prompts' numbers. ``margin``: scores at most this
    far apart are a tie.
    """
    both = [prompt for prompt in prompts if prompt.number in reference.keys() & policy.keys()]
    responses = [[side[prompt.number] for prompt in both] for side in (reference, policy)]
    judged = [judge(both, side, max_new_tokens) for side in responses]
    rows = []
    skipped = []
    for prompt, *pair, first, second in zip(both, *responses, *judged, strict=True):
        if first is None or second is None:
            reason = "the reward model's template or length does not take a response to it"
            skipped.append((prompt.place, reason))
            continue
        scores, parts = zip(first, second, strict=True)
        rows.append(PairResult(prompt, tuple(pair), scores, parts, margin))
    return rows, skipped


def reference_of(path: str | os.PathLike) -> str:
    """What a LoRA adapter was trained on. Raises ValueError for any other directory."""
    base = trained_from(find_model(path, "actor"))
    if base is None:
        raise ValueError(f"--start_path is required: {path} does not say what it was trained from")
    return base


def win_rate(rows: Sequence[PairResult]) -> tuple[float, float, float]:
    """The policy's share of wins, ties counting half, and its 95% interval (Wilson)."""
    won = sum({"win": 1.0, "tie": 0.5, "loss": 0.0}[row.result] for row in rows)
    low, high = wilson_interval(won, len(rows))
    return won / max(len(rows), 1), low, high


def summary(rows: Sequence[PairResult]) -> list[str]:
    """Lines: the win rate with its interval and verdict, mean scores, each part of the score, and
    statistics of the responses."""
    results = [row.result for row in rows]
    rate, low, high = win_rate(rows)
    verdict = "no significant difference to the reference; more prompts may show one"
    if low > 0.5:
        verdict = "better than the reference"
    elif high < 0.5:
        verdict = "worse than the reference"
    counts = (
        f"{results.count('win')} wins, {results.count('loss')} losses, {results.count('tie')} ties"
    )
    lines = [
        f"win rate {rate:.3f} on {len(rows)} prompts (95% {low:.3f} to {high:.3f}; {counts}): "
        f"{verdict}"
    ]
    differences = [row.difference for row in rows]
    before, after = (fmean(row.scores[side] for row in rows) for side in (0, 1))
    sure = 1.96 * stdev(differences) / math.sqrt(len(rows)) if len(rows) > 1 else math.inf
    lines.append(
        f"score {before:.4g} -> {after:.4g}, difference {after - before:+.4g} (95% +-{sure:.2g})"
    )
    if len(rows[0].parts[0]) > 1:
        for name in rows[0].parts[0]:
            before, after = (fmean(row.parts[side][name] for row in rows) for side in (0, 1))
            lines.append(f"{name} {before:.4g} -> {after:.4g}")
    before, after = (_statistics([row.responses[side] for row in rows]) for side in (0, 1))
    return [*lines, *(f"{name} {before[name]:.3g} -> {after[name]:.3g}" for name in before)]


def _statistics(responses: Sequence[Response]) -> dict[str, float]:
    return {
        "tokens": fmean(len(each.ids) for each in responses),
        "stop_rate": stop_rate([each.stopped for each in responses]),
        "distinct_2": distinct_2([each.ids for each in responses]),
    }


def extremes(rows: Sequence[PairResult], count: int, width: int | None = None) -> str:
    """The ``count`` largest wins and the ``count`` largest losses as a table; "" where there are
    none."""
    order = sorted(rows, key=lambda row: row.difference, reverse=True)
    wins = [row for row in order if row.result == "win"][:count]
    losses = [row for row in reversed(order) if row.result == "loss"][:count]
    width = terminal_width(width)
    return "\n".join(
        _part(title, part, width) for title, part in (("wins", wins), ("losses", losses)) if part
    )


def _part(title: str, rows: Sequence[PairResult], width: int) -> str:
    lines = [f"largest {title}:"]
    number = 9  # columns of a score, and of "reference"
    if width < 80:
        for row in rows:
            lines += wrap(f"{row.scores[0]:.3g} -> {row.scores[1]:.3g}", width)
            texts = (
                ("prompt", row.prompt.question),
                *zip(NAMES, (each.text for each in row.responses), strict=True),
            )
            for name, text in texts:
                first, *others = wrap(text, width - 10)
                lines += [f"{name:<10}{first}", *(f"{'':10}{other}" for other in others)]
        return "\n".join(lines)
    text = (width - 2 * number - 12) // 3
    cells = [
        [
            row.prompt.question or " ",
            *(each.text or " " for each in row.responses),
            *(f"{value:.3g}" for value in row.scores),
        ]
        for row in rows
    ]
    header = ["prompt", "reference's response", "policy's response", *NAMES]
    return "\n".join(
        [*lines, table(header, cells, [text] * 3 + [number] * 2, [False] * 3 + [True] * 2)]
    )
