"""Ray in this process: actors are objects whose calls run in threads of their own, arguments are
pickled as Ray pickles them, and each call may be made to fail as Ray fails."""

import pickle
import pickletools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from threading import Lock
from types import SimpleNamespace
from typing import Any

# Of what another release of torch or transformers may not be there to read.
PLAIN = ("numpy", "builtins", "_codecs", "collections", "tests.experience_maker.fake_ray")
# Two models that transformers loads at the same time leave weights untied for the whole process;
# Ray's actors have a process each.
_ONE = Lock()


class Ref:
    """A reference to an object that was put; it stays one when it is pickled."""

    def __init__(self, number: int) -> None:
        self.number = number

    def hex(self) -> str:
        return f"{self.number:08x}"


def plainly(value: Any) -> Any:
    """``value`` by way of pickle. Raises AssertionError for what is no plain value."""
    data = pickle.dumps(value, protocol=2)
    for code, argument, _ in pickletools.genops(data):
        if code.name == "GLOBAL":
            assert argument.split(" ")[0].partition("._core")[0].split(".multi")[0] in PLAIN, (
                argument
            )
    return pickle.loads(data)


class FakeRay:
    """``faults``: what the next calls fail with, by name of the method; a callable is called in
    place of the method's own. ``made``: the actors ever started, with their options."""

    __version__ = "2.60.0"

    def __init__(self, cpus: float = 4.0) -> None:
        import ray

        self._real = ray
        self.exceptions = ray.exceptions
        self.cpus = cpus
        self.faults: dict[str, deque] = {}
        self.made: list[SimpleNamespace] = []
        self.killed: list[Any] = []
        self.stored: dict[int, Any] = {}
        self.puts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)  # of what errors are made

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "NodeManagerHostname": "here", "Resources": {"CPU": self.cpus}}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def put(self, value: Any) -> Ref:
        if self.faults.get("put"):
            raise self.faults["put"].popleft()
        self.puts += 1
        self.stored[self.puts] = plainly(value)
        return Ref(self.puts)

    def get(self, wanted: Any, timeout: float | None = None) -> Any:
        if isinstance(wanted, Ref):
            return self.stored[wanted.number]
        try:
            return wanted.result(timeout)
        except NotInTime as error:
            raise self.exceptions.GetTimeoutError("too late") from error

    def remote(self, **options: Any) -> Any:
        def of(kind: type) -> Any:
            return SimpleNamespace(remote=lambda *arguments: _Actor(self, kind, arguments, options))

        return of

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

    def end_calls(self) -> None:
        """Wait for what actors still do: while one of them loads its model under transformers 4.51,
        every parameter that this process makes is an empty one."""
        for one in self.made:
            one.actor._pool.shutdown(wait=True, cancel_futures=True)


class _Actor:
    def __init__(self, ray: FakeRay, kind: type, arguments: tuple, options: dict) -> None:
        self._ray = ray
        self._new = lambda: kind(*plainly(arguments))
        self._object = self._new()
        self._pool = ThreadPoolExecutor(1)
        ray.made.append(SimpleNamespace(actor=self, options=options))

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(
            remote=lambda *arguments: self._pool.submit(self._call, method, plainly(arguments))
        )

    def _call(self, method: str, arguments: tuple) -> Any:
        if self in self._ray.killed:
            raise self._ray.exceptions.ActorDiedError()
        faults = self._ray.faults.get(method)
        fault = faults.popleft() if faults else None
        if isinstance(fault, self._ray.exceptions.RayActorError):
            self._object = self._new()  # the process that Ray starts next has nothing of this one
        if isinstance(fault, BaseException):
            raise fault
        if fault is not None:
            fault()
        try:
            with _ONE:
                return plainly(getattr(self._object, method)(*arguments))
        except Exception as error:
            raise self._ray.exceptions.RayTaskError(method, "", error) from error
