"""Log-softmax over the vocabulary at chosen tokens, and its gradient, a chunk of rows at a time;
and how such tokens lie in a batch.

The gradient of a row's log-probability with respect to its logits is ``onehot - softmax``. That of
the last chunk is kept from the forward pass, in place of the logits; the logits of the others are
formed again in the backward pass. One chunk of (rows, V) exists at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coati.utils.constants import IGNORE_INDEX

# Of fp32 logits: large enough for full matrix speed, small beside a model.
CHUNK_BYTES = 128 * 2**20
# Rows are exponentiated in blocks of 2 MiB, which stay in a core's cache between the passes.
_CACHED_ELEMENTS = 2**19
# p log p is 0 below it, without the product 0 x -inf of logits that are -inf.
LEAST_LOGP = -1e4


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


def log_normalize_(x: Tensor, collective: VocabCollective = WHOLE) -> Tensor:
    """``x`` (n, V) becomes x - logsumexp(x) in place; returns logsumexp (n,)."""
    peak = collective.reduce_max(x.amax(dim=1))
    total = torch.empty_like(peak)
    for part in row_blocks(x):
        torch.sum((x[part] - peak[part, None]).exp_(), dim=1, out=total[part])
    logsumexp = peak + collective.reduce_sum(total).log()
    x.sub_(logsumexp[:, None])
    return logsumexp


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
        ctx.save_for_backward(hidden, weight, bias, targets)
        logps = []
        gradient = factor = None
        for part in _row_chunks(len(hidden), chunk_rows):
            gradient = None  # release the last chunk before the next is formed
            found, gradient, factor = FromHidden._gradient(
                hidden[part], weight, bias, targets[part], temperature
            )
            logps.append(found)
        # An attribute, which backward can release before it forms the next chunk.
        ctx.kept = (gradient, factor)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """(n,) -> gradients of hidden states, weight and bias, a chunk at a time."""
        hidden, weight, bias, targets = ctx.saved_tensors
        kept = ctx.kept
        ctx.kept = None
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = (
            torch.zeros_like(weight) if ctx.needs_input_grad[1] and not len(hidden) else None
        )
        to_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for part in reversed(_row_chunks(len(hidden), ctx.chunk_rows)):
            rows = hidden[part]
            if kept is None:
                gradient = None
                _, gradient, factor = FromHidden._gradient(
                    rows, weight, bias, targets[part], ctx.temperature
                )
            else:
                gradient, factor = kept
                kept = None
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


def _row_chunks(count: int, size: int) -> list[slice]:
    """``count`` rows in chunks of ``size``; the first may be smaller, so that the last is whole."""
    ends = range(count % size or min(size, count), count + 1, size) if count else [0]
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def linear_logprobs(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_rows: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(n, d) hidden states through a linear layer (V, d) -> (n,) fp32 log-probs of ``targets``, as
    autocast would compute it; ``chunk_rows`` rows of logits at a time, by default as many as fit
    into :data:`CHUNK_BYTES`."""
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows = rows.to(dtype)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    step = chunk_rows or rows_per_chunk(len(weight))
    return FromHidden.apply(rows, weight, bias, targets, step, temperature)


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
