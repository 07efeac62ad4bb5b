"""Direct preference optimization and its family.

``--help`` lists the flags, docs/preferences.md explains them.
"""

from coati.cli.preferences import parse_dpo
from coati.legacy.flags_preferences import PREFERENCES

if __name__ == "__main__":
    settings = parse_dpo(older=PREFERENCES)
    from coati.recipes import dpo, finish

    finish.guarded("train_dpo.py", dpo.main, settings)
