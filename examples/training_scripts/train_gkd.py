"""Distillation from a teacher: the same as ``coati gkd``."""

from coati.legacy.flags import SHARED
from coati.recipes.command import run

if __name__ == "__main__":
    run("gkd", older=SHARED)
