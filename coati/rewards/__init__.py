"""Rewards that are computed, not learnt: a registry by name, and functions of the user's own files."""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Rewards": "scorer",
        "Scored": "scorer",
        "Responses": "responses",
        "REWARDS": "names",
        "check_rewards": "names",
        "gsm8k_reward_fn": "functions",
        "math_competition_reward_fn": "functions",
        "extract_solution": "tags",
        "validate_response_structure": "tags",
    },
)
