"""Sampling: temperature, top-k, nucleus (top-p) and repetition penalty; the token and its
log-probability."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coati.models.generation.row_noise import BLOCK, blocks, draw, inside_block
from coati.utils.errors import RunFailed


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``do_sample`` False is greedy.

    0 or None turns ``top_k`` off, 1 ``top_p``, 0 ``min_p``. ``repetition_penalty`` above 1 divides
    the positive and multiplies the negative logits of tokens that the row already holds.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, good, wanted in (
            (
                "temperature",
                self.temperature > 0,
                "above 0 (for greedy decoding use do_sample=False)",
            ),
            ("top_k", self.top_k is None or self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
        ):
            if not good:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")

    @classmethod
    def at(
        cls,
        temperature: float,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        min_p: float = 0.0,
    ) -> "Sampling":
        """As flags say it: a ``temperature`` of 0 is greedy."""
        return cls(temperature != 0, temperature or 1.0, top_k, top_p, repetition_penalty, min_p)


def choose(
    logits: Tensor,
    sampling: Sampling,
    uniform: Tensor | None = None,
    seen: tuple[Tensor, Tensor] | None = None,
    return_logprobs: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The next token (B,) of each row from fp32 ``logits`` (B, V), and log_softmax(logits /
    temperature) there.

    ``uniform`` (B,) in [0, 1) decides a sampled token. ``seen``: ids and mask (B, T) of the row so
    far, which the repetition penalty needs. Raises RunFailed for logits that are nan or inf.
    """
    maxima = blocks(logits, torch.amax, -torch.inf)
    peak = maxima.amax(dim=-1, keepdim=True)
    if not peak.isfinite().all():
        raise RunFailed(
            "the model's scores of the next token are not finite: its weights hold nan or inf, or "
            "it overflows in this precision (fp16?). Look at the checkpoint that it is from; load "
            "it in bf16 or fp32"
        )
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    filtered = sampling.top_k or sampling.top_p < 1 or sampling.min_p
    unfiltered = sampling.repetition_penalty == 1 and not filtered
    shares = None
    if return_logprobs or (sampling.do_sample and unfiltered):
        shares = scaled.softmax(dim=-1)  # one pass, where its parts would be four
    if sampling.repetition_penalty != 1:
        ids, mask = seen
        logits = _penalized(logits, ids, mask, sampling.repetition_penalty)
        maxima = blocks(logits, torch.amax, -torch.inf)
    if not sampling.do_sample:
        token = _argmax(logits, maxima)
    elif unfiltered:
        token = draw(shares, uniform)
    else:
        logits = keep_likely(
            logits / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        )
        token = draw(logits.softmax(dim=-1), uniform)
    if not return_logprobs:
        return token, None
    share = shares.gather(1, token[:, None])
    if sampling.repetition_penalty == 1 and (unfiltered or not sampling.do_sample):
        return token, share.log()[:, 0]
    # The share of a token that a penalty or filter has chosen may be too small to be a number.
    largest = shares.amax(dim=-1, keepdim=True)
    return token, (scaled.gather(1, token[:, None]) - peak / sampling.temperature + largest.log())[
        :, 0
    ]


def _argmax(logits: Tensor, maxima: Tensor) -> Tensor:
    """The first of the largest of each row (B, V), of which ``maxima`` are those of its blocks:
    many times faster than torch's own."""
    block = maxima.argmax(dim=-1, keepdim=True)
    return (block * BLOCK + inside_block(logits, block, -torch.inf).argmax(dim=-1, keepdim=True))[
        :, 0
    ]


def _penalized(logits: Tensor, ids: Tensor, mask: Tensor, penalty: float) -> Tensor:
    seen = torch.zeros_like(logits, dtype=torch.long).scatter_add_(1, ids, mask) > 0
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_likely(logits: Tensor, top_k: int | None, top_p: float, min_p: float = 0.0) -> Tensor:
    """``logits`` (B, V), -inf outside the ``top_k`` likeliest tokens and the nucleus: the fewest
    tokens with cumulative probability ``top_p`` (Holtzman et al., arXiv 1904.09751); and of those
    the ones at least ``min_p`` times as probable as the likeliest (Nguyen et al., 2407.01082)."""
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        shares = ordered.softmax(dim=-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter_(
            1, order, shares.cumsum(dim=-1) - shares >= top_p
        )
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p:
        least = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits
