"""Log-softmax over the vocabulary at chosen tokens, and its gradient, a chunk of rows at a time;
and how such tokens lie in a batch.

The gradient of a row's log-probability with respect to its logits is ``onehot - softmax``. Where
the rows of one call fit into a chunk it is kept from the forward pass, in place of the logits;
otherwise each chunk's logits are formed again in the backward pass. Either way one chunk of (rows,
V) exists at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coati.utils.constants import IGNORE_INDEX

# Of fp32 logits: large enough for full matrix speed, small beside a model.
CHUNK_BYTES = 128 * 2**20
# Rows are exponentiated in blocks of 2 MiB, which stay in a core's cache between the passes.
_CACHED_ELEMENTS = 2**19


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class VocabCollective:
    """A vocabulary split over ranks. ``offset``: token id of this rank's first logit.
    ``reduce_max``, ``reduce_sum``: a float tensor -> its maximum or sum over the ranks that share
    the vocabulary; ``gather``: (n, k) -> (n, ranks x k), alike on every rank (by default the
    identity)."""

    offset: int = 0
    reduce_max: Callable[[Tensor], Tensor] = _same
    reduce_sum: Callable[[Tensor], Tensor] = _same
    gather: Callable[[Tensor], Tensor] = _same


WHOLE = VocabCollective()


def next_token_targets(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """(B, S) labels -> (B, S) targets: position t is to predict ``labels[:, t + 1]``, the last
    position nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)


def scatter_token_logprobs(
    flat: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """The head's (1, n) log-probs laid out as (B, S - 1), zero where ``labels[:, 1:]`` is
    ``ignore_index``."""
    chosen = labels[:, 1:] != ignore_index
    return flat.new_zeros(chosen.shape).masked_scatter(chosen, flat)


def right_pad_order(attention_mask: Tensor) -> Tensor:
    """(B, S) 0/1 -> (B, S) positions: the real tokens of each row in their order, then its padding.

    ``tensor.gather(1, right_pad_order(mask))`` pads a (B, S) tensor on the right. A model counts
    positions from the start of a row, so only there do its numbers not depend on the side and
    amount of padding.
    """
    return torch.argsort(attention_mask.bool().logical_not().to(torch.uint8), dim=1, stable=True)


def restore_order(moved: Tensor, order: Tensor) -> Tensor:
    """The inverse: values (B, S) in the order of :func:`right_pad_order` back at their places."""
    return torch.empty_like(moved).scatter(1, order, moved)


def rows_per_chunk(vocab_size: int) -> int:
    """Rows of ``vocab_size`` fp32 logits that fit into :data:`CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows of ``logits`` (n, V) that fit into a core's cache."""
    rows = max(1, _CACHED_ELEMENTS // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _exp_(logits: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """``logits`` (n, V) becomes exp((logits - peak) / temperature), in place; the sum of each row,
    (n,)."""
    total = torch.empty_like(peak)
    for part in row_blocks(logits):
        block = logits[part]
        block.sub_(peak[part, None])
        if temperature != 1:
            block.div_(temperature)
        block.exp_()
        torch.sum(block, dim=1, out=total[part])
    return total


def _logprobs_and_gradient_(
    logits: Tensor, targets: Tensor, collective: VocabCollective, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs (n,) of ``targets`` (n,), and the factors (n,) of their gradient: fp32 ``logits``
    (n, V) become (softmax - onehot) x denominator, in place, and the factor divides by denominator
    x temperature: a factor per row is cheaper to apply to hidden states than to V columns.
    """
    index = targets - collective.offset
    mine = (index >= 0) & (index < logits.shape[1])  # this rank's shard holds the target
    index = index.masked_fill(~mine, 0)[:, None]
    peak = collective.reduce_max(logits.amax(dim=1))
    chosen = collective.reduce_sum((logits.gather(1, index)[:, 0] - peak).masked_fill(~mine, 0.0))
    total = collective.reduce_sum(_exp_(logits, peak, temperature))
    logits.scatter_add_(1, index, total.masked_fill(~mine, 0.0).neg()[:, None])
    return chosen / temperature - total.log(), (total * temperature).reciprocal_()


class FromLogits(torch.autograd.Function):
    """(n, V) logits, whole or one rank's shard of them -> (n,) log-probs of targets:
    log_softmax(logits / temperature) there."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, targets: Tensor, collective: VocabCollective, temperature: float
    ) -> Tensor:
        work = logits.detach().to(torch.float32, copy=True)
        logps, factor = _logprobs_and_gradient_(work, targets, collective, temperature)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(work, factor)
        return logps

    @staticmethod
    def backward(ctx, grad: Tensor):
        """(n,) -> (n, V), onehot - softmax over the temperature."""
        work, factor = ctx.saved_tensors
        return (work * (-grad * factor)[:, None]).to(ctx.dtype), None, None, None


class FromHidden(torch.autograd.Function):
    """(n, H) hidden states, (V, H) weight, (V,) bias or None -> (n,) log-probs of targets; V-wide
    memory: one chunk."""

    @staticmethod
    def _gradient(hidden, weight, bias, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
        """Log-probs and d(-log-prob)/d(logits) as (n, V) x (n,): in fp32 the row factor stays
        outside the matrix."""
        logits = F.linear(hidden, weight, bias)
        gradient = logits.float()
        logps, factor = _logprobs_and_gradient_(gradient, targets, WHOLE, temperature)
        if logits.dtype == torch.float32:
            return logps, gradient, factor
        return logps, gradient.mul_(factor[:, None]).to(logits.dtype), torch.ones_like(factor)

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets: Tensor, chunk_rows: int, temperature: float
    ) -> Tensor:
        ctx.chunk_rows = chunk_rows
        ctx.temperature = temperature
        if len(hidden) <= chunk_rows:
            logps, gradient, factor = FromHidden._gradient(
                hidden, weight, bias, targets, temperature
            )
            ctx.save_for_backward(hidden, weight, bias, targets, gradient, factor)
            return logps
        ctx.save_for_backward(hidden, weight, bias, targets, None, None)
        chunks = zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
        return torch.cat(
            [
                FromHidden._gradient(rows, weight, bias, wanted, temperature)[0]
                for rows, wanted in chunks
            ]
        )

    @staticmethod
    def backward(ctx, grad: Tensor):
        """(n,) -> gradients of hidden states, weight and bias, a chunk at a time."""
        hidden, weight, bias, targets, gradient, factor = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = (
            torch.zeros_like(weight) if ctx.needs_input_grad[1] and not len(hidden) else None
        )
        to_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), ctx.chunk_rows):
            part = slice(start, start + ctx.chunk_rows)
            rows = hidden[part]
            if gradient is None or start:
                gradient = None  # release the last chunk before the next is formed
                _, gradient, factor = FromHidden._gradient(
                    rows, weight, bias, targets[part], ctx.temperature
                )
            scale = (-grad[part] * factor).to(rows.dtype)[:, None]
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[part]).mul_(scale)
            if to_bias is not None:
                to_bias.addmv_(gradient.t(), scale[:, 0])
            if ctx.needs_input_grad[1]:
                scaled = rows * scale
                to_weight = (
                    gradient.t() @ scaled
                    if to_weight is None
                    else to_weight.addmm_(gradient.t(), scaled)
                )
        return to_hidden, to_weight, to_bias, None, None, None


def logprobs_from_logits(
    logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX, temperature: float = 1.0
) -> Tensor:
    """(B, S, V) logits, (B, S) labels -> (1, n) fp32 log-probs of the labeled tokens,
    log_softmax(logits / temperature) there, as :class:`Head` gives them: for models that
    :func:`head_unsupported` names. Besides the logits one chunk of fp32 copies exists at a time."""
    targets = next_token_targets(labels, ignore_index).flatten()
    index = (targets != ignore_index).nonzero()[:, 0]
    rows = logits.flatten(0, 1)
    targets = targets[index]
    step = rows_per_chunk(logits.shape[-1])

    def chunk(part: Tensor, wanted: Tensor) -> Tensor:
        return FromLogits.apply(rows.index_select(0, part), wanted, WHOLE, temperature)

    parts = zip(index.split(step), targets.split(step), strict=True)
    return torch.cat(
        [checkpoint(chunk, part, wanted, use_reentrant=False) for part, wanted in parts]
    )[None]
