"""``generate`` and ``generate_streaming``: sampling from a model that may be wrapped for training;
``model.generate`` is not used.

The key-value cache is made here and handed to every call: under tensor parallelism ColossalAI
returns none, and a loop that relies on a returned one silently loses the context. Positions are
given explicitly, so left padding is exact.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coati.models.generation.decoder import Decoder, identity
from coati.models.generation.mkl_prepack import PAYS_AFTER, MklPrepacked
from coati.models.generation.model_call import innermost
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
) -> Generated:
    """Continue every row of ``input_ids`` (B, P), left-padded with ``attention_mask`` (B, P) 0 on
    the padding.

    A row ends with any of ``stop_sequences`` (token ids, matched within the response) or after
    ``max_new_tokens``, or its own of ``limits``. Equal prompts go through the model once. ``noise``
    (B, max_new_tokens or more; see ``row_noise``) is used in place of ``generator``; a row's sample
    then does not depend on the rest of the batch.

    ``model`` is plain or wrapped; what a plugin needs is supplied by the caller. ``stop_flag``
    takes "all rows of this rank have ended" and returns whether to leave the loop, so that ranks
    whose forward passes contain collectives leave together. ``gather_logits`` completes logits of
    which each rank holds a part of the vocabulary. ``synchronize`` takes a tensor that is equal on
    a group of ranks up to rounding, and returns one rank's to all of them. ``padding_free``: how
    ``model`` is given prompts without padding.

    Raises:
        ValueError: for right padding, no prompt, too many tokens, or noise of another shape.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = _limits(limits, max_new_tokens, len(input_ids))
    _check(model, input_ids, mask, stop_sequences, rows, noise)
    decoder = Decoder(
        model,
        input_ids,
        mask,
        Sampling(do_sample, temperature, top_k, top_p, repetition_penalty, min_p),
        stop_sequences,
        noise=noise,
        generator=generator,
        max_columns=input_ids.shape[1] + int(rows.max()),
        return_logprobs=return_logprobs,
        gather_logits=gather_logits,
        synchronize=synchronize,
        padding_free=padding_free,
    )
    with _evaluating(model), MklPrepacked(model) as prepacked:
        return _decode(decoder, prepacked, rows.to(input_ids.device), pad_token_id, stop_flag)


def _limits(limits: Sequence[int] | None, most: int, rows: int) -> Tensor:
    """(B,): the new tokens that each row may get."""
    return torch.tensor(limits or [most] * rows).clamp(max=most)


def _decode(
    decoder: Decoder,
    prepacked: MklPrepacked,
    limits: Tensor,
    pad: int,
    stop_flag: Callable[[bool], bool],
) -> Generated:
    """Decode until ``stop_flag`` returns True; a row ends after its own of ``limits`` (B,)."""
    prompts = decoder.ids
    max_new_tokens = int(limits.max())
    shortest = int(limits.min())
    shape = (len(decoder.row_ids), max_new_tokens)
    device = prompts.device
    tokens = torch.full(shape, pad, dtype=prompts.dtype, device=device)
    logprobs = torch.zeros(shape, device=device) if decoder.return_logprobs else None
    lengths = torch.zeros(shape[0], dtype=torch.long, device=device)
    stopped = torch.zeros(shape[0], dtype=torch.bool, device=device)
    all_ended = False
    for count in range(1, max_new_tokens + 1):
        tick()
        if 1 < count <= max_new_tokens + 1 - PAYS_AFTER:
            prepacked.use(len(decoder.row_ids))
        if all_ended:
            decoder.idle_step()
        else:
            rows = decoder.row_ids
            step = decoder.step()
            tokens[rows, count - 1] = step.tokens
            if logprobs is not None:
                logprobs[rows, count - 1] = step.logprobs
            lengths[rows] = count
            stopped[rows] = step.stopped
            ended = step.stopped
            if shortest <= count < max_new_tokens:
                ended = ended | (limits[rows] <= count)
            if bool(ended.any()):
                all_ended = bool(ended.all())
                decoder.leave(~ended)
        if stop_flag(all_ended):
            break
    if logprobs is not None:
        logprobs = decoder.synchronize(logprobs[:, :count])
    sequences = torch.cat([prompts, tokens[:, :count]], dim=1)
    return Generated(sequences, lengths, stopped, prompts.shape[1], logprobs)


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
) -> Iterator[int]:
    """The new token ids after one prompt ``input_ids`` (1, P), one by one, those of the stop
    sequence included.

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
    for _ in range(max_new_tokens):
        with _evaluating(model):  # not around the yield: the caller may train meanwhile
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
