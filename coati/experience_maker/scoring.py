"""Scores of responses: from a reward model, reward functions, or the sum of both."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coati.experience_maker.experience import Experience
from coati.experience_maker.model_inputs import scores
from coati.parallel.inference_model import InferenceModel
from coati.rewards.responses import Responses
from coati.rewards.scorer import RewardResult, Rewards
from coati.rewards.source_rewards import SourceRewards
from coati.utils.distributed import raise_together

REWARD_MODEL = "reward_model"  # its name among the sources of reward
Scores = tuple[Tensor, dict[str, Tensor]]  # (B,), and (B,) of each source by name


class Scorer:
    """The reward of a run.

    Args:
        model: a frozen reward model.
        functions: reward functions.
        batch_size: rows per forward of the reward model; None: all.

    Raises:
        ValueError: without a model and functions.
    """

    def __init__(
        self,
        model: InferenceModel | None = None,
        functions: Rewards | SourceRewards | None = None,
        batch_size: int | None = None,
    ) -> None:
        if model is None and functions is None:
            raise ValueError(
                "nothing gives a reward: name a reward model (--rm_pretrain) or functions "
                "(--reward_functions)"
            )
        self.model = model
        self.functions = functions
        self.batch_size = batch_size

    @property
    def beside(self) -> bool:
        """Whether a reward waits for something else, while which the model can sample on."""
        return self.functions is not None and self.functions.beside

    def __call__(self, experience: Experience, responses: Responses) -> Scores:
        """(B,) scores, and (B,) scores of each source by name. Every rank must call it.

        Raises:
            ValueError: on every rank, if a reward function fails or a reward model's score is not
                finite on one.
        """
        return self.begin(responses)(experience)

    def begin(self, responses: Responses) -> Callable[[Experience], Scores]:
        """Begin what waits for something else. Calling what is returned gives the scores of the
        experience, as :meth:`__call__` does; every rank must do that, in the same order."""
        begun = None if self.functions is None else self.functions.begin(responses)
        return partial(self._finish, begun, responses)

    def _finish(
        self, begun: Callable[[], RewardResult] | None, responses: Responses, experience: Experience
    ) -> Scores:
        total = torch.zeros(len(experience))
        parts = {}
        if begun is not None:
            scored = raise_together(begun)
            total += torch.tensor(scored.total)
            parts |= {name: torch.tensor(values) for name, values in scored.parts.items()}
        if self.model is not None:
            found = scores(self.model, experience, self.batch_size).float().cpu()
            parts[REWARD_MODEL] = raise_together(lambda: _finite(found, responses))
            total += found
        return total, parts


def begin_scores(scorer: Callable[..., Any], responses: Responses) -> Callable[..., Scores]:
    """:meth:`Scorer.begin`; of another scorer: all of it when what is returned is called."""
    if isinstance(scorer, Scorer):
        return scorer.begin(responses)
    return lambda experience: scorer(experience, responses)


def no_scores(experience: Experience, responses: Responses) -> Scores:
    """Of a run whose rewards are its environment's alone."""
    return torch.zeros(len(experience)), {}


def _finite(found: Tensor, responses: Responses) -> Tensor:
    if bad := (~found.isfinite()).nonzero().flatten().tolist():
        raise ValueError(
            f"the reward model's score of response {bad[0]} is {found[bad[0]]:.3g}: prompt "
            f"{responses.prompts[bad[0]][-160:]!r}, response "
            f"{responses.responses[bad[0]][:160]!r}; score some rows with "
            "coati score to find out whether the model is broken"
        )
    return found
