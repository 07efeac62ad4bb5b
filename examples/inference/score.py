"""Scores of a reward model: the same as ``coati score``."""

from coati.recipes.command import run

if __name__ == "__main__":
    run("score")
