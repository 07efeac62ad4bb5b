"""More rows than go through the model at once: a row that has ended gives its slot to the next.

Rows are admitted in order, so that equal prompts of a group stand together: what the model made of
a prompt is kept until the last of them is admitted.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from coati.models.generation.decoder import Decoder, Step
from coati.models.generation.kv_cache import RowCache
from coati.models.generation.prepacked_linear import PAYS_AFTER, Prepacked
from coati.utils.liveness import tick

_ADMIT_SHARE = 8  # of the slots, one in so many must be free before prompts are prefilled


class ResponseRecord:
    """Tokens (B, N) of all rows, written as they are sampled; ``logprobs`` (B, N) or None,
    ``lengths`` and ``stopped`` (B,). ``limits`` (B,): the tokens that each row may get."""

    def __init__(self, limits: Tensor, pad: int, dtype: torch.dtype, logprobs: bool) -> None:
        rows = len(limits)
        device = limits.device
        shape = (rows, int(limits.max()))
        self.limits = limits
        self.tokens = torch.full(shape, pad, dtype=dtype, device=device)
        self.logprobs = torch.zeros(shape, device=device) if logprobs else None
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)

    def add(self, decoder: Decoder, step: Step) -> Tensor:
        """Write what ``decoder`` has just sampled; (slots,) bool, which rows have ended."""
        rows = decoder.row_ids
        counts = decoder.num_generated
        self.tokens[rows, counts - 1] = step.tokens
        if self.logprobs is not None:
            self.logprobs[rows, counts - 1] = step.logprobs
        self.lengths[rows] = counts
        self.stopped[rows] = step.stopped
        return step.stopped | (counts >= self.limits[rows])


class WaitingPrompts:
    """Prompts (B, P), padded on the left, of which some are admitted at a time. ``make``: a
    :class:`Decoder` of the rows that an index (n,) names."""

    def __init__(self, ids: Tensor, mask: Tensor, make: Callable[..., Decoder]) -> None:
        self._make = make
        keys = torch.cat([ids * mask, mask], dim=1)
        # As many of the rows after each as are equal to it, without a gap.
        self._same_as_next = (keys[1:] == keys[:-1]).all(dim=1).tolist() + [False]
        self._rows = len(ids)
        self._next = 0
        self._prompt: tuple[RowCache, Tensor] | None = None

    def __len__(self) -> int:
        return self._rows - self._next

    def admit(self, count: int) -> list[Decoder]:
        """Decoders of the next ``count`` rows, at most two, before their first step: rows of the
        prompt that was admitted last, and others."""
        made = []
        first = self._next
        end = min(first + count, self._rows)
        known = first
        while self._prompt is not None and known < end:
            known += 1
            if not self._same_as_next[known - 1]:
                break
        for start, stop, prompt in ((first, known, self._prompt), (known, end, None)):
            if start == stop:
                continue
            decoder = self._make(torch.arange(start, stop))
            decoder.prompt = prompt
            decoder.keep_prompt = prompt is None and self._same_as_next[stop - 1]
            made.append(decoder)
        self._next = end
        if not self._same_as_next[end - 1] or end > known:
            self._prompt = None
        return made

    def keep(self, decoder: Decoder) -> None:
        """What ``decoder``, which :meth:`admit` gave, has made of its last prompt in its first
        step, if more rows have it."""
        if decoder.keep_prompt:
            self._prompt = decoder.prompt


def decode_replacing(
    waiting: WaitingPrompts, prepacked: Prepacked, slots: int, record: ResponseRecord
) -> int:
    """Decode all rows that are ``waiting``, at most ``slots`` at a time, into ``record``; returns
    how many columns of it are used."""
    pays = int(record.limits.max()) >= PAYS_AFTER
    decoder: Decoder | None = None
    while decoder is not None or waiting:
        tick()
        free = slots - (0 if decoder is None else len(decoder.row_ids))
        if waiting and free >= min(max(1, slots // _ADMIT_SHARE), len(waiting)):
            for new in waiting.admit(free):
                decoder = _joined(decoder, _advanced(new, record))
                waiting.keep(new)
        if decoder is None:
            continue
        if pays:
            prepacked.use(len(decoder.row_ids))
        decoder.prepacked = prepacked
        decoder = _advanced(decoder, record)
    return int(record.lengths.max())


def _advanced(decoder: Decoder, record: ResponseRecord) -> Decoder | None:
    """``decoder`` after a token of each row, without those that have ended; None: all have."""
    ended = record.add(decoder, decoder.step())
    if not bool(ended.any()):
        return decoder
    if bool(ended.all()):
        return None
    decoder.leave(~ended)
    return decoder


def _joined(decoder: Decoder | None, new: Decoder | None) -> Decoder | None:
    if decoder is None or new is None:
        return decoder or new
    decoder.join(new)
    return decoder
