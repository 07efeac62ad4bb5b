"""Reward model from preference pairs: the same as ``coati rm``."""

from coati.legacy.flags_preferences import PREFERENCES
from coati.recipes.command import run

if __name__ == "__main__":
    run("rm", older=PREFERENCES)
