"""Packed sequences under a block-diagonal attention mask, without cross-contamination.

For models and plugins whose attention cannot take row boundaries (padding_free.py): a 4-d mask, one
number for each pair of tokens, goes through every attention of transformers that takes such masks.
"""

from collections.abc import Callable, Sequence
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
    found = [getattr(config, name, None) for name in names]
    if blocks := getattr(config, "index_topk_blocks", None):  # MiniMax-M3 chooses whole blocks
        found.append(blocks * config.index_block_size)
    return min(filter(None, found), default=None)


def counts_blocks(config: Any) -> bool:
    """Whether the model of ``config`` attends to blocks of tokens counted from the beginning of the
    sequence, whatever rows are in it, as MiniMax-M3's; a probe within one block shows nothing."""
    return bool(getattr(text_config(config), "index_topk_blocks", None))


def holds_for(model: nn.Module) -> bool:
    """Whether ``model`` gives two rows in one sequence under the mask the outputs of each alone."""
    if counts_blocks(model.config):
        return False
    dtype = next(model.parameters()).dtype
    try:
        return rows_stay_apart(model, lambda batch: with_block_mask(batch, dtype))
    except (ValueError, RuntimeError, IndexError):  # the model builds its own masks
        return False


def rows_stay_apart(
    model: nn.Module, inputs_of: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> bool:
    """Whether ``model`` gives two rows in one sequence the outputs of each alone.

    ``inputs_of``: the probe's (1, T) ``input_ids, position_ids`` -> the model's keyword arguments.
    """
    device = next(model.parameters()).device
    ids = torch.arange(sum(PROBE_LENGTHS), device=device) % text_config(model.config).vocab_size
    positions = torch.cat([torch.arange(length, device=device) for length in PROBE_LENGTHS])[None]
    inputs = inputs_of({"input_ids": ids[None], "position_ids": positions})
    return gives_outputs_of(model, ids.split(PROBE_LENGTHS), inputs)


@torch.no_grad()
def gives_outputs_of(
    model: nn.Module,
    rows: Sequence[Tensor],
    inputs: dict[str, Any],
    places: Tensor | None = None,
) -> bool:
    """Whether ``model``, called with ``inputs``, has the outputs of ``rows``, (L,) ids each, alone.
    Probed in evaluation mode, since with dropout the result could differ in a resumed run.

    ``places``: of the rows' tokens, one after the other, in ``inputs``; by default their order.
    """
    training = model.training
    backbone = _backbone(model)
    model.eval()
    try:
        together = backbone(**inputs, use_cache=False)[0]
        single = [backbone(input_ids=row[None], use_cache=False)[0] for row in rows]
    except TypeError:  # a forward without these keywords
        return False
    finally:
        model.train(training)
    alone = torch.cat(single, dim=1)
    together = together if places is None else together[:, places]
    exact = together.dtype == torch.float32 and not torch.is_autocast_enabled(together.device.type)
    tolerance = 1e-5 if exact else 2e-2
    return bool((together - alone).abs().max() <= tolerance * alone.abs().max())


@torch.no_grad()
def draws_in_training(model: nn.Module) -> bool:
    """Whether ``model`` draws random numbers in training mode (dropout, left-out layers, noise) on
    a CPU. The random state is left as it was."""
    training = model.training
    before = torch.get_rng_state()
    model.train()
    try:
        _backbone(model)(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        return not torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_rng_state(before)
        model.train(training)


def _backbone(model: nn.Module) -> nn.Module:
    # A model with a scalar head names its backbone; through peft the prefix leads to the whole
    # model.
    return getattr(model, "backbone", None) or getattr(model, body_name(model))
