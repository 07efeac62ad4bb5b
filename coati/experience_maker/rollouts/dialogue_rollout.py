"""Samples of several turns: the policy responds, its environment answers, until that is done or a
limit is reached.

What the policy sampled stays as it is, ids in, ids out; behind it come the ids that the template
writes between two responses. All turns of a batch are sampled at once by any rollout engine; rows
that are over leave. A sample depends on its row, its noise and its environment alone.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from coati.dataset.rows.row_errors import RowError
from coati.dataset.types.prompt_rows import DIALOGUE
from coati.environments.multi_turn import Message, Turn
from coati.environments.turn_tokens import Said, TurnTokens
from coati.experience_maker.rollouts.rollout_engine import RolloutEngine
from coati.models.generation.loop import Generated
from coati.models.generation.response_table import left_pad
from coati.models.generation.row_noise import NoiseRows
from coati.parallel.engine import Engine
from coati.rewards.time_limit import Overrun, time_limit
from coati.rewards.user_function import described
from coati.utils.distributed import all_gather_object, any_rank, raise_together

Result = TypeVar("Result")
SHOWN = 160  # characters of a row in messages
# What is known of each sample, beside its reward and where its last response begins.
COUNTED = ("turns", "tool_calls", "failed_calls", "unreadable_calls", "cut")


@dataclass(frozen=True)
class TurnLimits:
    """``turns``: responses of a sample. ``tokens``: of a sample behind its prompt, those of the
    environment included. ``prompt``: tokens of a prompt. ``seconds``: that an environment may take
    for a turn; None: no limit."""

    turns: int
    tokens: int
    prompt: int
    seconds: float | None = None


@dataclass
class Answer:
    """What follows a response: ``ids`` and ``text`` up to the next one; None: the sample is over,
    because the environment is ``done`` or at a limit."""

    ids: list[int] | None = None
    text: str = ""
    reward: float = 0.0
    done: bool = False
    calls: int = 0
    failed: int = 0
    unreadable: int = 0


@dataclass
class Sample:
    """One dialogue. ``environment``, ``tools``: on the rank that runs it alone."""

    prompt: list[int]
    text: str
    environment: Any = None
    tools: Sequence[dict[str, Any]] = ()
    row: dict[str, Any] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logprobs: list[float] | None = field(default_factory=list)
    sampled: list[float] | None = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))
    reward: float = 0.0
    last_start: int = 0
    stopped: bool = False
    over: bool = False

    def add_own(self, ids: list[int], logprobs: Any, sampled: Any) -> None:
        """A response of the policy."""
        self.last_start = len(self.ids)
        self._add(ids, True, logprobs, sampled)
        self.counts["turns"] += 1

    def add_others(self, ids: list[int]) -> None:
        """What stands between it and the next."""
        zeros = [0.0] * len(ids)
        self._add(ids, False, zeros, zeros)

    def _add(self, ids: list[int], own: bool, logprobs: Any, sampled: Any) -> None:
        self.ids += ids
        self.own += [own] * len(ids)
        for name, values in (("logprobs", logprobs), ("sampled", sampled)):
            held = getattr(self, name)
            setattr(self, name, None if held is None or values is None else [*held, *values])


class EnvironmentRollout:
    """Asks ``rollout`` turn by turn.

    Args:
        engine: the policy's; its place in the mesh decides which rank runs the environments: one of
            those that hold the same rows.
        make: makes an environment for each sample.
        name: of the environment, for messages.
    """

    def __init__(
        self,
        engine: Engine,
        rollout: RolloutEngine,
        make: Callable[[], Any],
        tokens: TurnTokens,
        limits: TurnLimits,
        *,
        pad_token_id: int,
        name: str = "environment",
    ) -> None:
        self.engine = engine
        self.rollout = rollout
        self.make = make
        self.tokens = tokens
        self.limits = limits
        self.pad = pad_token_id
        self.name = name

    # The first messages

    def begin(self, rows: Sequence[dict[str, Any]], count: int, noise: NoiseRows) -> list[Sample]:
        """``count`` samples of each of ``rows``, in their order. Every rank must call it.

        Raises ValueError on every rank for an environment that fails on one, and for one whose
        samples of a row begin differently.
        """
        prompts = self._shared(lambda: self._begun(rows, count, noise))
        if self._runs_environments:
            return prompts
        return [Sample(ids, text) for ids, text in prompts]

    @property
    def _runs_environments(self) -> bool:
        mesh = self.engine.mesh
        return mesh.tp_group is None or mesh.is_loss_rank

    def _begun(self, rows: Sequence[dict[str, Any]], count: int, noise: NoiseRows) -> list[Sample]:
        samples = []
        for number, index in enumerate(noise.rows):
            row = rows[number // count] | {"seed": _seed(noise, int(index))}
            samples.append(self._reset(row))
            first = samples[number - number % count]
            if samples[-1].prompt != first.prompt:
                raise ValueError(
                    f"{self.name}: reset begins another dialogue for the same row, and the "
                    "responses of a group must answer the same messages; let what differs show "
                    f"later; {_shown(row)}"
                )
        return samples

    def _reset(self, row: dict[str, Any]) -> Sample:
        environment = self.make()
        messages = self._called("reset", row, lambda: environment.reset(dict(row)))
        messages = self._checked(messages, "reset", row, ("system", "user", "assistant", "tool"))
        tools = list(getattr(environment, "tools", ()) or ())
        try:
            ids, text = self.tokens.first(messages, tools)
        except RowError as error:
            raise ValueError(
                f"{self.name}: the template cannot write what reset returned: {error}; "
                f"{_shown(row)}"
            ) from error
        if len(ids) > self.limits.prompt:
            raise ValueError(
                f"{self.name}: what reset returned has {len(ids)} tokens, at most "
                f"{self.limits.prompt} leave room for the response (--max_length less "
                f"--max_seq_len); {_shown(row)}"
            )
        return Sample(ids, text, environment, tools, row)

    # The turns

    def run(
        self, samples: list[Sample], noise: NoiseRows, temperature: float, prompt_width: int = 0
    ) -> Generated:
        """All turns of ``samples``, by the weights that were published last; prompts are padded on
        the left to the longest, and to ``prompt_width`` at least. Every rank must call it, with at
        least one sample.

        Raises ValueError on every rank for an environment or an engine that fails on one.
        """
        version = None
        turn = 0
        while any_rank(any(not sample.over for sample in samples)):
            rows = replace(noise, turn=turn)
            version = self._turn(samples, rows, temperature, version)
            turn += 1
        return self._generated(samples, version, prompt_width)

    def _turn(
        self, samples: list[Sample], noise: NoiseRows, temperature: float, before: int | None
    ) -> int | None:
        """One response of each sample that is not over, and the answer to it; the version of the
        weights. ``before``: that of the turns before."""
        active = [k for k, sample in enumerate(samples) if not sample.over]
        # Where nothing is left, a token more is sampled, since every rank must ask.
        asked = active or [0]
        rows = replace(noise, rows=[noise.rows[k] for k in asked])
        first = not rows.turn

        def sampled() -> Generated:
            parts = [samples[k] for k in asked]
            generated = self._sample(parts, rows, temperature, bool(active))
            if not first and generated.version != before:
                raise ValueError(
                    f"the turns of a sample are of the weights of {before} and "
                    f"{generated.version}, not of one"
                )
            return generated

        generated = raise_together(sampled)
        _take([samples[k] for k in active], generated)
        answers = self._shared(lambda: [self._answer(samples[k]) for k in active])
        for k, answer in zip(active, answers, strict=True):
            self._add(samples[k], answer)
        return generated.version

    def _sample(
        self, samples: list[Sample], noise: NoiseRows, temperature: float, counts: bool
    ) -> Generated:
        # Behind a sample that is over there may be no position for a token more.
        before = [sample.ids if counts else [] for sample in samples]
        rows = [sample.prompt + ids for sample, ids in zip(samples, before, strict=True)]
        ids, mask = left_pad(rows, self.pad, self.engine.device)
        limits = [self.limits.tokens - len(ids) if counts else 1 for ids in before]
        asked = self.rollout.ask(ids, mask, noise=noise, temperature=temperature, limits=limits)
        return asked.result()

    def _answer(self, sample: Sample) -> Answer:
        """What the environment says to the last response, and what of it the limits allow."""
        if not sample.stopped:  # the token limit
            return Answer()
        ids = sample.ids[sample.last_start :]
        said = self.tokens.read(ids, sample.text, sample.tools)
        answer = Answer(unreadable=int(said.unreadable))
        if said.unreadable:
            messages: Sequence[Message] = [self.tokens.unreadable_result(sample.tools)]
        else:
            answer.calls = len(said.message.get("tool_calls", ()))
            turn = self._step(sample, said)
            answer.reward = float(turn.reward)
            answer.done = bool(turn.done)
            messages = turn.messages
        answer.failed = int(getattr(sample.environment, "failed_calls", 0))
        if answer.done or sample.counts["turns"] >= self.limits.turns:
            return answer
        following, text = self._between(sample, ids, said, messages)
        if len(sample.ids) + len(following) < self.limits.tokens:
            answer.ids = following
            answer.text = text
        return answer

    def _step(self, sample: Sample, said: Said) -> Turn:
        environment = sample.environment
        turn = self._called("step", sample.row, lambda: environment.step(dict(said.message)))
        where = _shown(sample.row)
        if not all(hasattr(turn, name) for name in ("messages", "reward", "done")):
            raise ValueError(
                f"{self.name}: step returned {turn!r:.160}; expected a Turn(messages, reward, "
                f"done); {where}"
            )
        if not isinstance(turn.reward, int | float) or not math.isfinite(turn.reward):
            raise ValueError(
                f"{self.name}: step gave the reward {turn.reward!r:.160}; expected a finite "
                f"number; {where}"
            )
        if not turn.done:
            self._checked(turn.messages, "step", sample.row, ("user", "tool"))
            last = said.message.get("tool_calls")
            if turn.messages[0]["role"] == "tool" and not last:
                raise ValueError(
                    f"{self.name}: step answers a response that calls nothing with a tool's "
                    f"result; answer by role user; {where}"
                )
        return turn

    def _between(
        self, sample: Sample, ids: list[int], said: Said, messages: Sequence[Message]
    ) -> tuple[list[int], str]:
        try:
            return self.tokens.between(ids, said, messages, sample.tools)
        except RowError as error:
            raise ValueError(
                f"{self.name}: the template cannot write what step returned "
                f"({list(messages)!r:.300}): {error}; {_shown(sample.row)}"
            ) from error

    def _add(self, sample: Sample, answer: Answer) -> None:
        counts = sample.counts
        counts["tool_calls"] += answer.calls
        counts["unreadable_calls"] += answer.unreadable
        counts["failed_calls"] = max(counts["failed_calls"], answer.failed)
        sample.reward += answer.reward
        if answer.ids is None:
            sample.over = True
            sample.stopped = answer.done
            counts["cut"] = float(not answer.done)
        else:
            sample.add_others(answer.ids)
            sample.text = answer.text

    # Checks

    def _called(self, what: str, row: dict[str, Any], call: Callable[[], Any]) -> Any:
        try:
            with time_limit(self.limits.seconds):
                return call()
        except KeyboardInterrupt:
            raise
        except Overrun as error:
            raise ValueError(
                f"{self.name}: {what} took longer than {self.limits.seconds:g} s "
                f"(--reward_timeout); {_shown(row)}"
            ) from error
        except BaseException as error:  # sys.exit, too, ends the run as a failure
            raise ValueError(
                f"{self.name}: {what} raised {described(error)}; {_shown(row)}"
            ) from error

    def _checked(
        self, messages: Any, what: str, row: dict[str, Any], roles: Sequence[str]
    ) -> list[Message]:
        fits = isinstance(messages, list | tuple) and all(
            isinstance(one, dict)
            and one.get("role") in roles
            and isinstance(one.get("content"), str)
            for one in messages
        )
        if not fits or not messages or messages[-1]["role"] not in ("user", "tool"):
            raise ValueError(
                f"{self.name}: {what} returned the messages {messages!r:.300}; expected a list of "
                f"{{role, content}}, roles {', '.join(roles)}, that ends with user or tool; "
                f"{_shown(row)}"
            )
        return list(messages)

    # Ranks and tensors

    def _shared(self, work: Callable[[], list[Result]]) -> list[Any]:
        """``work()`` of the rank that runs the environments of this rank's rows."""
        mesh = self.engine.mesh
        if mesh.tp_group is None:
            return raise_together(work)
        own = raise_together(lambda: work() if self._runs_environments else [])
        sent = [(one.prompt, one.text) if isinstance(one, Sample) else one for one in own]
        found = all_gather_object((mesh.dp_rank, self._runs_environments, sent))
        if self._runs_environments:
            return own
        return next(each for place, runs, each in found if runs and place == mesh.dp_rank)

    def prompts(self, samples: Sequence[Sample], count: int) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (B, P), padded on the left, one row for each
        ``count`` samples."""
        ids, mask = left_pad([sample.prompt for sample in samples[::count]], self.pad)
        return {"input_ids": ids, "attention_mask": mask}

    def _generated(
        self, samples: list[Sample], version: int | None, prompt_width: int
    ) -> Generated:
        device = self.engine.device
        before = [sample.prompt for sample in samples]
        prompts, _ = left_pad(before, self.pad, device, prompt_width)
        width = max(len(sample.ids) for sample in samples)

        def padded(rows: list[Any], value: Any, dtype: torch.dtype) -> Tensor:
            filled = [[*row, *[value] * (width - len(row))] for row in rows]
            return torch.tensor(filled, dtype=dtype, device=device)

        def logprobs(name: str) -> Tensor | None:
            rows = [getattr(sample, name) for sample in samples]
            return None if None in rows else padded(rows, 0.0, torch.float32)

        def numbers(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        responses = padded([sample.ids for sample in samples], self.pad, torch.long)
        known = {name: numbers([one.counts[name] for one in samples]) for name in COUNTED}
        known["reward"] = numbers([sample.reward for sample in samples])
        known["last_start"] = torch.tensor([one.last_start for one in samples], device=device)
        return Generated(
            torch.cat([prompts, responses], dim=1),
            torch.tensor([len(sample.ids) for sample in samples], device=device),
            torch.tensor([sample.stopped for sample in samples], device=device),
            prompts.shape[1],
            logprobs("logprobs"),
            logprobs("sampled"),
            version,
            padded([sample.own for sample in samples], False, torch.bool),
            known,
        )


def _take(samples: list[Sample], generated: Generated) -> None:
    """Add the responses ``generated`` to ``samples``."""
    logprobs = None if generated.logprobs is None else generated.logprobs.tolist()
    sampled = None if generated.sampled_logprobs is None else generated.sampled_logprobs.tolist()
    stopped = generated.stopped.tolist()
    for k, (sample, ids) in enumerate(zip(samples, generated.responses(), strict=False)):
        sample.add_own(
            ids,
            None if logprobs is None else logprobs[k][: len(ids)],
            None if sampled is None else sampled[k][: len(ids)],
        )
        sample.stopped = stopped[k]


def dialogues_of(prompts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a batch of prompts, as environments take them."""
    truths = prompts["gt_answer"]
    return [
        json.loads(text) | {"gt_answer": truth}
        for text, truth in zip(prompts[DIALOGUE], truths, strict=True)
    ]


def _seed(noise: NoiseRows, index: int) -> int:
    """A number that each sample of each episode has of its own."""
    return int(noise.seed) * 1_000_003**2 + int(noise.episode) * 1_000_003 + index


def _shown(row: dict[str, Any]) -> str:
    messages = row.get("messages") or [{"content": ""}]
    return (
        f"the row whose last message is {messages[-1]['content'][:SHOWN]!r}, gt_answer "
        f"{row.get('gt_answer')!r}"
    )
