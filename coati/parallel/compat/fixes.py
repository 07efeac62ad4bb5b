"""Fixes of ColossalAI 0.5.0 that every device needs; imported after
:func:`~coati.parallel.compat.import_colossalai.import_colossalai`. Paths are relative to the
``colossalai`` package."""

import math
from functools import wraps
from importlib import import_module
from types import SimpleNamespace

import torch
import torch.distributed as dist
from colossalai.booster.plugin import GeminiPlugin, HybridParallelPlugin, hybrid_parallel_plugin
from colossalai.nn.optimizer import CPUAdam, HybridAdam
from colossalai.nn.optimizer.nvme_optimizer import NVMeOptimizer
from colossalai.pipeline import p2p
from colossalai.shardformer.layer import _operation
from colossalai.shardformer.modeling import gpt2
from colossalai.tensor.d_tensor import (
    init_tensor_as_customization_distributed,
    is_customized_distributed_tensor,
    is_distributed_tensor,
)
from colossalai.zero.gemini.chunk.manager import ChunkManager
from colossalai.zero.gemini.gemini_ddp import GeminiDDP
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer

from coati.parallel.compat.patch import Patch, apply_all, lacks, mentions, raises
from coati.utils.transformers_compat import transformers_major


def gather_what_was_received() -> None:
    """shardformer/layer/_operation.py:464, 470: ``sp_mode="ring"`` keeps what it sent as what it
    gathered.

    Every weight gradient of a column-parallel linear is wrong. The gather is done at once, so
    nothing is reused.
    """

    def _ring_as_gather(
        func,
        input_to_gather=None,
        input_local=None,
        process_group=None,
        gather_dim=1,
        keep_item=False,
    ):
        gathered = {
            name: _operation._gather(shard, gather_dim, process_group)
            for name, shard in input_to_gather.items()
        }
        return func(**gathered, **input_local), gathered

    _operation._ring_as_gather = _ring_as_gather


def weigh_accumulated_gradients_once() -> None:
    """zero/gemini/chunk/manager.py:290: earlier micro-batches of a gathered chunk weigh ``pg_size``
    times too much.

    The accumulated gradient is multiplied by ``pg_size`` before it is reduced again, which is right
    for a shard (added by its owner alone) and wrong for a gathered chunk (added by every rank).
    """
    original = ChunkManager.rearrange_accumulated_grad_chunk

    def rearrange_accumulated_grad_chunk(self, chunk):
        if chunk.grad_chunk.is_gathered:
            chunk.grad_chunk.cuda_global_chunk.div_(chunk.pg_size)
        return original(self, chunk)

    ChunkManager.rearrange_accumulated_grad_chunk = rearrange_accumulated_grad_chunk


def _accumulation_is_overweighted() -> bool:
    grad_chunk = SimpleNamespace(is_gathered=True, cuda_global_chunk=torch.ones(4))
    chunk = SimpleNamespace(grad_chunk=grad_chunk, pg_size=2)
    manager = SimpleNamespace(init_grad_chunk=lambda chunk: chunk.grad_chunk)
    return (
        ChunkManager.rearrange_accumulated_grad_chunk(manager, chunk).cuda_global_chunk[0].item()
        != 1.0
    )


def clip_bf16_gradients() -> None:
    """nn/optimizer/hybrid_adam.py:126, cpu_adam.py:158: the bf16 branch forgets ``div_scale``.

    Gemini clips through ``div_scale``, so parameters on the CPU were never clipped in bf16.
    """
    original_update = CPUAdam.torch_adam_update

    def torch_adam_update(self, data, grad, *args, **kwargs):
        divisor = getattr(self, "_coati_div_scale", -1)
        grad = grad.to(data.dtype)
        return original_update(self, data, grad / divisor if divisor > 0 else grad, *args, **kwargs)

    def remembering(original_step):
        def step(self, closure=None, div_scale: float = -1):
            self._coati_div_scale = div_scale
            return original_step(self, closure, div_scale)

        return step

    CPUAdam.torch_adam_update = torch_adam_update
    for optimizer_class in (CPUAdam, HybridAdam):
        optimizer_class.step = remembering(optimizer_class.__dict__["step"])


def _bf16_is_not_clipped() -> bool:
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = object.__new__(CPUAdam)  # without the kernel that its __init__ wants
    NVMeOptimizer.__init__(
        optimizer, [param], {"lr": 0.1, "betas": (0.5, 0.5), "eps": 1e-8, "weight_decay": 0.0}
    )
    optimizer.adamw_mode = True
    param.grad = torch.ones_like(param)
    CPUAdam.step(optimizer, div_scale=2.0)
    return optimizer.state[param]["exp_avg"].item() != 0.25


def measure_the_norm_of_all_tensor_parallel_parts() -> None:
    """zero/gemini/gemini_optimizer.py:227: with ``tp_size`` > 1 each rank clips by the norm of its
    own part.

    Parameters that the ranks hold alike (norms) are then updated differently and drift apart.
    """
    original = GeminiOptimizer._calc_global_norm

    def _calc_global_norm(self) -> float:
        if self.tp_size == 1:
            return original(self)
        shared = _squared_norm_of_replicated_gradients(self)
        squares = torch.tensor([original(self) ** 2], dtype=torch.float64, device=shared.device)
        dist.all_reduce(squares, group=self.tp_group)
        # Every rank has counted the replicated parameters once.
        return math.sqrt(max(0.0, squares.item() - (self.tp_size - 1) * shared.item()))

    GeminiOptimizer._calc_global_norm = _calc_global_norm


def _is_split(tensor) -> bool:
    return is_distributed_tensor(tensor) or is_customized_distributed_tensor(tensor)


def _squared_norm_of_replicated_gradients(optimizer) -> torch.Tensor:
    """Sum of squares of the gradients of parameters that tensor parallelism does not split, a
    float64 scalar."""
    reused = optimizer.module.chunk_manager.reuse_fp16_chunk
    device = next(iter(optimizer.chunk16_set)).payload.device
    whole = torch.zeros((), dtype=torch.float64, device=device)
    groups = {
        chunk.torch_pg: torch.zeros_like(whole)
        for chunk in optimizer.chunk16_set
        if not chunk.keep_gathered
    }
    for index, slot in optimizer.id_to_fake_params.items():
        param = optimizer.id_to_real_params[index]
        if _is_split(param):
            continue
        chunk = optimizer.param_to_chunk16[slot]
        begin, end = optimizer.param_to_range[slot]
        gradient = (chunk if reused else chunk.grad_chunk).payload[begin:end]
        square = gradient.double().square().sum().to(device)
        (whole if chunk.keep_gathered else groups[chunk.torch_pg]).add_(square)
    for group, part in groups.items():
        dist.all_reduce(part, group=group)
        whole += part
    return whole


def count_fused_weights_as_split() -> None:
    """booster/plugin/hybrid_parallel_plugin.py:427, 633, 892: the norm takes fused weights
    (GPT-2's) for replicated.

    Their gradients then weigh 1 / tp_size of what they should, and clipping is by a norm too small.
    """
    hybrid_parallel_plugin.is_distributed_tensor = _is_split


def _norm_takes_fused_weights_for_replicated() -> bool:
    fused = torch.nn.Parameter(torch.zeros(2))
    init_tensor_as_customization_distributed(fused, shard_fn=lambda t: t, gather_fn=lambda t: t)
    return not hybrid_parallel_plugin.is_distributed_tensor(fused)


_NO_LABELS = object()
_GLOO = SimpleNamespace(name=lambda: "gloo")  # a backend as p2p sees it


def let_gpt2_run_without_labels() -> None:
    """shardformer/modeling/gpt2.py:390: ``loss`` is unbound where GPT-2 is split and no labels are
    given."""
    forward = gpt2.GPT2PipelineForwards.gpt2_lmhead_model_forward
    cross_entropy = gpt2.dist_cross_entropy

    @wraps(forward)
    def gpt2_lmhead_model_forward(self, *args, labels=None, **kwargs):
        return forward(self, *args, labels=_NO_LABELS if labels is None else labels, **kwargs)

    def dist_cross_entropy(labels, *args, **kwargs):
        return None if labels is _NO_LABELS else cross_entropy(labels, *args, **kwargs)

    gpt2.GPT2PipelineForwards.gpt2_lmhead_model_forward = staticmethod(gpt2_lmhead_model_forward)
    gpt2.dist_cross_entropy = dist_cross_entropy


def send_over_any_backend() -> None:
    """pipeline/p2p.py:159: ``is_hccl_available`` and ``Backend.HCCL`` exist only in torch for
    Ascend."""
    p2p._check_for_nccl_hccl_backend = p2p.check_for_nccl_backend


def keep_groups_until_the_end() -> None:
    """booster/plugin/hybrid_parallel_plugin.py:1256: a plugin destroys its process groups when it
    is collected.

    Ranks collect garbage at different times, so one may name or use groups that another has already
    lost: with a second plugin in the process, collectives wait for ever. At the interpreter's end
    the finalizer fails with a traceback. The groups end with the process instead.
    """
    for plugin in (GeminiPlugin, HybridParallelPlugin):
        if "__del__" in vars(plugin):
            del plugin.__del__


def infer_before_the_first_step() -> None:
    """zero/gemini/gemini_ddp.py:278: placement "auto" refuses a forward without gradient before the
    first iteration.

    That iteration records in which order chunks are needed; what an inference recorded before it is
    removed again.
    """
    original = GeminiDDP.forward

    @wraps(original)
    def forward(self, *args, **kwargs):
        manager = self.gemini_manager
        if torch.is_grad_enabled() or not (manager.need_warmup and manager.is_warmup()):
            return original(self, *args, **kwargs)
        policy = manager.policy_name
        known = len(manager._compute_list)
        manager.policy_name = "static"  # asked for in the assertion alone
        try:
            return original(self, *args, **kwargs)
        finally:
            manager.policy_name = policy
            del manager._compute_list[known:]
            manager._get_layout_info.cache_clear()

    GeminiDDP.forward = forward


def split_by_transformers_plans() -> None:
    """shardformer/policies/*.py: the policies copy the forward passes of transformers 4.51 and fail
    with 5, or take the first row of a layer's output for the whole."""
    from colossalai.shardformer.shard import sharder

    from coati.parallel.policy.transformers_policy import TransformersPolicy

    sharder.get_autopolicy = lambda model: TransformersPolicy()


FIXES: tuple[Patch, ...] = (
    Patch(
        "ring gather",
        "shardformer/layer/_operation.py:470",
        gather_what_was_received,
        mentions(_operation._ring_as_gather, "input_tensors.append(send_tensors)"),
    ),
    Patch(
        "gemini accumulation",
        "zero/gemini/chunk/manager.py:290",
        weigh_accumulated_gradients_once,
        _accumulation_is_overweighted,
    ),
    Patch(
        "bf16 clipping",
        "nn/optimizer/hybrid_adam.py:126",
        clip_bf16_gradients,
        _bf16_is_not_clipped,
    ),
    Patch(
        "gemini tensor-parallel norm",
        "zero/gemini/gemini_optimizer.py:227",
        measure_the_norm_of_all_tensor_parallel_parts,
        lacks(GeminiOptimizer._calc_global_norm, "tp_group"),
    ),
    Patch(
        "norm of fused weights",
        "booster/plugin/hybrid_parallel_plugin.py:427",
        count_fused_weights_as_split,
        _norm_takes_fused_weights_for_replicated,
    ),
    Patch(
        "gpt2 without labels",
        "shardformer/modeling/gpt2.py:390",
        let_gpt2_run_without_labels,
        lacks(gpt2.GPT2PipelineForwards.gpt2_lmhead_model_forward, "loss = None"),
    ),
    Patch(
        "groups of a collected plugin",
        "booster/plugin/hybrid_parallel_plugin.py:1256",
        keep_groups_until_the_end,
        mentions(HybridParallelPlugin.__del__, "destroy_mesh_process_groups"),
    ),
    Patch(
        "gemini inference",
        "zero/gemini/gemini_ddp.py:278",
        infer_before_the_first_step,
        mentions(GeminiDDP.forward, "warmup"),
    ),
    Patch(
        "p2p backend",
        "pipeline/p2p.py:159",
        send_over_any_backend,
        raises(AttributeError, call=lambda: p2p._check_for_nccl_hccl_backend(_GLOO)),
    ),
)

if transformers_major() >= 5:
    FIXES += (
        Patch(
            "policies of transformers 5",
            "shardformer/shard/sharder.py:33",
            split_by_transformers_plans,
            raises(
                ImportError, call=lambda: import_module("colossalai.shardformer.modeling.llama")
            ),
        ),
    )


def apply() -> list[str]:
    """Fix ColossalAI in this process, on any device. Idempotent; returns the names of the fixes
    applied now."""
    return apply_all(FIXES)
