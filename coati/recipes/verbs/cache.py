"""List or remove what is kept of earlier runs."""

import shutil
import time
from pathlib import Path

from coati.cli.this_machine import CacheSettings, cache_parser, parse_cache
from coati.cli.verb import Verb
from coati.utils.user_cache import CONTENTS, cache_root

VERB = Verb("machine", cache_parser, parse_cache, "coati.recipes.verbs.cache:main")
DAY_S = 86400.0


def main(settings: CacheSettings) -> None:
    """Print each cache with its size, after removing what was asked for."""
    root = cache_root()
    print(root)
    for name, what in CONTENTS.items():
        entries = sorted((root / name).iterdir()) if (root / name).is_dir() else []
        found = [(entry, *_size_and_age(entry)) for entry in entries]
        chosen = [row for row in found if row[2] >= settings.older_than * DAY_S]
        size = sum(row[1] for row in chosen) / 2**20
        print(f"  {name:<12}{len(chosen):>5} entries {size:>10.1f} MiB  {what}")
        if settings.clear:
            for entry, _, _ in chosen:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            print(f"  {'':<12}{len(chosen):>5} removed")


def _size_and_age(entry: Path) -> tuple[int, float]:
    """Bytes, and seconds since anything in it was written."""
    files = [entry, *entry.rglob("*")] if entry.is_dir() else [entry]
    stats = [file.stat() for file in files]
    newest = max(stat.st_mtime for stat in stats)
    return sum(stat.st_size for stat in stats), time.time() - newest
