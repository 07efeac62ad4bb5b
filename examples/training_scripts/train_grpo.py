"""GRPO and its variants.

``--help`` lists the flags, docs/rlhf.md explains them.
"""

from coati.cli.rollouts import parse_grpo
from coati.legacy.flags_rl import ROLLOUTS

if __name__ == "__main__":
    settings = parse_grpo(older=ROLLOUTS)
    from coati.recipes import finish, rl

    finish.guarded("train_grpo.py", rl.main, settings)
