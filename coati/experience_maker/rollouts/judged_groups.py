"""Groups of responses that rows bring with them, judged: what a policy learns from without
sampling."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coati.models.generation.loop import Generated

REWARD = "rows"  # its name among the sources of reward


def judged_groups(
    prompts: dict[str, Any], count: int, stop_sequences: Sequence[list[int]], width: int
) -> Generated:
    """``count`` responses to each prompt, of the JSON in ``prompts["dialogue"]``, as if the policy
    had sampled them; their scores are the reward of :attr:`Generated.of_environment`.

    A response is stopped where it ends with one of ``stop_sequences``; after ``width`` tokens it is
    cut, as one that is sampled.
    """
    held = [json.loads(text) for text in prompts["dialogue"]]
    ids = [each[:width] for row in held for each in row["ids"][:count]]
    scores = [score for row in held for score in row["scores"][:count]]
    longest = max(map(len, ids))
    made = torch.tensor([each + [0] * (longest - len(each)) for each in ids], dtype=torch.long)
    before = prompts["input_ids"].repeat_interleave(count, 0)
    lengths = torch.tensor([len(each) for each in ids])
    stopped = [any(each[-len(stop) :] == list(stop) for stop in stop_sequences) for each in ids]
    known: dict[str, Tensor] = {
        "reward": torch.tensor(scores, dtype=torch.float32),
        "last_start": torch.zeros(len(ids), dtype=torch.long),
    }
    return Generated(
        torch.cat([before, made], 1),
        lengths,
        torch.tensor(stopped),
        before.shape[1],
        of_environment=known,
    )
