"""The output embedding of a causal language model, switchable to log-probabilities of chosen
tokens.

The model's code is left alone. :meth:`Head.install` replaces the ``forward`` of its output
embedding; between :meth:`Head.set` and :meth:`Head.clear` that forward keeps the hidden states
whose next token is supervised and returns the log-probabilities of these tokens, shape (1, n),
where logits would have been: the (B, S, V) logits never exist. Otherwise it is the original
forward. They are of log_softmax(logits / :attr:`Head.temperature`). A :class:`HeadRequest` asks for
more at the same tokens (entropy, top-k log-probs, ...), which :meth:`Head.take` then returns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coati.models.head_outputs import HeadOutputs, HeadRequest, outputs_of_chunks
from coati.models.ilql_heads import ILQLHeads, heads_of
from coati.models.logprobs import (
    IGNORE_INDEX,
    WHOLE,
    FromLogits,
    VocabCollective,
    linear_logprobs,
    logprobs_from_logits,
    next_token_targets,
    rows_per_chunk,
    scatter_token_logprobs,
)

__all__ = [
    "IGNORE_INDEX",
    "Head",
    "HeadOutputs",
    "HeadRequest",
    "VocabCollective",
    "head_unsupported",
    "logprobs_from_logits",
    "next_token_targets",
    "scatter_token_logprobs",
]

# Configuration fields of models that change the logits after the head. None changes nothing, and of
# those that multiply 1 does not.
_MULTIPLIES_LOGITS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CHANGES_LOGITS = (
    *_MULTIPLIES_LOGITS,
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "unpadded_vocab_size",
)


def head_unsupported(config: Any) -> str | None:
    """Why :class:`Head` cannot serve the model of ``config`` (it changes logits after the head), or
    None."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for field in _CHANGES_LOGITS:
        value = getattr(text, field, None)
        if value is not None and not (value == 1 and field in _MULTIPLIES_LOGITS):
            model = getattr(text, "model_type", "this model")
            return f"{model} changes its logits after the head ({field}={value})"
    return None


def _plain_tensor(tensor: Tensor) -> Tensor:
    # Gemini's ColoTensor does not follow out= and in-place operations.
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


class Head:
    """The output embedding of a causal language model, switchable to log-probs; made by
    :meth:`install`."""

    def __init__(
        self, module: nn.Module | None, collective: VocabCollective | None, chunk_rows: int | None
    ):
        self.module = module
        self.collective = collective or WHOLE
        self.chunk_rows = chunk_rows
        self.temperature = 1.0
        self.agree_on_chunks: Callable[[int], int] | None = None
        self.heads: ILQLHeads | None = None
        self._targets: Tensor | None = None
        self._places: Tensor | None = None
        self._ignore_index = IGNORE_INDEX
        self._request: HeadRequest | None = None
        self._outputs: HeadOutputs | None = None
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
        Where that is None (a pipeline stage that is not the last) nothing happens.

        collective: for a head that leaves its logits split over ranks. chunk_rows: rows of logits
        formed at a time, by default as many as fit into 128 MiB of fp32. agree_on_chunks: for a
        head whose own forward holds collectives (sharded parameters), which all ranks must call
        equally often: number of chunks -> the largest of all ranks.
        """
        module = causal_lm.get_output_embeddings()
        head = cls(module, collective, chunk_rows)
        head.heads = heads_of(causal_lm)
        if module is None:
            return head
        if isinstance(previous := getattr(module.forward, "__self__", None), Head):
            previous.remove()
        head.agree_on_chunks = agree_on_chunks
        head._original = module.forward
        module.forward = head._forward
        return head

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.module is not None:
            self.module.forward = self._original

    def set(
        self,
        labels: Tensor,
        ignore_index: int = IGNORE_INDEX,
        request: HeadRequest | None = None,
    ) -> None:
        """Choose tokens for the next forward: ``labels`` (B, S), position t predicts ``labels[:, t
        + 1]``.

        The log-probs come in the row order of ``labels[:, 1:] != ignore_index``. ``request``: what
        :meth:`take` is to give besides.
        """
        self.set_targets(next_token_targets(labels, ignore_index), ignore_index, request)

    def set_targets(
        self,
        targets: Tensor,
        ignore_index: int = IGNORE_INDEX,
        request: HeadRequest | None = None,
        places: Tensor | None = None,
    ) -> None:
        """:meth:`set` with labels already shifted: ``targets`` (B, S), what position t itself is to
        predict; for hidden states that are not whole rows (several rows in one, or a slice of the
        sequence).

        ``places`` (B x S,): which of the flattened hidden states belongs to each target, where it
        is not the one at its own place: rows may share them.
        """
        self._targets = targets
        self._places = places
        self._ignore_index = ignore_index
        self._request = request
        self._outputs = None

    def clear(self) -> None:
        """Back to the original forward, which generation needs. Outputs not taken yet remain."""
        self._targets = None
        self._places = None
        self._request = None

    def take(self) -> HeadOutputs:
        """What the request of the last forward asked for, given away once: it holds the graph.

        Raises RuntimeError where there was no request, or its outputs were taken.
        """
        if self._outputs is None:
            raise RuntimeError("no outputs: Head.set was not given a request, or they were taken")
        outputs = self._outputs
        self._outputs = None
        return outputs

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any):
        if self._targets is None:
            return self._original(hidden, *args, **kwargs)
        places = self._places
        if places is None and hidden.shape[:-1].numel() != self._targets.numel():
            raise ValueError(
                f"the vocabulary head was set for {tuple(self._targets.shape)} positions and got "
                f"hidden states {tuple(hidden.shape)}: call Head.set with the labels of this "
                "forward, Head.clear before generating"
            )
        hidden = _plain_tensor(hidden)
        targets = self._targets.to(hidden.device).flatten()
        index = (targets != self._ignore_index).nonzero()[:, 0]
        at = index if places is None else places.to(hidden.device)[index]
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, at)
        targets = targets[index]
        if self._request is not None and self._request.action_values:
            return self._with_action_values(hidden, rows, targets)
        if self._request is not None:
            self._outputs = self._requested(hidden, rows, targets, self._request.beside(index))
            return self._outputs.logps
        return self._logps(hidden, rows, targets)[None]

    def _logps(self, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        plain = self.is_plain()
        return self._plain(rows, targets) if plain else self._general(hidden, rows, targets)

    def _with_action_values(self, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """ILQL's heads at the same rows, inside the model's forward, where plugins expect it."""
        if self.heads is None:
            raise ValueError("action values were asked for, of a model without ILQL's heads")
        logps = self._logps(hidden, rows, targets)[None]
        self._outputs = HeadOutputs(logps, action_values=self.heads(rows, targets))
        return logps

    def is_plain(self) -> bool:
        """Whether the module is a linear layer and nothing else: its parameters may then be used
        directly."""
        module = self.module
        return (
            type(module) is nn.Linear
            and getattr(self._original, "__func__", None) is nn.Linear.forward
            and self.collective is WHOLE
            and all(type(parameter) is nn.Parameter for parameter in module.parameters())
        )

    def _plain(self, rows: Tensor, targets: Tensor) -> Tensor:
        module = self.module
        return linear_logprobs(
            rows, module.weight, module.bias, targets, self.chunk_rows, self.temperature
        )

    def _general(self, hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Any module, by its own forward: parameters that are split, gathered or adapted when it is
        called."""
        count = len(rows)
        parts = list(zip(*self._chunks(hidden, rows, targets), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            logps = [self._chunk(part, wanted, self.temperature) for part, wanted in parts]
        else:
            # The temperature is an argument: a chunk formed again must have the one of its forward
            # pass.
            logps = [
                checkpoint(self._chunk, part, wanted, self.temperature, use_reentrant=False)
                for part, wanted in parts
            ]
        return torch.cat(logps)[:count]

    def _requested(
        self, hidden: Tensor, rows: Tensor, targets: Tensor, beside: tuple[Tensor, ...]
    ) -> HeadOutputs:
        """All that the request asks for, by the module's own forward."""
        request = self._request
        if request.hidden:
            return HeadOutputs(rows.new_zeros(1, len(rows)), hidden=rows)
        # Beside a teacher's logits there are half as many of each.
        models = 1 if request.teacher is None else 2
        parts = self._chunks(hidden, rows, targets, *beside, models=models)
        return outputs_of_chunks(
            self.logits,
            parts[0],
            parts[1],
            list(zip(*parts[2:], strict=True)) or [()] * len(parts[0]),
            request,
            self.collective,
            self.temperature,
            len(rows),
        )

    def _chunks(
        self, hidden: Tensor, rows: Tensor, *beside: Tensor, models: int = 1
    ) -> list[tuple[Tensor, ...]]:
        """``rows`` and the tensors ``beside`` them, each split into chunks; with blank rows where
        there are fewer rows than chunks. ``models``: whose logits exist at a time."""
        count = len(rows)
        each = self.chunk_rows or max(1, rows_per_chunk(self._width()) // models)
        chunks = max(1, -(-count // each))
        if self.agree_on_chunks is not None:
            chunks = self.agree_on_chunks(chunks)
        if (missing := chunks - count) > 0:
            # Every rank calls the module equally often, with at least one row, and every parameter
            # gets a gradient.
            blank = hidden.reshape(-1, hidden.shape[-1])[:1].expand(missing, -1)
            blank = blank.masked_fill(torch.ones((), dtype=torch.bool, device=rows.device), 0.0)
            rows = torch.cat([rows, blank])
            beside = tuple(torch.cat([t, t.new_zeros(missing, *t.shape[1:])]) for t in beside)
        return [tensor.tensor_split(chunks) for tensor in (rows, *beside)]

    def _chunk(self, rows: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return FromLogits.apply(self.logits(rows), targets, self.collective, temperature)

    def logits(self, rows: Tensor) -> Tensor:
        """(n, H) hidden states -> (n, V) logits, by the module's own forward."""
        # Three dimensions, as every module that stands here has seen them.
        return _plain_tensor(self._original(rows[None])).flatten(0, -2)

    def _width(self) -> int:
        """Vocabulary entries one call returns, close enough to choose the size of a chunk."""
        for name in ("num_embeddings", "out_features"):
            if isinstance(size := getattr(self.module, name, None), int):
                return size
        return max((len(parameter) for parameter in self.module.parameters()), default=2**17)
