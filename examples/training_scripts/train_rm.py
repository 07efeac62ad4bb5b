"""Reward model from preference pairs.

``--help`` lists the flags, docs/preferences.md explains them.
"""

from coati.cli.preferences import parse_rm
from coati.legacy.flags_preferences import PREFERENCES

if __name__ == "__main__":
    settings = parse_rm(older=PREFERENCES)
    from coati.recipes import finish, rm

    finish.guarded("train_rm.py", rm.main, settings)
