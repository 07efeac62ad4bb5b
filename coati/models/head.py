"""Log-probabilities of chosen tokens without the (B, S, V) logits: the only softmax over the vocabulary.

The model's code is left alone. :meth:`Head.install` replaces the ``forward`` of its output embedding; between
:meth:`Head.set` and :meth:`Head.clear` that forward keeps the hidden states whose next token is supervised and returns
the log-probabilities of these tokens, shape (1, n), where logits would have been. Otherwise it is the original forward.

The gradient of a row's log-probability with respect to its logits is ``onehot - softmax``. Where the rows of one call
fit into a chunk it is kept from the forward pass, in place of the logits; otherwise each chunk's logits are formed
again in the backward pass. Either way one chunk of (rows, V) exists at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK_BYTES = 128 * 2**20  # of fp32 logits: large enough for full matrix speed, small beside a model
_CACHED_ELEMENTS = 2**19  # rows are exponentiated in blocks of 2 MiB, which stay in a core's cache between the passes

# Configuration fields of models that change the logits after the output embedding; 1 and None change nothing.
_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class VocabCollective:
    """A vocabulary split over ranks: what one rank holds, and how the ranks agree.

    ``offset``: token id of this rank's first logit. ``reduce_max``, ``reduce_sum``: take a float tensor of any shape
    and return its maximum or sum over the ranks that share the vocabulary (the identity by default).
    """

    offset: int = 0
    reduce_max: Callable[[Tensor], Tensor] = _same
    reduce_sum: Callable[[Tensor], Tensor] = _same


_WHOLE = VocabCollective()


def head_unsupported(config: Any) -> str | None:
    """Why :class:`Head` cannot serve the model of ``config`` (it changes logits after the head), or None."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for field in _CHANGES_LOGITS:
        value = getattr(text, field, None)
        if value is not None and not (value == 1 and field != "final_logit_softcapping"):
            return f"{getattr(text, 'model_type', 'this model')} changes its logits after the head ({field}={value})"
    return None


def next_token_targets(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """(B, S) labels -> (B, S) targets: position t is to predict ``labels[:, t + 1]``, the last position nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)


def gather_token_logprobs(flat: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The head's (1, n) log-probs laid out as (B, S - 1), zero where ``labels[:, 1:]`` is ``ignore_index``."""
    chosen = labels[:, 1:] != ignore_index
    return flat.new_zeros(chosen.shape).masked_scatter(chosen, flat)


unflatten = gather_token_logprobs


def default_chunk_rows(vocab_size: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def _exp_(logits: Tensor, peak: Tensor) -> Tensor:
    """``logits`` (n, V) becomes exp(logits - peak), in place; the sum of each row, (n,)."""
    total = torch.empty_like(peak)
    rows = max(1, _CACHED_ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, len(logits), rows):
        block = logits[start : start + rows]
        block.sub_(peak[start : start + rows, None]).exp_()
        torch.sum(block, dim=1, out=total[start : start + rows])
    return total


def _logprobs_and_gradient_(logits: Tensor, targets: Tensor, collective: VocabCollective) -> tuple[Tensor, Tensor]:
    """Log-probs (n,) of ``targets`` (n,); fp32 ``logits`` (n, V) become (softmax - onehot) x total, in place.

    ``total`` (n,), the second result, is the softmax denominator. It is left in because a factor per row is cheaper to
    apply to hidden states than to V columns.
    """
    index = targets - collective.offset
    mine = (index >= 0) & (index < logits.shape[1])  # this rank's shard holds the target
    index = index.masked_fill(~mine, 0)[:, None]
    peak = collective.reduce_max(logits.amax(dim=1))
    chosen = collective.reduce_sum((logits.gather(1, index)[:, 0] - peak).masked_fill(~mine, 0.0))
    total = collective.reduce_sum(_exp_(logits, peak))
    logits.scatter_add_(1, index, total.masked_fill(~mine, 0.0).neg()[:, None])
    return chosen - total.log(), total


class _FromLogits(torch.autograd.Function):
    """(n, V) logits, whole or one rank's shard of them -> (n,) log-probs of targets."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, collective: VocabCollective) -> Tensor:
        work = logits.detach().to(torch.float32, copy=True)
        logps, total = _logprobs_and_gradient_(work, targets, collective)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(work, total)
        return logps

    @staticmethod
    def backward(ctx, grad: Tensor):
        work, total = ctx.saved_tensors
        return (work * (-grad / total)[:, None]).to(ctx.dtype), None, None


class _FromHidden(torch.autograd.Function):
    """(n, H) hidden states, (V, H) weight, (V,) bias or None -> (n,) log-probs of targets; V-wide memory: one chunk."""

    @staticmethod
    def _gradient(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
        """Log-probs and d(-log-prob)/d(logits) as (n, V) x (n,): in fp32 the row factor stays outside the matrix."""
        logits = F.linear(hidden, weight, bias)
        gradient = logits.float()
        logps, total = _logprobs_and_gradient_(gradient, targets, _WHOLE)
        if logits.dtype == torch.float32:
            return logps, gradient, total.reciprocal_()
        return logps, gradient.div_(total[:, None]).to(logits.dtype), torch.ones_like(total)

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets: Tensor, chunk_rows: int) -> Tensor:
        ctx.chunk_rows = chunk_rows
        if len(hidden) <= chunk_rows:
            logps, gradient, factor = _FromHidden._gradient(hidden, weight, bias, targets)
            ctx.save_for_backward(hidden, weight, bias, targets, gradient, factor)
            return logps
        ctx.save_for_backward(hidden, weight, bias, targets, None, None)
        chunks = zip(hidden.split(chunk_rows), targets.split(chunk_rows), strict=True)
        return torch.cat([_FromHidden._gradient(rows, weight, bias, wanted)[0] for rows, wanted in chunks])

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, bias, targets, gradient, factor = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] and not len(hidden) else None
        to_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), ctx.chunk_rows):
            part = slice(start, start + ctx.chunk_rows)
            rows = hidden[part]
            if gradient is None or start:
                gradient = None  # release the last chunk before the next is formed
                _, gradient, factor = _FromHidden._gradient(rows, weight, bias, targets[part])
            scale = (-grad[part] * factor).to(rows.dtype)[:, None]
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[part]).mul_(scale)
            if to_bias is not None:
                to_bias.addmv_(gradient.t(), scale[:, 0])
            if ctx.needs_input_grad[1]:
                scaled = rows * scale
                to_weight = gradient.t() @ scaled if to_weight is None else to_weight.addmm_(gradient.t(), scaled)
        return to_hidden, to_weight, to_bias, None, None


def logprobs_from_logits(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """(B, S, V) logits, (B, S) labels -> (1, n) fp32 log-probs of the labelled tokens, as :class:`Head` gives them.

    For models that :func:`head_unsupported` names. Besides the logits one chunk of fp32 copies exists at a time.
    """
    targets = next_token_targets(labels, ignore_index).flatten()
    index = (targets != ignore_index).nonzero()[:, 0]
    rows, targets = logits.flatten(0, 1), targets[index]
    step = default_chunk_rows(logits.shape[-1])

    def chunk(part: Tensor, wanted: Tensor) -> Tensor:
        return _FromLogits.apply(rows.index_select(0, part), wanted, _WHOLE)

    parts = zip(index.split(step), targets.split(step), strict=True)
    return torch.cat([checkpoint(chunk, part, wanted, use_reentrant=False) for part, wanted in parts])[None]


class Head:
    """The output embedding of one causal language model, switchable to log-probs of chosen tokens.

    Built by :meth:`install`. Without an output embedding (a pipeline stage that is not the last) it does nothing.
    """

    def __init__(self, module: nn.Module | None, collective: VocabCollective | None, chunk_rows: int | None):
        self.module = module
        self.collective = collective or _WHOLE
        self.chunk_rows = chunk_rows
        self.agree_on_chunks: Callable[[int], int] | None = None
        self._targets: Tensor | None = None
        self._ignore_index = IGNORE_INDEX
        self._original: Callable[..., Any] | None = None

    @classmethod
    def install(
        cls,
        causal_lm: nn.Module,
        *,
        collective: VocabCollective | None = None,
        chunk_rows: int | None = None,
        agree_on_chunks: Callable[[int], int] | None = None,
    ) -> "Head":
        """Replace the forward of ``causal_lm.get_output_embeddings()``; call it after boosting.

        collective: for a head that leaves its logits split over ranks. chunk_rows: rows of logits formed at a time,
        by default as many as fit into 128 MiB of fp32. agree_on_chunks: for a head whose own forward holds collectives
        (sharded parameters), which all ranks must call equally often: number of chunks -> the largest of all ranks.
        """
        module = causal_lm.get_output_embeddings()
        head = cls(module, collective, chunk_rows)
        if module is None:
            return head
        if isinstance(getattr(module.forward, "__self__", None), Head):
            module.forward.__self__.remove()
        head.agree_on_chunks = agree_on_chunks
        head._original, module.forward = module.forward, head._forward
        return head

    def remove(self) -> None:
        if self.module is not None:
            self.module.forward = self._original

    def set(self, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> None:
        """Choose tokens for the next forward: ``labels`` (B, S), position t predicts ``labels[:, t + 1]``.

        The log-probs come in the row order of ``labels[:, 1:] != ignore_index``.
        """
        self.set_targets(next_token_targets(labels, ignore_index), ignore_index)

    def set_targets(self, targets: Tensor, ignore_index: int = IGNORE_INDEX) -> None:
        """:meth:`set` with labels already shifted: ``targets`` (B, S), what position t itself is to predict.

        For hidden states that are not whole rows: rows packed into one, or a slice of the sequence.
        """
        self._targets, self._ignore_index = targets, ignore_index

    def clear(self) -> None:
        """Back to the original forward, as generation needs it."""
        self._targets = None

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any):
        if self._targets is None:
            return self._original(hidden, *args, **kwargs)
        if hidden.shape[:-1].numel() != self._targets.numel():
            raise ValueError(
                f"the vocabulary head was set for {tuple(self._targets.shape)} positions and got hidden states "
                f"{tuple(hidden.shape)}: call Head.set with the labels of this forward, Head.clear before generating"
            )
        hidden = hidden.as_subclass(Tensor)
        targets = self._targets.to(hidden.device).flatten()
        index = (targets != self._ignore_index).nonzero()[:, 0]
        rows, targets = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index), targets[index]
        chosen = self._plain(rows, targets) if self._is_plain() else self._general(hidden, rows, targets)
        return chosen[None]

    def _is_plain(self) -> bool:
        """Whether the module is a linear layer and nothing else: its parameters may then be used directly."""
        module = self.module
        return (
            type(module) is nn.Linear
            and getattr(self._original, "__func__", None) is nn.Linear.forward
            and self.collective is _WHOLE
            and all(type(parameter) is nn.Parameter for parameter in module.parameters())
        )

    def _plain(self, rows: Tensor, targets: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        step = self.chunk_rows or default_chunk_rows(len(weight))
        return _FromHidden.apply(rows, weight, bias, targets, step)

    def _general(self, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Any module, by its own forward: parameters that are split, gathered or adapted when it is called."""
        count = len(rows)
        step = self.chunk_rows or default_chunk_rows(self._width())
        chunks = max(1, -(-count // step))
        if self.agree_on_chunks is not None:
            chunks = self.agree_on_chunks(chunks)
        if count < chunks:
            # Every rank calls the module equally often, with at least one row, and every parameter gets a gradient.
            blank = hidden.reshape(-1, hidden.shape[-1])[:1].expand(chunks - count, -1)
            blank = blank.masked_fill(torch.ones((), dtype=torch.bool, device=rows.device), 0.0)
            rows, targets = torch.cat([rows, blank]), F.pad(targets, (0, chunks - count))
        parts = zip(rows.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
        if chunks == 1 or not torch.is_grad_enabled():
            logps = [self._chunk(part, wanted) for part, wanted in parts]
        else:
            logps = [checkpoint(self._chunk, part, wanted, use_reentrant=False) for part, wanted in parts]
        return torch.cat(logps)[:count]

    def _chunk(self, rows: Tensor, targets: Tensor) -> Tensor:
        # Three dimensions, as every module that stands here has seen them.
        # Gemini's ColoTensor does not follow out= and in-place operations: from here on a plain tensor is meant.
        logits = self._original(rows[None]).as_subclass(Tensor)
        return _FromLogits.apply(logits.flatten(0, -2), targets, self.collective)

    def _width(self) -> int:
        """Vocabulary entries one call returns, close enough to choose the size of a chunk."""
        for name in ("num_embeddings", "out_features"):
            if isinstance(size := getattr(self.module, name, None), int):
                return size
        return max((len(parameter) for parameter in self.module.parameters()), default=2**17)
