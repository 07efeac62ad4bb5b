"""A model directory for others: the same as ``coati export``."""

from coati.recipes.command import run

if __name__ == "__main__":
    run("export")
