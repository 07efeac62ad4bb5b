"""Whether every rank sees the same directory: one writes, all others must read it, and the other
way round."""

import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from coati.parallel.agreement import Exchange, group_exchange
from coati.parallel.save_causes import existing_folder

PATIENCE_S = 8.0  # of a network file system whose clients keep for a while what they knew
RETRY_S = 0.1
PROBE = ".coati-probe-"
REMEDY = (
    "name a directory of a file system that all hosts share (NFS, Lustre, ...), by a path that is "
    "the same on each"
)


def check_shared(
    flag: str,
    folder: str | os.PathLike,
    why: str,
    create: bool = True,
    met: Exchange | None = None,
) -> None:
    """Refuse a ``folder`` that not all ranks have in common; ``why`` it must be.

    It is made where it is not there, unless ``create`` is false: then the nearest folder above it
    is tried. Nothing of the trial is left. Every rank must call it.

    Raises RanksDiffer on every rank, naming the hosts, and where a rank cannot write there.
    """
    met = met or group_exchange()
    if met is None:
        return
    place = Path(folder).absolute()
    if met.rank == 0:
        _first(met, place if create else existing_folder(place), f"{flag} {folder}", why)
    else:
        _other(met, place, create)


def _first(met: Exchange, place: Path, named: str, why: str) -> None:
    """Rank 0: writes, and looks for what the others write."""
    made = _missing(place)
    probe = place / f"{PROBE}{secrets.token_hex(8)}"
    try:
        failure = _attempt(lambda: _begin(probe))
        met.say("probe", None if failure else [probe.name, len(place.parts)])
        mine = {"host": met.host, "error": failure}

        def judge(answers: list[dict[str, Any]]) -> str:
            return _judge(answers, probe, named, why)

        met.answers("folder", mine, judge)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        for folder in made:  # the run makes them again, when it is sure to write there
            _remove_empty(folder)


def _begin(probe: Path) -> None:
    probe.mkdir(parents=True)
    (probe / "0").write_text(probe.name, encoding="utf-8")


def _other(met: Exchange, place: Path, create: bool) -> None:
    """Every other rank: looks for what rank 0 wrote, and writes beside it."""
    answer: dict[str, Any] = {"host": met.host}
    told = met.hear("probe")
    if told is not None:
        name, depth = told
        # Where it is not made, rank 0 has looked for the nearest folder that is there.
        place = place if create else Path(*place.parts[:depth])
        probe = place / name
        if not _appears(probe / "0", name):
            answer["unseen"] = True
        else:
            mine = probe / str(met.rank)
            answer["error"] = _attempt(lambda: mine.write_text(name, encoding="utf-8"))
    met.answers("folder", answer, lambda _: "")


def _judge(answers: list[dict[str, Any]], probe: Path, named: str, why: str) -> str:
    first = answers[0]["host"]
    if answers[0]["error"]:
        return f"{named}: {first} (rank 0) cannot write there ({answers[0]['error']}); {why}"
    for who, one in enumerate(answers):
        if one.get("error"):
            return f"{named}: {one['host']} (rank {who}) cannot write there ({one['error']}); {why}"
    unseen = {
        one["host"]: who
        for who, one in reversed(list(enumerate(answers)))
        if who and (one.get("unseen") or not _appears(probe / str(who), probe.name))
    }
    if not unseen:
        return ""
    others = " and ".join(f"{host} (rank {who})" for host, who in reversed(unseen.items()))
    see = "does" if len(unseen) == 1 else "do"
    return (
        f"{named} is not the same directory on all hosts: {others} {see} not see what {first} "
        f"(rank 0) writes there; {why}, so {REMEDY}"
    )


def _appears(file: Path, text: str) -> bool:
    """Whether ``file`` holds ``text``, now or within PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            if file.read_text(encoding="utf-8") == text:
                return True
        except OSError:
            _refresh(file)
        if time.monotonic() > end:
            return False
        time.sleep(RETRY_S)


def _refresh(file: Path) -> None:
    """Have a network file system ask its server again: opening a folder does, a mere look at a
    name need not."""
    for folder in reversed(file.parents):
        try:
            os.listdir(folder)
        except OSError:
            return


def _attempt(work: Any) -> str | None:
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _missing(folder: Path) -> list[Path]:
    """``folder`` and those above it that are not there, the deepest first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
