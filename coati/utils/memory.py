"""Peak memory of a process."""

import resource
import sys
from pathlib import Path


def peak_memory_mb() -> float:
    """MiB: the most that PyTorch has held on this process's GPU, or, without one, that the process
    has had resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def resident_mb() -> float:
    """MiB that the process has resident now; 0 where the system does not say (/proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / 2**20


def peak_memory_of_ranks() -> list[float]:
    """:func:`peak_memory_mb` of every rank."""
    from coati.utils.distributed import all_gather_object

    return all_gather_object(peak_memory_mb())


def describe_memory(peaks: list[float]) -> str:
    """One line: lowest, highest, and which ranks."""
    low = min(peaks)
    high = max(peaks)
    if len(peaks) == 1:
        return f"peak memory {high:.0f} MiB"
    return (
        f"peak memory {low:.0f} MiB (rank {peaks.index(low)}) to {high:.0f} MiB (rank "
        f"{peaks.index(high)})"
    )


def in_units(size: float) -> str:
    """Bytes as MiB, or as GiB from one GiB on."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
