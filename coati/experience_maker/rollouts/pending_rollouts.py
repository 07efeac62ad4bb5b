"""Responses that an engine was asked for and that are not in the experience yet."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coati.models.generation.loop import Generated
from coati.utils.errors import RunFailed


class RolloutsLost(RunFailed):
    """Nothing is left that could answer: raised by the result of what was asked for. The run saves
    and ends."""


@dataclass
class PendingRollouts:
    """One batch of prompts and the answers to it.

    ``prompts``: as the engine was asked, before they were repeated ``num_generations`` times.
    ``sample_index``, ``temperature``: of the responses. ``parts``: futures of consecutive rows.
    ``seconds``: that asking has taken.
    """

    prompts: dict[str, Any]
    sample_index: list[int]
    num_generations: int
    temperature: float
    parts: "list[Future[Generated]]"
    seconds: float = 0.0

    def result(self) -> Generated:
        """All responses, waited for.

        Raises:
            ValueError: for an engine's error that a user can mend, and for parts of several
                versions of the weights.
            RolloutsLost: where no sampler is left.
        """
        parts = [_answer(part) for part in self.parts]
        if len(versions := {part.version for part in parts}) > 1:
            raise ValueError(f"a batch of responses is of the weights of {versions}, not of one")
        return parts[0] if len(parts) == 1 else join_generated(parts, parts[0].prompt_length)

    def drop(self) -> None:
        """Nobody waits for the answers any more."""
        for part in self.parts:
            part.cancel()

    def state_dict(self) -> dict[str, Any]:
        """Prompts and responses on the CPU, as tensors, numbers and texts; waits for them."""
        generated = self.result()
        held = {field.name: getattr(generated, field.name) for field in fields(generated)}
        return {
            "prompts": _mapped(self.prompts, Tensor.cpu),
            "sample_index": list(self.sample_index),
            "num_generations": self.num_generations,
            "temperature": self.temperature,
            "generated": _mapped(held, Tensor.cpu),
        }

    @classmethod
    def of_state(cls, state: dict[str, Any], device: torch.device) -> "PendingRollouts":
        """What :meth:`state_dict` gave, its responses on ``device``."""
        held = dict(state)
        generated = _mapped(held.pop("generated"), lambda tensor: tensor.to(device))
        answer: Future[Generated] = Future()
        answer.set_result(Generated(**generated))
        return cls(**held, parts=[answer])


def _answer(part: "Future[Generated]") -> Generated:
    try:
        return part.result()
    except RolloutsLost:
        raise
    except (OSError, RunFailed) as error:
        raise ValueError(str(error)) from error


def _mapped(values: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {
        name: _mapped(value, change)
        if isinstance(value, dict)
        else change(value)
        if isinstance(value, Tensor)
        else value
        for name, value in values.items()
    }


def join_generated(parts: list[Generated], prompt_length: int) -> Generated:
    """Concatenate batches whose prompts have ``prompt_length`` columns; narrower ones are padded on
    the right."""
    width = max(part.sequences.shape[1] for part in parts)

    def padded(name: str, columns: int) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(tensor, (0, columns - tensor.shape[1])) for tensor in tensors])

    def of_actions(name: str) -> Tensor | None:
        there = all(getattr(part, name) is not None for part in parts)
        return padded(name, width - prompt_length) if there else None

    of_environment = None
    if parts[0].of_environment is not None:
        each = [part.of_environment or {} for part in parts]
        of_environment = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    return Generated(
        padded("sequences", width),
        torch.cat([part.lengths for part in parts]),
        torch.cat([part.stopped for part in parts]),
        prompt_length,
        of_actions("logprobs"),
        of_actions("sampled_logprobs"),
        parts[0].version,
        of_actions("action_mask"),
        of_environment,
    )
