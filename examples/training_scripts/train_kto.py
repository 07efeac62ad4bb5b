"""KTO: preferences from labeled single responses.

``--help`` lists the flags, docs/preferences.md explains them.
"""

from coati.cli.preferences import parse_kto
from coati.legacy.flags_preferences import PREFERENCES

if __name__ == "__main__":
    settings = parse_kto(older=PREFERENCES)
    from coati.recipes import finish, kto

    finish.guarded("train_kto.py", kto.main, settings)
