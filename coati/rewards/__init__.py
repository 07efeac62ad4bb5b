"""Rewards that are computed, not learned: a registry by name, and functions of the user's own
files."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Rewards": "scorer",
        "RewardResult": "scorer",
        "Responses": "responses",
        "REWARDS": "registry",
        "check_rewards": "registry",
        "gsm8k_reward_fn": "functions",
        "math_competition_reward_fn": "functions",
        "extract_solution": "tags",
        "validate_response_structure": "tags",
    },
)
