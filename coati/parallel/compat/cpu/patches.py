"""What stands between ColossalAI 0.5.0 and a machine without an accelerator: one function per
obstacle.

Paths are relative to the ``colossalai`` package. Everything here is applied by
:func:`coati.parallel.compat.cpu.apply` alone.
"""

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.distributed as dist
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.booster.plugin.gemini_plugin import GeminiPlugin
from colossalai.kernel import kernel_loader
from colossalai.legacy.utils import memory
from colossalai.shardformer.layer import qkv_fused_linear
from colossalai.shardformer.modeling import gpt2
from colossalai.zero.gemini.chunk.chunk import Chunk
from colossalai.zero.gemini.memory_tracer.memory_monitor import SyncCudaMemoryMonitor
from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

from coati.parallel.compat.cpu import collectives
from coati.parallel.compat.cpu.accelerator import GlooCpuAccelerator
from coati.parallel.compat.cpu.adam import TorchCpuAdam
from coati.parallel.compat.cpu.attention import sdpa_attention
from coati.parallel.compat.patch import Patch, apply_all, mentions, raises


def install_accelerator() -> None:
    """accelerator/cpu_accelerator.py:106 ff.: streams, seeds and memory figures raise instead of
    doing nothing."""
    set_accelerator(GlooCpuAccelerator())


def drop_zero_device_check() -> None:
    """zero/low_level/low_level_optim.py:254: asserts that the accelerator is called cuda or npu."""

    def check_dtypes(self) -> None:
        for group in self.optim.param_groups:
            for param in group["params"]:
                if not getattr(param, "skip_zero_check", False) and param.dtype != self._dtype:
                    raise TypeError(
                        f"ZeRO expects parameters of {self._dtype}, but found one of {param.dtype}"
                    )

    LowLevelZeroOptimizer._sanity_checks = check_dtypes


def _force(owner: type, method: str, **forced: Any) -> None:
    """Call ``method`` of ``owner`` with the keywords ``forced``, whatever it is called with."""
    original = getattr(owner, method)

    def changed(self, *args, **kwargs):
        return original(self, *args, **kwargs | forced)

    setattr(owner, method, changed)


def never_overlap_communication() -> None:
    """zero/low_level/low_level_optim.py:343: ``Tensor.record_stream`` has no CPU kernel."""
    _force(LowLevelZeroOptimizer, "__init__", overlap_communication=False)


def keep_gemini_shards_in_place() -> None:
    """zero/gemini/chunk/chunk.py:321, 504: a shard moves between "cuda" and "cpu"; here both are
    the same memory.

    ``ChunkManager.access_chunk`` asks every chunk whose device is "cpu" to move first, a gathered
    one too. The update of a "cpu" shard is put off until it moves, which a saved state dict would
    miss; here it is made at once.
    """

    def shard_move(self, device, force_copy=False, non_blocking=False) -> None:
        if not self.is_gathered and self.cuda_shard is None:
            self.cuda_shard, self.cpu_shard = self.cpu_shard, None

    def optim_update(self) -> None:
        self.payload.copy_(self.paired_chunk.payload)

    Chunk.shard_move = shard_move
    Chunk.optim_update = optim_update


def never_pin_gemini_chunks() -> None:
    """booster/plugin/gemini_plugin.py:491 turns ``pin_memory`` on; without a device no memory can
    be pinned."""
    _force(Chunk, "__init__", pin_memory=False)


def reduce_gemini_chunks_at_once() -> None:
    """zero/gemini/chunk/chunk.py:417 frees the gradient right after an asynchronous reduce-scatter
    has begun.

    On a GPU the stream orders the two; gloo reads the memory from a thread of its own.
    """
    _force(Chunk, "reduce", async_op=False)


def measure_memory_without_cuda() -> None:
    """zero/gemini/memory_tracer/memory_monitor.py:135, legacy/utils/memory.py:85: Gemini's "auto"
    asks CUDA.

    Activations are counted as nothing and the capacity as this process's share of the machine, so
    that nothing is ever moved: there is nowhere to move it to.
    """

    def finish(self) -> int:
        self.time_stamps.append(time.time())
        self.mem_stats.append(0)
        return 0

    SyncCudaMemoryMonitor.start = lambda self: None
    SyncCudaMemoryMonitor.finish = finish
    memory.colo_device_memory_capacity = lambda device: (
        psutil.virtual_memory().total // dist.get_world_size()
    )


def _extension(name: str, kernel: Any) -> type:
    """``kernel`` as ColossalAI's loader wants it: always there, chosen last."""
    return type(
        name,
        (),
        {
            "name": name,
            "priority": 0,
            "is_available": lambda self: True,
            "assert_compatible": lambda self: None,
            "load": lambda self: kernel,
        },
    )


def offer_torch_adam() -> None:
    """kernel/extensions/cuda_extension.py:33: the CPU Adam counts as a CUDA extension, hence never
    available."""
    module = SimpleNamespace(CPUAdamOptimizer=TorchCpuAdam)
    kernel_loader.CPUAdamLoader.register_extension(_extension("cpu_adam_torch", module))


def offer_sdpa() -> None:
    """kernel/kernel_loader.py:107-121: no attention kernel of ``enable_flash_attention`` runs on a
    CPU."""
    for loader in (
        kernel_loader.FlashAttentionLoader,
        kernel_loader.FlashAttentionWithCustomMaskLoader,
        kernel_loader.FlashAttentionForFloatAndCustomMaskLoader,
    ):
        loader.register_extension(_extension("flash_attention_sdpa_cpu", sdpa_attention))


def let_gpt2_name_the_cpu() -> None:
    """shardformer/modeling/gpt2.py:258 calls ``torch.cuda.set_device`` with the device of its
    hidden states."""
    original = torch.cuda.set_device

    def set_device(device) -> None:
        if not (isinstance(device, torch.device) and device.type == "cpu"):
            original(device)

    torch.cuda.set_device = set_device


def gather_fused_weights_where_they_are() -> None:
    """shardformer/layer/qkv_fused_linear.py:125: GPT-2's fused weights are moved to a GPU to be
    gathered, also where there is none."""

    def gather_fused_qkv_in_gpt2_style(qkv, split_sizes, process_group, is_transposed=False):
        ways = dist.get_world_size(process_group)
        dim = -1 if is_transposed else 0
        found = [torch.empty_like(qkv) for _ in range(ways)]
        dist.all_gather(found, qkv.contiguous(), group=process_group)
        parts = [each.split([size // ways for size in split_sizes], dim=dim) for each in found]
        return torch.cat([part[i] for i in range(len(split_sizes)) for part in parts], dim=dim)

    qkv_fused_linear.gather_fused_qkv_in_gpt2_style = gather_fused_qkv_in_gpt2_style


_EMPTY_OPTIMIZER = SimpleNamespace(optim=SimpleNamespace(param_groups=[]), _dtype=torch.float32)
_STALE_CHUNK = SimpleNamespace(
    is_gathered=False, optim_sync_flag=False, _Chunk__paired_shard_move=lambda **_: None
)

CPU_PATCHES = (
    Patch(
        "cpu accelerator",
        "accelerator/cpu_accelerator.py:106",
        install_accelerator,
        raises(RuntimeError, call=CpuAccelerator().current_stream),
    ),
    Patch(
        "zero device check",
        "zero/low_level/low_level_optim.py:254",
        drop_zero_device_check,
        raises(AssertionError, call=lambda: LowLevelZeroOptimizer._sanity_checks(_EMPTY_OPTIMIZER)),
    ),
    Patch(
        "zero overlap",
        "zero/low_level/low_level_optim.py:343",
        never_overlap_communication,
        mentions(LowLevelZeroOptimizer._run_reduction, "record_stream"),
    ),
    Patch(
        "gemini shards",
        "zero/gemini/chunk/chunk.py:321",
        keep_gemini_shards_in_place,
        raises(AssertionError, call=lambda: Chunk.shard_move(_STALE_CHUNK, torch.device("cpu"))),
    ),
    Patch(
        "gemini pinned memory",
        "booster/plugin/gemini_plugin.py:491",
        never_pin_gemini_chunks,
        mentions(GeminiPlugin.__init__, "pin_memory = True"),
    ),
    Patch(
        "gemini reduce",
        "zero/gemini/chunk/chunk.py:417",
        reduce_gemini_chunks_at_once,
        mentions(Chunk.reduce, "async_op=async_op", "free_storage(self.cuda_global_chunk)"),
    ),
    Patch(
        "gemini auto placement",
        "zero/gemini/memory_tracer/memory_monitor.py:135",
        measure_memory_without_cuda,
        raises(RuntimeError, AssertionError, call=lambda: SyncCudaMemoryMonitor().start()),
    ),
    Patch(
        "cpu adam",
        "kernel/extensions/cuda_extension.py:33",
        offer_torch_adam,
        raises(AssertionError, call=lambda: kernel_loader.CPUAdamLoader().load()),
    ),
    Patch(
        "flash attention",
        "kernel/kernel_loader.py:107",
        offer_sdpa,
        raises(
            AssertionError,
            call=lambda: kernel_loader.FlashAttentionForFloatAndCustomMaskLoader().load(),
        ),
    ),
    Patch(
        "gpt2 device",
        "shardformer/modeling/gpt2.py:258",
        let_gpt2_name_the_cpu,
        mentions(gpt2, "torch.cuda.set_device(hidden_states.device)"),
    ),
    Patch(
        "gpt2 weights",
        "shardformer/layer/qkv_fused_linear.py:125",
        gather_fused_weights_where_they_are,
        mentions(qkv_fused_linear.gather_fused_qkv_in_gpt2_style, "qkv.cuda()"),
    ),
    # The rest is torch's: newer versions may need none of it, and the functions then do nothing.
    Patch(
        "gloo reduce_scatter",
        "shardformer/layer/_operation.py:522",
        partial(
            collectives.install,
            "reduce_scatter",
            collectives.reduce_scatter,
            collectives.sends_chunks_twice,
        ),
        collectives.sends_chunks_twice,
    ),
    Patch(
        "gloo reduce_scatter_tensor",
        "zero/low_level/low_level_optim.py:382",
        partial(
            collectives.install,
            "reduce_scatter_tensor",
            collectives.reduce_scatter_tensor,
            collectives.sends_chunks_twice,
        ),
        collectives.sends_chunks_twice,
    ),
    Patch(
        "gloo all_to_all",
        "shardformer/layer/_operation.py:1259",
        partial(
            collectives.install, "all_to_all", collectives.all_to_all, collectives.lacks_all_to_all
        ),
        collectives.lacks_all_to_all,
    ),
    Patch(
        "gloo average",
        "quantization/fp8.py:164",
        partial(
            collectives.install,
            "all_reduce",
            collectives.averaging(dist.all_reduce),
            collectives.lacks_average,
        ),
        collectives.lacks_average,
    ),
)


def apply() -> list[str]:
    """Make ColossalAI run on this CPU; nothing happens where CUDA is available.

    Idempotent; call it before a process group or a plugin is built. Returns the names of the
    patches applied now.
    """
    return [] if torch.cuda.is_available() else apply_all(CPU_PATCHES)
