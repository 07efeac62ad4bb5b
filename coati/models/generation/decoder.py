"""The decoder of rollouts, streaming and the server: a batch of sequences, one token a step.

Rows may join and leave between any two tokens (continuous batching). All rows end at the same
column of the key-value cache, so they are padded on the left; the last rows move into the slots of
those that leave, and columns that hold nothing but padding by then are dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.generation.kv_cache import TupleCache
from coati.models.generation.model_call import (
    accepted_by,
    cache_for,
    call_with_cache,
    call_without_padding,
)
from coati.models.generation.sampling import Sampling, choose
from coati.models.padding_free import PaddingFree
from coati.models.sdpa import patch_sdpa

_NO_LIMIT = 2**31


def same(value):
    """``value``: what ranks that share nothing have to agree on."""
    return value


class Step(NamedTuple):
    """One token of each active row, by slot: ``tokens`` (slots,), ``logprobs`` (slots,) fp32 or
    None, and ``stopped`` (slots,): whether the token completes a stop sequence."""

    tokens: Tensor
    logprobs: Tensor | None
    stopped: Tensor


@dataclass(frozen=True)
class RowSettings:
    """What may differ between the rows of a batch."""

    sampling: Sampling
    stop_sequences: tuple[tuple[int, ...], ...]


class Decoder:
    """Prompts (B, P), padded on the left, being continued; all state is by slot.

    Args:
        model: plain or wrapped by a plugin, in evaluation mode.
        input_ids, mask: (B, P); ``mask`` is 0 on the padding.
        sampling, stop_sequences: of all these rows; rows that :meth:`join` have their own.
        noise: (B, at least as many as there will be tokens) fp64 of [0, 1), which decides each
            token in place of ``generator``; a row's tokens then depend on the row alone.
        rows: numbers that rows are known by, (B,); by default their places in the batch.
        columns: of the cache, at most; buffers never grow beyond it.
        gather_logits, agree, padding_free: see :func:`coati.models.generation.loop.generate`.
    """

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        mask: Tensor,
        sampling: Sampling,
        stop_sequences: Sequence[Sequence[int]] = (),
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        rows: Tensor | None = None,
        columns: int = _NO_LIMIT,
        return_logprobs: bool = False,
        gather_logits: Callable[[Tensor], Tensor] = same,
        agree: Callable[[Tensor], Tensor] = same,
        padding_free: PaddingFree | None = None,
    ) -> None:
        count = len(input_ids)
        device = input_ids.device
        self.model = model
        self.accepted = accepted_by(model)
        self.generator = generator
        self.return_logprobs = return_logprobs
        self.gather_logits = gather_logits
        self.agree = agree
        self.padding_free = padding_free
        self.ids = input_ids
        self.mask = mask.long()
        self.rows = torch.arange(count, device=device) if rows is None else rows.to(device)
        self.ages = torch.zeros(count, dtype=torch.long, device=device)  # new tokens of each row
        self.noise = None if noise is None else noise.to(device)
        self.cache: Any = cache_for(model, count, columns)
        self._joined = count
        self._start = 0  # the first column that the model is shown
        settings = RowSettings(sampling, tuple(map(tuple, stop_sequences)))
        self._settings = [settings] * count
        self._group_rows()
        if device.type == "cpu":
            patch_sdpa()

    @torch.no_grad()
    def step(self) -> Step:
        """One token more of each row."""
        return self._choose(self._forward())

    @torch.no_grad()
    def idle_step(self) -> None:
        """A forward that other ranks wait for; no row needs its token."""
        self._forward()
        self._append(self.ids[:, -1])

    def _forward(self) -> Tensor:
        """Logits (slots, V) fp32 after the last token of each row."""
        if self.cache.get_seq_length() == 0:
            return self._prefill()
        positions = self.mask.sum(dim=1, keepdim=True) - 1
        return self._call(self.ids[:, -1:], self.mask, positions)[:, -1].float()

    def _choose(self, logits: Tensor) -> Step:
        """The next token of each row by ``logits`` (slots, V), appended to it."""
        logits = self.gather_logits(logits)
        uniform = self._uniform()
        tokens = self.ids.new_empty(len(self.rows))
        logprobs = logits.new_empty(len(self.rows)) if self.return_logprobs else None
        for sampling, _, slots in self._groups:
            seen = None
            if sampling.repetition_penalty != 1:
                seen = self.ids[slots], self.mask[slots]
            numbers = uniform[slots] if sampling.do_sample else None
            tokens[slots], chosen = choose(
                logits[slots], sampling, numbers, seen, self.return_logprobs
            )
            if logprobs is not None:
                logprobs[slots] = chosen
        tokens = self.agree(tokens)
        self._append(tokens)
        return Step(tokens, logprobs, self._stopped())

    def _append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.ages = self.ages + 1

    def leave(self, alive: Tensor) -> None:
        """Only rows that are ``alive`` (slots,) go on; one stays where none is, for forwards that
        other ranks need."""
        count = int(alive.sum())
        survivors = torch.arange(max(count, 1), device=alive.device)
        holes = (~alive[:count]).nonzero()[:, 0]
        survivors[holes] = count + alive[count:].nonzero()[:, 0]
        self.cache.keep(survivors)
        self.rows = self.rows[survivors]
        self.ages = self.ages[survivors]
        self.ids = self.ids[survivors]
        self.mask = self.mask[survivors]
        if self.noise is not None:
            self.noise = self.noise[survivors]
        if len(self._groups) > 1:
            self._settings = [self._settings[slot] for slot in survivors.tolist()]
            self._group_rows()
        else:
            self._settings = self._settings[: len(survivors)]
        self._drop_padding()

    def join(self, other: "Decoder") -> None:
        """The rows of ``other``, which has taken a step, go on in this batch. Either all rows of
        both have noise or none has."""
        self.cache.join(other.cache)
        self._start = 0
        columns = max(self.mask.shape[1], other.mask.shape[1])
        self.ids = _stacked(self.ids, other.ids, columns)
        self.mask = _stacked(self.mask, other.mask, columns)
        self.rows = torch.cat([self.rows, other.rows])
        self.ages = torch.cat([self.ages, other.ages])
        if self.noise is not None:
            steps = max(self.noise.shape[1], other.noise.shape[1])
            filled = [F.pad(part, (0, steps - part.shape[1])) for part in (self.noise, other.noise)]
            self.noise = torch.cat(filled)
        self._settings = [*self._settings, *other._settings]
        self._group_rows()

    def _group_rows(self) -> None:
        """Rows of like settings are sampled together: (sampling, stops by length, slots) each."""
        members: dict[RowSettings, list[int]] = {}
        for slot, settings in enumerate(self._settings):
            members.setdefault(settings, []).append(slot)
        device = self.ids.device
        self._groups = []
        for settings, slots in members.items():
            stops = _by_length(settings.stop_sequences, device)
            everyone = len(members) == 1
            index = slice(None) if everyone else torch.tensor(slots, device=device)
            self._groups.append((settings.sampling, stops, index))

    def _drop_padding(self) -> None:
        unused = int(self.mask.argmax(dim=1).min())
        if unused and self.cache.trim(self._start + unused):
            self._start += unused
            self.ids = self.ids[:, unused:]
            self.mask = self.mask[:, unused:]

    def _uniform(self) -> Tensor | None:
        if not any(sampling.do_sample for sampling, _, _ in self._groups):
            return None
        if self.noise is not None:
            return self.noise.gather(1, self.ages[:, None])[:, 0]
        # One for every row, ended or not, so that the ends of others do not shift a row's numbers.
        drawn = torch.rand(
            self._joined, dtype=torch.float64, generator=self.generator, device=self.ids.device
        )
        return drawn[self.rows]

    def _stopped(self) -> Tensor:
        """Whether a stop sequence is complete, (slots,); it does not begin in the prompt."""
        stopped = torch.zeros(len(self.rows), dtype=torch.bool, device=self.rows.device)
        for _, stops_by_length, slots in self._groups:
            for length, stops in stops_by_length.items():
                if length > self.ids.shape[1]:
                    continue
                recent = self.ids[slots, -length:]
                complete = (recent[:, None] == stops).all(dim=2).any(dim=1)
                stopped[slots] |= complete & (self.ages[slots] >= length)
        return stopped

    def _prefill(self) -> Tensor:
        """Every different prompt through the model once; the logits after each row's, (slots, V)
        fp32."""
        ids, mask, index = distinct_prompts(self.ids, self.mask)
        self.cache.rows = len(ids)
        inputs = self._without_padding(ids, mask)
        if inputs is None:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = self._call(ids, mask, positions)[:, -1]
        else:
            logits = call_without_padding(self.model, self.accepted, self.cache, inputs, mask)
        if index is None:
            return logits.float()
        self.cache.repeat(index)
        return logits.float()[index]

    def _without_padding(self, ids: Tensor, mask: Tensor) -> dict | None:
        """The model's inputs without padding; None where there is none or the model needs it."""
        padding_free = self.padding_free
        if padding_free is None or isinstance(self.cache, TupleCache) or bool(mask.all()):
            return None
        packed = padding_free.pack({"input_ids": ids, "attention_mask": mask})
        return None if packed is None else packed.inputs

    def _call(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return call_with_cache(self.model, self.accepted, self.cache, ids, mask, positions)


def distinct_prompts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The distinct prompts among (B, P) ``ids`` with ``mask``, and which of them each row is,
    (B,); None where all are distinct, and then in their own order."""
    whole = torch.cat([ids * mask, mask], dim=1)
    found, index = whole.unique(dim=0, return_inverse=True)
    if len(found) == len(ids):
        return ids, mask, None
    width = ids.shape[1]
    return found[:, :width], found[:, width:], index


def _by_length(stop_sequences: Sequence[Sequence[int]], device: torch.device) -> dict[int, Tensor]:
    """Stop sequences as (how many, length) tensors, by length."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for stop in stop_sequences:
        by_length.setdefault(len(stop), []).append(stop)
    return {length: torch.tensor(stops, device=device) for length, stops in by_length.items()}


def _stacked(upper: Tensor, lower: Tensor, columns: int) -> Tensor:
    """Rows of two batches, 0 on the left of the shorter ones."""
    return torch.cat([F.pad(part, (columns - part.shape[1], 0)) for part in (upper, lower)])
