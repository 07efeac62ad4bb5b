"""Sampling from an engine's model on whatever plugin wraps it."""

from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from coati.models.generation.loop import Generated, generate
from coati.models.generation.sampling import Sampling
from coati.parallel.engine import Engine
from coati.parallel.plugin_checks import cannot_generate


def sample(
    engine: Engine,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    sampling: Sampling,
    stop_sequences: list[list[int]],
    max_new_tokens: int,
    pad_token_id: int,
    limits: Sequence[int] | None = None,
    noise: Tensor | None = None,
    return_logprobs: bool = False,
    rows_at_once: int | None = None,
) -> Generated:
    """:func:`coati.models.generation.loop.generate` for prompts (B, P), padded on the left, on the
    engine's plugin.

    Under gemini, whose every forward gathers parameters, all ranks must call it, each with its own
    rows; they return together, when the last row of the last rank has ended. The ranks of a
    tensor-parallel group must get the same rows and noise, and return the same tokens, bitwise.
    Otherwise ranks are independent. ``rows_at_once``: see there, and :func:`replaces_rows`.

    Raises:
        ValueError: for a model that :func:`cannot_sample` names, and what ``generate`` refuses.
    """
    reason = cannot_sample(engine)
    if reason:
        raise ValueError(reason)
    input_ids = input_ids.to(engine.device)
    attention_mask = attention_mask.to(engine.device)
    generated = generate(
        engine.model,
        input_ids,
        attention_mask,
        stop_sequences=stop_sequences,
        max_new_tokens=max_new_tokens,
        limits=limits,
        pad_token_id=pad_token_id,
        noise=noise,
        return_logprobs=return_logprobs,
        rows_at_once=rows_at_once,
        **vars(sampling),
        **_plugin_keywords(engine),
    )
    engine.work.add_generation(input_ids, attention_mask, generated.lengths)
    return generated


def replaces_rows(engine: Engine) -> bool:
    """Whether a row that has ended may give its place to the next. Ranks whose forward passes
    contain collectives take as many of them, which only whole batches make sure of."""
    return not engine.mesh.sharded_forward


def cannot_sample(engine: Engine) -> str | None:
    """Why the model of ``engine`` cannot generate, naming the flag; None where it can."""
    config = getattr(engine.plugin, "shard_config", None)  # of an engine made without boost()
    options = replace(
        engine.options,
        pp=max(engine.options.pp, engine.mesh.pp_size),
        enable_sequence_parallelism=engine.options.enable_sequence_parallelism
        or getattr(config, "enable_sequence_parallelism", False),
    )
    if reason := cannot_generate(options):
        return reason
    embeddings = getattr(engine.module, "get_output_embeddings", lambda: None)
    if embeddings() is None:
        return f"{type(engine.module).__name__} has no vocabulary head, so it cannot generate"
    return None


def _plugin_keywords(engine: Engine) -> dict:
    # On a GPU, row-by-row attention would cost more than the padding.
    keywords: dict = {"padding_free": engine.padding_free if engine.device.type == "cpu" else None}
    if engine.mesh.sharded_forward:
        keywords["stop_flag"] = engine.all_ranks
    if engine.mesh.tp_group is not None:
        group = engine.mesh.tp_group
        first = dist.get_global_rank(group, 0)

        def same_in_group(tensor: Tensor) -> Tensor:
            # The logits are equal up to rounding only; with other tokens the ranks would diverge.
            tensor = tensor.contiguous()
            dist.broadcast(tensor, first, group=group)
            return tensor

        keywords["synchronize"] = same_in_group
    return keywords
