"""``generate`` and ``generate_streaming``: sampling from a model that may be wrapped for training;
``model.generate`` is not used.

The key-value cache is made here and handed to every call: under tensor parallelism ColossalAI
returns none, and a loop that relies on a returned one silently loses the context. Positions are
given explicitly, so left padding is exact.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coati.models.generation.continuous import (
    ResponseRecord,
    WaitingPrompts,
    decode_replacing,
)
from coati.models.generation.decoder import Decoder, identity
from coati.models.generation.kv_cache import GROWTH
from coati.models.generation.model_call import innermost
from coati.models.generation.prepacked_linear import PAYS_AFTER, Prepacked
from coati.models.generation.sampling import Sampling
from coati.models.padding_free import PaddingFree
from coati.models.positions import positions_of
from coati.utils.liveness import tick


@dataclass
class Generated:
    """Prompts and their responses.

    ``sequences`` (B, P + N): prompts and responses, pad after a response's end. ``lengths`` (B,):
    tokens of each response, its stop sequence included. ``stopped`` (B,): whether a stop sequence,
    not the limit, ended it. ``prompt_length``: P. ``logprobs`` (B, N) fp32, when asked for:
    log_softmax(logits / temperature) at each token of a response, whatever top_k, top_p and
    penalties made of the logits; 0 after its end.

    Of responses that others sampled: ``sampled_logprobs`` (B, N) fp32, the same by the weights that
    sampled, and ``version``, the optimizer steps that those weights have behind them; None: they
    are the weights of now.

    Of responses of several turns, between which an environment wrote: ``action_mask`` (B, N) bool,
    the tokens that the policy wrote, which log-probs belong to; None: all up to ``lengths``.
    ``of_environment``: what is known of each, (B,) by name.
    """

    sequences: Tensor
    lengths: Tensor
    stopped: Tensor
    prompt_length: int = 0
    logprobs: Tensor | None = None
    sampled_logprobs: Tensor | None = None
    version: int | None = None
    action_mask: Tensor | None = None
    of_environment: dict[str, Tensor] | None = None

    def responses(self) -> list[list[int]]:
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
    limits: Sequence[int] | None = None,
    pad_token_id: int = 0,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    return_logprobs: bool = False,
    stop_flag: Callable[[bool], bool] = identity,
    gather_logits: Callable[[Tensor], Tensor] = identity,
    synchronize: Callable[[Tensor], Tensor] = identity,
    padding_free: PaddingFree | None = None,
    rows_at_once: int | None = None,
) -> Generated:
    """Continue every row of ``input_ids`` (B, P), left-padded with ``attention_mask`` (B, P) 0 on
    the padding.

    A row ends with any of ``stop_sequences`` (token ids, matched within the response) or after
    ``max_new_tokens``, or its own of ``limits``. Equal prompts go through the model once. ``noise``
    (B, max_new_tokens or more; see ``row_noise``) is used in place of ``generator``; a row's sample
    then does not depend on the rest of the batch (dynamic rotary scaling follows its longest row).

    ``model`` is plain or wrapped; what a plugin needs is supplied by the caller. ``stop_flag``
    takes "all rows of this rank have ended" and returns whether to leave the loop, so that ranks
    whose forward passes contain collectives leave together, whatever the ``limits`` of each.
    ``gather_logits`` completes logits of which each rank holds a part of the vocabulary.
    ``synchronize`` takes a tensor that is equal on a group of ranks up to rounding, and returns one
    rank's to all of them. ``padding_free``: how ``model`` is given prompts without padding.
    ``rows_at_once``: of how many rows the batch is; one that has ended gives its place to the next.
    None: all.

    Raises:
        ValueError: for right padding, no prompt, too many tokens, noise of another shape, and for
            rows that are replaced without ``noise`` to sample by, or with a ``stop_flag``.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = _limits(limits, max_new_tokens, len(input_ids))
    _check(model, input_ids, mask, stop_sequences, rows, noise)
    sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty, min_p)
    by_row = stop_flag is identity and not (do_sample and noise is None)
    settings = {
        **_of_plugin(gather_logits, synchronize, padding_free),
        "sampling": sampling,
        "stop_sequences": stop_sequences,
        "generator": generator,
    }
    record = ResponseRecord(rows.to(mask.device), pad_token_id, input_ids.dtype, return_logprobs)
    at_once = _at_once(len(rows), rows_at_once, by_row)
    return _generate(model, (input_ids, mask, noise), record, at_once, stop_flag, settings)


def _of_plugin(
    gather_logits: Callable[[Tensor], Tensor],
    synchronize: Callable[[Tensor], Tensor],
    padding_free: PaddingFree | None,
) -> dict[str, Any]:
    return {
        "gather_logits": gather_logits,
        "synchronize": synchronize,
        "padding_free": padding_free,
    }


def _generate(
    model: nn.Module,
    prompts: tuple[Tensor, Tensor, Tensor | None],
    record: ResponseRecord,
    at_once: int | None,
    stop_flag: Callable[[bool], bool],
    settings: dict[str, Any],
) -> Generated:
    """:func:`generate` with checked arguments: ``prompts`` are ids, mask and noise, ``settings``
    those of :class:`Decoder`. ``at_once``: None where all rows are."""
    input_ids, mask, _ = prompts
    room = 0 if at_once is None else GROWTH
    columns = input_ids.shape[1] + int(record.limits.max()) + room
    decoder_of = _decoders(
        *prompts,
        model=model,
        max_columns=columns,
        return_logprobs=record.logprobs is not None,
        **settings,
    )
    with _evaluating(model), Prepacked(model) as prepacked:
        if at_once is not None:
            waiting = WaitingPrompts(input_ids, mask.long(), decoder_of)
            columns = decode_replacing(waiting, prepacked, at_once, record)
        else:
            columns = _decode(decoder_of(None), prepacked, record, stop_flag)
    logprobs = record.logprobs
    if logprobs is not None:
        logprobs = settings["synchronize"](logprobs[:, :columns])
    sequences = torch.cat([input_ids, record.tokens[:, :columns]], dim=1)
    return Generated(sequences, record.lengths, record.stopped, input_ids.shape[1], logprobs)


def _at_once(rows: int, wanted: int | None, by_row: bool) -> int | None:
    """How many of ``rows`` are decoded at a time, None for all of them. For fewer they must depend
    on nothing but themselves (``by_row``)."""
    if wanted is None or wanted >= rows:
        return None
    if not by_row:
        raise ValueError(
            "rows are replaced as they end only with noise by row and without a stop_flag"
        )
    return wanted


def _decoders(
    input_ids: Tensor, mask: Tensor, noise: Tensor | None, **settings: Any
) -> Callable[[Tensor | None], Decoder]:
    """Makes decoders of the rows of ``input_ids`` (B, P) that an index (n,) names, or of all."""

    def decoder_of(some: Tensor | None) -> Decoder:
        if some is None:
            return Decoder(input_ids=input_ids, mask=mask, noise=noise, **settings)
        first = int(mask[some].argmax(dim=1).min())
        return Decoder(
            input_ids=input_ids[some, first:],
            mask=mask[some, first:],
            noise=None if noise is None else noise[some.to(noise.device)],
            row_ids=some,
            **settings,
        )

    return decoder_of


def _limits(limits: Sequence[int] | None, most: int, rows: int) -> Tensor:
    """(B,): the new tokens that each row may get."""
    return torch.tensor(limits or [most] * rows).clamp(max=most)


def _decode(
    decoder: Decoder,
    prepacked: Prepacked,
    record: ResponseRecord,
    stop_flag: Callable[[bool], bool],
) -> int:
    """Decode all rows at once into ``record`` until all have ended and ``stop_flag`` returns True;
    the forward passes that this took."""
    decoder.prepacked = prepacked
    max_new_tokens = int(record.limits.max())
    all_ended = False
    count = 0
    while True:
        count += 1
        tick()
        if 1 < count <= max_new_tokens + 1 - PAYS_AFTER:
            prepacked.use(len(decoder.row_ids))
        if all_ended:  # other ranks decode longer responses
            decoder.idle_step()
        else:
            ended = record.add(decoder, decoder.step())
            if bool(ended.any()):
                all_ended = bool(ended.all())
                if not all_ended:
                    decoder.leave(~ended)
        if stop_flag(all_ended):
            return count


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
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
    frozen: bool = False,
) -> Iterator[int]:
    """The new token ids after one prompt ``input_ids`` (1, P), one by one, those of the stop
    sequence included. ``frozen``: the weights stay as they are until the last of them.

    Raises:
        ValueError: for more than one prompt, and what :func:`generate` refuses.
    """
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"streaming takes one prompt, input_ids of shape (1, P), not {tuple(input_ids.shape)}"
        )
    sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty, min_p)
    mask = torch.ones_like(input_ids)
    _check(model, input_ids, mask, stop_sequences, torch.tensor([max_new_tokens]))
    columns = input_ids.shape[1] + max_new_tokens
    decoder = Decoder(
        model, input_ids, mask, sampling, stop_sequences, generator=generator, max_columns=columns
    )
    with Prepacked(model, patience=PAYS_AFTER) as prepacked:
        decoder.prepacked = prepacked
        for _ in range(max_new_tokens):
            with _evaluating(model):  # not around the yield: the caller may train meanwhile
                if frozen:
                    prepacked.use(1)
                step = decoder.step()
            yield int(step.tokens[0])
            if bool(step.stopped[0]):
                return


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No gradient and evaluation mode; afterward each module's mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _check_noise(noise: Tensor | None, limits: Tensor) -> None:
    rows = len(limits)
    steps = int(limits.max())
    if noise is not None and (noise.dim() != 2 or noise.shape[0] != rows or noise.shape[1] < steps):
        raise ValueError(
            f"noise must have the shape ({rows}, {steps} or more), not {tuple(noise.shape)}"
        )


def _check(
    model,
    input_ids: Tensor,
    mask: Tensor,
    stop_sequences: list[list[int]],
    limits: Tensor,
    noise: Tensor | None = None,
) -> None:
    rows, length = input_ids.shape
    if rows == 0 or length == 0:
        raise ValueError(f"nothing to continue: input_ids has shape {tuple(input_ids.shape)}")
    if len(limits) != rows or int(limits.min()) < 1:
        raise ValueError(f"max_new_tokens must be at least 1 for each row, not {limits.tolist()}")
    if not mask[:, -1].all() or (mask[:, 1:] < mask[:, :-1]).any():
        raise ValueError(
            "prompts must be padded on the left: attention_mask 0, then 1 up to the last position"
        )
    if any(not isinstance(stop, list | tuple) or len(stop) == 0 for stop in stop_sequences):
        raise ValueError(
            f"stop_sequences must be a list of non-empty lists of token ids, not {stop_sequences}"
        )
    _check_noise(noise, limits)
    positions = positions_of(getattr(innermost(model), "config", None))
    lengths = mask.sum(dim=1).cpu()
    longest = int((lengths + limits).argmax())
    # Rotary embeddings would go on, but what is written beyond what they were trained on is noise.
    if positions is not None and int(lengths[longest] + limits[longest]) > positions.count:
        raise ValueError(
            f"a prompt of {lengths[longest]} tokens and {limits[longest]} new ones exceed the "
            f"model's {positions.count} positions; shorten the prompt or ask for fewer new tokens "
            "(--max_new_tokens)"
        )
