"""Measures of a model with intervals: the same as ``coati evaluate``."""

from coati.recipes.command import run

if __name__ == "__main__":
    run("evaluate")
