"""The reward functions as the first systems called them: on the token ids of one conversation, with
a tokenizer.

New code names rewards (:data:`~coati.rewards.registry.REWARDS`) or hands texts to
:mod:`coati.rewards.functions`; these are the same rewards under the old call, which
``coati.utils.reward_score`` exports.
"""

from typing import Any

import torch
from torch import Tensor

from coati.models.generation.detokenize import decode
from coati.rewards import functions
from coati.rewards import tags as structure

# What was taken where a template named no tags.
USUAL_TAGS = {
    "think_start": {"text": "<think>", "num_occur": 1},
    "think_end": {"text": "</think>", "num_occur": 1},
    "answer_start": {"text": "<answer>", "num_occur": 1},
    "answer_end": {"text": "</answer>", "num_occur": 1},
}


def gsm8k_reward_fn(
    input_ids: Tensor, attention_mask: Tensor | None = None, **keywords: Any
) -> Tensor:
    """:func:`coati.rewards.functions.gsm8k_reward_fn` of the response in ``input_ids`` (S,), a
    scalar tensor.

    ``keywords``: tokenizer, response_start and response_end (the end is one past the response's
    last token), gt_answer (None: reward 0), tags (None: :data:`USUAL_TAGS`). Others are left alone.
    Raises ValueError naming a keyword that is missing.
    """
    return _scored(functions.gsm8k_reward_fn, input_ids, keywords)


def math_competition_reward_fn(
    input_ids: Tensor, attention_mask: Tensor | None = None, **keywords: Any
) -> Tensor:
    """:func:`coati.rewards.functions.math_competition_reward_fn`, called as
    :func:`gsm8k_reward_fn`."""
    return _scored(functions.math_competition_reward_fn, input_ids, keywords)


def extract_solution(solution_str: str) -> tuple[str | None, str]:
    """What stands in the last <answer>...</answer>, None without one, and the text itself."""
    return structure.extract_solution(solution_str), solution_str


def validate_response_structure(processed_str: str, tags: dict | None = None) -> bool:
    """:func:`coati.rewards.tags.validate_response_structure`, by default of :data:`USUAL_TAGS`."""
    return structure.validate_response_structure(
        processed_str, USUAL_TAGS if tags is None else tags
    )


def _scored(function: Any, input_ids: Tensor, keywords: dict[str, Any]) -> Tensor:
    wanted = ("tokenizer", "response_start", "response_end", "gt_answer")
    if missing := [name for name in wanted if name not in keywords]:
        known = ", ".join([*wanted, "tags"])
        raise ValueError(
            f"{function.__name__}: called without {', '.join(missing)}; its keywords are {known}"
        )
    if keywords["gt_answer"] is None:
        return torch.tensor(0.0, device=input_ids.device)
    response = input_ids[int(keywords["response_start"]) : int(keywords["response_end"])]
    text = decode(keywords["tokenizer"], response.tolist())
    known = USUAL_TAGS if keywords.get("tags") is None else keywords["tags"]
    return torch.tensor(function(text, keywords["gt_answer"], known), device=input_ids.device)
