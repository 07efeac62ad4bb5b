"""Divergences between a teacher's and a student's next-token distributions (GKD, arXiv 2306.13649),
with their gradients, a chunk of rows at a time.

Notation: p the teacher, q the student, m = beta p + (1 - beta) q, D_beta = beta KL(p || m) +
(1 - beta) KL(q || m). D_beta is 0 at both ends, so these are what D_beta / (beta (1 - beta)) tends
to: D_0 = KL(p || q), D_1 = KL(q || p). With x the student's logits and h_i = q_i dD/dq_i (up to
what cancels) the gradient is dD/dx_i = h_i - q_i sum_j h_j.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coati.models.logprobs import LEAST_LOGP, WHOLE, VocabCollective, log_normalize_, row_blocks

# Logits that a model changes after its head: configuration field -> what it does with them.
_AFTER_HEAD: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, scale: logits / scale,
    "lm_head_multiplier": lambda logits, scale: logits * scale,
}
_MOST = 1 - 1e-12  # of the sum of listed probabilities


def divergence(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """D_beta (...,) of distributions (..., C) given as log-probs, of the student and of the
    teacher."""
    return _terms(log_q, log_p, beta)[0]


def _terms(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """D_beta (...,) and h (..., C)."""
    log_q = log_q.clamp(min=LEAST_LOGP)
    log_p = log_p.clamp(min=LEAST_LOGP)
    if beta == 0:
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), -p
    if beta == 1:
        h = log_q.exp() * (log_q - log_p)
        return h.sum(-1), h
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    h = (1 - beta) * log_q.exp() * (log_q - log_m)
    return beta * (log_p.exp() * (log_p - log_m)).sum(-1) + h.sum(-1), h


@dataclass(frozen=True)
class WholeTeacher:
    """A teacher whose distribution is compared over the whole vocabulary.

    ``hidden`` (n, H'): its last hidden states at the supervised rows; ``logits_of``: rows of them
    -> (rows, V') logits in a new tensor, which is overwritten. Where V and V' differ (rows of
    embeddings that no token has), both distributions are those of the first min(V, V') ids.
    """

    hidden: Tensor
    logits_of: Callable[[Tensor], Tensor]
    beta: float

    def rows(self) -> tuple[Tensor, ...]:
        """What is of one row each."""
        return (self.hidden,)

    def outputs(self, logits: Tensor, targets: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        """(c, V) logits of the student -> log-probs of ``targets``, divergences and the teacher's
        log-probs of ``targets``, each (c,)."""
        with torch.no_grad():
            theirs = self.logits_of(hidden)
        return _FromTeacher.apply(logits, theirs, targets, self.beta)


@dataclass(frozen=True)
class ListedTeacher:
    """A teacher of whom the likeliest ids are known: ``ids`` and ``logps`` (n, K), no id twice in a
    row. Both distributions are over these ids, and one cell for all others."""

    ids: Tensor
    logps: Tensor
    beta: float

    def rows(self) -> tuple[Tensor, ...]:
        """What is of one row each."""
        return (self.ids, self.logps)

    def outputs(self, logits: Tensor, targets: Tensor, ids: Tensor, logps: Tensor):
        """As of :class:`WholeTeacher`; the teacher's log-probs of ``targets`` are NaN, since they
        need not be listed."""
        return _FromListed.apply(logits, ids, logps, targets, self.beta)


Teacher = WholeTeacher | ListedTeacher


def check_whole(collective: VocabCollective) -> None:
    """Raise ValueError for logits that are split over ranks."""
    if collective is not WHOLE:
        raise ValueError("a divergence from a teacher needs whole logits on every rank")


def after_head(config: Any) -> Callable[[Tensor], Tensor]:
    """What a causal language model of ``config`` does with the logits of its head, without
    gradient (soft caps, scales); the identity for most."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    changes = [
        (change, float(value))
        for field, change in _AFTER_HEAD.items()
        if (value := getattr(text, field, None)) is not None
    ]

    def changed(logits: Tensor) -> Tensor:
        for change, value in changes:
            logits = change(logits, value)
        return logits

    return changed


class _FromTeacher(torch.autograd.Function):
    """(n, V) and (n, V') logits of student and teacher -> log-probs of targets by the student,
    D_beta, log-probs of targets by the teacher, each (n,). Both log-softmaxes are saved."""

    @staticmethod
    def forward(ctx, logits: Tensor, theirs: Tensor, targets: Tensor, beta: float):
        width = min(logits.shape[1], theirs.shape[1])
        log_q = logits.detach()[:, :width].to(torch.float32, copy=True)
        log_p = theirs[:, :width].float()  # the teacher's own tensor where it is fp32 already
        log_normalize_(log_q)
        log_normalize_(log_p)
        found = log_q.new_empty(len(log_q))
        for part in row_blocks(log_q):
            found[part] = divergence(log_q[part], log_p[part], beta)
        index = targets[:, None]
        ctx.save_for_backward(log_q, log_p, targets)
        ctx.beta = beta
        ctx.logits = (logits.shape, logits.dtype)
        ctx.set_materialize_grads(False)
        teacher_logps = log_p.gather(1, index)[:, 0]
        ctx.mark_non_differentiable(teacher_logps)
        return log_q.gather(1, index)[:, 0], found, teacher_logps

    @staticmethod
    def backward(ctx, to_logps, to_divergence, _):
        log_q, log_p, targets = ctx.saved_tensors
        shape, dtype = ctx.logits
        grad = log_q.new_zeros(shape, dtype=dtype)
        for part in row_blocks(log_q):
            block = log_q[part]
            q = block.exp()
            total = torch.zeros_like(block)
            if to_divergence is not None:
                _, h = _terms(block, log_p[part], ctx.beta)
                h = h - q * h.sum(-1, keepdim=True)
                total += h * to_divergence[part, None]
            if to_logps is not None:
                _add_log_softmax_gradient_(total, q, targets[part], to_logps[part])
            grad[part, : block.shape[1]] = total.to(dtype)
        return grad, None, None, None


class _FromListed(torch.autograd.Function):
    """(n, V) logits of the student, ids and log-probs (n, K) of the teacher -> as
    :class:`_FromTeacher`, over K + 1 cells.

    Within the last cell the student's probabilities share h in proportion to themselves.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, logps: Tensor, targets: Tensor, beta: float):
        log_q = logits.detach().to(torch.float32, copy=True)
        log_normalize_(log_q)
        listed = log_q.gather(1, ids)
        rest = log_q.scatter(1, ids, float("-inf")).logsumexp(1, keepdim=True)
        mine = torch.cat([listed, rest], dim=1)
        others = -logps.double().exp().sum(1, keepdim=True).clamp(max=_MOST)
        nothing = rest == float("-inf")  # every id is listed: what is left of p is rounding
        unlisted = torch.log1p(others).float().masked_fill(nothing, LEAST_LOGP)
        theirs = torch.cat([logps.float(), unlisted], dim=1)
        found, h = _terms(mine, theirs, beta)
        ctx.save_for_backward(log_q, ids, mine, h, targets)
        ctx.dtype = logits.dtype
        ctx.set_materialize_grads(False)
        unknown = torch.full_like(found, float("nan"))
        ctx.mark_non_differentiable(unknown)
        return log_q.gather(1, targets[:, None])[:, 0], found, unknown

    @staticmethod
    def backward(ctx, to_logps, to_divergence, _):
        log_q, ids, mine, h, targets = ctx.saved_tensors
        grad = torch.zeros_like(log_q)
        share = mine.clamp(min=LEAST_LOGP).exp()
        for part in row_blocks(log_q):
            q = log_q[part].exp()
            if to_divergence is not None:
                total = h[part].sum(-1, keepdim=True)
                in_rest = h[part, -1:] / share[part, -1:].clamp(min=1e-30)
                of_cells = h[part, :-1] - share[part, :-1] * total
                grad[part] = q * (in_rest - total)
                grad[part] = grad[part].scatter(1, ids[part], of_cells)
                grad[part] *= to_divergence[part, None]
            if to_logps is not None:
                _add_log_softmax_gradient_(grad[part], q, targets[part], to_logps[part])
        return grad.to(ctx.dtype), None, None, None, None


def _add_log_softmax_gradient_(grad: Tensor, q: Tensor, targets: Tensor, weight: Tensor) -> None:
    """Add the gradient of ``weight`` x log q at ``targets``: weight x (onehot - q)."""
    grad -= q * weight[:, None]
    grad.scatter_add_(1, targets[:, None], weight[:, None].to(grad.dtype))
