"""The old place of the reward functions; they live in :mod:`coati.rewards.legacy`.

The one package below ``rewards`` that names it: nothing is imported before a name is used, and nothing else in
``utils`` may use it.
"""

from coati.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    "coati.rewards",
    {
        "gsm8k_reward_fn": "legacy",
        "math_competition_reward_fn": "legacy",
        "extract_solution": "legacy",
        "validate_response_structure": "legacy",
    },
)
