"""Chat with a model in the terminal: the same as ``coati chat``."""

from coati.legacy.flags import QUANTIZED
from coati.recipes.command import run

if __name__ == "__main__":
    run("chat", older=QUANTIZED)
