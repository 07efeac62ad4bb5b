"""Answers of a model to the prompts of files, in batches that do not change them."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from coati.dataset.chat.conversation import Conversation
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import find_files
from coati.dataset.rows.readers import decode, read_rows
from coati.dataset.rows.row_errors import RowError
from coati.inference.model_loading import Loaded, load, stop_sequences
from coati.models.generation.loop import Sampling, generate
from coati.models.generation.response_table import left_pad, without_stop
from coati.models.generation.row_noise import row_noise

LeftOut = tuple[str, str]  # place of a row, and why it is not used


@dataclass(frozen=True)
class Prompt:
    """One prompt: its place in the files, {role, content} messages that end with the user, and the
    right answer.

    ``number``: of the row among all rows; it decides the noise that its answers are sampled with.
    """

    place: str
    number: int
    messages: list[dict[str, str]]
    gt_answer: str | None = None

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Answer:
    """``prompt``: the text that the model got; ``ids``: the answer's tokens, its stop sequence
    included."""

    prompt: str
    text: str
    ids: list[int]
    stopped: bool


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are made. ``max_length``: tokens of prompt and answer together."""

    sampling: Sampling = field(default_factory=lambda: Sampling(do_sample=False))
    max_new_tokens: int = 256
    max_length: int = 2048
    batch_size: int = 16
    seed: int = 42


def read_prompts(
    inputs: Sequence[str | os.PathLike], most: int | None = None, seed: int = 42
) -> tuple[list[Prompt], list[LeftOut]]:
    """The prompts of files of any shape that a prompt data set may have, and the rows that hold
    none.

    ``most``: of more prompts, as many are drawn with ``seed``. Raises ValueError for files that are
    not there.
    """
    prompts: list[Prompt] = []
    left_out: list[LeftOut] = []
    for file in find_files(inputs):
        for line, raw in read_rows(file):
            try:
                row = read_row("prompt", decode(raw))
            except RowError as error:
                left_out.append((f"{file}:{line}", f"{error.reason}: {error.detail}"))
                continue
            prompts.append(
                Prompt(f"{file}:{line}", len(prompts) + len(left_out), row.messages, row.gt_answer)
            )
    if most is not None and len(prompts) > most:
        prompts = [
            prompts[index]
            for index in sorted(random.Random(seed).sample(range(len(prompts)), most))
        ]
    return prompts, left_out


def told(left_out: Sequence[LeftOut], first: int = 2) -> list[str]:
    """A line for each kind of reason: how many rows, and the ``first`` of them in full."""
    kinds: dict[str, list[LeftOut]] = {}
    for place, reason in dict(left_out).items():
        kinds.setdefault(reason.partition(":")[0], []).append((place, reason))
    return [
        f"left out: {len(rows)} "
        f"({'; '.join(f'{place}: {reason}' for place, reason in rows[:first])}"
        f"{'; ...' if len(rows) > first else ''})"
        for rows in kinds.values()
    ]


def answers_of(
    path: str | os.PathLike, prompts: Sequence[Prompt], asking: SamplingConfig, **loading: Any
) -> tuple[dict[int, Answer], list[LeftOut], Conversation]:
    """Answers by the prompts' numbers of the model of ``path``, which is in memory meanwhile only;
    prompts too long for it; and its template. ``loading``: keywords of
    :func:`~coati.inference.model_loading.load`."""
    loaded = load(path, **loading)
    found, left_out = answer(loaded, prompts, asking)
    return found, left_out, loaded.conversation


def answer(
    loaded: Loaded, prompts: Sequence[Prompt], asking: SamplingConfig
) -> tuple[dict[int, Answer], list[LeftOut]]:
    """The answer to each prompt, by its number, and the prompts that leave no room for one.

    The noise of an answer belongs to the prompt's number and ``asking.seed``: neither batch size
    nor neighbors change what is sampled.
    """
    positions = getattr(loaded.model.config, "max_position_embeddings", None) or asking.max_length
    room = min(asking.max_length, positions) - asking.max_new_tokens
    ready, left_out = [], []
    for prompt in prompts:
        try:
            encoded = loaded.conversation.encode_prompt(prompt.messages)
        except RowError as error:
            left_out.append((prompt.place, f"{error.reason}: {error.detail}"))
            continue
        if len(encoded.input_ids) > room:
            left_out.append(
                (prompt.place, f"too_long: {len(encoded.input_ids)} tokens, room for {room}")
            )
        else:
            ready.append((prompt, encoded))
    ready.sort(key=lambda pair: len(pair[1].input_ids))  # batches of like length
    found: dict[int, Answer] = {}
    for start in range(0, len(ready), asking.batch_size):
        found |= _batch(loaded, ready[start : start + asking.batch_size], asking)
    return found, left_out


def _batch(loaded: Loaded, batch: list, asking: SamplingConfig) -> dict[int, Answer]:
    model, tokenizer, conversation = loaded
    stops, pad = stop_sequences(tokenizer, conversation), tokenizer.pad_token_id or 0
    ids, mask = left_pad(
        [encoded.input_ids for _, encoded in batch], pad, next(model.parameters()).device
    )
    numbers = [prompt.number for prompt, _ in batch]
    generated = generate(
        model,
        ids,
        mask,
        stop_sequences=stops,
        max_new_tokens=asking.max_new_tokens,
        pad_token_id=pad,
        noise=row_noise(asking.seed, 0, numbers, asking.max_new_tokens)
        if asking.sampling.do_sample
        else None,
        **vars(asking.sampling),
    )
    rows = zip(batch, generated.responses(), generated.stopped.tolist(), strict=True)
    return {
        prompt.number: Answer(
            # As in training: tags that a reward looks for may be special tokens.
            encoded.text,
            tokenizer.decode(without_stop(new, stops), skip_special_tokens=False),
            new,
            stopped,
        )
        for (prompt, encoded), new, stopped in rows
    }


def release() -> None:
    """Give back what models that are no longer used held on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
