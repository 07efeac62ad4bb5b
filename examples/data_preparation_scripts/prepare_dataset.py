"""Raw rows to tokenized shards: the same as ``coati prepare``."""

from coati.recipes.command import run

if __name__ == "__main__":
    run("prepare")
