"""A LoRA adapter and its base as one model: the same as ``coati merge``."""

from coati.recipes.command import run

if __name__ == "__main__":
    run("merge")
