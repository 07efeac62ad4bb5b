"""What the parsers of PPO, GRPO and online DPO return: frozen dataclasses, one a flag group.

Fields and groups as in :mod:`coati.cli.settings`.
"""

from dataclasses import dataclass, field

from coati.cli.reward_flags import SlowRewardSettings
from coati.cli.settings import OnlineDPOLoss, ReferenceSettings, TrainingSettings


@dataclass(frozen=True)
class RolloutSettings:
    """What an episode collects. Batch sizes count rows of one process. ``rollouts_ahead``: episodes
    asked for while another is trained. ``environment``: what responds to the policy, in up to
    ``max_turns`` responses of a sample. ``dynamic_sampling``: rounds that replace groups of equal
    scores. ``offline_groups``: responses are the rows' own."""

    num_episodes: int
    num_collect_steps: int
    experience_batch_size: int
    max_seq_len: int
    inference_batch_size: int
    logits_forward_batch_size: int
    rollout_engine: str
    sample_interval: int
    offload_inference_models: bool
    rollouts_ahead: int
    num_generations: int = 1
    environment: str | None = None
    environment_args: str | None = None  # a JSON object
    max_turns: int | None = None
    dynamic_sampling: int = 0
    offline_groups: bool = False


@dataclass(frozen=True)
class EngineSettings:
    """The engines of rollouts that are not the trained model: servers, actors of a Ray cluster, and
    vLLM in this process. ``rollout_workers`` None: there is no cluster."""

    rollout_url: list[str]
    rollout_sync: str
    rollout_weights_dir: str | None
    rollout_timeout: float
    rollout_token_env: str | None
    vllm_memory_share: float
    vllm_sleep: bool
    rollout_workers: int | None = None
    rollout_worker_cpus: float = 1.0
    rollout_worker_gpus: float = 0.0
    rollout_python: str | None = None
    ray_address: str = "auto"


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are sampled; the temperature moves from the initial to the final one."""

    initial_temperature: float
    final_temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float


@dataclass(frozen=True)
class RewardSettings:
    """Where scores come from and what is made of them; a clip or timeout of 0 is none."""

    rm_pretrain: str | None
    rm_checkpoint_path: str | None
    no_neural_reward_model: bool
    reward_functions: list[str]
    reward_weights: list[float]
    reward_timeout: float
    reward_clip: float
    reward_normalization: str
    missing_eos_penalty: float
    source_rewards: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PassAtSettings:
    """pass@k of evaluations. ``eval_generations`` None: as many as the largest k. ``eval_right``:
    the reward that a right response reaches; None: the reward functions say."""

    eval_pass_at: list[int] = field(default_factory=list)
    eval_generations: int | None = None
    eval_right: float | None = None


@dataclass(frozen=True)
class KLPenalty:
    """The KL to the reference. ``kl_in``: "reward" or "loss"."""

    kl_coef: float
    kl_estimator: str
    kl_in: str
    kl_target: float | None
    kl_horizon: int


@dataclass(frozen=True)
class UpdateSettings:
    """The optimizer steps of an episode and the policy's loss: ``policy_loss`` to ``sapo_tau`` of
    :class:`~coati.models.surrogate_loss.SurrogateSettings`, ``rollout_is...`` of
    :class:`~coati.models.rollout_correction.RolloutCorrection`."""

    num_update_steps: int
    train_batch_size: int
    accumulation_steps: int
    buffer_limit: int
    clip_eps_low: float | None
    clip_eps_high: float | None
    policy_loss: str
    loss_agg_mode: str | None
    dual_clip: float | None
    cispo_cap: float | None
    sapo_tau: list[float] | None
    entropy_coef: float
    skip_threshold: float
    rollout_is: str
    rollout_is_cap: float | None
    rollout_is_mask: list[float] | None


@dataclass(frozen=True)
class AdvantageSettings:
    """How scores become advantages. ``algo`` None: a critic and GAE."""

    algo: str | None = None
    gamma: float = 1.0
    lam: float = 0.95
    reward_at: str = "last"
    no_whiten_advantages: bool = False
    overlong_buffer_len: int = 0
    mask_truncated_completions: bool = False


@dataclass(frozen=True)
class PtxSettings:
    """Supervised rows beside the rollouts: the loss is (1 - C) x policy + C x SFT."""

    ptx_dataset: list[str]
    ptx_coef: float
    ptx_batch_size: int


@dataclass(frozen=True)
class CriticSettings:
    """Where the critic starts and how it is trained."""

    critic_pretrain: str | None = None
    critic_checkpoint_path: str | None = None
    critic_lr: float = 9e-6
    value_clip: float = 0.2


@dataclass(frozen=True, kw_only=True)
class OnlineSettings(TrainingSettings):
    """What the trainers with rollouts share; all that ``coati grpo`` is told."""

    rollout: RolloutSettings
    engine: EngineSettings
    sampling: SamplingSettings
    reward: RewardSettings
    slow_rewards: SlowRewardSettings
    kl: KLPenalty
    update: UpdateSettings
    advantage: AdvantageSettings
    ptx: PtxSettings
    evaluation: PassAtSettings

    @property
    def rows_per_prompt(self) -> int:
        """What an optimizer step counts of the responses to a prompt."""
        return self.rollout.num_generations


@dataclass(frozen=True, kw_only=True)
class PPOSettings(OnlineSettings):
    """``coati ppo``."""

    critic: CriticSettings


@dataclass(frozen=True, kw_only=True)
class OnlineDPOSettings(OnlineSettings):
    """``coati online-dpo``, whose optimizer steps count pairs."""

    loss: OnlineDPOLoss
    reference: ReferenceSettings

    @property
    def rows_per_prompt(self) -> int:
        return 1
