"""Packs as they are: several rows in one sequence, kept apart by a block-diagonal mask.

For models and plugins to which rows cannot be given by their ends (models/varlen.py): a mask of one
number for each pair of tokens of a pack goes through every attention of transformers that takes
masks with four dimensions.
"""

from typing import Any

import torch
from torch import Tensor, nn

_PROBE_LENGTHS = (3, 5)


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
    return inputs | {"attention_mask": block_diagonal_mask(inputs["position_ids"], dtype)}


def sliding_window(config: Any) -> int | None:
    """Tokens that attention of the model of ``config`` looks back at most, or None: rows that long
    are all one mask can keep apart."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


@torch.no_grad()
def holds_for(model: nn.Module) -> bool:
    """Whether two rows in one sequence under the mask come out of ``model`` as each does alone."""
    device, training = next(model.parameters()).device, model.training
    dtype = next(model.parameters()).dtype
    backbone = getattr(model, "backbone", None) or getattr(model, model.base_model_prefix, None)
    ids = torch.arange(sum(_PROBE_LENGTHS), device=device)[None] % model.config.vocab_size
    positions = torch.cat([torch.arange(length, device=device) for length in _PROBE_LENGTHS])[None]
    inputs = with_block_mask({"input_ids": ids, "position_ids": positions}, dtype)
    model.eval()
    try:
        together = backbone(**inputs, use_cache=False)[0]
        alone = [
            backbone(input_ids=row, use_cache=False)[0] for row in ids.split(_PROBE_LENGTHS, dim=1)
        ]
    except (
        TypeError,
        ValueError,
        RuntimeError,
        IndexError,
    ):  # a forward without these keywords, or masks of its own
        return False
    finally:
        model.train(training)
    alone = torch.cat(alone, dim=1)
    tolerance = 1e-5 if together.dtype == torch.float32 else 2e-2
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())
