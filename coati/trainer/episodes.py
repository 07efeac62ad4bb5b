"""How long an online run is, and how an episode is divided into optimizer steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coati.parallel.checkpoint import RunningState


@dataclass(frozen=True)
class Episodes:
    """The length of a run.

    ``num_update_steps``: passes over the responses of an episode. ``steps_per_pass``: optimizer
    steps of a pass (:func:`~coati.experience_buffer.batch_sizes.optimizer_steps_per_pass`).
    ``temperature``: episode -> sampling temperature. ``ahead``: episodes whose responses are asked
    for while another is trained; theirs are of weights that are so many episodes older.
    ``refill_rounds``: of :mod:`~coati.trainer.dynamic_sampling`.

    Raises ValueError for episodes ahead of which it is not known where their prompts begin, because
    rounds of others take some first.
    """

    num_episodes: int = 1
    num_update_steps: int = 1
    steps_per_pass: int = 1
    temperature: Callable[[int], float] = field(default=lambda episode: 1.0)
    seed: int = 42
    sample_interval: int = 10
    ahead: int = 0
    refill_rounds: int = 0

    def __post_init__(self) -> None:
        if self.ahead and self.refill_rounds:
            raise ValueError(
                "dynamic sampling takes prompts that episodes asked for ahead have taken already; "
                "use one of the two"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a run from its start."""
        return self.num_episodes * self.num_update_steps * self.steps_per_pass

    def total_steps_from(self, state: RunningState, inside: bool) -> int:
        """Optimizer steps of the whole run, those that ``state`` has done included: this is not
        :attr:`total_steps` where a run is resumed with episodes of another kind. ``inside``: it
        goes on inside an episode."""
        trained = state.trainer
        left = max(self.num_episodes - trained.get("episode", 0), 0)
        first, start = trained.get("position", (0, 0)) if inside else (0, 0)
        per_episode = self.num_update_steps * self.steps_per_pass
        return state.step + max(left * per_episode - first * self.steps_per_pass - start, 0)


def update_shape(episodes: Episodes, micro_batch_size: int) -> list[int]:
    """How the updates of an episode are divided; a run goes on inside one under the same alone."""
    return [episodes.steps_per_pass, episodes.num_update_steps, micro_batch_size]


def why_over(
    buffer_state: Mapping[str, Any], trained: Mapping[str, Any], shape: list[int], kl_in_loss: bool
) -> str | None:
    """Why a run that was stopped inside an episode, with that buffer and trainer's state, has to
    begin it anew; None: it goes on inside it. ``shape``: the :func:`update_shape` of now."""
    if trained.get("cut") != shape:
        return "whose updates were divided otherwise"
    if kl_in_loss and "reference_log_probs" not in buffer_state:
        return "whose responses have no log-probs of the reference, which --kl_in loss needs"
    return None
