"""PPO with a critic: the same as ``coati ppo``."""

from coati.legacy.flags_rl import ROLLOUTS
from coati.recipes.command import run

if __name__ == "__main__":
    run("ppo", older=ROLLOUTS)
