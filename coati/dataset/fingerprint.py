"""Everything the result of a preparation depends on, as one dictionary; its hash names the staging
folder."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.plain_text import PlainText
from coati.dataset.clean.cleaning import Cleaning
from coati.utils.transformers_compat import named_special_tokens

LAYOUT = 4  # raised whenever the same rows and settings begin to give another result
Stamp = list[Any]  # path, size in bytes, time of the last change in ns


def describe(
    files: dict[str, Sequence[Path]], template: Conversation, cleaning: Cleaning, **settings: Any
) -> dict[str, Any]:
    """``files`` are named by their use. What does not change the result (processes, the budget of
    bad rows) is left out."""
    found = {
        "layout": LAYOUT,
        **settings,
        **{
            f"cleaning {name}": value
            for name, value in asdict(cleaning).items()
            if name != "benchmark_files"
        },
        "tokenizer": tokenizer_fingerprint(template.tokenizer),
        "template": template.to_config() | {"template_mode": template.template_mode},
        **row_options(template),
        **stamps(files),
    }
    return json.loads(json.dumps(found))  # as it will be read from disk again


def row_options(template: Conversation | PlainText) -> dict[str, Any]:
    """What is learned of a row, where it is not the default; and what the default is where the
    template's text leaves a choice."""
    if isinstance(template, PlainText):
        return {}
    choices = {"empty_thoughts": template.options.empty_thoughts}
    return template.options.named() | (choices if template.abilities.empty else {})


def stamps(files: dict[str, Sequence[Path]]) -> dict[str, list[Stamp]]:
    """The part of :func:`describe` that may change during the work."""
    return {use: [stamp(path) for path in paths] for use, paths in files.items()}


def stamp(path: Path) -> Stamp:
    """Equal while a file or folder is unchanged."""
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    states = [p.stat() for p in inside if p.exists()]
    newest = max((state.st_mtime_ns for state in states), default=0)
    return [os.path.abspath(path), sum(state.st_size for state in states), newest]


def digest(made_from: dict[str, Any]) -> str:
    """16 hex digits."""
    text = json.dumps(made_from, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two descriptions, in words."""
    names = [*here, *(name for name in there if name not in here)]
    found = [text for name in names for text in _difference(name, there.get(name), here.get(name))]
    return "; ".join(found[:5]) + ("; ..." if len(found) > 5 else "")


def _difference(name: str, there: Any, here: Any) -> Iterator[str]:
    if there == here:
        return
    if name == "tokenizer":
        yield "the tokenizer differs"
    elif name == "template" and isinstance(there, dict):
        keys = ", ".join(key for key in here if there.get(key) != here[key])
        yield f"the conversation template differs in {keys}"
    elif isinstance(here, list) and isinstance(there, list):
        yield f"{name}: {_changed_files(there, here)}"
    else:
        yield f"{name} was {there!r}, now {here!r}"


def _changed_files(there: list[Stamp], here: list[Stamp]) -> str:
    before, now = ({one[0]: one[1:] for one in stamps} for stamps in (there, here))
    changed = [path for path in now if path in before and now[path] != before[path]]
    parts = {
        "changed": changed,
        "new": now.keys() - before.keys(),
        "gone": before.keys() - now.keys(),
    }
    return (
        ", ".join(
            f"{what} {', '.join(sorted(paths)[:3])}" for what, paths in parts.items() if paths
        )
        or "reordered"
    )


def tokenizer_fingerprint(tokenizer) -> str:
    """16 hex digits that differ when vocabulary, special tokens or the splitting of words and
    numbers differ."""
    known = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": named_special_tokens(tokenizer),
        "probe": tokenizer.encode("Probe 12 345,6\n\tcafé 你好 can't", add_special_tokens=False),
    }
    return hashlib.sha256(json.dumps(known, ensure_ascii=False).encode("utf-8")).hexdigest()[:16]
