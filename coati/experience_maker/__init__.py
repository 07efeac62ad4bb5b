"""From responses to experience: rewards of actions, advantages, and the one layout in which both
are kept."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Collected": "rollout_batch",
        "Experience": "experience",
        "ExperienceSettings": "rollout_batch",
        "KLController": "running_moments",
        "NaiveExperienceMaker": "maker",
        "RunningNormalization": "running_moments",
        "Scorer": "scoring",
        "gae": "advantage",
        "group_advantages": "advantage",
        "token_rewards": "advantage",
        "whiten": "advantage",
    },
)
