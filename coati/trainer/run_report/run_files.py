"""What a run left in its directory, read on as the files grow."""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from coati.utils.json_io import load_json

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
EVENTS = "events.jsonl"
ARGUMENTS = "arguments.json"
ENVIRONMENT = "environment.json"
MOST_SAMPLES = 2000  # lines of samples.jsonl to remember besides the first ones


class JsonLines:
    """A file of JSON objects, one a line, that may still be written to.

    ``broken``: numbers of whole lines that are no JSON objects. ``cut_off``: the last line has no
    end, as a killed run leaves it, or one that is being written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        self.broken: list[int] = []
        self.cut_off = False
        self._offset = 0

    def read_on(self) -> Iterator[dict[str, Any]]:
        """The objects since this was last called; none of a file that is not there."""
        if not self.path.is_file():
            return
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            for line in file:
                self.cut_off = not line.endswith(b"\n")
                if self.cut_off:
                    return
                self._offset += len(line)
                self.lines += 1
                row = _object(line)
                if row is not None:
                    yield row
                elif line.strip():
                    self.broken.append(self.lines)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


@dataclass
class Series:
    """One metric over the run: ``steps`` (N,) and ``values`` (N,), in the order of the file."""

    steps: array = field(default_factory=lambda: array("d"))
    values: array = field(default_factory=lambda: array("d"))

    def add(self, step: float, value: float) -> None:
        """One more point."""
        self.steps.append(step)
        self.values.append(value)

    def finite(self) -> list[tuple[float, float]]:
        """``(step, value)`` of the values that are numbers."""
        pairs = zip(self.steps, self.values, strict=True)
        return [(step, value) for step, value in pairs if math.isfinite(value)]

    @property
    def last(self) -> float:
        """The last value, whatever it is."""
        return self.values[-1]


class RunFiles:
    """The files of the run in ``folder``; :meth:`read_on` brings them up to date.

    ``settings``: stands for an arguments.json that is not there.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.metrics: dict[str, Series] = {}
        self.samples: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.arguments: dict[str, Any] = dict(settings or {})
        self.environment: dict[str, Any] = {}
        self.last_step = 0.0
        self._files = {name: JsonLines(folder / name) for name in (METRICS, SAMPLES, EVENTS)}

    def read_on(self) -> None:
        """Take in what has been written since the last call.

        Raises ValueError with file, line and column for a JSON file that is none.
        """
        for row in self._files[METRICS].read_on():
            step = row.pop("step", None)
            if not isinstance(step, int | float):
                continue
            self.last_step = max(self.last_step, step)
            for name, value in row.items():
                if isinstance(value, int | float):
                    self.metrics.setdefault(name, Series()).add(step, value)
        for sample in self._files[SAMPLES].read_on():
            self.samples.append(sample)
            if len(self.samples) > 2 * MOST_SAMPLES:
                self._drop_samples()
        if len(self.samples) > MOST_SAMPLES + MOST_SAMPLES // 2:
            self._drop_samples()
        self.events += self._files[EVENTS].read_on()
        for name in ("arguments", "environment"):
            path = self.folder / f"{name}.json"
            if path.is_file():
                setattr(self, name, _mapping(path))

    def _drop_samples(self) -> None:
        """Keep the first and the last."""
        del self.samples[MOST_SAMPLES // 2 : -MOST_SAMPLES]

    def points(self) -> int:
        """How many values of metrics there are."""
        return sum(len(series.values) for series in self.metrics.values())

    def holds_no_metric(self) -> bool:
        """Whether metrics.jsonl has lines, and not one that can be read as metrics of a step."""
        return bool(self._files[METRICS].lines) and not self.points()

    def remarks(self) -> list[str]:
        """What about the files themselves is odd, one sentence each."""
        found = []
        for name, file in self._files.items():
            if file.broken:
                lines = ", ".join(map(str, file.broken[:3]))
                found.append(
                    f"{name}: {len(file.broken)} of {file.lines} lines are no JSON objects and "
                    f"were left out (line {lines}{', ...' if len(file.broken) > 3 else ''})"
                )
            if file.cut_off:
                found.append(
                    f"{name}: the last line is cut off and was left out, as when a run is killed"
                )
        return found

    def written_at(self) -> str | None:
        """When metrics.jsonl was last written to, as :func:`now` writes it."""
        path = self.folder / METRICS
        if not path.is_file():
            return None
        return _written(datetime.fromtimestamp(path.stat().st_mtime, timezone.utc))


def _mapping(path: Path) -> dict[str, Any]:
    found = load_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object {{...}}, found another kind of value")
    return found


def open_run(folder: Path) -> RunFiles:
    """The run in ``folder``. Raises ValueError for a directory that holds none, with what was found
    in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such directory; expected the --save_dir of a run")
    if not (folder / METRICS).is_file():
        held = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
        shown = ", ".join(held[:8]) + (", ..." if len(held) > 8 else "")
        raise ValueError(
            f"{folder}: expected the --save_dir of a training run, which holds {METRICS}; found "
            f"{shown or 'an empty directory'}{_elsewhere(folder)}"
        )
    run = RunFiles(folder)
    run.read_on()
    return run


def _elsewhere(folder: Path) -> str:
    """Where a run is near, for who named its model or the folder of several."""
    above = next((one for one in folder.absolute().parents if (one / METRICS).is_file()), None)
    below = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    near = ([above] if above else []) + below[:4]
    return f". Runs are in {', '.join(map(str, near))}" if near else ""


def now() -> str:
    """The time, as events and pages write it: ISO 8601 in UTC, to the second."""
    return _written(datetime.now(timezone.utc))


def _written(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")
