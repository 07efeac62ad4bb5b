"""The systems of a benchmark, each in a process of its own, taking their steps in turn.

A worker prints ``ready``, then takes a step for each line on its standard input and prints it as a
line of JSON; at the end it prints its peak memory. A peer that ends early, or that is silent for
longer than the limit, is stopped and named with its reason, and the others go on; the library
itself must not fail.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

LIMIT = 300.0  # seconds without a line after which a worker hangs
SHOWN = 20  # last lines of a failed worker's standard error


class WorkerFailed(RuntimeError):
    """A worker ended or hung; the message is the reason."""


class Worker:
    """A training process that takes one step per line it is sent. ``cwd``: the checkout it runs.
    ``site``: a folder of packages of its own. ``limit``: seconds that a step, or the start, may
    take."""

    def __init__(
        self,
        name: str,
        command: list[str],
        cwd: Path | None = None,
        site: Path | None = None,
        limit: float = LIMIT,
    ):
        self.name = name
        self.limit = limit
        self.steps: list[dict] = []
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            bufsize=1,
            cwd=cwd,
            env=os.environ | _path(cwd, site),
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._read(lambda line: line == "ready")

    def step(self) -> None:
        try:
            self.process.stdin.write("\n")
        except OSError:
            pass  # it has ended, which reading tells with its code
        self.steps.append(json.loads(self._read(lambda line: line.startswith('{"'))))

    def finish(self) -> float:
        """Peak resident memory, MiB."""
        peak = json.loads(self._read(lambda line: line.startswith('{"peak_mb')))["peak_mb"]
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.stop()  # its figures are complete
        return peak

    def stop(self) -> None:
        """Ends it, whatever it is doing."""
        self.process.kill()
        self.process.wait()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line.strip())
        self.lines.put(None)

    def _read(self, wanted) -> str:
        until = time.monotonic() + self.limit
        while True:
            try:
                line = self.lines.get(timeout=max(until - time.monotonic(), 0.001))
            except queue.Empty:
                raise self._failed(f"no step within {self.limit:.0f} s") from None
            if line is None:
                raise self._failed(f"ended with code {self.process.wait()}")
            if wanted(line):
                return line

    def _failed(self, how: str) -> WorkerFailed:
        self.stop()
        self.errors.seek(0)
        said = [line.rstrip() for line in self.errors if line.strip()]
        print(*said[-SHOWN:], sep="\n", file=sys.stderr, flush=True)
        return WorkerFailed(f"{how}: {said[-1].strip()}" if said else how)


def _path(cwd: Path | None, site: Path | None) -> dict[str, str]:
    if site is not None:
        there = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join([str(site), *[there] * bool(there)])}
    return {} if cwd is None else {"PYTHONPATH": str(cwd)}


@dataclass
class Turns:
    """What the workers that ``take_turns`` ran have left, and why others failed."""

    steps: dict[str, list[dict]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def noting(self, name: str, own: str) -> Iterator[None]:
        """Leaves ``name`` out where it fails, unless it is ``own``."""
        try:
            yield
        except WorkerFailed as error:
            if name == own:
                raise
            self.failed[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)


def take_turns(
    makers: dict[str, Callable[[], Worker]],
    steps: int,
    together: int = 1,
    between: Callable[[], None] = lambda: None,
) -> Turns:
    """Starts the workers, of which the first is the library's, and lets each take ``steps`` steps,
    ``between`` called after each. The order is turned round every ``together`` steps, so that none
    always follows the same one."""
    turns = Turns()
    workers: dict[str, Worker] = {}
    own = next(iter(makers))
    try:
        for name, make in makers.items():
            with turns.noting(name, own):
                workers[name] = make()
        for index in range(steps):
            for name in workers if index // together % 2 else reversed(workers):
                if name not in turns.failed:
                    with turns.noting(name, own):
                        workers[name].step()
                    between()
        for name, worker in workers.items():
            if name not in turns.failed:
                with turns.noting(name, own):
                    turns.peaks[name] = worker.finish()
    finally:
        for worker in workers.values():
            worker.stop()
    turns.steps = {name: workers[name].steps for name in turns.peaks}
    return turns
