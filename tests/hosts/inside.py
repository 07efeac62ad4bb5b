"""``coati`` inside a host without its seconds of imports: a process forked from the server of
:mod:`tests.distributed.spawn` goes into the host's namespaces."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.distributed.spawn import ROOT, forked_context

NAMESPACES = ("ipc", "net", "uts", "pid", "mnt")  # mnt last: the others are found in /proc


class Forked:
    """What ``subprocess.Popen`` offers, of ``coati WORDS`` in the host of ``first_process``."""

    def __init__(
        self,
        first_process: int,
        words: Sequence[str],
        variables: Mapping[str, str],
        files: Sequence[Path],
    ) -> None:
        context = forked_context()
        receiver, sender = context.Pipe(duplex=False)
        given = (first_process, list(words), dict(variables), list(map(str, files)), sender)
        self._process = context.Process(target=_go_inside, args=given)
        self._process.start()
        sender.close()
        self.pid: int = receiver.recv()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self._process.exitcode

    def kill(self) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)


def _go_inside(first_process, words, variables, files, sender) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    doors = [os.open(f"/proc/{first_process}/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
    for door in doors:
        if libc.setns(door, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(door)
    pid = os.fork()  # only children are in the host's namespace of processes
    if pid == 0:
        _run(words, variables, files)
    sender.send(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def _run(words, variables, files) -> None:
    """Never returns: ends as Python does after ``python -m coati``."""
    for number, name in enumerate((os.devnull, *files)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0)), number)
    os.environ.update(variables)
    os.chdir(ROOT)
    code = 1
    try:
        from coati import __main__

        sys.argv = [__main__.__file__, *words]
        __main__.main(words)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
