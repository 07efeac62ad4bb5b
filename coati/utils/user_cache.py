"""Where the library keeps what it can make again: ``$XDG_CACHE_HOME/coati``, by default
``~/.cache/coati``."""

import os
from pathlib import Path

# Subfolder -> what is in it.
CONTENTS = {
    "rows": "rows that were given in Python, as files",
    "prepared": "raw files given to training, tokenized",
    "reference": "log-probs of reference models, for rows whose folder cannot be written",
}


def cache_root() -> Path:
    """The folder of all caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coati"
