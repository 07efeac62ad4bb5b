"""Packed sequences under a block-diagonal attention mask, without cross-contamination.

For models and plugins whose attention cannot take row boundaries (padding_free.py): a 4-d mask, one
number for each pair of tokens, goes through every attention of transformers that takes such masks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coati.utils.transformers_compat import body_name, masks_packs_itself, text_config

PROBE_LENGTHS = (3, 5)


def block_diagonal_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S) positions, 0 where a row begins -> (B, 1, S, S) to be added to attention scores: 0
    where a token may look at another (itself and what stands before it in its row), else the lowest
    number of ``dtype``. Padding, at position 0 each, looks at itself alone."""
    row = (position_ids == 0).cumsum(1)
    width = position_ids.shape[1]
    later = torch.ones(width, width, dtype=torch.bool, device=position_ids.device).triu(1)
    apart = (row[:, :, None] != row[:, None, :]) | later
    lowest = torch.finfo(dtype).min
    return torch.zeros(apart.shape, dtype=dtype, device=position_ids.device).masked_fill_(
        apart, lowest
    )[:, None]


def with_block_mask(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What a model is called with; of packs, which have ``position_ids``, the mask says which
    tokens are one row."""
    if "position_ids" not in inputs:
        return inputs
    if masks_packs_itself():
        # None, not a mask of padding: transformers 5 then tells rows apart where positions begin
        # anew, layer by layer, with windows and chunks.
        return inputs | {"attention_mask": None}
    return inputs | {"attention_mask": block_diagonal_mask(inputs["position_ids"], dtype)}


def sliding_window(config: Any) -> int | None:
    """The most tokens that a token of the model of ``config`` attends to, or None. Longer rows
    cannot be kept apart by one mask."""
    config = text_config(config)
    # Llama 4's chunks; the tokens that DeepSeek-V3.2's indexer chooses
    names = ["attention_chunk_size", "index_topk"]
    if getattr(config, "use_sliding_window", True) is not False:
        names.append("sliding_window")
    return min(filter(None, (getattr(config, name, None) for name in names)), default=None)


def holds_for(model: nn.Module) -> bool:
    """Whether ``model`` gives two rows in one sequence under the mask the outputs of each alone."""
    dtype = next(model.parameters()).dtype
    try:
        return rows_stay_apart(model, lambda batch: with_block_mask(batch, dtype))
    except (ValueError, RuntimeError, IndexError):  # the model builds its own masks
        return False


@torch.no_grad()
def rows_stay_apart(
    model: nn.Module, inputs_of: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> bool:
    """Whether ``model`` gives two rows in one sequence the outputs of each alone. Probed in
    evaluation mode, since with dropout the result could differ in a resumed run.

    ``inputs_of``: the probe's (1, T) ``input_ids, position_ids`` -> the model's keyword arguments.
    """
    device = next(model.parameters()).device
    training = model.training
    # A model with a scalar head names its backbone; through peft the prefix leads to the whole
    # model.
    backbone = getattr(model, "backbone", None) or getattr(model, body_name(model))
    ids = (
        torch.arange(sum(PROBE_LENGTHS), device=device)[None] % text_config(model.config).vocab_size
    )
    positions = torch.cat([torch.arange(length, device=device) for length in PROBE_LENGTHS])[None]
    model.eval()
    try:
        together = backbone(
            **inputs_of({"input_ids": ids, "position_ids": positions}), use_cache=False
        )[0]
        single = [
            backbone(input_ids=row, use_cache=False)[0] for row in ids.split(PROBE_LENGTHS, dim=1)
        ]
    except TypeError:  # a forward without these keywords
        return False
    finally:
        model.train(training)
    alone = torch.cat(single, dim=1)
    tolerance = 1e-5 if together.dtype == torch.float32 else 2e-2
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())
