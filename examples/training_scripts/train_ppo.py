"""PPO with a critic.

``--help`` lists the flags, docs/rlhf.md explains them.
"""

from coati.cli.rollouts import parse_ppo
from coati.legacy.flags_rl import ROLLOUTS

if __name__ == "__main__":
    settings = parse_ppo(older=ROLLOUTS)
    from coati.recipes import finish, rl

    finish.guarded("train_ppo.py", rl.main, settings)
