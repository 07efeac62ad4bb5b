"""Several responses to each prompt, scored and selected: the same as ``coati sample``."""

from coati.recipes.command import run

if __name__ == "__main__":
    run("sample")
