"""``python -m coati`` is the command ``coati``."""

from coati.recipes.command import main

if __name__ == "__main__":
    main()
