"""Supervised fine-tuning.

``--help`` lists the flags, docs/flags.md explains them.
"""

from coati.cli.arguments import parse_sft
from coati.legacy.flags import SHARED

if __name__ == "__main__":
    settings = parse_sft(older=SHARED)
    from coati.recipes import finish, sft

    finish.guarded("train_sft.py", sft.main, settings)
