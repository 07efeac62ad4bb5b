"""GRPO and its variants: the same as ``coati grpo``."""

from coati.legacy.flags_rl import ROLLOUTS
from coati.recipes.command import run

if __name__ == "__main__":
    run("grpo", older=ROLLOUTS)
