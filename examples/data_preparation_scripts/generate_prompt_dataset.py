"""A random sample of the prompts of a data set: the same as ``coati sample-prompts``."""

from coati.recipes.command import run

if __name__ == "__main__":
    run("sample-prompts")
