"""The progress of a run on rank 0: a bar in a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tqdm import tqdm

from coati.utils.distributed import is_rank_0
from coati.utils.logging import get_logger
from coati.utils.phases import FIRST_S, begin, duration, end, phase

logger = get_logger(__name__)

LINE_S = 10.0  # between lines where there is no terminal
LONGER = 3.0  # times the step before, after which a step says that it is not stuck


def in_terminal() -> bool:
    """Whether a bar can be drawn on standard error: a terminal, or a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or hasattr(shell, "kernel")


@contextmanager
def bars_in_terminals_alone() -> Iterator[None]:
    """Inside, transformers and datasets draw bars only where :func:`in_terminal`: elsewhere each
    redraw is a line."""
    import datasets
    from transformers.utils import logging as transformers_logging

    ways = (
        (
            transformers_logging.is_progress_bar_enabled,
            transformers_logging.disable_progress_bar,
            transformers_logging.enable_progress_bar,
        ),
        (
            lambda: not datasets.are_progress_bars_disabled(),
            datasets.disable_progress_bars,
            datasets.enable_progress_bars,
        ),
    )
    enable_again = []
    if not in_terminal():
        for drawn, disable, enable in ways:
            if drawn():
                disable()
                enable_again.append(enable)
    try:
        yield
    finally:
        for enable in enable_again:
            enable()


class _Display(Protocol):
    def describe(self, text: str) -> None: ...

    def update(self, shown: dict[str, str]) -> None: ...

    def skip(self, seconds: float) -> None:
        """``seconds`` that count neither in the rate nor in the time left."""

    def close(self) -> None: ...


class _Bar:
    """tqdm's, which adds the rate and the time left."""

    def __init__(self, total: int, done: int, name: str, unit: str) -> None:
        self._name = name
        self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True)

    def describe(self, text: str) -> None:
        self._bar.set_description(f"{self._name} ({text})" if text else self._name)

    def update(self, shown: dict[str, str]) -> None:
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def skip(self, seconds: float) -> None:
        self._bar.start_t += seconds
        self._bar.last_print_t += seconds

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """Whole lines, for pipes and files: the first step, one every :data:`LINE_S` seconds, the
    last."""

    def __init__(self, total: int, done: int, name: str, unit: str) -> None:
        self._total = total
        self._done = done
        self._name = name
        self._unit = unit
        self._counted = 0  # steps of this process
        self._began = time.monotonic()
        self._after_first = self._began
        self._said: float | None = None
        self._phase = begin(self._title(), closing=False)

    def _title(self) -> str:
        return f"{self._name}: {self._unit} {min(self._done + 1, self._total)} of {self._total}"

    def describe(self, text: str) -> None:
        self._phase.detail = text

    def update(self, shown: dict[str, str]) -> None:
        self._done += 1
        self._counted += 1
        now = time.monotonic()
        if self._counted == 1:
            self._after_first = now
        last = self._done == self._total
        if last or self._said is None or now - self._said >= LINE_S:
            self._said = now
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            logger.info(
                f"{self._name}: {self._unit} {self._done} of {self._total}"
                + (f", {values}" if values else "")
                + ("" if last else self._left(now))
            )
        self._phase.what = self._title()
        self._phase.detail = ""
        # Steps that all take long have their own lines; one that takes far longer is worth a word.
        self._phase.restart(max(FIRST_S, LONGER * (now - self._phase.began)))

    def _left(self, now: float) -> str:
        # The first step compiles and allocates, and says little of the others.
        steps = max(self._counted - 1, 1)
        since = self._began if self._counted == 1 else self._after_first
        each = (now - since) / steps
        return f", {duration(each * (self._total - self._done))} left"

    def skip(self, seconds: float) -> None:
        self._began += seconds
        self._after_first += seconds

    def close(self) -> None:
        end(self._phase)


class ProgressBar:
    """Steps (or episodes) done of all, with loss, learning rate, tokens per second and the time
    left. Ranks other than 0 show nothing."""

    def __init__(self, total: int, done: int, name: str, unit: str = "step") -> None:
        self.name = name
        self._display: _Display | None = None
        if is_rank_0():
            kind = _Bar if in_terminal() else _Lines
            self._display = kind(total, done, name, unit)

    def phase(self, text: str) -> None:
        """What is being done inside a step."""
        if self._display is not None:
            self._display.describe(text)

    def step(self, **shown: float) -> None:
        """One step is done; ``shown`` stands at the end of the bar."""
        if self._display is not None:
            self._display.update({name: f"{value:.4g}" for name, value in shown.items()})

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """For ``what`` is no step: its time counts neither in the rate nor in the time left."""
        began = time.monotonic()
        try:
            with phase(what):
                yield
        finally:
            if self._display is not None:
                self._display.skip(time.monotonic() - began)

    def over(self, batches: Iterable[Any], what: str, count: int | None = None) -> Iterator[Any]:
        """``batches``, with a bar of their own while :meth:`paused`. ``count``: how many."""
        total = count if count is not None else _length(batches)
        with phase(what, closing=False) as current:
            if isinstance(self._display, _Bar):
                current.shown = True
                yield from tqdm(batches, what, total, unit="batch", leave=False, dynamic_ncols=True)
                return
            for number, batch in enumerate(batches, 1):
                current.detail = f"batch {number}" + (f" of {total}" if total else "")
                yield batch

    def write(self, text: str) -> None:
        """A line (or a table) above the bar, on rank 0."""
        if is_rank_0():
            tqdm.write(text)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._display is not None:
            self._display.close()


def _length(batches: Any) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None
