"""Memory on a machine without an accelerator: how the C library hands it out, and where weights
lie in it."""

import ctypes
import os

from torch import nn

# malloc.h of glibc: the most that may lie free at the end of the heap, and how many blocks may be
# mapped on their own.
TRIM_THRESHOLD = -1
MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let freed blocks be used again instead of going back to the kernel; False where the C library
    is not glibc.

    A step allocates and frees the same large tensors as the one before. By default glibc maps each
    again, and the kernel fills page after page with zeros at first touch: a tenth of a step of a
    small model (benchmarks/bench_sft.py). The environment's own MALLOC_* settings, where there are
    any, are left alone.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # An int is what mallopt takes, so 2 GiB - 1 is the most that can be asked to stay.
    return bool(libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)) and bool(libc.mallopt(MMAP_MAX, 0))


ALIGNMENT = 64  # bytes, of PyTorch's own tensors on a CPU


def align_weights(model: nn.Module) -> None:
    """Move the parameters of ``model`` that lie at odd addresses, one after the other.

    Weights from a safetensors file are a view of the file, at whatever offset its header leads to.
    Matrix products read them more slowly there and round otherwise, so that a run resumed from its
    checkpoint would not be the same to the bit.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
