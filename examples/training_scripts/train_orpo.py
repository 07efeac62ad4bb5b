"""ORPO: SFT and preferences in one stage.

``--help`` lists the flags, docs/preferences.md explains them.
"""

from coati.cli.preferences import parse_orpo
from coati.legacy.flags_preferences import PREFERENCES

if __name__ == "__main__":
    settings = parse_orpo(older=PREFERENCES)
    from coati.recipes import finish, orpo

    finish.guarded("train_orpo.py", orpo.main, settings)
