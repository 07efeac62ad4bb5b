"""Quantize a model and measure it: the same as ``coati quantize``."""

from coati.recipes.command import run

if __name__ == "__main__":
    run("quantize")
