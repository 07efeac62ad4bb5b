"""What the keyword constructors of PPO and GRPO are given, as the parts that they are made of."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from coati.experience_maker.experience import Experience
from coati.experience_maker.scoring import Scorer
from coati.models.generation.loop import Sampling
from coati.models.rlvr_reward_model import RLVRRewardModel
from coati.parallel.inference_model import InferenceModel
from coati.rewards.responses import Responses
from coati.rewards.scorer import Rewards

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


class _RowFunctions:
    """A :class:`~coati.models.rlvr_reward_model.RLVRRewardModel` in a scorer's place."""

    def __init__(self, model: RLVRRewardModel) -> None:
        self.model = model

    def __call__(
        self, experience: Experience, responses: Responses
    ) -> tuple[Tensor, dict[str, Tensor]]:
        start, lengths = experience.prompt_width, experience.response_lengths()
        found = (
            self.model(
                experience.sequences,
                experience.attention_mask,
                response_start=[start] * len(lengths),
                response_end=(start + lengths).tolist(),
                gt_answer=responses.gt_answers,
            )
            .float()
            .cpu()
        )
        return found, {"reward_functions": found}


def scorer_of(reward_model: Any, batch_size: int | None) -> Callable:
    """What gives the rewards. Raises TypeError for what is no reward model."""
    if isinstance(reward_model, RLVRRewardModel):
        return _RowFunctions(reward_model)
    if isinstance(reward_model, Rewards):
        return Scorer(functions=reward_model)
    if not isinstance(reward_model, torch.nn.Module):
        raise TypeError(
            f"reward_model is {type(reward_model).__name__}; expected a RewardModel, "
            "coati.rewards.Rewards or an "
            "RLVRRewardModel"
        )
    return Scorer(InferenceModel.plain(reward_model), batch_size=batch_size)


def generation_of(tokenizer: Any, given: dict[str, Any]) -> tuple[list[list[int]], int, Sampling]:
    """Stop sequences, tokens of a response at most, and how it is sampled. Raises TypeError for
    unknown keywords."""
    if unknown := set(given) - {"max_new_tokens", "stop_token_ids", *SAMPLING}:
        known = ", ".join(("max_new_tokens", "stop_token_ids", *SAMPLING))
        raise TypeError(
            f"unknown keywords {', '.join(sorted(unknown))}; what is sampled with may be {known}"
        )
    if not given.get("max_new_tokens"):
        raise TypeError("max_new_tokens is missing: how many tokens a response may have")
    stops: Sequence = given.get("stop_token_ids") or [[tokenizer.eos_token_id]]
    stops = [list(stops)] if isinstance(stops[0], int) else [list(stop) for stop in stops]
    return (
        stops,
        given["max_new_tokens"],
        Sampling(**{name: given[name] for name in SAMPLING if name in given}),
    )
