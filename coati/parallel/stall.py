"""Whether the main thread waits for other ranks, and where: read from its stack by another
thread."""

import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from coati.utils.liveness import CURRENT

PACKAGE = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).resolve().parent
# A backward waits inside it for the gradients of other ranks.
BACKWARD = str(TORCH / "autograd")
COLLECTIVES = str(TORCH / "distributed")
# A wait takes no processor time; what moves bytes or computes takes more than this share.
IDLE_SHARE = 0.05


@dataclass(frozen=True)
class Stall:
    """For how many ``seconds`` the main thread has waited in one collective at ``place``
    ("coati/trainer/base.py:12"); 0.0 when it does anything else."""

    seconds: float
    place: str


class StallClock:
    """Samples the thread that makes it.

    On a CPU a collective is waited for inside torch.distributed or a backward, without using the
    processor. On a GPU calls return at once, and the thread waits at any later call that needs
    their result: there every call of torch counts, as long as no collective and no work of the
    library has begun since.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._thread = threading.get_ident()
        self._on_gpu = on_gpu
        self._mark: tuple | None = None
        self._since = time.monotonic()
        self._sampled = self._since
        self._cpu = time.process_time()

    def sample(self) -> Stall:
        """Where the thread stands now. To be called regularly."""
        now = time.monotonic()
        cpu = time.process_time()
        busy = not self._on_gpu and cpu - self._cpu > IDLE_SHARE * (now - self._sampled)
        self._cpu = cpu
        self._sampled = now
        frame = sys._current_frames().get(self._thread)
        place = place_of(frame)
        waits = frame is not None and self._waits(frame.f_code.co_filename)
        mark = (place, CURRENT.ticks, collectives_begun())
        if busy or not waits or mark != self._mark:
            self._mark = mark
            self._since = now
        return Stall(now - self._since, place)

    def _waits(self, file: str) -> bool:
        if file.startswith((COLLECTIVES, BACKWARD)):
            return True
        if not self._on_gpu or file.endswith("serialization.py"):
            return False
        return file.startswith((str(TORCH), str(PACKAGE))) or "colossalai" in file


def place_of(frame: FrameType | None) -> str:
    """The innermost line of the library, or of whatever runs where none is; "" for no frame."""
    innermost = frame
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if PACKAGE in file.parents:
            return f"{file.relative_to(PACKAGE.parent)}:{frame.f_lineno}"
        frame = frame.f_back
    if innermost is None:
        return ""
    outer = innermost
    while outer.f_back is not None and "torch" in Path(outer.f_code.co_filename).parts:
        outer = outer.f_back
    return f"{outer.f_code.co_filename}:{outer.f_lineno}"


def collectives_begun() -> int:
    """How many collectives this process has begun in all its groups."""
    world = getattr(dist.distributed_c10d, "_world", None)
    begun = 0
    for group in list(getattr(world, "pg_names", ())):
        try:
            begun += group._get_sequence_number_for_group()
        except RuntimeError:  # a backend that does not count
            continue
    return begun
