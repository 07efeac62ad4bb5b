"""Supervised fine-tuning: the same as ``coati sft``."""

from coati.legacy.flags import SHARED
from coati.recipes.command import run

if __name__ == "__main__":
    run("sft", older=SHARED)
