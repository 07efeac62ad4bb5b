"""ILQL, offline reinforcement learning from scored conversations: the same as ``coati ilql``."""

from coati.legacy.flags import SHARED
from coati.recipes.command import run

if __name__ == "__main__":
    run("ilql", older=SHARED)
