"""Win rate of a trained model: the same as ``coati compare``."""

from coati.recipes.command import run

if __name__ == "__main__":
    run("compare")
