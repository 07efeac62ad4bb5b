"""Which files an input stands for: files, folders, directories of ``save_to_disk``, names of data
sets on the hub."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.dataset_info import NAME as DATASET_INFO
from coati.dataset.rows.dataset_info import entries, is_list_of_inputs
from coati.dataset.rows.formats import SourceRow, read_row
from coati.dataset.rows.input_names import InputName, Source, parse_input
from coati.dataset.rows.joined_rows import parts_of, whole_rows
from coati.dataset.rows.readers import KINDS, kind_of
from coati.dataset.rows.readers import decode as decode
from coati.dataset.rows.readers import read_rows as read_rows
from coati.dataset.rows.row_errors import RowError
from coati.utils.json_io import load_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)

KNOWN = ", ".join(kind for kind in KINDS if kind != ".arrow") + " (all but .parquet also .gz, .zst)"
# How files and folders name the part of a data set they hold.
SPLITS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}
_SPLIT = re.compile(rf"({'|'.join(SPLITS)})(?![a-z])", re.IGNORECASE)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def find_files(paths: Sequence[str | os.PathLike], split: str | None = None) -> list[Path]:
    """The data files behind ``paths``: files as given, folders searched in all depths, in sorted
    order.

    A directory written by ``save_to_disk``, and the name of a data set on the hub (``owner/name``
    or ``owner/name:subset``), give the files of one split: ``split``, else the one called train,
    else the only one. ``PATH@SPLIT`` names the split of one input, ``PATH#N`` its first N rows. A
    ``dataset_info.json`` of LLaMA-Factory stands for the data sets it lists.

    Raises ValueError for an input that is not there, holds no data, or is of another kind.
    """
    return [source.path for source in find_sources(paths, split)]


def find_sources(
    paths: Sequence[str | os.PathLike], split: str | None = None, layout: Layout | None = None
) -> list[Source]:
    """:func:`find_files`, each with what its columns are (``layout`` where the input does not say)
    and how many of its rows are read."""
    sources: list[Source] = []
    for path in paths:
        for found in _sources_of(parse_input(os.fspath(path)), split):
            number = len(sources)
            sources += [replace(one, number=number) for one in found]
    if not sources:
        raise ValueError("no input: name at least one file or folder of data")
    if not layout:
        return sources
    return [one if one.layout else replace(one, layout=layout) for one in sources]


def _sources_of(name: InputName, split: str | None) -> list[list[Source]]:
    """The files of one input, those of each data set in it by themselves."""
    path = Path(name.base)
    info = path / DATASET_INFO if path.is_dir() else path
    if is_list_of_inputs(info):
        return [
            [
                replace(source, layout=entry.layout, limit=name.rows or entry.rows)
                for found in _sources_of(parse_input(entry.place), name.split or split)
                for source in found
            ]
            for entry in entries(info, name.subset)
        ]
    if path.exists() and name.subset is None:
        files = _files_of(path, name.split or split)
    elif path.exists():
        raise ValueError(
            f"{path}: is no data set on the hub and no {DATASET_INFO}, so it has no {name.subset}"
        )
    else:
        files = _files_of_hub(path, name.subset, name.split or split)
    return [[Source(file, limit=name.rows) for file in files]]


def source_rows(
    paths: Sequence[str | os.PathLike], type: str, layout: Layout | None = None
) -> Iterator[tuple[str, SourceRow | RowError]]:
    """``(file:line, row)`` of each row of the files behind ``paths``, as data of ``type``; what is
    wrong with it in the place of a row that cannot be used. ``layout``: as of
    :func:`find_sources`."""
    for source, line, raw in raw_rows(find_sources(paths, layout=layout)):
        place = f"{source.path}:{line}"
        try:
            found = read_row(type, decode(raw), layout=source.layout)
        except RowError as error:
            yield place, error
            continue
        for one in (found, *found.branches):
            yield place, one


def read_as(source: Source) -> dict[str, Any]:
    """What beside the file decides its rows, to know them by; empty for most."""
    joins = parts_of(source.path, source.layout)
    return source.described() | ({} if joins is None else {"joins": sorted(joins.needs)})


def raw_rows(sources: Sequence[Source]) -> Iterator[tuple[Source, int, Any]]:
    """``(source, line, row)`` of each row that the inputs want, undecoded."""
    left: dict[int, int] = {}
    for source in sources:
        rows = whole_rows(source.path, layout=source.layout)
        if source.limit is not None:
            rows = islice(rows, left.setdefault(source.number, source.limit))
        for line, raw in rows:
            if source.limit is not None:
                left[source.number] -= 1
            yield source, line, raw
    warn_of_fewer(sources, left)


def warn_of_fewer(sources: Sequence[Source], left: dict[int, int]) -> None:
    """Say where an input holds fewer rows than are wanted of it; ``left``: how many fewer, by its
    number."""
    wanted = {source.number: source for source in sources if source.limit is not None}
    for number, source in wanted.items():
        if left.get(number):
            logger.warning_once(
                f"{source.path}: {source.limit} rows are wanted, and only "
                f"{source.limit - left[number]} are there"
            )


def _files_of(path: Path, split: str | None) -> list[Path]:
    if path.is_file():
        if kind_of(path) is None:
            raise ValueError(f"{path}: unknown kind of data file; expected one of {KNOWN}")
        return [path]
    if (path / "preparation.json").is_file():
        raise ValueError(f"{path}: is prepared already; pass it to a trainer with --dataset")
    found = []
    ignored = []
    _search(path, split, found, ignored)
    # A text file beside data files is documentation, a README for instance.
    if any(kind_of(file) != ".txt" for file in found):
        ignored += [file for file in found if kind_of(file) == ".txt"]
        found = [file for file in found if kind_of(file) != ".txt"]
    if not found:
        held = ", ".join(file.name for file in ignored[:5]) or "nothing"
        raise ValueError(f"{path}: the folder holds no data file (expected {KNOWN}; found {held})")
    if ignored:
        names = ", ".join(str(file.relative_to(path)) for file in ignored[:5])
        logger.warning_once(
            f"{path}: ignored {names}{' ...' if len(ignored) > 5 else ''} (not {KNOWN})"
        )
    return _of_split(path, found, split)


def _search(folder: Path, split: str | None, found: list[Path], ignored: list[Path]) -> None:
    """Sort the files below ``folder`` into those with data and others."""
    if (folder / "dataset_dict.json").is_file():
        names = _saved_list(folder / "dataset_dict.json", "splits")
        found += _saved_files(folder / choose_split(names, split, str(folder)))
    elif (folder / "state.json").is_file():
        found += _saved_files(folder)
    else:
        for child in sorted(one for one in folder.iterdir() if not one.name.startswith(".")):
            if child.is_dir():
                _search(child, split, found, ignored)
            else:
                (ignored if kind_of(child) in (None, ".arrow") else found).append(child)


def _saved_files(folder: Path) -> list[Path]:
    """The arrow files of one ``Dataset.save_to_disk``, in its order."""
    return [folder / file["filename"] for file in _saved_list(folder / "state.json", "_data_files")]


def _saved_list(file: Path, name: str) -> list:
    found = load_json(file)
    if not isinstance(found, dict) or not isinstance(found.get(name), list):
        raise ValueError(
            f"{file}: lacks the list {name} that save_to_disk writes; save the data set again"
        )
    return found[name]


def choose_split(names: Sequence[str], split: str | None, where: str) -> str:
    """The split to read: ``split``, else "train", else the only one; a choice is logged."""
    chosen = split or ("train" if "train" in names else names[0])
    if chosen not in names or (split is None and chosen != "train" and len(names) > 1):
        raise ValueError(
            f"{where}: has the splits {', '.join(names)}; name one of them with --split"
        )
    if len(names) > 1:
        logger.warning_once(
            f"{where}: the split {chosen} is read (of {', '.join(names)}); another with --split"
        )
    return chosen


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Of files named after splits (train-00000.parquet, test/a.jsonl) those of ``split``."""
    named = {
        file: _split_of(file.relative_to(folder)) for file in files if kind_of(file) != ".arrow"
    }
    present = sorted({name for name in named.values() if name})
    if split is None:
        if len(present) > 1:
            logger.warning_once(
                f"{folder}: files of {' and '.join(present)} are all read; choose with --split "
                f"{present[0]}"
            )
        return files
    wanted = SPLITS.get(split, split)
    chosen = [file for file in files if named.get(file, wanted) == wanted]
    if not chosen:
        raise ValueError(
            f"{folder}: no file is named after the split {split}; found "
            f"{', '.join(present) or 'none'}"
        )
    return chosen


def _split_of(file: Path) -> str | None:
    marks = (_SPLIT.match(part) for part in reversed(file.parts))
    return next((SPLITS[mark[1].lower()] for mark in marks if mark), None)


def may_be_on_hub(name: str) -> bool:
    """Whether ``name``, ``owner/name`` without what may follow it, is that of a data set on the
    hub: nothing of that name is here. Of data/sft.jsn, where there is a folder data, a file was
    meant; offline, asking the hub takes half a minute."""
    path = Path(name)
    here = path.exists() or Path(name.partition("/")[0]).exists()
    return _HUB_NAME.fullmatch(name) is not None and kind_of(path) is None and not here


def _files_of_hub(path: Path, subset: str | None, split: str | None) -> list[Path]:
    name = path.as_posix()
    absent = f"{name}: there is no such file or folder; expected data files ({KNOWN})"
    if not may_be_on_hub(name):
        raise ValueError(absent)
    logger.warning_once(
        f"{name}: no such file or folder; looking for a data set of this name on the hub"
    )
    import datasets

    try:
        loaded = _load_from_hub(datasets, name, subset)
    except Exception as error:  # the library raises some twenty types, most from the network
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{absent}, or the name of a data set that can be loaded here ({said})"
        ) from error
    part = loaded[choose_split(list(loaded), split, name)]
    return [Path(file["filename"]) for file in part.cache_files]


def _load_from_hub(datasets, name: str, subset: str | None):
    """All splits of a data set; ``subset`` is one of its configurations, or a folder in it
    (harmless-base)."""
    try:
        return datasets.load_dataset(name, subset)
    except ValueError:
        if subset is None:
            raise
        return datasets.load_dataset(name, data_dir=subset)
