"""What a vocabulary head gives besides the log-probs of labels: entropy, logsumexp, top-k log-probs
and log-probs of given ids, with gradients, a chunk of rows at a time.

Notation: n rows, V vocabulary entries, x = logits / temperature, log p = x - logsumexp(x).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coati.models.distillation import Teacher, check_whole
from coati.models.ilql_heads import ActionValues
from coati.models.logprobs import (
    IGNORE_INDEX,
    LEAST_LOGP,
    WHOLE,
    VocabCollective,
    log_normalize_,
    next_token_targets,
    row_blocks,
    rows_per_chunk,
)


@dataclass(frozen=True)
class HeadRequest:
    """What is wanted besides label log-probs, at the same rows.

    ``entropy``: of the full distribution, for an entropy bonus; with ``entropy_order`` 2 the
    collision entropy -log sum p^2 (Renyi), which has no gradient. ``logsumexp``: for a z-loss.
    ``top_k``: the K most probable tokens. ``given``: ids (n, K), or (B, S, K) beside targets (B, S)
    of which the chosen rows are taken, whose log-probs are wanted. ``teacher``: the divergence from
    it (then nothing else but label log-probs). ``hidden``: the hidden states themselves, in place
    of all of these. ``action_values``: those of ILQL's heads, and nothing else.
    """

    entropy: bool = False
    entropy_order: int = 1
    logsumexp: bool = False
    top_k: int = 0
    given: Tensor | None = None
    teacher: Teacher | None = None
    hidden: bool = False
    action_values: bool = False

    def rows(self, chosen: Tensor) -> Tensor | None:
        """The given ids (n, K) of the n chosen rows, from a flat index ``chosen`` into B x S.

        Raises ValueError for (n, K) ids of another number of rows.
        """
        if self.given is None:
            return None
        ids = self.given.to(chosen.device)
        if ids.dim() == 3:
            return ids.flatten(0, 1).index_select(0, chosen)
        if len(ids) != len(chosen):
            raise ValueError(f"given ids for {len(ids)} rows, {len(chosen)} rows are supervised")
        return ids

    def beside(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """What each of the n chosen rows (:meth:`rows`) comes with. Raises ValueError for a teacher
        of another number of rows."""
        if self.teacher is None:
            given = self.rows(chosen)
            return () if given is None else (given,)
        found = self.teacher.rows()
        if len(found[0]) != len(chosen):
            raise ValueError(f"a teacher's {len(found[0])} rows, {len(chosen)} rows are supervised")
        return tuple(tensor.to(chosen.device) for tensor in found)


@dataclass(frozen=True)
class HeadOutputs:
    """Log-probs of labels and what a :class:`HeadRequest` asked for, all fp32 in the order of the n
    supervised rows; the ids int64. None for what was not asked."""

    logps: Tensor  # (1, n), as without a request
    entropy: Tensor | None = None  # (1, n) nats
    logsumexp: Tensor | None = None  # (1, n)
    topk_logps: Tensor | None = None  # (n, top_k), descending
    topk_ids: Tensor | None = None  # (n, top_k)
    given_logps: Tensor | None = None  # (n, K)
    divergence: Tensor | None = None  # (1, n) nats, from the teacher
    teacher_logps: Tensor | None = None  # (1, n) of the labels, no gradient
    hidden: Tensor | None = None  # (n, H)
    action_values: ActionValues | None = None  # each (n,)

    def without_batch_dim(self) -> "HeadOutputs":
        """(1, n) fields as (n,)."""
        names = ("logps", "entropy", "logsumexp", "divergence", "teacher_logps")
        found = {name: getattr(self, name) for name in names}
        return replace(self, **{name: t[0] for name, t in found.items() if t is not None})


class _RowOutputs(torch.autograd.Function):
    """(n, V) logits, whole or one rank's shard of them -> the fields of :class:`HeadOutputs`, each
    (n,) or (n, K).

    One (n, V) tensor is saved, log p; with respect to x the gradients are
    d log p_i = onehot_i - p, d logsumexp = p, d entropy = -p (log p + entropy).
    """

    @staticmethod
    def forward(ctx, logits, targets, given, request, collective, temperature):
        logp = logits.detach().to(torch.float32, copy=True)
        if temperature != 1:
            logp.div_(temperature)
        logsumexp = log_normalize_(logp, collective)
        ids = [targets[:, None]]
        if request.top_k:
            ids.append(_top_ids(logp, request.top_k, collective))
        if given is not None:
            ids.append(given)
        picked = _logps_at(logp, torch.cat(ids, dim=1), collective)
        logps, *groups = picked.split([part.shape[1] for part in ids], dim=1)
        entropy = _requested_entropy(request, logp, collective)
        ctx.save_for_backward(logp, torch.cat(ids, dim=1), entropy)
        ctx.widths = [part.shape[1] for part in ids]
        ctx.collective = collective
        ctx.temperature = temperature
        ctx.dtype = logits.dtype
        ctx.top_k = bool(request.top_k)
        ctx.order = request.entropy_order
        ctx.given = given is not None
        ctx.set_materialize_grads(False)
        topk_ids = ids[1] if request.top_k else None
        if topk_ids is not None:
            ctx.mark_non_differentiable(topk_ids)
        return (
            logps[:, 0],
            entropy,
            logsumexp if request.logsumexp else None,
            groups[0] if request.top_k else None,
            topk_ids,
            groups[-1] if given is not None else None,
        )

    @staticmethod
    def backward(ctx, to_logps, to_entropy, to_logsumexp, to_topk, _, to_given):
        logp, ids, entropy = ctx.saved_tensors
        if to_entropy is not None and ctx.order != 1:
            raise NotImplementedError("the collision entropy has no gradient; detach it")
        parts = [None if to_logps is None else to_logps[:, None]]
        parts += [to_topk] if ctx.top_k else []
        parts += [to_given] if ctx.given else []
        to_picked = torch.cat(
            [
                logp.new_zeros(len(logp), width) if part is None else part
                for part, width in zip(parts, ctx.widths, strict=True)
            ],
            dim=1,
        )
        share = to_picked.sum(1)  # of -p, in each row
        if to_logsumexp is not None:
            share = share - to_logsumexp
        if to_entropy is not None:
            share = share + to_entropy * entropy
        grad = torch.empty_like(logp)
        for part in row_blocks(logp):
            block = logp[part]
            factor = share[part, None]
            if to_entropy is not None:
                factor = factor + to_entropy[part, None] * block.clamp(min=LEAST_LOGP)
            torch.mul(block.exp(), -factor, out=grad[part])
        index, mine = _local(ids, logp.shape[1], ctx.collective)
        grad.scatter_add_(1, index, to_picked.masked_fill(~mine, 0.0))
        if ctx.temperature != 1:
            grad.div_(ctx.temperature)
        return grad.to(ctx.dtype), None, None, None, None, None


def _entropy(logp: Tensor) -> Tensor:
    """-sum p log p over this rank's share of the vocabulary, (n,)."""
    entropy = logp.new_empty(len(logp))
    for part in row_blocks(logp):
        block = logp[part].clamp(min=LEAST_LOGP)
        torch.sum(block.exp().mul_(block).neg_(), dim=1, out=entropy[part])
    return entropy


def _requested_entropy(
    request: HeadRequest, logp: Tensor, collective: VocabCollective
) -> Tensor | None:
    if not request.entropy:
        return None
    if request.entropy_order == 1:
        return collective.reduce_sum(_entropy(logp))
    total = logp.new_empty(len(logp))
    for part in row_blocks(logp):
        torch.sum((2 * logp[part]).exp_(), dim=1, out=total[part])
    return -collective.reduce_sum(total).log()


def _local(ids: Tensor, width: int, collective: VocabCollective) -> tuple[Tensor, Tensor]:
    """Columns of this rank's shard for ``ids``, 0 for those of another rank, and which are here."""
    index = ids - collective.offset
    mine = (index >= 0) & (index < width)
    return index.masked_fill(~mine, 0), mine


def _logps_at(logp: Tensor, ids: Tensor, collective: VocabCollective) -> Tensor:
    index, mine = _local(ids, logp.shape[1], collective)
    return collective.reduce_sum(logp.gather(1, index).masked_fill(~mine, 0.0))


def _top_ids(logp: Tensor, k: int, collective: VocabCollective) -> Tensor:
    """Ids (n, k) of the largest entries of every row, over all ranks."""
    values, index = logp.topk(min(k, logp.shape[1]), dim=1)
    if collective is WHOLE:
        return index
    missing = k - values.shape[1]  # a shard narrower than k
    values = F.pad(values, (0, missing), value=float("-inf"))
    ids = F.pad(index + collective.offset, (0, missing))
    best = collective.gather(values).topk(k, dim=1).indices
    return collective.gather(ids).gather(1, best)


def outputs_of_chunks(
    logits_of: Callable[[Tensor], Tensor],
    rows: Sequence[Tensor],
    targets: Sequence[Tensor],
    beside: Sequence[tuple[Tensor, ...]],
    request: HeadRequest,
    collective: VocabCollective,
    temperature: float,
    count: int,
) -> HeadOutputs:
    """The outputs of chunks of rows, joined, of the first ``count`` rows. ``logits_of``: a chunk of
    ``rows`` -> (n, V) logits, called again in the backward pass unless there is one chunk, so that
    one chunk exists at a time. ``beside``: each chunk of :meth:`HeadRequest.beside`. The divergence
    from a teacher is at temperature 1."""
    if request.teacher is not None:
        check_whole(collective)

    def chunk(part: Tensor, wanted: Tensor, *more: Tensor) -> tuple[Tensor | None, ...]:
        logits = logits_of(part)
        if request.teacher is not None:
            logps, *compared = request.teacher.outputs(logits, wanted, *more)
            return logps, *[None] * 5, *compared
        given = more[0] if more else None
        found = _RowOutputs.apply(logits, wanted, given, request, collective, temperature)
        return *found, None, None

    recompute = len(rows) > 1 and torch.is_grad_enabled()
    parts = [
        checkpoint(chunk, part, wanted, *more, use_reentrant=False)
        if recompute
        else chunk(part, wanted, *more)
        for part, wanted, more in zip(rows, targets, beside, strict=True)
    ]
    joined = [
        None if column[0] is None else torch.cat(column)[:count]
        for column in zip(*parts, strict=True)
    ]
    *first, topk_logps, topk_ids, given_logps, divergence, teacher_logps = joined
    per_row = (*first, divergence, teacher_logps)
    logps, entropy, logsumexp, divergence, teacher_logps = (
        None if value is None else value[None] for value in per_row
    )
    return HeadOutputs(
        logps,
        entropy,
        logsumexp,
        topk_logps,
        topk_ids,
        given_logps,
        divergence=divergence,
        teacher_logps=teacher_logps,
    )


def outputs_from_logits(
    logits: Tensor,
    labels: Tensor,
    request: HeadRequest,
    ignore_index: int = IGNORE_INDEX,
    temperature: float = 1.0,
) -> HeadOutputs:
    """(B, S, V) logits, (B, S) labels -> what a head gives for them; as
    :func:`~coati.models.logprobs.logprobs_from_logits`, one chunk of fp32 copies at a time."""
    targets = next_token_targets(labels, ignore_index).flatten()
    index = (targets != ignore_index).nonzero()[:, 0]
    flat = logits.flatten(0, 1)
    step = rows_per_chunk(logits.shape[-1])
    chunks = index.split(step)
    beside = [tensor.split(step) for tensor in request.beside(index)]
    return outputs_of_chunks(
        lambda part: flat.index_select(0, part),
        chunks,
        targets[index].split(step),
        list(zip(*beside, strict=True)) or [()] * len(chunks),
        request,
        WHOLE,
        temperature,
        len(index),
    )
