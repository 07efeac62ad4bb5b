"""The rewards ``judge`` and ``pairwise_judge``: a language model behind an OpenAI-compatible
endpoint reads a response, or two of them, and the score is read from its verdict."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from coati.rewards.background import map_bounded
from coati.rewards.endpoint import bearer, post_json
from coati.rewards.failures import Rejected, RowFailed
from coati.rewards.responses import Responses
from coati.rewards.reward_options import JudgeOptions, PairJudgeOptions
from coati.utils.json_io import load_object, save_json
from coati.utils.logging import get_logger
from coati.utils.user_cache import cache_root, hold

logger = get_logger(__name__)

KEY_VARIABLE = "COATI_JUDGE_KEY"
TRIES = 3  # verdicts without a score, before the response counts as not judged
RETRY_TEMPERATURE = 0.5
ENOUGH = 50  # comparisons after which it is said that most depend on the order


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

    name = "judge"

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
        return self._text(batch, row, response=batch.responses[row])

    def _text(self, batch: Responses, row: int, **responses: str) -> str:
        truth = batch.gt_answers[row]
        if truth is None and "gt_answer" in self.options.places:
            raise RowFailed("is asked with {gt_answer}, which this row has not", row)
        values = {"prompt": batch.prompts[row], "gt_answer": truth, **responses}
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
                f"reward {self.name} {told}; such responses get --judge_failed "
                f"{self.options.failed:g}"
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


def pair_judge_reward(
    options: PairJudgeOptions, timeout: float | None, at_once: int
) -> Callable[[Responses], list[float]]:
    """The reward function: of each response the mean share that it wins of the comparisons with the
    others of its prompt, 0 to 1. Equal responses are ties that are not asked about. Raises
    ValueError for a single response to a prompt, RowFailed as :func:`judge_reward`."""
    judge = PairJudge(options, timeout)

    def scores(batch: Responses) -> list[float]:
        size = batch.num_generations
        if size < 2:
            raise ValueError(
                "compares the responses to a prompt, of which there is one; take judge, which "
                "gives a response a score by itself"
            )
        pairs = [
            (start + a, start + b)
            for start in range(0, len(batch), size)
            for a, b in combinations(range(size), 2)
        ]
        asked = [judge.questions(batch, a, b) for a, b in pairs]
        first = {both: number for number, both in reversed(list(enumerate(asked)))}
        unlike = [
            number
            for number in sorted(first.values())
            if batch.responses[pairs[number][0]] != batch.responses[pairs[number][1]]
        ]
        found = map_bounded(
            lambda index: judge.share(asked[unlike[index]], pairs[unlike[index]][0]),
            len(unlike),
            at_once,
        )
        shares = {asked[number]: share for number, share in zip(unlike, found, strict=True)}
        won = [0.0] * len(batch)
        for (a, b), both in zip(pairs, asked, strict=True):
            share = shares.get(both, 0.5)
            won[a] += share
            won[b] += 1 - share
        judge.say_if_order_decides()
        return [each / (size - 1) for each in won]

    return scores


class PairJudge(Judge):
    """Asks which of two responses is better, in both orders: a judge that prefers the first one,
    whichever that is, finds a tie."""

    name = "pairwise_judge"

    def __init__(self, options: PairJudgeOptions, timeout: float | None) -> None:
        super().__init__(options, timeout)
        self.compared = 0
        self.by_order = 0  # comparisons won by the same place in both orders

    def questions(self, batch: Responses, a: int, b: int) -> tuple[str, str]:
        """What the judge is asked about the responses ``a`` and ``b``, rows of ``batch``: with
        ``a`` in the first place, and with ``b``. Raises RowFailed as :meth:`question`."""
        first = batch.responses[a]
        second = batch.responses[b]
        return (
            self._text(batch, a, response_a=first, response_b=second),
            self._text(batch, a, response_a=second, response_b=first),
        )

    def share(self, questions: tuple[str, str], row: int) -> float:
        """What the response wins that is in the first place of the first of both ``questions``: 1,
        0, or what the mean of both orders is."""
        there, back = (self.score(question, row) for question in questions)
        self.compared += 1
        self.by_order += there == back != 0.5
        return (there + 1 - back) / 2

    def say_if_order_decides(self) -> None:
        """Once, where most comparisons went to the same place in both orders."""
        if self.compared >= ENOUGH and self.by_order > self.compared / 2:
            logger.warning_once(
                f"reward pairwise_judge: in {self.by_order} of {self.compared} comparisons the "
                "judge preferred the same place in both orders, which makes them ties; take a "
                "larger model, or another --judge_prompt"
            )

    def _score_in(self, verdict: str) -> float | None:
        """The share of the response in the first place, by the last match."""
        matches = list(self.pattern.finditer(verdict))
        if not matches or matches[-1][1] is None:
            return None
        return {"a": 1.0, "b": 0.0}.get(matches[-1][1].strip().lower(), 0.5)
