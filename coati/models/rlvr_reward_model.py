"""Reward functions behind the call of a reward model, as the first systems had them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

REWARD_CALL = "(input_ids, attention_mask, response_start=, response_end=, gt_answer=, ...)"


class RLVRRewardModel:
    """The sum of reward functions for each row, called as a reward model is.

    The trainers of this library take :class:`coati.rewards.Rewards` instead, whose functions are
    given texts.

    Args:
        reward_fn_list: functions of one row, ``function(input_ids, attention_mask,
            response_start=..., response_end=..., gt_answer=..., **kwargs)``, that give a number or
            a scalar tensor; ``coati.utils.reward_score`` has two.
        kwargs: given to every function, such as ``tokenizer`` and ``tags``.

    Raises:
        ValueError: for an empty list or something in it that cannot be called.
    """

    def __init__(self, reward_fn_list: Sequence[Callable[..., Any]], **kwargs: Any) -> None:
        if not reward_fn_list or not all(map(callable, reward_fn_list)):
            raise ValueError(
                f"reward_fn_list: expected functions {REWARD_CALL}, found {list(reward_fn_list)}"
            )
        self.reward_fn_list = list(reward_fn_list)
        self.kwargs = kwargs

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        response_start: Sequence[int] | None = None,
        response_end: Sequence[int] | None = None,
        gt_answer: Sequence[str | None] | None = None,
    ) -> Tensor:
        """Rewards (B,) fp32 of ``input_ids`` (B, S).

        ``response_start``, ``response_end``: where each row's response begins, and one past its
        end; without them a response is the whole row. Raises ValueError for lists that are not as
        long as the batch, and for a reward that is not one finite number, naming function and row.
        """
        rows, width = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        columns = {
            "response_start": [0] * rows if response_start is None else response_start,
            "response_end": [width] * rows if response_end is None else response_end,
            "gt_answer": [None] * rows if gt_answer is None else gt_answer,
        }
        for name, values in columns.items():
            if len(values) != rows:
                raise ValueError(
                    f"{name}: {len(values)} values for {rows} rows; expected one for each"
                )
        rewards = torch.zeros(rows, device=input_ids.device)
        for row in range(rows):
            given = {name: values[row] for name, values in columns.items()} | self.kwargs
            for function in self.reward_fn_list:
                rewards[row] += _number(function, row, function(input_ids[row], mask[row], **given))
        return rewards

    def to(self, *arguments: Any, **keywords: Any) -> "RLVRRewardModel":
        """There is nothing to move; for code that treats it as a model."""
        return self

    def eval(self) -> "RLVRRewardModel":
        """There is nothing to switch; for code that treats it as a model."""
        return self


def _number(function: Callable, row: int, value: Any) -> float:
    number = torch.as_tensor(value, dtype=torch.float32)
    if number.numel() != 1 or not bool(number.isfinite()):
        name = getattr(function, "__name__", repr(function))
        raise ValueError(
            f"reward function {name} gave {value} for row {row}; expected one finite number"
        )
    return float(number)
