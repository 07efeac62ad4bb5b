"""The reward ``judge``: a language model behind an OpenAI-compatible endpoint reads a response, and
the score is read from its verdict."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coati.rewards.background import map_bounded
from coati.rewards.endpoint import bearer, post_json
from coati.rewards.failures import Rejected, RowFailed
from coati.rewards.responses import Responses
from coati.rewards.reward_options import JudgeOptions
from coati.utils.json_io import load_object, save_json
from coati.utils.logging import get_logger
from coati.utils.user_cache import cache_root, hold

logger = get_logger(__name__)

KEY_VARIABLE = "COATI_JUDGE_KEY"
TRIES = 3  # verdicts without a score, before the response counts as not judged
RETRY_TEMPERATURE = 0.5


class VerdictCache:
    """Verdicts on disk by what was asked; without a disk to write to it keeps nothing, and says so
    once."""

    def __init__(self, options: JudgeOptions) -> None:
        whose = json.dumps([options.url, options.model])
        self.folder = cache_root() / "judge" / hashlib.sha256(whose.encode()).hexdigest()[:16]
        hold(self.folder)

    def place(self, text: str) -> Path:
        """The file of the verdict on ``text``."""
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.json"

    def read(self, text: str) -> str | None:
        """None where there is none, or its file is damaged."""
        place = self.place(text)
        if not place.is_file():
            return None
        try:
            verdict = load_object(place).get("verdict")
        except (OSError, ValueError):
            return None
        return verdict if isinstance(verdict, str) else None

    def write(self, text: str, verdict: str) -> None:
        """Keep it."""
        try:
            save_json({"verdict": verdict}, self.place(text))
        except OSError as error:
            logger.warning_once(
                f"verdicts of the judge are not kept: {self.folder} cannot be written "
                f"({error.strerror})"
            )


def judge_reward(
    options: JudgeOptions, timeout: float | None, at_once: int
) -> Callable[[Responses], list[float]]:
    """The reward function; equal responses to equal prompts are judged once, and not again in a
    later run. It raises RowFailed where no verdict has a score and ``options.failed`` is None."""
    judge = Judge(options, timeout)

    def scores(batch: Responses) -> list[float]:
        texts = [judge.question(batch, row) for row in range(len(batch))]
        first = {text: row for row, text in reversed(list(enumerate(texts)))}
        rows = sorted(first.values())
        found = map_bounded(
            lambda index: judge.score(texts[rows[index]], rows[index]), len(rows), at_once
        )
        by_text = {texts[row]: score for row, score in zip(rows, found, strict=True)}
        return [by_text[text] for text in texts]

    return scores


class Judge:
    """Asks for verdicts. Raises ValueError for a key in the environment that is none."""

    def __init__(self, options: JudgeOptions, timeout: float | None) -> None:
        self.options = options
        self.timeout = timeout
        self.pattern = re.compile(options.pattern)
        self.headers = bearer(KEY_VARIABLE)
        url = options.url.rstrip("/")
        self.url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        self.cache = VerdictCache(options)
        self.temperature = True  # whether the model takes one
        self.failed = 0  # responses that got no score

    def question(self, batch: Responses, row: int) -> str:
        """What the judge is asked about a response. Raises RowFailed where the prompt wants a
        gt_answer and the row has none."""
        truth = batch.gt_answers[row]
        if truth is None and "gt_answer" in self.options.places:
            raise RowFailed("is asked with {gt_answer}, which this row has not", row)
        values = {
            "prompt": batch.prompts[row],
            "response": batch.responses[row],
            "gt_answer": truth,
        }
        return self.options.text(values)

    def score(self, question: str, row: int) -> float:
        """The score in the verdict on ``question``."""
        verdict = self.cache.read(question)
        score = None if verdict is None else self._score_in(verdict)
        for number in range(TRIES):
            if score is not None:
                return score
            verdict = self._ask(question, 0.0 if number == 0 else RETRY_TEMPERATURE, row)
            score = self._score_in(verdict)
            if score is not None:
                self.cache.write(question, verdict)
        if score is not None:
            return score
        told = f"gave {TRIES} verdicts without a score; the last ends {(verdict or '')[-160:]!r}"
        if self.options.failed is None:
            raise RowFailed(
                f"{told}. See --judge_prompt and --judge_pattern; with --judge_failed SCORE such a "
                "response gets that score",
                row,
            )
        if not self.failed:
            logger.warning(
                f"reward judge {told}; such responses get --judge_failed {self.options.failed:g}"
            )
        self.failed += 1
        return self.options.failed

    def _score_in(self, verdict: str) -> float | None:
        """The last one, since a verdict may weigh several."""
        matches = list(self.pattern.finditer(verdict))
        for match in reversed(matches):
            try:
                score = float(match[1])
            except (TypeError, ValueError):
                continue
            if math.isfinite(score):
                return score
        return None

    def _ask(self, question: str, temperature: float, row: int) -> str:
        body: dict[str, Any] = {
            "model": self.options.model,
            "messages": [{"role": "user", "content": question}],
        }
        if self.temperature:
            body["temperature"] = temperature
        try:
            found = post_json(self.url, body, timeout=self.timeout, headers=self.headers)
        except Rejected as error:
            if "temperature" in body and "temperature" in str(error):
                self.temperature = False
                logger.warning_once("the judge takes no temperature; it is asked at its own")
                return self._ask(question, temperature, row)
            raise RowFailed(str(error), row) from error
        try:
            content = found["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            shown = json.dumps(found)[:160]
            raise RowFailed(f"answered {shown}; expected OpenAI's chat completion", row) from error
        if not isinstance(content, str):  # cut off while it still thought, say
            return ""
        return content
