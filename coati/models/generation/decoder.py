"""The decoder of rollouts, streaming and the server: a batch of sequences, one token a step.

Rows may join and leave between any two tokens (continuous batching). All rows end at the same
column of the key-value cache, so they are padded on the left; the last rows move into the slots of
those that leave, and columns that then hold only padding are dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coati.models.generation.history import History
from coati.models.generation.kv_cache import RowCache
from coati.models.generation.llama_step import LlamaStep
from coati.models.generation.model_call import (
    accepted_by,
    cache_for,
    call_with_cache,
    call_without_padding,
    innermost,
)
from coati.models.generation.prepacked_linear import Prepacked
from coati.models.generation.sampling import Sampling, choose
from coati.models.padding_free import PaddingFree
from coati.models.sdpa import patch_sdpa
from coati.utils.logging import get_logger

logger = get_logger(__name__)

_NO_LIMIT = 2**31


def identity(value):
    """``value`` itself: the default of hooks that only several ranks need."""
    return value


class Step(NamedTuple):
    """The next token of each active row: ``tokens`` (slots,), ``logprobs`` (slots,) fp32 or None,
    and ``stopped`` (slots,) bool, whether the token completes a stop sequence. ``logits``
    (slots, V) fp32 that it was chosen from, where the decoder's ``keep_logits`` is set."""

    tokens: Tensor
    logprobs: Tensor | None
    stopped: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True)
class RowSettings:
    """What may differ between the rows of a batch."""

    sampling: Sampling
    stop_sequences: tuple[tuple[int, ...], ...]


class Decoder:
    """The state of a batch of sequences being generated. A row occupies a slot, an index into every
    state tensor, which changes as rows leave; ``row_ids`` (slots,) say which row is in which.

    Args:
        model: plain or wrapped by a plugin, in evaluation mode.
        input_ids, mask: (B, P); ``mask`` is 0 on the padding.
        sampling, stop_sequences: for all these rows; rows that :meth:`join` bring their own.
        noise: (B, max_new_tokens or more) fp64 uniform on [0, 1), used in place of ``generator``;
            a row's tokens then do not depend on the rest of the batch.
        row_ids: (B,) identifiers of the rows; by default 0 to B - 1.
        max_columns: columns that the key-value cache is never grown beyond.
        gather_logits, synchronize, padding_free: see
            :func:`coati.models.generation.loop.generate`.

    ``prepacked``: weights for all tokens but the first. ``prompt``: cache of one row and logits
    (1, V) of a prompt that all rows have; with ``keep_prompt`` those of the last row after the
    first step.
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
        row_ids: Tensor | None = None,
        max_columns: int = _NO_LIMIT,
        return_logprobs: bool = False,
        gather_logits: Callable[[Tensor], Tensor] = identity,
        synchronize: Callable[[Tensor], Tensor] = identity,
        padding_free: PaddingFree | None = None,
    ) -> None:
        count = len(input_ids)
        device = input_ids.device
        self.model = model
        self.accepted = accepted_by(model)
        self.generator = generator
        self.return_logprobs = return_logprobs
        self.keep_logits = False
        self.gather_logits = gather_logits
        self.synchronize = synchronize
        self.padding_free = padding_free
        self.prepacked: Prepacked | None = None
        self.prompt: tuple[RowCache, Tensor] | None = None
        self.keep_prompt = False
        self.history = History(input_ids, mask)
        self.row_ids = torch.arange(count, device=device) if row_ids is None else row_ids.to(device)
        self.num_generated = torch.zeros(count, dtype=torch.long, device=device)
        self.noise = None if noise is None else noise.to(device)
        self.cache: Any = cache_for(model, count, max_columns)
        self._initial_rows = count
        settings = RowSettings(sampling, tuple(map(tuple, stop_sequences)))
        self._settings = [settings] * count
        self._group_rows()
        if device.type == "cpu":
            patch_sdpa()

    @property
    def ids(self) -> Tensor:
        """(slots, columns): the tokens of each row so far."""
        return self.history.ids

    @property
    def mask(self) -> Tensor:
        """(slots, columns): 0 where ``ids`` are padding."""
        return self.history.mask

    @torch.no_grad()
    def step(self) -> Step:
        """Generate one token for each row."""
        return self._sample(self._forward())

    @torch.no_grad()
    def idle_step(self) -> None:
        """A forward for its collectives alone, once every row of this rank has ended: of one token
        without a past, so that there may be any number of them."""
        token = self.history.last[:1, None]
        cache = cache_for(self.model, 1, 1)
        positions = torch.zeros_like(token)
        call_with_cache(self.model, self.accepted, cache, token, torch.ones_like(token), positions)

    def _forward(self) -> Tensor:
        """Logits (slots, V) fp32 after the last token of each row."""
        if self.cache.get_seq_length() == 0:
            return self._prefill()
        step = None if self.prepacked is None else self.prepacked.step
        if step is not None and not _holds_fp32(self.cache):
            self.prepacked.without_step()  # a wrapper computes in another precision
            step = None
        if step is None:
            return self._by_model()
        history = self.history
        logits = step(history.last, history.positions, history.blocked(), self.cache)
        return logits if step.checked else self._checked(step, logits)

    def _by_model(self) -> Tensor:
        """What :meth:`_forward` returns, by the model's own forward of the last tokens."""
        last = self.history.last[:, None]
        positions = self.history.positions[:, None]
        return self._call(last, self.mask.contiguous(), positions)[:, -1].float()

    def _checked(self, step: LlamaStep, logits: Tensor) -> Tensor:
        """The same logits by the model's own forward, which must not differ from those of ``step``
        for it to be used."""
        self.cache.rewind()
        own = self._by_model()
        if not step.agrees(logits, own):
            name = type(innermost(self.model)).__name__
            logger.warning_once(
                f"{name} computes something else than layers of its kind do, so each token is "
                "decoded by its own forward, which is slower"
            )
            self.prepacked.without_step()
        return own

    def _sample(self, logits: Tensor) -> Step:
        """Sample the next token of each row from ``logits`` (slots, V) and append it."""
        logits = self.gather_logits(logits)
        uniform = self._uniform()
        tokens = self.ids.new_empty(len(self.row_ids))
        logprobs = logits.new_empty(len(self.row_ids)) if self.return_logprobs else None
        for sampling, _, slots in self._groups:
            history = None
            if sampling.repetition_penalty != 1:
                history = self.ids[slots], self.mask[slots]
            draws = uniform[slots] if sampling.do_sample else None
            tokens[slots], chosen_logprobs = choose(
                logits[slots], sampling, draws, history, self.return_logprobs
            )
            if logprobs is not None:
                logprobs[slots] = chosen_logprobs
        tokens = self.synchronize(tokens)
        self._append(tokens)
        return Step(tokens, logprobs, self._stopped(), logits if self.keep_logits else None)

    def _append(self, tokens: Tensor) -> None:
        self.history.append(tokens)
        self.num_generated = self.num_generated + 1

    def leave(self, active: Tensor) -> None:
        """Remove the rows that are not ``active`` (slots,) bool. If none is, one row stays."""
        count = int(active.sum())
        survivors = torch.arange(max(count, 1), device=active.device)
        holes = (~active[:count]).nonzero()[:, 0]
        survivors[holes] = count + active[count:].nonzero()[:, 0]
        self.cache.keep(survivors)
        self.row_ids = self.row_ids[survivors]
        self.num_generated = self.num_generated[survivors]
        self.history.keep(survivors)
        if self.noise is not None:
            self.noise = self.noise[survivors]
        if len(self._groups) > 1:
            self._settings = [self._settings[slot] for slot in survivors.tolist()]
            self._group_rows()
        else:
            self._settings = self._settings[: len(survivors)]
        self._drop_padding()

    def join(self, other: "Decoder") -> None:
        """Add the rows of ``other``, which has taken at least one step. Either both have noise or
        neither has."""
        self.cache.join(other.cache)
        self.history.join(other.history)
        self.row_ids = torch.cat([self.row_ids, other.row_ids])
        self.num_generated = torch.cat([self.num_generated, other.num_generated])
        if self.noise is not None:
            steps = max(self.noise.shape[1], other.noise.shape[1])
            filled = [F.pad(part, (0, steps - part.shape[1])) for part in (self.noise, other.noise)]
            self.noise = torch.cat(filled)
        self._settings = [*self._settings, *other._settings]
        self._group_rows()

    def _group_rows(self) -> None:
        """Group rows of equal settings, which are sampled together: (sampling, stop sequences by
        length, slots) of each group."""
        members: dict[RowSettings, list[int]] = {}
        for slot, settings in enumerate(self._settings):
            members.setdefault(settings, []).append(slot)
        device = self.ids.device
        self._groups = []
        for settings, slots in members.items():
            stops = _by_length(settings.stop_sequences, device)
            single = len(members) == 1
            index = slice(None) if single else torch.tensor(slots, device=device)
            self._groups.append((settings.sampling, stops, index))

    def _drop_padding(self) -> None:
        unused = self.history.padding()
        if unused and self.cache.trim(unused):
            self.history.drop(unused)

    def _uniform(self) -> Tensor | None:
        if not any(sampling.do_sample for sampling, _, _ in self._groups):
            return None
        if self.noise is not None:
            return self.noise.gather(1, self.num_generated[:, None])[:, 0]
        # Drawn for ended rows too, so that a row's draws do not depend on when others end.
        drawn = torch.rand(
            self._initial_rows,
            dtype=torch.float64,
            generator=self.generator,
            device=self.ids.device,
        )
        return drawn[self.row_ids]

    def _stopped(self) -> Tensor:
        """(slots,) bool: whether the response ends with a stop sequence; tokens of the prompt do
        not count toward one."""
        stopped = torch.zeros(len(self.row_ids), dtype=torch.bool, device=self.row_ids.device)
        for _, stops_by_length, slots in self._groups:
            for length, stops in stops_by_length.items():
                if length > self.ids.shape[1]:
                    continue
                recent = self.ids[slots, -length:]
                if length == 1:  # most are
                    stopped[slots] |= (recent == stops.view(1, -1)).any(dim=1)
                    continue
                complete = (recent[:, None] == stops).all(dim=2).any(dim=1)
                stopped[slots] |= complete & (self.num_generated[slots] >= length)
        return stopped

    def _prefill(self) -> Tensor:
        """Run each distinct prompt through the model once; (slots, V) fp32 logits after each row's
        prompt."""
        if self.prompt is not None:
            return self._after_prompt(*self.prompt)
        ids, mask, index = distinct_prompts(self.ids, self.mask)
        self.cache.rows = len(ids)
        inputs = self._without_padding(ids, mask)
        if inputs is None:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = self._call(ids, mask, positions)[:, -1]
        else:
            logits = call_without_padding(self.model, self.accepted, self.cache, inputs, mask)
        if self.keep_prompt and isinstance(self.cache, RowCache):
            last = len(ids) - 1 if index is None else int(index[-1])
            padding = int(mask[last].argmax())
            self.prompt = self.cache.row(last, padding), logits[last : last + 1].float()
        if index is None:
            return logits.float()
        self.cache.repeat(index)
        return logits.float()[index]

    def _after_prompt(self, cache: RowCache, logits: Tensor) -> Tensor:
        """What :meth:`_prefill` returns where all rows have the prompt that ``cache`` (of one row)
        and ``logits`` (1, V) are of."""
        rows = len(self.row_ids)
        limit = self.cache.limit
        self.cache = cache.row(0)
        self.cache.limit = limit
        self.cache.repeat(torch.zeros(rows, dtype=torch.long, device=self.ids.device))
        return logits.expand(rows, -1)

    def _without_padding(self, ids: Tensor, mask: Tensor) -> dict | None:
        """The model's inputs without padding; None if there is no padding or the model cannot do
        without it."""
        padding_free = self.padding_free
        if padding_free is None or not isinstance(self.cache, RowCache) or bool(mask.all()):
            return None
        unpadded = padding_free.unpad({"input_ids": ids, "attention_mask": mask})
        return None if unpadded is None else unpadded.inputs

    def _call(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return call_with_cache(self.model, self.accepted, self.cache, ids, mask, positions)


def distinct_prompts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Distinct prompts among ``ids`` (B, P) with ``mask`` (B, P).

    Returns (D, P) ids and mask of the D distinct ones and the (B,) index of each row's prompt among
    them; where all are distinct, the arguments unchanged and None.
    """
    keys = torch.cat([ids * mask, mask], dim=1)
    distinct, index = keys.unique(dim=0, return_inverse=True)
    if len(distinct) == len(ids):
        return ids, mask, None
    width = ids.shape[1]
    return distinct[:, :width], distinct[:, width:], index


def _holds_fp32(cache: Any) -> bool:
    return isinstance(cache, RowCache) and all(state.dtype == torch.float32 for state in cache[0])


def _by_length(stop_sequences: Sequence[Sequence[int]], device: torch.device) -> dict[int, Tensor]:
    """Stop sequences of each length as one (number, length) tensor."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for stop in stop_sequences:
        by_length.setdefault(len(stop), []).append(stop)
    return {length: torch.tensor(stops, device=device) for length, stops in by_length.items()}
