"""The settings of a PPO or GRPO run, and the assembly of its parts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypedDict

from coati.experience_buffer.buffer import NaiveExperienceBuffer
from coati.experience_maker.kl_controller import KLController
from coati.experience_maker.maker import NaiveExperienceMaker
from coati.experience_maker.rollout_batch import ExperienceSettings
from coati.experience_maker.rollouts.dialogue_rollout import EnvironmentRollout
from coati.experience_maker.rollouts.rollout_engine import RolloutEngine
from coati.parallel.engine import Engine
from coati.parallel.inference_model import InferenceModel
from coati.trainer.episodes import Episodes
from coati.trainer.policy_objective import PolicySettings


@dataclass(frozen=True)
class KLSettings:
    """The KL penalty: its initial coefficient, and target and horizon of an adaptive one
    (:class:`~coati.experience_maker.kl_controller.KLController`)."""

    coef: float = 0.1
    target: float | None = None
    horizon: int = 10000


@dataclass(frozen=True)
class BufferSettings:
    """``micro_batch_size``: rows of a micro-batch. ``limit``: only so many of the newest rows are
    kept; 0: all. ``cpu_offload``: rows are kept in host memory."""

    micro_batch_size: int = 8
    limit: int = 0
    cpu_offload: bool = True


@dataclass(frozen=True)
class ValueSettings:
    """The critic's loss: the clip range of its values, and its coefficient."""

    clip: float = 0.2
    coef: float = 1.0


@dataclass(frozen=True)
class RLSettings:
    """All settings of a run. ``ptx_coef``: c of (1 - c) x policy loss + c x supervised loss."""

    experience: ExperienceSettings
    policy: PolicySettings = field(default_factory=PolicySettings)
    value: ValueSettings = field(default_factory=ValueSettings)
    kl: KLSettings = field(default_factory=KLSettings)
    buffer: BufferSettings = field(default_factory=BufferSettings)
    episodes: Episodes = field(default_factory=Episodes)
    ptx_coef: float = 0.0


class TrainerParts(TypedDict):
    """Arguments of :class:`~coati.trainer.online.OLTrainer`."""

    actor: Engine
    critic: Engine | None
    maker: NaiveExperienceMaker
    buffer: NaiveExperienceBuffer
    episodes: Episodes
    policy: PolicySettings
    value_clip: float
    vf_coef: float
    ptx_coef: float


def linear_annealing(first: float, last: float, start: float, end: float) -> Callable[[int], float]:
    """Episode -> temperature: ``first`` up to episode ``start``, ``last`` from ``end`` on, linear
    in between."""

    def temperature(episode: int) -> float:
        progress = min(max((episode - start) / max(end - start, 1), 0.0), 1.0)
        return first + (last - first) * progress

    return temperature


def assemble_rl(
    settings: RLSettings,
    *,
    actor: Engine,
    critic: Engine | None = None,
    reference: InferenceModel | None = None,
    rollout: RolloutEngine,
    scorer: Callable[..., Any],
    tokenizer: Any,
    environment: EnvironmentRollout | None = None,
) -> TrainerParts:
    """The parts of :class:`~coati.trainer.online.OLTrainer`: PPO with a ``critic``, otherwise the
    group method ``settings.experience.method``.

    ``reference``: the reference policy; None: no KL. ``environment``: what responds to the policy.

    Raises:
        ValueError: for a critic with a group method, for neither, and for a KL target with a
            coefficient of 0.
    """
    kl = settings.kl
    buffer = settings.buffer
    maker = NaiveExperienceMaker(
        actor,
        rollout,
        scorer,
        tokenizer,
        settings.experience,
        reference=reference,
        critic=critic,
        kl=KLController(kl.coef, kl.target, kl.horizon),
        environment=environment,
    )
    return TrainerParts(
        actor=actor,
        critic=critic,
        maker=maker,
        buffer=NaiveExperienceBuffer(buffer.micro_batch_size, buffer.limit, buffer.cpu_offload),
        episodes=settings.episodes,
        policy=settings.policy,
        value_clip=settings.value.clip,
        vf_coef=settings.value.coef,
        ptx_coef=settings.ptx_coef,
    )
