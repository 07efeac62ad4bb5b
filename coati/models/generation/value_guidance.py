"""Decoding by ILQL's heads (arXiv 2206.11871): softmax(top_k(log pi + beta (min_i Qi' - V)) / T).

As with :class:`coati.models.head.Head`, the forward of the output embedding is replaced: what it
returns is no longer log pi but the sum above, -inf outside the top k, and everything that decodes
(chat, server, samples, batches that rows join and leave) works on it as on any logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from coati.models.generation.sampling import keep_likely
from coati.models.ilql_heads import ILQLHeads

BETA = 1.0
TOP_K = 20


class ValueGuidance:
    """The scores of tokens by policy and heads, in place of the logits of ``model``.

    ``beta``: weight of the advantages min_i Qi' - V beside log pi, above 0. ``top_k``: tokens that
    may be chosen at all.
    """

    def __init__(
        self, model: Any, heads: ILQLHeads, beta: float = BETA, top_k: int | None = TOP_K
    ) -> None:
        self.module = model.get_output_embeddings()
        self.heads = heads
        self.beta = beta
        self.top_k = top_k
        self._own = self.module.__dict__.get("forward")
        self._original = self.module.forward

    def install(self) -> None:
        """Replace the forward of the output embedding."""
        self.module.forward = self._forward

    def remove(self) -> None:
        """Give it back what it had."""
        if self._own is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self._own

    @torch.no_grad()
    def _forward(self, hidden: Tensor, *args: Any, **keywords: Any) -> Tensor:
        """(..., d) -> (..., V) fp32."""
        logps = self._original(hidden, *args, **keywords).float().log_softmax(dim=-1)
        scores = logps.add_(self.heads.advantages(hidden), alpha=self.beta)
        return keep_likely(scores.flatten(0, -2), self.top_k, 1.0).view_as(scores)


@contextmanager
def guided(
    model: Any, heads: ILQLHeads, beta: float = BETA, top_k: int | None = TOP_K
) -> Iterator[None]:
    """Inside the block ``model`` decodes by ``heads``; with ``beta`` 0 as it does anyway."""
    if not beta:
        yield
        return
    guidance = ValueGuidance(model, heads, beta, top_k)
    guidance.install()
    try:
        yield
    finally:
        guidance.remove()


@contextmanager
def unguided(model: Any) -> Iterator[None]:
    """Inside the block the logits of ``model`` are those of its policy, whatever it decodes by."""
    forward = getattr(model.get_output_embeddings(), "forward", None)
    guidance = getattr(forward, "__self__", None)
    if not isinstance(guidance, ValueGuidance):
        yield
        return
    guidance.remove()
    try:
        yield
    finally:
        guidance.install()
