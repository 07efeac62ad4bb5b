"""DPO and its family: the same as ``coati dpo``."""

from coati.legacy.flags_preferences import PREFERENCES
from coati.recipes.command import run

if __name__ == "__main__":
    run("dpo", older=PREFERENCES)
