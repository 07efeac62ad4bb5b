"""ORPO, SFT and preferences in one stage: the same as ``coati orpo``."""

from coati.legacy.flags_preferences import PREFERENCES
from coati.recipes.command import run

if __name__ == "__main__":
    run("orpo", older=PREFERENCES)
