"""A trained model against its start: who gives the better answers to the same prompts, and how sure
that is."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from coati.dataset.rows.row_errors import RowError
from coati.inference.evaluate.generate_responses import Answer, LeftOut, Prompt
from coati.inference.evaluate.reward_scores import Scored, score
from coati.models.loading import adapter_base, find_model
from coati.rewards import Responses, Rewards
from coati.trainer.monitor.sample_table import distinct_2, stop_rate
from coati.utils.statistics import wilson_interval
from coati.utils.text_table import table, terminal_width, wrap

SIDES = ("start", "trained")
ROUNDING = 1e-6  # scores this close, relative to their size, differ by arithmetic alone


@dataclass(frozen=True)
class PairResult:
    """One prompt with the answers of both models (start, trained), their scores, and the parts of
    each score."""

    prompt: Prompt
    answers: tuple[Answer, Answer]
    scores: tuple[float, float]
    parts: tuple[dict[str, float], dict[str, float]]
    margin: float = 0.0

    @property
    def difference(self) -> float:
        """How much better the trained model's answer is."""
        return self.scores[1] - self.scores[0]

    @property
    def result(self) -> str:
        """win, loss or tie of the trained model; the same answer twice is a tie whatever its
        scores."""
        rounding = ROUNDING * max(1.0, *map(abs, self.scores))
        if self.answers[0].text == self.answers[1].text or abs(self.difference) <= max(
            self.margin, rounding
        ):
            return "tie"
        return "win" if self.difference > 0 else "loss"

    def as_dict(self) -> dict[str, Any]:
        """One line of the output file."""
        sides = {
            side: {
                "response": one.text,
                "score": score,
                "parts": parts,
                "tokens": len(one.ids),
                "stopped": one.stopped,
            }
            for side, one, score, parts in zip(
                SIDES, self.answers, self.scores, self.parts, strict=True
            )
        }
        row = {
            "row": self.prompt.place,
            "prompt": self.prompt.messages,
            "gt_answer": self.prompt.gt_answer,
        }
        return {**row, **sides, "difference": self.difference, "result": self.result}


class Judge:
    """Scores of answers: a reward model's, the weighted sum of reward functions, or both added up.

    Args: reward_model: model, tokenizer and template of
        :func:`~coati.inference.evaluate.reward_scores.load_reward_model`. rewards:
        :class:`~coati.rewards.Rewards`.

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
            raise ValueError("nothing to judge by: give a reward model, reward functions, or both")
        self.reward_model, self.rewards, self.batch_size = reward_model, rewards, batch_size

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer], max_new_tokens: int
    ) -> list[tuple[float, dict[str, float]] | None]:
        """Each answer's score and the parts of it by name; None for one that the reward model
        cannot read."""
        scores, parts = [0.0] * len(answers), [{} for _ in answers]
        if self.rewards is not None:
            batch = Responses(
                [one.prompt for one in answers],
                [one.text for one in answers],
                [one.gt_answer for one in prompts],
                [len(one.ids) for one in answers],
                [one.stopped for one in answers],
                max_new_tokens,
            )
            found = self.rewards(batch)
            scores = found.total
            parts = [
                {name: values[row] for name, values in found.parts.items()}
                for row in range(len(answers))
            ]
        if self.reward_model is None:
            return list(zip(scores, parts, strict=True))
        modeled = self._modeled(prompts, answers)
        return [
            None if value is None else (score + value, part | {"reward_model": value})
            for score, part, value in zip(scores, parts, modeled, strict=True)
        ]

    def _modeled(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[float | None]:
        """Of the whole conversation, in the reward model's own template; None where it does not fit
        into it."""
        model, tokenizer, conversation = self.reward_model
        longest, rows = getattr(model.config, "max_position_embeddings", None), []
        for prompt, one in zip(prompts, answers, strict=True):
            messages = [*prompt.messages, {"role": "assistant", "content": one.text}]
            try:
                ids = [conversation.encode_answer(messages, longest).input_ids]
            except RowError:
                ids = []
            rows.append(Scored(prompt.place, "sft", ids=ids))
        score(model, rows, tokenizer.pad_token_id or 0, self.batch_size)
        return [row.scores[0] if row.ids else None for row in rows]


def compare(
    prompts: Sequence[Prompt],
    start: dict[int, Answer],
    trained: dict[int, Answer],
    judges: Judge,
    max_new_tokens: int,
    margin: float = 0.0,
) -> tuple[list[PairResult], list[LeftOut]]:
    """Every prompt that both models have answered and both answers of which have a score; and the
    others.

    ``start``, ``trained``: answers by the prompts' numbers. ``margin``: scores at most this far
    apart are a tie.
    """
    both = [prompt for prompt in prompts if prompt.number in start and prompt.number in trained]
    answers = [[side[prompt.number] for prompt in both] for side in (start, trained)]
    found = [judges(both, side, max_new_tokens) for side in answers]
    rows, left_out = [], []
    for prompt, *pair, first, second in zip(both, *answers, *found, strict=True):
        if first is None or second is None:
            left_out.append(
                (
                    prompt.place,
                    "the reward model's template or length does not take an answer to it",
                )
            )
            continue
        scores, parts = zip(first, second, strict=True)
        rows.append(PairResult(prompt, tuple(pair), scores, parts, margin))
    return rows, left_out


def start_of(path: str | os.PathLike) -> str:
    """The model that a LoRA adapter was trained from. Raises ValueError for any other directory."""
    base = adapter_base(find_model(path, "actor"))
    if base is None:
        raise ValueError(f"--start_path is required: {path} does not say what it was trained from")
    return base


def win_rate(rows: Sequence[PairResult]) -> tuple[float, float, float]:
    """The trained model's share of wins, ties counting half, and the 95% interval it lies in."""
    won = sum({"win": 1.0, "tie": 0.5, "loss": 0.0}[row.result] for row in rows)
    low, high = wilson_interval(won, len(rows))
    return won / max(len(rows), 1), low, high


def summary(rows: Sequence[PairResult]) -> list[str]:
    """Lines: the win rate with its interval and what it says, mean scores, each part, and the
    answers' own numbers."""
    results = [row.result for row in rows]
    rate, low, high = win_rate(rows)
    unsure = "not told apart from its start, which more prompts may change"
    verdict = (
        "better than its start" if low > 0.5 else "worse than its start" if high < 0.5 else unsure
    )
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
    sides = [[row.answers[side] for row in rows] for side in (0, 1)]
    for name, measure in (
        ("tokens", _tokens),
        ("stop_rate", _stop_rate),
        ("distinct_2", _distinct_2),
    ):
        lines.append(f"{name} {measure(sides[0]):.3g} -> {measure(sides[1]):.3g}")
    return lines


def _tokens(answers: Sequence[Answer]) -> float:
    return fmean(len(one.ids) for one in answers)


def _stop_rate(answers: Sequence[Answer]) -> float:
    return stop_rate([one.stopped for one in answers])


def _distinct_2(answers: Sequence[Answer]) -> float:
    return distinct_2([one.ids for one in answers])


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
    lines, number = [f"largest {title}:"], 8
    if width < 80:
        for row in rows:
            lines += wrap(f"{row.scores[0]:.3g} -> {row.scores[1]:.3g}", width)
            texts = (
                ("prompt", row.prompt.question),
                *zip(SIDES, (one.text for one in row.answers), strict=True),
            )
            for name, text in texts:
                first, *others = wrap(text, width - 9)
                lines += [f"{name:<9}{first}", *(f"{'':9}{other}" for other in others)]
        return "\n".join(lines)
    text = (width - 2 * number - 12) // 3
    cells = [
        [
            row.prompt.question or " ",
            *(one.text or " " for one in row.answers),
            *(f"{one:.3g}" for one in row.scores),
        ]
        for row in rows
    ]
    header = ["prompt", "start's answer", "trained model's answer", "start", "trained"]
    return "\n".join(
        [*lines, table(header, cells, [text] * 3 + [number] * 2, [False] * 3 + [True] * 2)]
    )
