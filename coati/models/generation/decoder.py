"""The state of a sampling loop: rows that have not ended, each in a slot of the batch, and what the
model has seen.

A row that ends gives its slot to one that goes on, so the model is called with living rows alone,
and columns that hold nothing but padding by then are left behind.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coati.models.generation.kv_cache import RowCache, TupleCache
from coati.models.generation.mkl_prepack import PAYS_AFTER, MklPrepacked
from coati.models.generation.sampling import Sampling, choose
from coati.models.padding_free import PaddingFree
from coati.models.sdpa import teach_sdpa


@dataclass(frozen=True)
class Decoding:
    """What :func:`~coati.models.generation.loop.generate` was asked for; its docstring explains the
    fields."""

    sampling: Sampling
    stop_sequences: list[list[int]]
    max_new_tokens: int
    pad: int = 0
    generator: torch.Generator | None = None
    noise: Tensor | None = None
    return_logprobs: bool = False
    gather_logits: Callable[[Tensor], Tensor] | None = None
    agree: Callable[[Tensor], Tensor] | None = None
    packing: PaddingFree | None = None


class Decoder:
    """B prompts being continued; :meth:`step` adds a token to each that has not ended.

    ``tokens`` and ``logprobs`` (B, max_new_tokens), ``lengths`` and ``stopped`` (B,) are by row of
    the batch as it was given; everything with an underscore is by slot.
    """

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        mask: Tensor,
        decoding: Decoding,
        prepacked: MklPrepacked | None = None,
    ) -> None:
        rows, width = input_ids.shape
        device, limit = input_ids.device, decoding.max_new_tokens
        self.model, self.ids, self.mask, self.decoding = model, input_ids, mask.long(), decoding
        self.prepacked = prepacked
        self.tokens = torch.full((rows, limit), decoding.pad, dtype=input_ids.dtype, device=device)
        self.logprobs = (
            torch.zeros(rows, limit, device=device) if decoding.return_logprobs else None
        )
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.steps, self.all_ended = 0, False
        self.noise = None if decoding.noise is None else decoding.noise.to(device)
        self.stops = _by_length(decoding.stop_sequences, device)
        self.accepted = accepted_by(model)
        self.cache = cache_for(model, rows, width + limit)
        if device.type == "cpu":
            teach_sdpa()
        self._rows = torch.arange(rows, device=device)
        self._positions = self.mask.sum(dim=1)  # of the next token
        self._seen = torch.cat([self.mask, self.mask.new_ones(rows, limit)], dim=1)
        self._start = 0  # the first column that the model is shown

    def step(self) -> None:
        """A token more; nothing is kept of it once all rows have ended."""
        logits = self._prompts() if self.steps == 0 else self._last_tokens()
        self.steps += 1
        if self.all_ended:  # other ranks go on, whose forward needs this one's
            return
        self._choose(logits)
        ended = self._ended()
        self.lengths[self._rows] = self.steps
        self.stopped[self._rows] = ended
        if bool(ended.any()):
            self._leave(~ended)

    def _choose(self, logits: Tensor) -> None:
        decoding, rows, step = self.decoding, self._rows, self.steps - 1
        if decoding.gather_logits is not None:
            logits = decoding.gather_logits(logits)
        seen = None
        if decoding.sampling.repetition_penalty != 1:
            ids = torch.cat([self.ids[rows], self.tokens[rows, :step]], dim=1)
            seen = ids, self._seen[:, : ids.shape[1]]
        tokens, logprobs = choose(
            logits, decoding.sampling, self._uniform(step), seen, decoding.return_logprobs
        )
        if decoding.agree is not None:
            tokens = decoding.agree(tokens)
        self.tokens[rows, step] = tokens
        if logprobs is not None:
            self.logprobs[rows, step] = logprobs

    def _uniform(self, step: int) -> Tensor | None:
        if not self.decoding.sampling.do_sample:
            return None
        if self.noise is not None:
            return self.noise[self._rows, step]
        # One for every row, ended or not, so that the ends of others do not shift a row's numbers.
        generator, device = self.decoding.generator, self.tokens.device
        return torch.rand(
            len(self.tokens), dtype=torch.float64, generator=generator, device=device
        )[self._rows]

    def _ended(self) -> Tensor:
        """Whether a stop sequence is complete, (slots,)."""
        ended = torch.zeros(len(self._rows), dtype=torch.bool, device=self._rows.device)
        for length, stops in self.stops.items():
            if length <= self.steps:
                recent = self.tokens[self._rows, self.steps - length : self.steps]
                ended |= (recent[:, None] == stops).all(dim=2).any(dim=1)
        return ended

    def _leave(self, alive: Tensor) -> None:
        """The rows that live on move up into the slots of those that do not."""
        count = int(alive.sum())
        self.all_ended = count == 0
        survivors = torch.arange(
            max(count, 1), device=alive.device
        )  # one stays, for forwards that others need
        holes = (~alive[:count]).nonzero()[:, 0]
        survivors[holes] = count + alive[count:].nonzero()[:, 0]
        self.cache.keep(survivors)
        self._rows, self._positions, self._seen = (
            t[survivors] for t in (self._rows, self._positions, self._seen)
        )
        start = int(self._seen.argmax(dim=1).min())
        if start > self._start and self.cache.trim(start):
            self._start = start

    def _prompts(self) -> Tensor:
        """Every different prompt through the model once; the logits after each row's, (B, V)
        fp32."""
        ids, mask, index = different(self.ids, self.mask)
        self.cache.rows = len(ids)
        packed = self._packed(ids, mask)
        if packed is None:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = self._call(ids, mask, positions)[:, -1]
        else:
            logits = self._end_to_end(packed, mask)
        if index is None:
            return logits.float()
        self.cache.repeat(index)
        return logits.float()[index]

    def _packed(self, ids: Tensor, mask: Tensor) -> dict | None:
        """The model's inputs without padding; None where there is none or the model needs it."""
        packing = self.decoding.packing
        if packing is None or isinstance(self.cache, TupleCache) or bool(mask.all()):
            return None
        packed = packing.pack({"input_ids": ids, "attention_mask": mask})
        return None if packed is None else packed.inputs

    def _end_to_end(self, inputs: dict, mask: Tensor) -> Tensor:
        last = mask.sum(dim=1).cumsum(dim=0) - 1
        keep = {"logits_to_keep": last} if "logits_to_keep" in self.accepted else {}
        self.cache.fill_end_to_end(mask)
        logits = _plain(
            self.model(**inputs, past_key_values=self.cache, use_cache=True, **keep).logits
        )[0]
        self.cache.filled()
        return logits if keep else logits[last]

    def _last_tokens(self) -> Tensor:
        """What the cache has not seen: one token of each row; the logits after it, (slots, V)
        fp32."""
        end = self.ids.shape[1] + self.steps
        tokens = self.tokens[self._rows, self.steps - 1]
        if self.prepacked is not None and self.decoding.max_new_tokens - self.steps >= PAYS_AFTER:
            self.prepacked.use(len(tokens))
        logits = self._call(
            tokens[:, None], self._seen[:, self._start : end], self._positions[:, None]
        )
        self._positions = self._positions + 1
        return logits[:, -1].float()

    def _call(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return call_with_cache(self.model, self.accepted, self.cache, ids, mask, positions)


def cache_for(model: nn.Module, rows: int, limit: int) -> RowCache | TupleCache:
    """An empty cache of the kind that ``model`` fills, for ``rows`` rows and up to ``limit``
    columns."""
    return (
        RowCache(rows, limit)
        if getattr(innermost(model), "_supports_cache_class", True)
        else TupleCache()
    )


def call_with_cache(
    model: nn.Module,
    accepted: set[str],
    cache: RowCache | TupleCache,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
) -> Tensor:
    """``ids`` and ``positions`` (rows, n) through the model, after what ``cache`` holds; logits
    (rows, 1 or n, V).

    ``mask`` (rows, shown): 1 on the columns of the cache and of ``ids`` that hold tokens.
    ``accepted``: the keywords of the model's forward.
    """
    shown, tuples = mask.shape[1], isinstance(cache, TupleCache)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "past_key_values": cache.states if tuples else cache,
        "use_cache": True,
        "cache_position": torch.arange(shown - ids.shape[1], shown, device=ids.device),
        "logits_to_keep": 1,  # of a long prompt only the last position goes through the head
    }
    outputs = model(**{name: value for name, value in inputs.items() if name in accepted})
    if tuples:
        cache.states = outputs.past_key_values
    if cache.get_seq_length() != shown:
        raise ValueError(
            f"{type(innermost(model)).__name__} fills no key-value cache here; it cannot sample"
        )
    return _plain(outputs.logits)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)  # Gemini's tensors do not follow in-place operations


def different(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The different prompts among (B, P) ``ids`` with ``mask``, and which of them each row is,
    (B,); None where all differ, and then in their own order."""
    whole = torch.cat([ids * mask, mask], dim=1)
    found, index = whole.unique(dim=0, return_inverse=True)
    if len(found) == len(ids):
        return ids, mask, None
    width = ids.shape[1]
    return found[:, :width], found[:, width:], index


def _by_length(stop_sequences: list[list[int]], device: torch.device) -> dict[int, Tensor]:
    """Stop sequences as (how many, length) tensors, by length."""
    lengths = sorted({len(stop) for stop in stop_sequences})
    of_length = {
        length: [stop for stop in stop_sequences if len(stop) == length] for length in lengths
    }
    return {length: torch.tensor(stops, device=device) for length, stops in of_length.items()}


def innermost(model: nn.Module) -> nn.Module:
    """The transformers model inside plugin wrappers and adapters."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepted_by(model: nn.Module) -> set[str]:
    """The keywords that the model's forward names; wrappers pass everything on, so the innermost
    decides."""
    return set(inspect.signature(innermost(model).forward).parameters)
