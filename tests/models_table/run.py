"""Runs cells of docs/models.md: those of one number of processes share a process group and an
import. Results are kept after each cell, so that a run that was stopped goes on where it was."""

import faulthandler
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.distributed.spawn import WorkerFailed
from tests.distributed.spawn import run as spawn
from tests.models_table import cells
from tests.models_table.cells import BY_TITLE
from tests.models_table.families import BY_TYPE, Family

YES = "yes"
NO = "no"
FAILED = "failed"
CELL_S = 60  # seconds after which a cell has hung
Key = tuple[str, str]  # a family's model_type, a column's title


def work(asked: list[Key], folder: str) -> None:
    """In a worker: the cells one after another, each result a line of this rank's file. An error
    that is no refusal ends the group, whose ranks may have lost step."""
    from coati.parallel.launch import launch

    launch(seed=0, timeout_s=CELL_S)
    rank = os.environ["RANK"]
    with open(Path(folder) / f"rank-{rank}", "a", encoding="utf-8") as file:
        for key in asked:
            family, column = BY_TYPE[key[0]], BY_TITLE[key[1]]
            start = time.monotonic()
            fatal = None
            watch = threading.Timer(CELL_S, _give_up, (key, file))
            watch.daemon = True
            watch.start()
            try:
                result = [YES, getattr(cells, column.trial)(family, column)]
            except ValueError as error:
                result = [NO, str(error)]
            except Exception as error:  # named in the table, and raised below
                fatal = error
                result = [FAILED, f"{type(error).__name__}: {error}"[:600]]
            watch.cancel()
            line = {"key": key, "result": result, "seconds": time.monotonic() - start}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if fatal is not None:
                raise fatal


def _give_up(key: Key, file: Any) -> None:
    """A cell that hangs ends its process, and with it the group."""
    result = [FAILED, f"no result after {CELL_S} seconds"]
    file.write(json.dumps({"key": key, "result": result, "seconds": CELL_S}) + "\n")
    file.flush()
    faulthandler.dump_traceback()  # where it hangs, with what the rank printed
    os._exit(1)


def run_cells(asked: Iterable[Key], folder: Path) -> Iterator[tuple[Key, tuple[str, Any]]]:
    """Each cell with (YES, ""), (NO, the library's words) or (FAILED, what happened), column by
    column; those of one process that they are compared with are run first."""
    wanted = list(dict.fromkeys(asked))
    needed = [
        (family, BY_TITLE[title].reference)
        for family, title in wanted
        if BY_TITLE[title].trial in ("train", "pack")
    ]
    found = _run_group(list(dict.fromkeys(needed)), 1, folder / "alone")
    for processes in (1, 2, 4):
        mine = [key for key in wanted if BY_TITLE[key[1]].processes == processes]
        for title in dict.fromkeys(title for _, title in mine):
            column = [key for key in mine if key[1] == title]
            place = folder / "".join(letter for letter in title if letter.isalnum())
            found |= _run_group(column, processes, place)
            yield from ((key, judge(key, found)) for key in column)


def _run_group(asked: list[Key], processes: int, folder: Path) -> dict[Key, tuple[str, Any]]:
    found: dict[Key, tuple[str, Any]] = {}
    while left := [key for key in asked if key not in found]:
        place = folder / f"{processes}-{len(found)}"
        place.mkdir(parents=True, exist_ok=True)
        said = ""
        try:
            spawn(
                processes,
                "tests.models_table.run:work",
                left,
                str(place),
                timeout=60 + CELL_S * len(left),
            )
        except WorkerFailed as error:
            said = str(error)
        lines = [_lines(place / f"rank-{rank}") for rank in range(processes)]
        for key in left:
            of_ranks = [line[key] for line in lines if key in line]
            if len(of_ranks) == processes or of_ranks:
                found[key] = _agreed(of_ranks, processes)
        if not any(key in found for key in left):
            found[left[0]] = (FAILED, f"the processes ended: {said[-600:]}")
    return found


def _lines(path: Path) -> dict[Key, list[Any]]:
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {tuple(line["key"]): line["result"] for line in lines}


def _agreed(results: list[list[Any]], processes: int) -> tuple[str, Any]:
    """One result of those of all ranks."""
    failed = [text for kind, text in results if kind == FAILED]
    if failed and (alone := [text for kind, text in results if kind == NO]):
        return FAILED, f"on one rank only: {alone[0]}"
    if failed:  # of several ranks the one that did not only wait for another
        return FAILED, min(failed, key=lambda text: ("no result" in text) + ("Dist" in text))
    if len(results) < processes or len({kind for kind, _ in results}) > 1:
        return FAILED, f"only some of {processes} processes got there: {results}"
    if results[0][0] == NO:
        return NO, results[0][1]
    return YES, [numbers for _, numbers in results]


def judge(key: Key, found: dict[Key, tuple[str, Any]]) -> tuple[str, Any]:
    """The result of a cell, FAILED where its losses or norms are not those of one process."""
    kind, value = found[key]
    column = BY_TITLE[key[1]]
    if kind != YES or column.trial not in ("train", "pack"):
        return kind, "" if kind == YES else value
    base_kind, base = found[(key[0], column.reference)]
    if base_kind != YES:
        return FAILED, f"one process: {base}"
    for steps in value:
        try:
            torch.testing.assert_close(steps, base[0], rtol=column.tolerance, atol=0.0)
        except AssertionError:
            return FAILED, f"loss and norm {steps} instead of {base[0]}"
    return YES, ""


def possible(family: Family) -> bool:
    """Whether the family can be tried here at all."""
    from tests.models_table.families import known

    return family.config is not None and known(family)
