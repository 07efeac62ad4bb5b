"""Tensor parallelism by a plan: linear layers split by columns or rows, the vocabulary by rows,
experts by their inner width."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from colossalai.shardformer.layer import (
    GPT2FusedLinearConv1D_Col,
    GPT2FusedLinearConv1D_Row,
    Linear1D_Col,
    Linear1D_Row,
    VocabParallelEmbedding1D,
    VocabParallelLMHead1D,
)
from colossalai.shardformer.policies.base_policy import SubModuleReplacementDescription
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coati.parallel.policy.experts import (
    split_expert_adapters,
    split_experts,
    split_parameter,
)
from coati.parallel.policy.plan import COUNTS, HEAD_NORM, Styles, tp_plan
from coati.parallel.policy.sequence import sum_gradients, sum_of
from coati.utils.transformers_compat import text_config

LINEAR: dict[str, tuple[Any, dict[str, Any]]] = {
    "colwise": (Linear1D_Col, {}),
    "rowwise": (Linear1D_Row, {}),
    "colwise_gather_output": (Linear1D_Col, {"gather_output": True}),
    "rowwise_split_input": (Linear1D_Row, {"parallel_input": False}),
}
_CHANGED_IN_PLACE = ("falcon", "llama4_text")
# The embedding is split by _split_vocabulary whatever a plan says of it.
_EMBEDDING = ("embedding_rowwise", "embedding_colwise")


def split(policy, described: dict) -> None:
    """Describe in ``described`` how the layers of ``policy.inner`` are split.

    Raises ValueError for a style that is not known here.
    """
    styles = Styles(tp_plan(policy.inner.config))
    group = policy.shard_config.tensor_parallel_process_group
    family = text_config(policy.inner.config).model_type
    replaced = policy.describe(described, policy.base).sub_module_replacement
    for name, module in policy.base.named_modules():
        style = styles.of(name)
        if style is None or style in _EMBEDDING or style == "replicate":
            continue
        if style == HEAD_NORM:
            sum_gradients(module.parameters(), group)
        elif style == "moe_tp_experts":
            split_experts(split_expert_adapters(module, name, styles, group), name, styles, group)
        elif style == "mla_kv_a_proj":
            _sum_shared_key(module, policy.base.config.kv_lora_rank, group)
        elif isinstance(module, BaseTunerLayer):
            replaced.extend(_adapted(name, module, style))
        elif isinstance(module, nn.Linear) and style in LINEAR:
            target, keywords = LINEAR[style]
            if target is Linear1D_Row and family in _CHANGED_IN_PLACE:
                target = _FreshRow
            replaced.append(SubModuleReplacementDescription(name, target, kwargs=dict(keywords)))
        elif isinstance(module, Conv1D):
            replaced.append(SubModuleReplacementDescription(name, *_conv1d(module, style)))
        else:
            raise ValueError(
                f"--tp: the plan of {policy.base.config.model_type} models asks {style} of {name} "
                f"({type(module).__name__}), which is not known here; use --pp or --plugin zero2"
            )
    _split_attention_parameters(policy, styles, group)
    _divide_counts(policy, dist.get_world_size(group))
    _split_alibi(policy.base, group)
    _split_vocabulary(policy, described)


def _adapted(name: str, module: Any, style: str) -> Iterator[SubModuleReplacementDescription]:
    """A layer with LoRA: of one split by columns B (r -> out) is split with it, of one split by
    rows A (in -> r); the other factor stays whole, and its gradient is the same everywhere."""
    base = module.get_base_layer()
    if style not in LINEAR or not isinstance(base, nn.Linear):
        raise ValueError(
            f"--tp with LoRA: {name} ({type(base).__name__}, {style}) cannot be split together "
            "with an adapter; leave it out of target_modules, or use --plugin zero2"
        )
    if hasattr(module, "pissa_A"):
        raise ValueError(
            "--tp with LoRA: adapters that start from principal singular vectors (PiSSA) cannot be "
            "split; use lora_initialization_method kaiming_uniform, or --plugin zero2"
        )
    target, keywords = LINEAR[style]
    factor = "lora_B" if target is Linear1D_Col else "lora_A"
    for part in ("base_layer", *(f"{factor}.{key}" for key in getattr(module, factor))):
        yield SubModuleReplacementDescription(f"{name}.{part}", target, kwargs=dict(keywords))


def _conv1d(module: nn.Module, style: str) -> tuple[Any, dict[str, Any]]:
    """The layer and keywords for GPT-2's transposed linear layers."""
    if style == "rowwise":
        return GPT2FusedLinearConv1D_Row, {}
    out = module.nf  # of a layer on another stage the weight is gone
    sizes = [out // 3] * 3 if style == "fused_colwise" else [out]
    return GPT2FusedLinearConv1D_Col, {"split_sizes": sizes}


def _split_attention_parameters(policy, styles: Styles, group: dist.ProcessGroup) -> None:
    """Parameters that are no module of their own and of no expert: attention sinks."""
    experts = [n for n, _ in policy.base.named_modules() if styles.of(n) == "moe_tp_experts"]
    modules = dict(policy.base.named_modules())
    for name, _ in list(policy.base.named_parameters()):
        parent, _, own = name.rpartition(".")
        style = styles.of(name)
        if style is not None and parent not in experts:
            split_parameter(modules[parent], own, style, group)


def _sum_shared_key(module: nn.Module, rank: int, group: dist.ProcessGroup) -> None:
    """Of a projection to (latent, rotary key): each process's heads use the rotary key as it is,
    so its gradient is summed; the latent's is, by the layer that expands it."""

    def summed(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        latent = output[..., :rank]
        key = output[..., rank:]
        if key.requires_grad:
            key.register_hook(lambda grad: sum_of(grad, group))
        return torch.cat([latent, key], dim=-1)

    module.register_forward_hook(summed)


def _divide_counts(policy, ways: int) -> None:
    """Attributes that modules reshape by."""
    counts = Styles(COUNTS.get(text_config(policy.inner.config).model_type, {}))
    for name, module in policy.base.named_modules():
        for attribute in counts.of(name) or ():
            setattr(module, attribute, max(getattr(module, attribute) // ways, 1))


def _split_alibi(base: nn.Module, group: dist.ProcessGroup) -> None:
    """BLOOM's position biases: those of this process's heads."""
    build = getattr(base, "build_alibi_tensor", None)
    if build is None:
        return
    ways = dist.get_world_size(group)
    rank = dist.get_rank(group)

    def build_mine(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        whole = build(attention_mask, num_heads, dtype)  # (B x heads, 1, S)
        mine = whole.view(-1, num_heads, *whole.shape[1:]).chunk(ways, dim=1)[rank]
        return mine.reshape(-1, *whole.shape[1:])

    base.build_alibi_tensor = build_mine


class _FreshRow:
    """Linear1D_Row whose output the model may change in place, which autograd refuses of its own
    (the sum over processes returns its input)."""

    @staticmethod
    def from_native_module(module: nn.Module, *args: Any, **keywords: Any) -> nn.Module:
        made = Linear1D_Row.from_native_module(module, *args, **keywords)
        made.register_forward_hook(lambda module, args, output: output.clone())
        return made


class _ScaledVocabParallelEmbedding:
    """ColossalAI's split embedding for one that scales its output (Gemma)."""

    @staticmethod
    def from_native_module(module: nn.Module, *args: Any, **keywords: Any) -> nn.Module:
        scale = module.embed_scale
        made = VocabParallelEmbedding1D.from_native_module(module, *args, **keywords)
        if isinstance(scale, Tensor):  # a buffer, which follows the module to its device
            made.register_buffer("embed_scale", scale, persistent=False)
        else:
            made.embed_scale = scale

        def scaled(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            factor = module.embed_scale
            return output * (factor.to(output.dtype) if isinstance(factor, Tensor) else factor)

        made.register_forward_hook(scaled)
        return made


def _split_vocabulary(policy, described: dict) -> None:
    size = {"make_vocab_size_divisible_by": policy.shard_config.make_vocab_size_divisible_by}
    embedding = policy.base.get_input_embeddings()
    plain = type(embedding) is nn.Embedding
    if isinstance(embedding, BaseTunerLayer):
        raise ValueError(
            "--tp with LoRA: an adapter of the token embedding cannot be split; leave it out of "
            "target_modules, or use --plugin zero2"
        )
    if not plain and not hasattr(embedding, "embed_scale"):
        raise ValueError(
            f"--tp: {type(embedding).__name__} cannot be split over processes; use --pp or "
            "--plugin zero2"
        )
    target = VocabParallelEmbedding1D if plain else _ScaledVocabParallelEmbedding
    policy.describe(described, policy.base).sub_module_replacement.append(
        SubModuleReplacementDescription(_name_of(embedding, policy.base), target, kwargs=size)
    )
    head = getattr(policy.inner, "get_output_embeddings", lambda: None)()
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            "--tp with LoRA: an adapter of the vocabulary head cannot be split; leave it out of "
            "target_modules, or use --plugin zero2"
        )
    if head is not None and policy.inner is not policy.base:
        # The model's own forward expects whole rows of logits, its loss too.
        keywords = size | {"gather_output": True}
        policy.describe(described, policy.inner).sub_module_replacement.append(
            SubModuleReplacementDescription(
                _name_of(head, policy.inner), VocabParallelLMHead1D, kwargs=keywords
            )
        )


def _name_of(module: nn.Module, root: nn.Module) -> str:
    return next(name for name, each in root.named_modules() if each is module)
