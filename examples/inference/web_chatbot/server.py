"""Serve a model: the same as ``coati serve``."""

from coati.legacy.flags import QUANTIZED
from coati.recipes.command import run

if __name__ == "__main__":
    run("serve", older=QUANTIZED)
