"""The old place of the reward functions; they live in :mod:`coati.legacy.token_rewards`.

The one package below ``rewards`` that names it: nothing is imported before a name is used, and
nothing else in ``utils`` may use it.
"""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    "coati.legacy",
    {
        "gsm8k_reward_fn": "token_rewards",
        "math_competition_reward_fn": "token_rewards",
        "extract_solution": "token_rewards",
        "validate_response_structure": "token_rewards",
    },
)
