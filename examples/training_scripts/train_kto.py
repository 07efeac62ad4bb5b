"""KTO, preferences from labeled single responses: the same as ``coati kto``."""

from coati.legacy.flags_preferences import PREFERENCES
from coati.recipes.command import run

if __name__ == "__main__":
    run("kto", older=PREFERENCES)
