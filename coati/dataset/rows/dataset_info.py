"""LLaMA-Factory's ``dataset_info.json``: a list of data sets with the names of their columns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.dataset.rows.column_names import Layout
from coati.utils.json_io import load_json

NAME = "dataset_info.json"
_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "label"}
_MEDIA = ("images", "videos", "audios")
_KEPT = ("messages", "history", "system", "tools", "chosen", "rejected", *_MEDIA)


@dataclass(frozen=True)
class Entry:
    """One data set: where it is (a path, or a name as the hub has it), and what its columns are."""

    place: str
    layout: Layout
    rows: int | None = None


def is_list_of_inputs(path: Path) -> bool:
    """Whether ``path`` is a file of entries (datasets writes another one of this name)."""
    if path.name != NAME or not path.is_file():
        return False
    try:
        found = load_json(path)
    except ValueError:
        return False
    return (
        isinstance(found, dict)
        and bool(found)
        and all(
            isinstance(one, dict) and any(key in one for key in _PLACES) for one in found.values()
        )
    )


def entries(path: Path, name: str | None) -> list[Entry]:
    """All entries of the file, or the one called ``name``. Raises ValueError."""
    found = load_json(path)
    if name is not None and name not in found:
        raise ValueError(f"{path}: has no data set {name}; found {', '.join(list(found)[:20])}")
    chosen = found if name is None else {name: found[name]}
    return [_entry(one, f"{path}: {key}", path.parent) for key, one in chosen.items()]


def _entry(found: dict[str, Any], where: str, folder: Path) -> Entry:
    if url := found.get("hf_hub_url"):
        subset = found.get("subset") or found.get("folder")
        split = found.get("split")
        place = f"{url}{f':{subset}' if subset else ''}{f'@{split}' if split else ''}"
    elif name := found.get("file_name"):
        place = str(folder / name)
        if not Path(place).exists():
            raise ValueError(f"{where}: there is no {place}")
    else:
        kinds = ", ".join(key for key in _PLACES if key in found)
        raise ValueError(
            f"{where}: only file_name and hf_hub_url can be read, found {kinds}; fetch the data "
            "and name its file"
        )
    rows = found.get("num_samples")
    if rows is not None and not (isinstance(rows, int) and rows > 0):
        raise ValueError(f"{where}: num_samples is {rows!r}, expected a positive number")
    return Entry(place, Layout(_columns(found, where), found.get("tags") or {}), rows)


def _columns(found: dict[str, Any], where: str) -> dict[str, str]:
    given = found.get("columns") or {}
    names = _ALPACA | {name: name for name in _KEPT}
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"{where}: columns has {', '.join(unknown)}; known: {', '.join(names)}")
    if not given:
        return {}
    if "messages" not in given and ({"response", "chosen"} & given.keys()):
        given = {"prompt": "instruction", "query": "input"} | given
    return {names[name]: column for name, column in given.items() if column}
