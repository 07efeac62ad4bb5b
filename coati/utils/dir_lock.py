"""A lock on a directory that holds over processes, hosts and shared file systems.

The lock is a file that says who holds it. It appears whole (a hard link, where the file system has
them), and a thread touches it every few seconds. One whose process is gone is recognized at once on
the same host; on another host, when it has not been touched for a while by the file server's clock.
Neither flock nor fcntl is used: network file systems differ in them.
"""

import getpass
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from coati.utils.environment import command_line
from coati.utils.logging import get_logger

logger = get_logger(__name__)

NAME = "run.lock"
BEAT_S = 10.0  # between two touches
STALE_S = 90.0  # without a touch; more than any file server's clock and cache are late
ATTEMPTS = 20  # to read a lock that is being written, a tenth of a second each
MARKER_S = 30.0  # after which a take-over that did not end is given up


class Locked(ValueError):
    """Another process holds the lock; the message says who."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. ``boot`` and ``pid_space``: of the running kernel and of what its process
    ids mean; ``began``: of the process, in the kernel's ticks."""

    id: str
    host: str
    user: str
    pid: int
    began: str
    boot: str
    pid_space: str
    since: str
    command: str
    folder: str

    @classmethod
    def here(cls, folder: Path) -> "Holder":
        """This process."""
        pid = os.getpid()
        return cls(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            user=_user(),
            pid=pid,
            began=_began(pid) or "",
            boot=_text("/proc/sys/kernel/random/boot_id"),
            pid_space=_pid_space(),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command_line(),
            folder=str(folder.resolve()),
        )

    def shares_pids_with(self, other: "Holder") -> bool:
        """Whether process ids of both mean the same."""
        names = ("host", "boot", "pid_space")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def lives(self) -> bool:
        """Whether the process is there, asked where its id means something: the id may be another
        process's by now."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        began = _began(self.pid)
        return began is None or self.began in ("", began)

    def __str__(self) -> str:
        return f"{self.user} on {self.host}, process {self.pid}, since {self.since}: {self.command}"


class DirLock:
    """The lock of ``folder``; the folder that holds it is made if it is not there.

    Args:
        folder: what is locked.
        flag: what named it, for messages.
        wait: called before a wait of up to ``STALE_S`` seconds with a message about it.
        path: of the lock, if not ``run.lock`` inside ``folder``, which then need not be there.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        flag: str,
        wait: Callable[[str], None] = logger.info,
        path: Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.flag = flag
        self.path = path or self.folder / NAME
        self._wait = wait
        self._mine: Holder | None = None
        self._ended = threading.Event()
        self._before: Any = None

    def acquire(self) -> None:
        """Take the lock, from a holder that is gone too, which is logged.

        Raises:
            Locked: naming the one that holds it.
            ValueError: if the folder cannot be made or written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise ValueError(
                f"{self.flag} {self.folder}: cannot be written ({error.strerror or error}); name a "
                "directory that can"
            ) from error
        threading.Thread(target=self._beat, daemon=True).start()
        self._release_on_sigterm()

    def _acquire(self) -> None:
        mine = Holder.here(self.path.parent)
        draft = self._beside(mine.id)
        try:
            draft.write_text(json.dumps(asdict(mine)), encoding="utf-8")
            while self._mine is None:
                if _appears(draft, self.path):
                    self._mine = mine
                    return
                holder = self._read()
                if holder is not None and self._gone(holder, mine, draft):
                    self._take_over(holder, mine, draft)
        finally:
            draft.unlink(missing_ok=True)

    def _beside(self, name: str) -> Path:
        return self.path.with_name(f".{self.path.name.lstrip('.')}.{name}")

    def _read(self) -> Holder | None:
        """Who holds the lock; None if nobody does any more."""
        for _ in range(ATTEMPTS):
            try:
                return Holder(**json.loads(self.path.read_text(encoding="utf-8")))
            except FileNotFoundError:
                return None
            except (TypeError, ValueError):  # half written, where there are no hard links
                time.sleep(0.1)
        raise ValueError(
            f"{self.path} is not a lock of this library; remove it if nothing runs in {self.folder}"
        )

    def _gone(self, holder: Holder, mine: Holder, draft: Path) -> bool:
        """Whether ``holder`` no longer runs; not where the lock is no longer its own. Raises
        Locked if it does."""
        if holder.shares_pids_with(mine):
            if holder.lives and not self._is_copy(holder):
                raise Locked(self._refusal(holder))
            return True
        began = self._touched(self.path)
        if self._age(draft) > STALE_S:
            return True
        if not self._still(holder):
            return False
        self._wait(
            f"{self.flag} {self.folder} was in use by {holder}; waiting up to {STALE_S:g} s to see "
            "whether it still runs"
        )
        while (touched := self._touched(self.path)) is not None:
            if not self._still(holder):
                return False
            if touched != began:
                raise Locked(self._refusal(holder))
            if self._age(draft) > STALE_S:
                return True
            time.sleep(min(1.0, BEAT_S / 4))
        return False  # it has ended by itself: try again

    def _still(self, holder: Holder) -> bool:
        """Whether the lock is that of ``holder``, and not of one that has taken it over."""
        found = self._read()
        return found is not None and found.id == holder.id

    def _refusal(self, holder: Holder) -> str:
        return (
            f"{self.flag} {self.folder} is in use by {holder}. Wait until it has ended, stop it "
            f"(kill {holder.pid} on {holder.host}), or choose another {self.flag}"
        )

    def _is_copy(self, holder: Holder) -> bool:
        """Whether this folder is a copy of the one that ``holder`` locked."""
        there = Path(holder.folder) / self.path.name
        try:
            return not os.path.samefile(there, self.path) and holder.id in there.read_text("utf-8")
        except OSError:
            return False

    @staticmethod
    def _touched(path: Path) -> int | None:
        """When ``path`` was last touched, in ns; None if it is not there. Opening makes a client of
        a network file system ask its server."""
        try:
            with open(path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _age(self, draft: Path) -> float:
        """Seconds since the lock was touched, by the clock of the file system."""
        os.utime(draft)
        touched = self._touched(self.path)
        now = self._touched(draft)
        return 0.0 if touched is None or now is None else (now - touched) / 1e9

    def _take_over(self, holder: Holder, mine: Holder, draft: Path) -> None:
        """Replace the lock of ``holder``, which is gone. Of several that try, one does."""
        marker = self._beside(f"{holder.id}.over")
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            began = self._touched(marker)
            os.utime(draft)
            if began is not None and (self._touched(draft) or 0) - began > MARKER_S * 1e9:
                marker.unlink(missing_ok=True)
            time.sleep(0.05)
            return
        try:
            if not self._still(holder):
                return
            os.replace(draft, self.path)
            self._mine = mine
        finally:
            marker.unlink(missing_ok=True)
        logger.info(
            f"{self.flag} {self.folder} was left locked by {holder}, which no longer runs: taken "
            "over"
        )

    def _beat(self) -> None:
        mine = self._mine
        while not self._ended.wait(BEAT_S):
            if mine is None or os.getpid() != mine.pid:
                return
            self._put_back(mine)
            if not self._held_by(mine):
                if self._ended.is_set():
                    return
                logger.error(
                    f"{self.flag} {self.folder}: another run has taken it over, this process "
                    f"having been silent for more than {STALE_S:g} s; it ends without saving"
                )
                _interrupt_until(self._ended)
                return
            try:
                os.utime(self.path)
            except OSError as error:  # a server that is away for a moment
                logger.warning_once(f"{self.path} could not be touched ({error})")

    def _put_back(self, mine: Holder) -> None:
        """Write the lock anew where somebody has removed it by hand."""
        draft = self._beside(mine.id)
        try:
            if self.path.exists():
                return
            draft.write_text(json.dumps(asdict(mine)), encoding="utf-8")
            if _appears(draft, self.path):
                logger.warning(f"{self.path} was removed while its run goes on: written again")
        except OSError as error:  # a server that is away for a moment, or the folder is gone
            logger.warning_once(f"{self.path} could not be written again ({error})")
        finally:
            draft.unlink(missing_ok=True)
        if self._ended.is_set() and self._held_by(mine):  # given back meanwhile
            self.path.unlink(missing_ok=True)

    def _held_by(self, mine: Holder) -> bool:
        """Whether nobody else holds it, as far as can be read just now."""
        try:
            found = self._read()
        except (OSError, ValueError):
            return True
        return found is None or found.id == mine.id

    def release(self) -> None:
        """Give the lock back; does nothing in a process that does not hold it."""
        mine = self._mine
        self._ended.set()
        if mine is None or os.getpid() != mine.pid:
            return
        self._mine = None
        if self._held_by(mine):
            self.path.unlink(missing_ok=True)
        main = threading.current_thread() is threading.main_thread()
        if main and self._before is not None and signal.getsignal(signal.SIGTERM) == self._end:
            signal.signal(signal.SIGTERM, self._before)

    def _release_on_sigterm(self) -> None:
        # Python's own end by SIGTERM cleans nothing up. A trainer has its own handler meanwhile.
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self._before = signal.signal(signal.SIGTERM, self._end)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        self.release()
        signal.signal(number, signal.SIG_DFL)  # in a child made by fork, nothing was released
        os.kill(os.getpid(), number)


def _appears(draft: Path, path: Path) -> bool:
    """Give ``draft`` the name ``path`` too unless that is taken, at once."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # no hard links there
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(file, "wb") as opened:
            opened.write(draft.read_bytes())
    return True


def _interrupt_until(ended: threading.Event) -> None:
    """Ctrl-C until the process has ended: the first asks a trainer to stop, the next ends it."""
    import _thread

    while not ended.wait(0.5):
        _thread.interrupt_main()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in containers
        return str(os.getuid())


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:  # not on this system
        return ""


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _began(pid: int) -> str | None:
    """When the process started, in the kernel's ticks since boot; "ended" for one that is only
    waited for, None where the system does not say (proc(5), stat, fields 3 and 22)."""
    text = _text(f"/proc/{pid}/stat")
    if not text:
        return None
    fields = text.rpartition(")")[2].split()
    return "ended" if fields[0] in "ZX" else fields[19]
