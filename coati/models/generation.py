"""Sampling by a loop of its own, so that a model wrapped for training can sample too; ``model.generate`` is not used.

The loop makes the key-value cache and hands it to every call: under tensor parallelism ColossalAI returns none, and a
loop that relies on a returned one silently loses the context. Positions are given explicitly, so left padding is exact.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coati.models.noise import draw


def _same(value):
    return value


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``do_sample`` False takes the likeliest.

    0 or None turns ``top_k`` off, 1 ``top_p``. ``repetition_penalty`` above 1 divides the positive and multiplies
    the negative logits of tokens that the row already holds.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("temperature", self.temperature > 0, "above 0 (for the likeliest token use do_sample=False)"),
            ("top_k", self.top_k is None or self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")


@dataclass
class Generated:
    """``sequences`` (B, P + N): prompts and answers, pad after an answer's end.

    ``lengths`` (B,): tokens of each answer, its stop sequence included. ``stopped`` (B,): whether a stop sequence, not
    the limit, ended it. ``logprobs`` (B, N) fp32, when asked for: log_softmax(logits / temperature) at each token of
    an answer, whatever top_k, top_p and penalties made of the logits; 0 after its end.
    """

    sequences: Tensor
    lengths: Tensor
    stopped: Tensor
    prompt_length: int = field(default=0)
    logprobs: Tensor | None = None

    def answers(self) -> list[list[int]]:
        """The new token ids of each row, stop sequence included."""
        new = self.sequences[:, self.prompt_length :].tolist()
        return [row[:length] for row, length in zip(new, self.lengths.tolist(), strict=True)]


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    stop_sequences: list[list[int]],
    max_new_tokens: int,
    pad_token_id: int = 0,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    return_logprobs: bool = False,
    stop_flag: Callable[[bool], bool] = _same,
    gather_logits: Callable[[Tensor], Tensor] = _same,
) -> Generated:
    """Continue every row of ``input_ids`` (B, P), left-padded with ``attention_mask`` (B, P) 0 on the padding.

    A row ends with any of ``stop_sequences`` (each a list of token ids, counted within the answer) or after
    ``max_new_tokens``. ``noise`` (B, at least max_new_tokens) of :func:`~coati.models.noise.row_noise` decides each
    token in place of ``generator``; a row's sample then depends on nothing but the row. ``stop_flag`` takes "all my
    rows have ended" and returns whether to leave the loop: ranks whose forward passes contain collectives leave
    together, by an all-reduce that the caller supplies. ``gather_logits`` completes the last position's logits where
    each rank holds a part of the vocabulary. ``model`` is the plain or the wrapped model. Raises ValueError for right
    padding, an empty prompt, more tokens than the model has positions, or noise of another shape.
    """
    sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    _check(model, input_ids, attention_mask, stop_sequences, max_new_tokens)
    _check_noise(noise, len(input_ids), max_new_tokens)
    loop = _Loop(model, input_ids, attention_mask, stop_sequences, pad_token_id, sampling, generator, gather_logits)
    loop.noise = None if noise is None else noise.to(input_ids.device)
    loop.logprobs = [] if return_logprobs else None
    with _at_rest(model):
        for _ in range(max_new_tokens):
            loop.step()
            if stop_flag(bool(loop.stopped.all())):
                break
    logprobs = torch.stack(loop.logprobs, dim=1) if return_logprobs else None
    return Generated(loop.ids, loop.lengths, loop.stopped, input_ids.shape[1], logprobs)


def generate_streaming(
    model: nn.Module,
    input_ids: Tensor,
    *,
    stop_sequences: list[list[int]],
    max_new_tokens: int,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The new token ids after one prompt ``input_ids`` (1, P), one by one, those of the stop sequence included."""
    if input_ids.shape[0] != 1:
        raise ValueError(f"streaming takes one prompt, input_ids of shape (1, P), not {tuple(input_ids.shape)}")
    sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty)
    mask = torch.ones_like(input_ids)
    _check(model, input_ids, mask, stop_sequences, max_new_tokens)
    loop = _Loop(model, input_ids, mask, stop_sequences, 0, sampling, generator, _same)
    for _ in range(max_new_tokens):
        with _at_rest(model):  # not around the yield: the caller may train meanwhile
            loop.step()
        yield int(loop.ids[0, -1])
        if loop.stopped[0]:
            return


class _Loop:
    """The state between two calls of the model: ids and mask so far (B, T), the cache, and which rows have stopped."""

    def __init__(self, model, input_ids, attention_mask, stop_sequences, pad, sampling, generator, gather_logits):
        from transformers import DynamicCache

        self.model, self.sampling, self.generator, self.gather_logits = model, sampling, generator, gather_logits
        self.ids, self.mask, self.pad, self.prompt_length = input_ids, attention_mask.long(), pad, input_ids.shape[1]
        self.stops = [torch.tensor(stop, device=input_ids.device) for stop in stop_sequences]
        self.accepted = _accepted(model)
        # Older classes (GPT-2) know only tuples, which they return.
        self.cache = DynamicCache() if getattr(innermost(model), "_supports_cache_class", True) else None
        self.stopped = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.lengths = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        self.fed = 0
        self.noise: Tensor | None = None
        self.logprobs: list[Tensor] | None = None  # of each step, (B,); None: not asked for

    def step(self) -> None:
        logits = self.gather_logits(self._logits())
        uniform = None if self.noise is None else self.noise[:, self.ids.shape[1] - self.prompt_length]
        token = choose(logits, self.ids, self.mask, self.sampling, self.generator, uniform)
        if self.logprobs is not None:
            scaled = logits / self.sampling.temperature
            chosen = scaled.gather(1, token[:, None])[:, 0] - scaled.logsumexp(dim=-1)
            self.logprobs.append(chosen.masked_fill(self.stopped, 0.0))
        token = torch.where(self.stopped, self.pad, token)
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        self.mask = torch.cat([self.mask, (~self.stopped).long()[:, None]], dim=1)
        self.lengths += ~self.stopped
        new = self.ids[:, self.prompt_length :]
        for stop in self.stops:
            if new.shape[1] >= len(stop):
                self.stopped |= (new[:, -len(stop) :] == stop).all(dim=1)

    def _logits(self) -> Tensor:
        """Feed what the cache has not seen, (B, P) at first, then (B, 1); the last position's logits, (B, V) fp32."""
        from transformers import DynamicCache

        start, end = self.fed, self.ids.shape[1]
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        inputs = {
            "input_ids": self.ids[:, start:],
            "attention_mask": self.mask,
            "position_ids": positions[:, start:],
            "past_key_values": self.cache,
            "use_cache": True,
            "cache_position": torch.arange(start, end, device=self.ids.device),
            "logits_to_keep": 1,  # of a long prompt only the last position goes through the head
        }
        outputs = self.model(**{name: value for name, value in inputs.items() if name in self.accepted})
        if not isinstance(self.cache, DynamicCache):
            self.cache = outputs.past_key_values
        if _cached_length(self.cache) != end:
            raise ValueError(f"{type(innermost(self.model)).__name__} fills no key-value cache here; it cannot sample")
        self.fed = end
        return outputs.logits[:, -1].float()


def choose(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    """The next token (B,) of each row from ``logits`` (B, V); ``ids`` and ``mask`` (B, T) are the row so far.

    ``uniform`` (B,) in [0, 1) takes the place of ``generator``.
    """
    if sampling.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.long).scatter_add_(1, ids, mask) > 0
        penalised = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if not sampling.do_sample:
        return logits.argmax(dim=-1)
    probabilities = keep_likely(logits / sampling.temperature, sampling.top_k, sampling.top_p).softmax(dim=-1)
    if uniform is not None:
        return draw(probabilities, uniform)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def keep_likely(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """``logits`` (B, V), -inf outside the ``top_k`` likeliest tokens and the fewest with a share of ``top_p``."""
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def _cached_length(cache) -> int:
    """Positions held by a Cache object or by the older tuples of (keys, values) of shape (B, H, T, D)."""
    if cache is None:
        return 0
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else cache[0][0].shape[-2]


def innermost(model: nn.Module) -> nn.Module:
    """The transformers model inside plugin wrappers and adapters."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _accepted(model: nn.Module) -> set[str]:
    """The keywords that the model's forward names; wrappers pass everything on, so the innermost decides."""
    return set(inspect.signature(innermost(model).forward).parameters)


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """No gradient, no dropout; afterwards every module trains again that did."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _check_noise(noise: Tensor | None, rows: int, steps: int) -> None:
    if noise is not None and (noise.dim() != 2 or noise.shape[0] != rows or noise.shape[1] < steps):
        raise ValueError(f"noise must have the shape ({rows}, {steps} or more), not {tuple(noise.shape)}")


def _check(model, input_ids: Tensor, mask: Tensor, stop_sequences: list[list[int]], max_new_tokens: int) -> None:
    rows, length = input_ids.shape
    if rows == 0 or length == 0:
        raise ValueError(f"nothing to continue: input_ids has shape {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not mask[:, -1].all() or (mask[:, 1:] < mask[:, :-1]).any():
        raise ValueError("prompts must be padded on the left: attention_mask 0, then 1 up to the last position")
    if any(not isinstance(stop, list | tuple) or len(stop) == 0 for stop in stop_sequences):
        raise ValueError(f"stop_sequences must be a list of non-empty lists of token ids, not {stop_sequences}")
    limit = getattr(getattr(innermost(model), "config", None), "max_position_embeddings", None)
    longest = int(mask.sum(dim=1).max())
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {limit} positions; shorten "
            "the prompt or ask for fewer new tokens (--max_new_tokens)"
        )
