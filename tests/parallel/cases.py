"""What the ranks of tests/parallel do: a tiny Llama trained for a few steps under one plugin."""

import torch
import torch.distributed as dist

from tests.distributed.spawn import join_group
from tests.tiny import tiny_llama

STEPS, ROWS, LENGTH, LR, CLIP = 4, 8, 32, 5e-3, 0.5


def batch() -> dict[str, torch.Tensor]:
    """ROWS rows of LENGTH token ids, the same on every rank and at every step."""
    tokens = torch.randint(0, 384, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def train_alone() -> tuple[list[float], list[float]]:
    """The losses and gradient norms of plain PyTorch on one process in fp32."""
    model = tiny_llama(attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = model(**batch()).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def _build(name: str, precision: str, options: dict):
    from colossalai.booster import plugin

    common = {"precision": precision, "max_norm": CLIP, **options}
    if name == "zero2":
        return plugin.LowLevelZeroPlugin(stage=2, **common)
    if name == "gemini":
        return plugin.GeminiPlugin(initial_scale=2**8, **common)
    return plugin.HybridParallelPlugin(**{"tp_size": 1, "pp_size": 1, "zero_stage": 0, **common})


def _optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    from colossalai.nn.optimizer import HybridAdam

    return (torch.optim.AdamW if name == "3d" else HybridAdam)(
        model.parameters(), lr=LR, weight_decay=0.0
    )


def _loss(model, rows: dict) -> torch.Tensor:
    from colossalai.zero import GeminiDDP

    if not isinstance(model, GeminiDDP):
        return model(**rows).loss
    head = model.unwrap().get_output_embeddings()
    # Gemini turns in-place operations on its tensors into others, ColossalAI's own tensor-parallel
    # loss included.
    head.gather_output = True
    logits = model(rows["input_ids"], rows["attention_mask"]).logits.as_subclass(torch.Tensor)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), rows["labels"][:, 1:].flatten()
    )


def _forward_backward(booster, model, optimizer, rows: dict, micro_batches: int) -> torch.Tensor:
    """This micro-batch's share of the loss, on every rank that works on it; gradients made."""
    if booster.plugin.__class__.__name__ != "HybridParallelPlugin" or booster.plugin.pp_size == 1:
        loss = _loss(model, rows) / micro_batches
        booster.backward(loss, optimizer)
        return loss.detach().float().reshape(1)
    out = booster.execute_pipeline(
        iter([rows]), model, lambda outputs, _: outputs[0], optimizer, return_loss=True
    )
    last = booster.plugin.stage_manager.is_last_stage(ignore_chunk=True)
    loss = out["loss"].detach().float().reshape(1) if last else torch.zeros(1)
    dist.all_reduce(loss, group=booster.plugin.pp_group)
    return loss


def train(
    name: str, precision: str, options: dict, micro_batches: int = 1
) -> tuple[list[float], list[float]]:
    """The losses of each step, averaged over all ranks, and this rank's gradient norms."""
    join_group()
    from colossalai.booster import Booster

    model = tiny_llama(attn_implementation="eager")
    plugin = _build(name, precision, options)
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, _optimizer(name, model))
    # Not plugin.dp_size: with sequence parallelism that counts the ranks which share a sequence
    # too.
    replicas = (
        None if name == "zero2" else plugin.zero_group if name == "gemini" else plugin.dp_group
    )
    rows = {
        k: v.chunk(dist.get_world_size(replicas))[dist.get_rank(replicas)]
        for k, v in batch().items()
    }
    losses, norms = [], []
    for _ in range(STEPS):
        total = torch.zeros(1)
        for index in range(micro_batches):
            part = {key: value.chunk(micro_batches)[index] for key, value in rows.items()}
            total += _forward_backward(booster, model, optimizer, part, micro_batches)
        optimizer.step()
        norms.append(float(optimizer.get_grad_norm()))
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses, norms
