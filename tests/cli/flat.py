"""The settings of a training script as a flat namespace of its flags, for assertions."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from coati.cli import arguments, distilling, preferences, pretraining, rollout_pairs, rollouts
from coati.legacy.flags import SHARED
from coati.legacy.flags_preferences import PREFERENCES
from coati.legacy.flags_rl import PROMPTS, ROLLOUTS


def flat(parse: Callable[..., Any], argv: list[str] | None = None) -> SimpleNamespace:
    """The resolved flags that ``parse`` reads from ``argv``."""
    return SimpleNamespace(**parse(argv).flags)


# As the scripts call them: flags of earlier releases are taken too.
parse_sft = partial(flat, partial(arguments.parse_sft, older=SHARED))
parse_rm = partial(flat, partial(preferences.parse_rm, older=PREFERENCES))
parse_dpo = partial(flat, partial(preferences.parse_dpo, older=PREFERENCES))
parse_pretrain = partial(flat, partial(pretraining.parse_pretrain, older=SHARED))
parse_orpo = partial(flat, partial(preferences.parse_orpo, older=PREFERENCES))
parse_kto = partial(flat, partial(preferences.parse_kto, older=PREFERENCES))
parse_gkd = partial(flat, partial(distilling.parse_gkd, older=SHARED))
parse_ppo = partial(flat, partial(rollouts.parse_ppo, older=ROLLOUTS))
parse_grpo = partial(flat, partial(rollouts.parse_grpo, older=ROLLOUTS))
parse_online_dpo = partial(flat, partial(rollout_pairs.parse_online_dpo, older=SHARED))
parse_prompts = partial(flat, partial(rollouts.parse_ppo, older=PROMPTS))
