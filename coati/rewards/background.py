"""Work beside the main thread: functions in threads of their own, and coroutines on one event
loop."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from coati.utils.watchdog import Overrun, raise_in

_GRACE_S = 0.5  # for a coroutine to end when it is canceled


def in_background(function: Callable[..., Any], *arguments: Any) -> Future:
    """What ``function`` will have returned or raised, in a thread that does not keep the process
    from ending."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # whoever asks for the result is told
            future.set_exception(error)

    threading.Thread(target=work, name="coati-reward", daemon=True).start()
    return future


def map_bounded(function: Callable[[int], Any], count: int, at_once: int) -> list[Any]:
    """``[function(0), ..., function(count - 1)]`` in at most ``at_once`` threads. The failure of
    the lowest number is raised; what has not begun by then is left out."""
    results: list[Any] = [None] * count
    failures: dict[int, BaseException] = {}
    order = iter(range(count))
    lock = threading.Lock()

    def work() -> None:
        while not failures:
            with lock:
                index = next(order, None)
            if index is None:
                return
            try:
                results[index] = function(index)
            except BaseException as error:
                failures[index] = error

    for worker in [in_background(work) for _ in range(min(count, at_once))]:
        worker.result()
    if failures:
        raise failures[min(failures)]
    return results


class EventLoop:
    """One event loop in a thread of its own, begun when it is first used: what a user's coroutines
    keep between calls, a client's connections say, stays with its loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._asked: dict[Future, asyncio.AbstractEventLoop] = {}
        self._lock = threading.Lock()

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
        """The result of ``coroutine``. Raises Overrun after ``timeout`` seconds, also where it
        blocks its loop, which is then given up."""
        with self._lock:
            loop = self._running()
            future = asyncio.run_coroutine_threadsafe(coroutine, loop)
            self._asked[future] = loop
        try:
            return future.result(timeout)
        except FutureTimeout:
            if future.done():  # raised by the coroutine itself
                raise
            future.cancel()
            self._give_up_if_blocked(loop)
            raise Overrun from None
        except CancelledError:
            raise RuntimeError("the coroutine canceled itself") from None
        finally:
            self._asked.pop(future, None)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._serve, args=(loop,), name="coati-reward-loop", daemon=True
            )
            self._thread.start()
            self._loop = loop
        return self._loop

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_forever()
        except BaseException as error:  # sys.exit in a task ends its loop
            with self._lock:
                if self._loop is loop:
                    self._loop = None
                for future, of in self._asked.items():
                    if of is loop and not future.done():
                        future.set_exception(RuntimeError(f"its event loop ended: {error!r}"))

    def _give_up_if_blocked(self, loop: asyncio.AbstractEventLoop) -> None:
        answered = threading.Event()
        loop.call_soon_threadsafe(answered.set)
        if answered.wait(_GRACE_S):
            return
        with self._lock:
            if self._loop is loop:
                if self._thread is not None and self._thread.ident is not None:
                    raise_in(self._thread.ident, Overrun)
                self._loop = None


async def gather_bounded(
    function: Callable[[int], Coroutine[Any, Any, Any]], count: int, at_once: int
) -> list[Any]:
    """The results of ``function(0), ..., function(count - 1)``, at most ``at_once`` of them at a
    time. The first failure is raised, the others are canceled."""
    free = asyncio.Semaphore(at_once)

    async def one(index: int) -> Any:
        async with free:
            return await function(index)

    tasks = [asyncio.ensure_future(one(index)) for index in range(count)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
