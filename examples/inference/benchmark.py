"""Load time, speed and memory of a model: the same as ``coati measure``."""

from coati.legacy.flags import QUANTIZED
from coati.recipes.command import run

if __name__ == "__main__":
    run("measure", older=QUANTIZED)
