"""What stands between ColossalAI 0.5.0 and a machine without an accelerator: one function per
obstacle.

Paths are relative to the ``colossalai`` package. Everything here is applied by
:func:`coati.parallel.compat.cpu.apply` alone.
"""

import inspect
from types import SimpleNamespace

import torch

from coati.parallel.compat.cpu import collectives
from coati.parallel.compat.patch import Patch, raises


def install_accelerator() -> None:
    """accelerator/cpu_accelerator.py:106 ff.: streams, seeds and memory figures raise instead of
    doing nothing."""
    from colossalai.accelerator import set_accelerator

    from coati.parallel.compat.cpu.accelerator import GlooCpuAccelerator

    set_accelerator(GlooCpuAccelerator())


def _accelerator_raises() -> bool:
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    return raises(RuntimeError, call=lambda: CpuAccelerator().current_stream())


def drop_zero_device_check() -> None:
    """zero/low_level/low_level_optim.py:254: asserts that the accelerator is called cuda or npu."""
    from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

    def check_dtypes(self) -> None:
        for group in self.optim.param_groups:
            for param in group["params"]:
                if not getattr(param, "skip_zero_check", False) and param.dtype != self._dtype:
                    raise TypeError(
                        f"ZeRO expects parameters of {self._dtype}, but found one of {param.dtype}"
                    )

    LowLevelZeroOptimizer._sanity_checks = check_dtypes


def _zero_checks_device() -> bool:
    from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

    empty = SimpleNamespace(optim=SimpleNamespace(param_groups=[]), _dtype=torch.float32)
    return raises(AssertionError, call=lambda: LowLevelZeroOptimizer._sanity_checks(empty))


def never_overlap_communication() -> None:
    """zero/low_level/low_level_optim.py:343: ``Tensor.record_stream`` has no CPU kernel."""
    from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

    original = LowLevelZeroOptimizer.__init__

    def __init__(self, *args, **kwargs):
        original(self, *args, **{**kwargs, "overlap_communication": False})

    LowLevelZeroOptimizer.__init__ = __init__


def _zero_records_stream() -> bool:
    from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

    return "record_stream" in inspect.getsource(LowLevelZeroOptimizer._run_reduction)


def keep_gemini_shards_in_place() -> None:
    """zero/gemini/chunk/chunk.py:321, 504: a shard moves between "cuda" and "cpu"; here both are
    the same memory.

    ``ChunkManager.access_chunk`` asks every chunk whose device is "cpu" to move first, a gathered
    one too. The update of a "cpu" shard is put off until it moves, which a saved state dict would
    miss; here it is made at once.
    """
    from colossalai.zero.gemini.chunk.chunk import Chunk

    def shard_move(self, device, force_copy=False, non_blocking=False) -> None:
        if not self.is_gathered and self.cuda_shard is None:
            self.cuda_shard, self.cpu_shard = self.cpu_shard, None

    def optim_update(self) -> None:
        self.payload.copy_(self.paired_chunk.payload)

    Chunk.shard_move = shard_move
    Chunk.optim_update = optim_update


def _gemini_needs_two_memories() -> bool:
    from colossalai.zero.gemini.chunk.chunk import Chunk

    stale = SimpleNamespace(
        is_gathered=False, optim_sync_flag=False, _Chunk__paired_shard_move=lambda **_: None
    )
    return raises(AssertionError, call=lambda: Chunk.shard_move(stale, torch.device("cpu")))


def never_pin_gemini_chunks() -> None:
    """booster/plugin/gemini_plugin.py:491 turns ``pin_memory`` on; without a device no memory can
    be pinned."""
    from colossalai.zero.gemini.chunk.chunk import Chunk

    original = Chunk.__init__

    def __init__(self, *args, **kwargs):
        original(self, *args, **{**kwargs, "pin_memory": False})

    Chunk.__init__ = __init__


def _gemini_pins() -> bool:
    from colossalai.booster.plugin import gemini_plugin

    return "pin_memory = True" in inspect.getsource(gemini_plugin.GeminiPlugin.__init__)


def reduce_gemini_chunks_at_once() -> None:
    """zero/gemini/chunk/chunk.py:417 frees the gradient right after an asynchronous reduce-scatter
    has begun.

    On a GPU the stream orders the two; gloo reads the memory from a thread of its own.
    """
    from colossalai.zero.gemini.chunk.chunk import Chunk

    original = Chunk.reduce

    def reduce(self, async_op: bool = False) -> None:
        original(self, async_op=False)

    Chunk.reduce = reduce


def _gemini_frees_early() -> bool:
    from colossalai.zero.gemini.chunk.chunk import Chunk

    lines = inspect.getsource(Chunk.reduce)
    return "async_op=async_op" in lines and "free_storage(self.cuda_global_chunk)" in lines


def measure_memory_without_cuda() -> None:
    """zero/gemini/memory_tracer/memory_monitor.py:135, legacy/utils/memory.py:85: Gemini's "auto"
    asks CUDA.

    Activations are counted as nothing and the capacity as this process's share of the machine, so
    that nothing is ever moved: there is nowhere to move it to.
    """
    import time

    import psutil
    import torch.distributed as dist
    from colossalai.legacy.utils import memory
    from colossalai.zero.gemini.memory_tracer.memory_monitor import SyncCudaMemoryMonitor

    def finish(self) -> int:
        self.time_stamps.append(time.time())
        self.mem_stats.append(0)
        return 0

    SyncCudaMemoryMonitor.start = lambda self: None
    SyncCudaMemoryMonitor.finish = finish
    memory.colo_device_memory_capacity = lambda device: (
        psutil.virtual_memory().total // dist.get_world_size()
    )


def _memory_monitor_needs_cuda() -> bool:
    from colossalai.zero.gemini.memory_tracer.memory_monitor import SyncCudaMemoryMonitor

    return raises(RuntimeError, AssertionError, call=SyncCudaMemoryMonitor().start)


def offer_torch_adam() -> None:
    """kernel/extensions/cuda_extension.py:33: the CPU Adam counts as a CUDA extension, hence never
    available."""
    from colossalai.kernel.kernel_loader import CPUAdamLoader

    from coati.parallel.compat.cpu.adam import TorchCpuAdamExtension

    CPUAdamLoader.register_extension(TorchCpuAdamExtension)


def _no_adam_kernel() -> bool:
    from colossalai.kernel.kernel_loader import CPUAdamLoader

    return raises(AssertionError, call=CPUAdamLoader().load)


def offer_sdpa() -> None:
    """kernel/kernel_loader.py:107-121: no attention kernel of ``enable_flash_attention`` runs on a
    CPU."""
    from colossalai.kernel import kernel_loader

    from coati.parallel.compat.cpu.attention import SdpaExtension

    for loader in (
        kernel_loader.FlashAttentionLoader,
        kernel_loader.FlashAttentionWithCustomMaskLoader,
        kernel_loader.FlashAttentionForFloatAndCustomMaskLoader,
    ):
        loader.register_extension(SdpaExtension)


def _no_attention_kernel() -> bool:
    from colossalai.kernel.kernel_loader import FlashAttentionForFloatAndCustomMaskLoader

    return raises(AssertionError, call=FlashAttentionForFloatAndCustomMaskLoader().load)


def let_gpt2_name_the_cpu() -> None:
    """shardformer/modeling/gpt2.py:258 calls ``torch.cuda.set_device`` with the device of its
    hidden states."""
    original = torch.cuda.set_device

    def set_device(device) -> None:
        if not (isinstance(device, torch.device) and device.type == "cpu"):
            original(device)

    torch.cuda.set_device = set_device


def _gpt2_sets_a_cuda_device() -> bool:
    from colossalai.shardformer.modeling import gpt2

    return "torch.cuda.set_device(hidden_states.device)" in inspect.getsource(gpt2)


CPU_PATCHES = (
    Patch(
        "cpu accelerator",
        "accelerator/cpu_accelerator.py:106",
        install_accelerator,
        _accelerator_raises,
    ),
    Patch(
        "zero device check",
        "zero/low_level/low_level_optim.py:254",
        drop_zero_device_check,
        _zero_checks_device,
    ),
    Patch(
        "zero overlap",
        "zero/low_level/low_level_optim.py:343",
        never_overlap_communication,
        _zero_records_stream,
    ),
    Patch(
        "gemini shards",
        "zero/gemini/chunk/chunk.py:321",
        keep_gemini_shards_in_place,
        _gemini_needs_two_memories,
    ),
    Patch(
        "gemini pinned memory",
        "booster/plugin/gemini_plugin.py:491",
        never_pin_gemini_chunks,
        _gemini_pins,
    ),
    Patch(
        "gemini reduce",
        "zero/gemini/chunk/chunk.py:417",
        reduce_gemini_chunks_at_once,
        _gemini_frees_early,
    ),
    Patch(
        "gemini auto placement",
        "zero/gemini/memory_tracer/memory_monitor.py:135",
        measure_memory_without_cuda,
        _memory_monitor_needs_cuda,
    ),
    Patch("cpu adam", "kernel/extensions/cuda_extension.py:33", offer_torch_adam, _no_adam_kernel),
    Patch("flash attention", "kernel/kernel_loader.py:107", offer_sdpa, _no_attention_kernel),
    Patch(
        "gpt2 device",
        "shardformer/modeling/gpt2.py:258",
        let_gpt2_name_the_cpu,
        _gpt2_sets_a_cuda_device,
    ),
    # These three are torch's: newer versions lack nothing and the functions then do nothing.
    Patch(
        "gloo reduce_scatter",
        "shardformer/layer/_operation.py:522",
        collectives.install_reduce_scatter,
        collectives.lacks_reduce_scatter,
    ),
    Patch(
        "gloo all_to_all",
        "shardformer/layer/_operation.py:1259",
        collectives.install_all_to_all,
        collectives.lacks_all_to_all,
    ),
    Patch(
        "gloo average",
        "quantization/fp8.py:164",
        collectives.install_average,
        collectives.lacks_average,
    ),
)
