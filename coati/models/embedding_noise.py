"""NEFTune: noise on the input embeddings in training (arXiv 2310.05914).

A token's noise is a function of the seed, the optimizer step, the tokens of its row and its place
in it: neither batch, micro-batches, processes, packing nor padding change it, and a resumed run has
the noise that it would have had.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Odd multipliers of splitmix64 and of its relatives, as signed 64-bit integers: products wrap.
_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_TOKEN = 0x2545F4914F6CDD1D
_PLACE = -0x61C8864680B583EB
_STEP = 0x1D8E4E27C47D124F
_SEED = 0x369DEA0F31A53F85
_COLUMN = 0x27BB2EE687B0B0FD
_ELEMENTS = 2**22  # of noise made at a time
_BITS = 24  # of a number, as many as fp32 holds exactly


def _mixed(x: Tensor) -> Tensor:
    """Every bit of the int64 numbers ``x`` changes half of the bits (splitmix64's finalizer)."""
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        x = (x ^ _right(x, shift)) * factor
    return x ^ _right(x, 31)


def _right(x: Tensor, bits: int) -> Tensor:
    """A shift that fills in zeros."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    """``number`` as a 64-bit integer of torch."""
    return (number + 2**63) % 2**64 - 2**63


def row_of_tokens(positions: Tensor) -> Tensor:
    """(T,) positions of concatenated rows, each from 0 -> (T,) the index of each token's row."""
    return (positions == 0).cumsum(0) - 1


def uniform_noise(ids: Tensor, positions: Tensor, width: int, seed: int, step: int) -> Tensor:
    """(T, width) fp32 numbers of [-1, 1) divided by sqrt(L x width), L the length of a token's row:
    the noise of NEFTune for alpha 1.

    ``ids``, ``positions`` (T,): concatenated rows, each from position 0 on.
    """
    row = row_of_tokens(positions)
    rows = int(row[-1]) + 1 if len(row) else 0
    ids = ids.to(torch.int64)
    places = positions.to(torch.int64) * _PLACE
    tokens = _mixed(ids * _TOKEN + places)
    contents = torch.zeros(rows, dtype=torch.int64, device=ids.device).index_add_(0, row, tokens)
    lengths = torch.zeros_like(contents).index_add_(0, row, torch.ones_like(row))
    of_run = _signed(step * _STEP + seed * _SEED)
    keys = _mixed(contents[row] + of_run) + places
    scale = (lengths[row].double() * width).rsqrt().float()[:, None]
    columns = torch.arange(width, device=ids.device) * _COLUMN
    parts = []
    for part, factor in zip(
        keys.split(max(1, _ELEMENTS // width)),
        scale.split(max(1, _ELEMENTS // width)),
        strict=True,
    ):
        numbers = _right(_mixed(part[:, None] + columns), 64 - _BITS).float()
        parts.append((numbers / 2 ** (_BITS - 1) - 1) * factor)
    return torch.cat(parts) if parts else torch.zeros(0, width, device=ids.device)


class EmbeddingNoise:
    """Adds ``alpha`` times :func:`uniform_noise` to what the input embedding of ``model`` returns,
    in training with gradients.

    Args:
        model: called with ``input_ids`` (B, S) and ``attention_mask`` (B, S), or with
            ``position_ids`` (B, S) of several rows each.
        step: the optimizer steps taken so far.
    """

    def __init__(self, model: nn.Module, alpha: float, seed: int, step: Callable[[], int]) -> None:
        self.alpha = alpha
        self.seed = seed
        self.step = step
        self._inputs: Mapping[str, Any] = {}
        embedding = model.get_input_embeddings()
        self._handles = [
            model.register_forward_pre_hook(self._called, with_kwargs=True),
            model.register_forward_hook(self._returned, always_call=True),
        ]
        if embedding is not None:  # a later stage of a pipeline has none
            self._handles.append(embedding.register_forward_hook(self._embedded))

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _called(self, module: nn.Module, args: Any, keywords: dict[str, Any]) -> None:
        active = module.training and torch.is_grad_enabled()
        named = {"input_ids": args[0], **keywords} if args else keywords
        self._inputs = named if active else {}

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inputs = {}

    def _embedded(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        ids = self._inputs.get("input_ids")
        if ids is None:
            return None
        if output.shape[:-1] != ids.shape:
            raise ValueError(
                f"--neftune_alpha: the embedding of this {type(module).__name__} returned "
                f"{tuple(output.shape)} for {tuple(ids.shape)} tokens; train without it, or "
                "without splitting the sequence"
            )
        real, positions = _rows(ids, self._inputs)
        noise = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        made = uniform_noise(ids[real], positions[real], output.shape[-1], self.seed, self.step())
        noise[real] = (self.alpha * made).to(output.dtype)
        return output + noise


def _rows(ids: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(B, S) which tokens are real, and their positions within their rows."""
    positions = inputs.get("position_ids")
    if positions is not None:
        return torch.ones_like(ids, dtype=torch.bool), positions.expand_as(ids)
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids) if mask is None else mask
    return real.bool(), real.cumsum(1) - 1
