"""Scores of drawn responses by a reward model, reward functions or a judge, kept on disk as they
are found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.inference.evaluate.generate_responses import Prompt
from coati.inference.evaluate.win_rate import Judge
from coati.inference.samples.sample_journal import Journal, Key, OtherSettings
from coati.inference.samples.samplers import Drawn
from coati.utils.logging import get_logger
from coati.utils.phases import phase

logger = get_logger(__name__)

SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Scored:
    """A response, its score and the parts of that by name; ``score`` None: the reward model cannot
    read it. ``prompt``: the text that the model was given, which rewards see."""

    drawn: Drawn
    prompt: str
    score: float | None = None
    parts: Mapping[str, float] | None = None

    # What a judge reads of a response.
    @property
    def text(self) -> str:
        return self.drawn.text

    @property
    def tokens(self) -> int:
        return self.drawn.tokens

    @property
    def stopped(self) -> bool:
        return self.drawn.stopped


@phase("scoring responses")
def score_all(
    judge: Judge,
    prompts: Sequence[Prompt],
    drawn: Mapping[int, Sequence[Drawn]],
    texts: Mapping[int, str],
    folder: Path,
    settings: Mapping[str, Any],
    max_new_tokens: int,
) -> dict[int, list[Scored]]:
    """Every response of ``drawn`` with its score, by the prompt's number. ``texts``: of the
    prompts, as the model was given them.

    All responses to a prompt are scored together, as many prompts at a time as make a batch of the
    judge: what a function makes of a batch is the same in a run that was killed and begun again.
    Scores in ``folder`` of other ``settings`` are replaced.
    """
    path = folder / SCORES
    try:
        journal = Journal(path, settings)
    except OtherSettings as error:
        logger.info(f"{error}; the responses are scored anew")
        path.unlink()
        journal = Journal(path, settings)
    found = {(row["number"], row["sample"]): row for row in journal.rows}
    most = max((len(each) for each in drawn.values()), default=1)
    size = max(1, judge.batch_size // max(most, 1))
    try:
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            pairs = [(prompt, each) for prompt in part for each in drawn[prompt.number]]
            keys = [(each.number, each.sample) for _, each in pairs]
            counts = {prompt.number: len(drawn[prompt.number]) for prompt in part}
            # A function may look at all responses to a prompt at once.
            if all(found.get(key, {}).get("of") == counts[key[0]] for key in keys):
                continue
            rows = [Scored(each, texts[prompt.number]) for prompt, each in pairs]
            values = judge([prompt for prompt, _ in pairs], rows, max_new_tokens)
            lines = [
                _line(key, value) | {"of": counts[key[0]]}
                for key, value in zip(keys, values, strict=True)
            ]
            journal.add(
                line for key, line in zip(keys, lines, strict=True) if found.get(key) != line
            )  # of two of a key the later one counts
            found |= dict(zip(keys, lines, strict=True))
    finally:
        journal.close()
    return {
        prompt.number: [
            _scored(each, texts[prompt.number], found[each.number, each.sample])
            for each in drawn[prompt.number]
        ]
        for prompt in prompts
    }


def _line(key: Key, value: tuple[float, dict[str, float]] | None) -> dict[str, Any]:
    score, parts = (None, {}) if value is None else value
    return {"number": key[0], "sample": key[1], "score": score, "parts": parts}


def _scored(drawn: Drawn, prompt: str, row: Mapping[str, Any]) -> Scored:
    return Scored(drawn, prompt, row["score"], row["parts"])
