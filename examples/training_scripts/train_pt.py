"""Continued pre-training on plain texts: the same as ``coati pretrain``."""

from coati.legacy.flags import SHARED
from coati.recipes.command import run

if __name__ == "__main__":
    run("pretrain", older=SHARED)
