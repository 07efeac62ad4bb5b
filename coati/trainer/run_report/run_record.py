"""The report of a run that is going on: its events, and report.html beside metrics.jsonl.

Only rank 0 with a --save_dir has a :class:`RunRecord` that writes. Nothing that goes wrong here
ends a run: it is said once, and training goes on.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coati.trainer.run_report.run_files import EVENTS, JsonLines, RunFiles, now
from coati.utils.json_io import save_text
from coati.utils.liveness import note
from coati.utils.logging import get_logger, take_warnings

logger = get_logger(__name__)

PAGE = "report.html"
QUICK_S = 0.5  # a page that takes less is always written


class RunRecord:
    """Events of a run in ``<folder>/events.jsonl``, and its page.

    Args:
        folder: the run's --save_dir; None where nothing is to be written.
        method: the trainer's name.
        settings: shown where there is no arguments.json.
    """

    def __init__(self, folder: str | None, method: str, settings: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.method = method
        self.settings = settings
        self.seconds: dict[str, float] = {}  # of each phase
        self._began = time.perf_counter()
        self._written = 0.0  # when the page was
        self._page_seconds = 0.0
        self._files: RunFiles | None = None

    def start(self, step: int, resumed: bool, **known: Any) -> None:
        """The run begins at ``step``, or goes on from there. ``known``: stands in the event."""
        self._began = time.perf_counter()
        if self.folder is not None:
            self._guarded(lambda: self._start(self.folder, step, resumed, known))

    def _start(self, folder: Path, step: int, resumed: bool, known: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Warnings from after the checkpoint belong to steps that are taken again.
        kept = [
            event
            for event in JsonLines(folder / EVENTS).read_on()
            if resumed and (event.get("event") != "warning" or (event.get("step") or 0) <= step)
        ]
        lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in kept]
        save_text("".join(lines), folder / EVENTS)
        self._files = RunFiles(folder, self.settings)
        self._add("resumed" if resumed else "started", step, method=self.method, **known)
        self._update(step)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time inside as ``phase``."""
        began = time.perf_counter()
        note(phase=phase)
        try:
            yield
        finally:
            note(phase="training")
            self.add_seconds(phase, time.perf_counter() - began)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Count ``seconds`` that the caller has measured."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def note(self, text: str, step: int, kind: str = "warning") -> None:
        """Something to be read beside the curves."""
        self._guarded(lambda: self._add(kind, step, text=text))

    def update(self, step: int) -> None:
        """Write the page as things stand at ``step``."""
        # Pages grow with the run: those of long ones may take a hundredth of its time.
        since = time.perf_counter() - self._written
        worth = self._page_seconds < QUICK_S or since > 100 * self._page_seconds
        self._guarded(lambda: self._update(step) if worth else self._collect(step))

    def end(self, how: str, step: int, text: str = "") -> None:
        """``how``: "finished", "stopped" or "failed"; ``text``: why."""
        self._guarded(lambda: self._end(how, step, text))

    def _end(self, how: str, step: int, text: str) -> None:
        self._add(how, step, **({"text": text} if text else {}))
        self._update(step)

    def _add(self, event: str, step: int, **known: Any) -> None:
        if self._files is None:
            return
        line = {"time": now(), "event": event, "step": step, **known}
        with open(self._files.folder / EVENTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _update(self, step: int) -> None:
        if self._files is None:
            return
        from coati.trainer.run_report.run_page import run_page

        began = time.perf_counter()
        with self.timed("this report"):
            self._collect(step)
            elapsed = time.perf_counter() - self._began
            seconds = {name: round(value, 3) for name, value in self.seconds.items()}
            self._add("times", step, seconds=seconds, elapsed=round(elapsed, 3))
            self._files.read_on()
            save_text(run_page(self._files, live=True), self._files.folder / PAGE)
        self._written = time.perf_counter()
        self._page_seconds = self._written - began

    def _collect(self, step: int) -> None:
        for text in take_warnings():
            self._add("warning", step, text=text)

    def _guarded(self, write: Callable[[], None]) -> None:
        if self.folder is None:
            return
        try:
            write()
        except Exception as error:  # whatever it is, the run is worth more than its report
            logger.warning_once(
                f"{self.folder / PAGE} could not be written ({type(error).__name__}: {error}); "
                f"training goes on, and `coati report {self.folder}` makes it from the files"
            )
