"""Tensor parallelism by a plan: linear layers split by columns or rows, the vocabulary by rows."""

import torch.distributed as dist
from colossalai.shardformer.layer import (
    Linear1D_Col,
    Linear1D_Row,
    VocabParallelEmbedding1D,
    VocabParallelLMHead1D,
)
from colossalai.shardformer.policies.base_policy import SubModuleReplacementDescription
from torch import Tensor, nn

from coati.parallel.policy.plan import Styles, tp_plan

LAYERS = {
    "colwise": (Linear1D_Col, {}),
    "rowwise": (Linear1D_Row, {}),
    "colwise_gather_output": (Linear1D_Col, {"gather_output": True}),
    "rowwise_split_input": (Linear1D_Row, {"parallel_input": False}),
}
IGNORED = {
    "moe_tp_experts",
    "packed_colwise",
    "packed_rowwise",
    "replicate",
    "embedding_rowwise",
    "embedding_colwise",
}


def split(policy, described: dict) -> None:
    """Describe in ``described`` how the layers of ``policy.model`` are split."""
    _split_linears(policy, described)
    _split_vocabulary(policy, described)


def _split_linears(policy, described: dict) -> None:
    styles = Styles(tp_plan(policy.model.config))
    group = policy.shard_config.tensor_parallel_process_group
    replaced = policy.describe(described, policy.base).sub_module_replacement
    for name, module in policy.base.named_modules():
        style = styles.of(name)
        if style in LAYERS and isinstance(module, nn.Linear):
            target, keywords = LAYERS[style]
            replaced.append(SubModuleReplacementDescription(name, target, kwargs=dict(keywords)))
        elif style == "replicated_with_grad_allreduce":
            # A norm of each head: every process sees its own heads only.
            for parameter in module.parameters():
                parameter.register_hook(lambda grad: _sum_over(grad, group))
        elif style is not None and style not in IGNORED and style not in LAYERS:
            raise ValueError(f"transformers' plan asks {style} of {name}, which is not done here")


def _split_vocabulary(policy, described: dict) -> None:
    size = {"make_vocab_size_divisible_by": policy.shard_config.make_vocab_size_divisible_by}
    embedding = policy.base.get_input_embeddings()
    if type(embedding) is nn.Embedding:
        policy.describe(described, policy.base).sub_module_replacement.append(
            SubModuleReplacementDescription(
                _name_of(embedding, policy.base), VocabParallelEmbedding1D, kwargs=size
            )
        )
    elif policy.tied:
        return  # an embedding that scales its output stays whole, and so the head that shares it
    get_head = getattr(policy.model, "get_output_embeddings", lambda: None)
    head = get_head()
    if head is not None and policy.model is not policy.base:
        keywords = size | {"gather_output": not policy.shard_config.parallel_output}
        policy.describe(described, policy.model).sub_module_replacement.append(
            SubModuleReplacementDescription(
                _name_of(head, policy.model), VocabParallelLMHead1D, kwargs=keywords
            )
        )


def _name_of(module: nn.Module, root: nn.Module) -> str:
    return next(name for name, each in root.named_modules() if each is module)


def _sum_over(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    grad = grad.contiguous().clone()
    dist.all_reduce(grad, group=group)
    return grad
