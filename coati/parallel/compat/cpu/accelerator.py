"""The accelerator object that ColossalAI asks for streams, memory and random numbers, on a CPU."""

import os
from contextlib import nullcontext

import psutil
import torch
from colossalai.accelerator.cpu_accelerator import CpuAccelerator


class NoStream:
    """A stream or an event where work is done in the order in which it is asked for."""

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs) -> None:
        pass

    wait = wait_event = wait_stream = record = record_event = synchronize = _nothing

    def query(self) -> bool:
        """Whether all work is done: on a CPU it always is."""
        return True


class GlooCpuAccelerator(CpuAccelerator):
    """ColossalAI's own CPU accelerator with the methods that raise there filled in. Memory figures
    are in bytes."""

    def _nothing(self, *args, **kwargs) -> None:
        pass

    # random numbers: the processor has one generator
    def get_rng_state(self, device=None) -> torch.Tensor:
        return torch.get_rng_state()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def seed(self) -> int:
        return torch.seed()

    def initial_seed(self) -> int:
        return torch.initial_seed()

    # streams
    Stream = Event = NoStream

    def current_stream(self, device=None) -> NoStream:
        return NoStream()

    default_stream = current_stream

    def stream(self, stream_) -> nullcontext:
        return nullcontext()

    set_stream = synchronize = _nothing

    # devices
    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_name(self, device=None) -> str:
        return "cpu"

    def device_count(self) -> int:
        return os.cpu_count() or 1

    set_device = _nothing

    # memory: the process's own, since the processor's allocator keeps no statistics
    def memory_allocated(self, device=None) -> int:
        return psutil.Process().memory_info().rss

    def max_memory_allocated(self, device=None) -> int:
        # The base class returns ru_maxrss, which is in KiB.
        return self.max_memory_reserved(device) * 1024

    empty_cache = reset_peak_memory_stats = reset_max_memory_allocated = reset_max_memory_cached = (
        _nothing
    )

    def autocast(
        self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True
    ):
        return torch.autocast("cpu", dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)
