"""What an item of bench_gpu.py leaves behind while it runs, and steps measured against its cap."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from coati.utils.json_io import save_json
from coati.utils.memory import peak_memory_mb

GIB = 1024  # MiB
MARGIN_S = 3.0  # of the cap, for the end of the process
WARM_UP = 2
COUNTED = 8


class Report:
    """The figures of one item, in ``path`` as JSON from the first on: an item that is stopped at
    its cap has left what it had measured by then."""

    def __init__(self, path: Path, cap_s: float) -> None:
        self.path = path
        self.ends = time.monotonic() + cap_s - MARGIN_S
        self.figures: dict[str, Any] = {}
        self._lock = threading.Lock()

    def add(self, **figures: Any) -> None:
        with self._lock:
            self.figures |= figures
            save_json(self.figures, self.path)

    def has(self, seconds: float) -> bool:
        """Whether that much is left of the cap."""
        return time.monotonic() + seconds < self.ends

    def watch_memory(self) -> None:
        """From now on the peak of the device's memory is written every second: the first update of
        an optimizer in host memory may last longer than the cap."""
        import torch

        if not torch.cuda.is_available():
            return
        torch.cuda.reset_peak_memory_stats()

        def write() -> None:
            while True:
                time.sleep(1)
                self.add(peak_gib=peak_memory_mb() / GIB)

        threading.Thread(target=write, daemon=True).start()


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of ``call``, to the end of what it started on the GPU, and its result."""
    synchronize()
    started = time.perf_counter()
    result = call()
    synchronize()
    return time.perf_counter() - started, result


def measure(
    report: Report,
    step: Callable[[], Any],
    operations: float | None = None,
    counted: int = COUNTED,
    warm_up: int = WARM_UP,
) -> None:
    """Take steps until ``counted`` are measured or the cap is near; after each the report has the
    medians so far. Of the first ``warm_up`` steps the last is shown where no other is reached.
    ``step`` returns a :class:`~coati.parallel.objective.Step`; ``operations``: of a step."""
    import torch

    from benchmarks.gpu_models import peak_tflops

    seconds: list[float] = []
    losses: list[float] = []
    for index in range(warm_up + counted):
        took, done = timed(step)
        seconds.append(took)
        losses.append(done.loss)
        kept = seconds[warm_up:] or seconds[-1:]
        middle = median(kept)
        found = {
            "step_seconds": middle,
            "steps": len(kept) if index >= warm_up else 0,
            "tokens_per_second": done.tokens / middle,
            "losses": losses,
            "peak_gib": peak_memory_mb() / GIB,
        }
        if operations:
            rate = operations / middle / 1e12
            name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
            peak = peak_tflops(name)
            found |= {"model_tflops": rate} | ({"mfu": rate / peak} if peak else {})
        report.add(**found)
        if not report.has(1.2 * took):
            break
