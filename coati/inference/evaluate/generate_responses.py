"""Responses of a model to the prompts of files; batching does not change them."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.encoded import Encoded
from coati.dataset.rows.input_files import source_rows
from coati.dataset.rows.row_errors import RowError
from coati.inference.model_loading import Loaded, load
from coati.models.generation.detokenize import decode
from coati.models.generation.loop import generate
from coati.models.generation.response_table import left_pad, without_stop
from coati.models.generation.row_noise import row_noise
from coati.models.generation.sampling import Sampling
from coati.models.positions import within_positions
from coati.utils.phases import phase

Skipped = tuple[str, str]  # place of a row, and why it is not used


@dataclass(frozen=True)
class Prompt:
    """One prompt: its place in the files, {role, content} messages that end with the user, the
    right answer, and the functions that may be called.

    ``number``: of the row among all rows; it decides the noise that its response is sampled with.
    """

    place: str
    number: int
    messages: list[dict[str, Any]]
    gt_answer: str | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Response:
    """``prompt``: the text that the model got; ``ids``: the response's tokens, its stop sequence
    included."""

    prompt: str
    text: str
    ids: list[int]
    stopped: bool

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.ids)


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled. ``max_length``: tokens of prompt and response together."""

    sampling: Sampling = field(default_factory=lambda: Sampling(do_sample=False))
    max_new_tokens: int = 256
    max_length: int = 2048
    batch_size: int = 16
    seed: int = 42


@phase("reading prompts")
def read_prompts(
    inputs: Sequence[str | os.PathLike], most: int | None = None, seed: int = 42
) -> tuple[list[Prompt], list[Skipped]]:
    """The prompts of files in any format that a prompt data set may have, and the rows without one.

    ``most``: of more prompts, as many are drawn with ``seed``. Raises ValueError for files that are
    not there.
    """
    prompts: list[Prompt] = []
    skipped: list[Skipped] = []
    for number, (place, row) in enumerate(source_rows(inputs, "prompt")):
        if isinstance(row, RowError):
            skipped.append((place, f"{row.reason}: {row.detail}"))
        else:
            prompts.append(Prompt(place, number, row.messages, row.gt_answer, row.tools))
    if most is not None and len(prompts) > most:
        drawn = random.Random(seed).sample(range(len(prompts)), most)
        prompts = [prompts[index] for index in sorted(drawn)]
    return prompts, skipped


def skipped_summary(skipped: Sequence[Skipped], first: int = 2) -> list[str]:
    """A line for each kind of reason: how many rows, and the ``first`` of them in full."""
    kinds: dict[str, list[str]] = {}
    for place, reason in dict(skipped).items():
        kinds.setdefault(reason.partition(":")[0], []).append(f"{place}: {reason}")
    lines = []
    for rows in kinds.values():
        more = ["..."] if len(rows) > first else []
        lines.append(f"left out: {len(rows)} ({'; '.join([*rows[:first], *more])})")
    return lines


def responses_of(
    path: str | os.PathLike, prompts: Sequence[Prompt], config: SamplingConfig, **loading: Any
) -> tuple[dict[int, Response], list[Skipped], Conversation]:
    """:func:`generate_responses` of the model of ``path``, which is in memory meanwhile only, and
    its template. ``loading``: keywords of :func:`~coati.inference.model_loading.load`."""
    loaded = load(path, **loading)
    found, skipped = generate_responses(loaded, prompts, config)
    conversation = loaded.conversation
    del loaded
    torch.cuda.empty_cache()  # does nothing where no GPU was used
    return found, skipped, conversation


@phase("writing responses")
def generate_responses(
    loaded: Loaded, prompts: Sequence[Prompt], config: SamplingConfig
) -> tuple[dict[int, Response], list[Skipped]]:
    """The response to each prompt, by its number, and the prompts that leave no room for one.

    The noise of a response belongs to the prompt's number and ``config.seed``: neither batch size
    nor neighbors change what is sampled.
    """
    room = within_positions(loaded.model.config, config.max_length) - config.max_new_tokens
    ready, skipped = encoded_prompts(loaded.conversation, prompts, room)
    ready.sort(key=lambda pair: len(pair[1].input_ids))  # batches of like length
    found: dict[int, Response] = {}
    for start in range(0, len(ready), config.batch_size):
        batch = ready[start : start + config.batch_size]
        responses = sample_batch(loaded, batch, [0] * len(batch), config)
        found |= {prompt.number: each for (prompt, _), each in zip(batch, responses, strict=True)}
    return found, skipped


def encoded_prompts(
    conversation: Conversation, prompts: Sequence[Prompt], room: int
) -> tuple[list[tuple[Prompt, Encoded]], list[Skipped]]:
    """The prompts as the model is given them, and those that have more than ``room`` tokens."""
    ready = []
    skipped = []
    for prompt in prompts:
        try:
            encoded = conversation.encode_prompt(prompt.messages, tools=prompt.tools)
        except RowError as error:
            skipped.append((prompt.place, f"{error.reason}: {error.detail}"))
            continue
        length = len(encoded.input_ids)
        if length > room:
            skipped.append((prompt.place, f"too_long: {length} tokens, room for {room}"))
        else:
            ready.append((prompt, encoded))
    return ready, skipped


def noise_of(prompts: Sequence[Prompt], samples: Sequence[int], config: SamplingConfig) -> Tensor:
    """The noise of the ``samples``-th response to each prompt, (B, max_new_tokens)."""
    rows = [
        row_noise(config.seed, sample, [prompt.number], config.max_new_tokens)
        for prompt, sample in zip(prompts, samples, strict=True)
    ]
    return torch.cat(rows)


def sample_batch(
    loaded: Loaded,
    batch: Sequence[tuple[Prompt, Encoded]],
    samples: Sequence[int],
    config: SamplingConfig,
) -> list[Response]:
    """One response to each prompt of ``batch``, that of the number in ``samples``: the noise
    belongs to it, the prompt's number and ``config.seed``. Equal prompts go through the model
    once."""
    model, tokenizer, _ = loaded
    stops = loaded.stop_sequences()
    pad = tokenizer.pad_token_id or 0
    device = next(model.parameters()).device
    ids, mask = left_pad([encoded.input_ids for _, encoded in batch], pad, device)
    noise = None
    if config.sampling.do_sample:
        noise = noise_of([prompt for prompt, _ in batch], samples, config)
    generated = generate(
        model,
        ids,
        mask,
        stop_sequences=stops,
        max_new_tokens=config.max_new_tokens,
        pad_token_id=pad,
        noise=noise,
        **vars(config.sampling),
    )
    rows = zip(batch, generated.responses(), generated.stopped.tolist(), strict=True)
    return [
        response_of(tokenizer, encoded.text, new, stops, stopped)
        for (_, encoded), new, stopped in rows
    ]


def response_of(
    tokenizer: Any, prompt: str, new: list[int], stops: list[list[int]], stopped: bool
) -> Response:
    """The tokens ``new`` after ``prompt`` as a response."""
    # As in training: tags that a reward looks for may be special tokens.
    text = decode(tokenizer, without_stop(new, stops), skip_special_tokens=False)
    return Response(prompt, text, new, stopped)
