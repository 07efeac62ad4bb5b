"""Hosts that can be asked: this one, and others over ssh.

``python -m coati.recipes.doctor.peers`` is what runs on the others: a request arrives as a line of
JSON on standard input, its answer goes out as a line.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any, Protocol

from coati.recipes.doctor.host_report import Asked, host_report
from coati.recipes.launcher import SSH, is_here
from coati.utils.errors import RunFailed

PATIENCE_S = 5.0  # of network file systems
Request = Mapping[str, Any]


class PeerFailed(RunFailed):
    """A host did not answer."""


class Peer(Protocol):
    """A host that can be asked."""

    name: str

    def ask(self, request: Request, wait_s: float = 60.0) -> Any:
        """The answer. Raises PeerFailed."""

    def close(self) -> None:
        """Let it go."""


class Here:
    """This host."""

    def __init__(self, name: str) -> None:
        self.name = name

    def ask(self, request: Request, wait_s: float = 60.0) -> Any:
        try:
            return answer(request)
        except (OSError, RuntimeError) as error:
            raise PeerFailed(str(error)) from error

    def close(self) -> None:
        return


class There:
    """Another host, over ssh."""

    def __init__(self, name: str) -> None:
        self.name = name
        variables = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if "PYTHONPATH" in os.environ else []
        start = shlex.join(["env", *variables, sys.executable, "-m", __spec__.name])
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            ["ssh", *SSH, name, f"cd {shlex.quote(os.getcwd())} && {start}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put("")

    def ask(self, request: Request, wait_s: float = 60.0) -> Any:
        pipe: IO[str] = self._process.stdin  # type: ignore[assignment]
        try:
            pipe.write(json.dumps(request) + "\n")
            pipe.flush()
            line = self._lines.get(timeout=wait_s)
        except (BrokenPipeError, Empty):
            line = ""
        if not line:
            raise PeerFailed(self._why(wait_s))
        told = json.loads(line)
        if "error" in told:
            raise PeerFailed(told["error"])
        return told["answer"]

    def _why(self, wait_s: float) -> str:
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return f"it did not answer within {wait_s:.0f} s"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit code {code}"
        if code == 255:
            return (
                f"ssh could not connect ({said}); `ssh {self.name} true` must work without a prompt"
            )
        return (
            f"coati could not be started there ({said}); it needs the same working directory and "
            f"virtual environment ({sys.executable}) as here"
        )

    def close(self) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it has ended, and its request was not read
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def peer(name: str) -> Peer:
    """The host of that name."""
    return Here(name) if is_here(name) else There(name)


def ask_all(peers: Sequence[Peer], requests: Sequence[Request], wait_s: float = 60.0) -> list[Any]:
    """The answer of each to its request, all at once; a PeerFailed in place of one that gave
    none."""

    def one(asked: Peer, request: Request) -> Any:
        try:
            return asked.ask(request, wait_s)
        except PeerFailed as error:
            return error

    with ThreadPoolExecutor(len(peers)) as pool:
        return list(pool.map(one, peers, requests))


def answer(request: Request) -> Any:
    """What this host says to a request."""
    return ANSWERS[request["ask"]](request)


def _report(request: Request) -> Any:
    return host_report(Asked(**request["about"]))


def _write(request: Request) -> str:
    """Leave a file in the nearest folder of ``place`` that is there; its path."""
    folder = Path(request["place"]).absolute()
    while not folder.is_dir():
        folder = folder.parent
    file = folder / request["name"]
    file.write_text(request["name"], encoding="utf-8")
    return str(file)


def _see(request: Request) -> bool:
    """Whether the file is there, now or soon."""
    file = Path(request["file"])
    end = time.monotonic() + PATIENCE_S
    while not file.exists():
        if time.monotonic() > end:
            return False
        try:
            os.listdir(file.parent)  # has a network file system ask its server again
        except OSError:
            return False
        time.sleep(0.1)
    return True


def _remove(request: Request) -> None:
    Path(request["file"]).unlink(missing_ok=True)


def _pairs(request: Request) -> Any:
    from coati.parallel.pair_speed import measure_pairs

    return measure_pairs(**request["group"])


ANSWERS: dict[str, Callable[[Request], Any]] = {
    "report": _report,
    "clock": lambda _: time.time(),
    "write": _write,
    "see": _see,
    "remove": _remove,
    "pairs": _pairs,
}


def report_request(asked: Asked) -> dict[str, Any]:
    return {"ask": "report", "about": asdict(asked)}


def main() -> None:
    """Answer until nobody asks."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever is printed is no answer
    for line in sys.stdin:
        try:
            told = {"answer": answer(json.loads(line))}
        except (OSError, RuntimeError, ValueError) as error:
            told = {"error": str(error)}
        print(json.dumps(told), file=out, flush=True)


if __name__ == "__main__":
    main()
