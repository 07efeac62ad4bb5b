"""From rollouts to experience: per-token rewards, advantages, and the tensors that hold them."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Experience": "experience",
        "ExperienceSettings": "rollout_batch",
        "KLController": "kl_controller",
        "NaiveExperienceMaker": "maker",
        "RolloutBatch": "rollout_batch",
        "RunningNormalization": "running_moments",
        "Scorer": "scoring",
        "gae": "advantage",
        "group_advantages": "advantage",
        "token_rewards": "advantage",
        "whiten": "advantage",
    },
)
