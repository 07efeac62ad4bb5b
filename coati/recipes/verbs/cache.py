"""List or remove what is kept of earlier runs."""

import time

from coati.cli.this_machine import CacheSettings, cache_parser, parse_cache
from coati.cli.verb import Verb
from coati.utils.json_io import load_json
from coati.utils.user_cache import CONTENTS, LIMIT_VARIABLE, Entry, cache_root, entries, limit_gib

VERB = Verb("machine", cache_parser, parse_cache, "coati.recipes.verbs.cache:main")
DAY_S = 86400.0


def main(settings: CacheSettings) -> None:
    """Print every entry with its size and when it was used last, after removing what was asked
    for."""
    limit = limit_gib()
    bound = "no limit" if limit == float("inf") else f"{limit:g} GiB at most"
    print(f"{cache_root()}: {bound} ({LIMIT_VARIABLE})")
    now = time.time()
    chosen = [entry for entry in entries() if now - entry.used >= settings.older_than * DAY_S]
    for kind, what in CONTENTS.items():
        found = [entry for entry in chosen if entry.kind == kind]
        size = sum(entry.size for entry in found)
        print(f"\n{kind}: {what}; {len(found)} entries, {_size(size)}")
        kept = 0
        for entry in found:
            in_use = entry.in_use
            removed = settings.clear and entry.remove()
            kept += settings.clear and not removed
            print(_line(entry, now, "removed" if removed else "in use" if in_use else ""))
        if kept:
            print(f"  {kept} of them are in use by a running process and stay")


def _line(entry: Entry, now: float, state: str) -> str:
    days = (now - entry.used) / DAY_S
    hours = days * 24
    age = (
        f"{days:.0f} days"
        if days >= 2
        else f"{hours:.0f} h"
        if hours >= 1
        else f"{hours * 60:.0f} min"
    )
    said = f"{_size(entry.size):>12}{age:>12} ago  {state:<9}{_source(entry)}"
    return f"  {entry.path.name:<32}{said}".rstrip()


def _source(entry: Entry) -> str:
    """The files that prepared rows come from, "" of other things and of remnants."""
    try:
        files = load_json(entry.path / "preparation.json")["report"]["files"]
        return ", ".join(file["file"] for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
