"""Cross-entropy of texts and conversations of any length: every learned token is scored once, with
the context of its window."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F

from coati.dataset.chat.conversation import Conversation
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.column_names import Layout
from coati.dataset.rows.formats import format_of, read_row
from coati.dataset.rows.input_files import decode, find_sources
from coati.dataset.rows.joined_rows import whole_rows
from coati.dataset.rows.readers import kind_of
from coati.dataset.rows.row_errors import RowError
from coati.models.generation.value_guidance import unguided
from coati.utils.constants import IGNORE_INDEX
from coati.utils.phases import phase

WHOLE = 2**40  # tokens; a row is not cut before it is tokenized


@dataclass(frozen=True)
class LossRow:
    """Token ids and labels (IGNORE_INDEX where not learned) of one text or conversation."""

    place: str
    ids: list[int]
    labels: list[int]


def windows(length: int, most: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """``(start, first, end)`` of windows of at most ``most`` tokens over ``length``: ``first`` to
    ``end`` are scored in it, ``start`` to ``first`` are context. A window begins ``stride`` tokens
    after the one before it, so that every token but those of the first window has at least
    ``most - stride`` tokens before it."""
    start = 0
    done = 0
    while done < length:
        end = min(start + most, length)
        yield start, done, end
        done = end
        start += stride


@torch.no_grad()
def row_loss(
    model: Any, ids: Sequence[int], labels: Sequence[int], most: int, stride: int = 1
) -> tuple[float, int]:
    """The summed cross-entropy (nats) of a row's learned tokens and how many there are, of ILQL's
    models that of the policy. With ``stride`` below ``most`` no token of a long row but its first
    lacks context.

    Raises ValueError for a ``stride`` that would leave tokens without any.
    """
    if not 1 <= stride < max(most, 2):
        raise ValueError(f"a stride of {stride} tokens; expected 1 to {most - 1}, below the window")
    device = next(model.parameters()).device
    total = 0.0
    count = 0
    for start, first, end in windows(len(ids), most, stride):
        targets = torch.tensor(labels[max(first, start + 1) : end], device=device)
        if not bool((targets != IGNORE_INDEX).any()):
            continue
        with unguided(model):
            logits = model(torch.tensor([ids[start:end]], device=device)).logits[0, :-1].float()
        scored = logits[len(logits) - len(targets) :]
        loss = F.cross_entropy(scored, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        total += float(loss)
        count += int((targets != IGNORE_INDEX).sum())
    return total, count


@phase("reading texts")
def loss_rows(
    inputs: Sequence[str | os.PathLike], conversation: Conversation, documents: str = "file"
) -> tuple[list[LossRow], list[tuple[str, str]]]:
    """The texts and conversations of files, whole: of a text every token is learned, the end of a
    document among them, of a conversation what SFT learns; and ``(place, reason)`` of rows that
    cannot be used. ``documents``: what of a .txt file is one (file, paragraph, line)."""
    found: list[LossRow] = []
    skipped = []
    for source in find_sources(inputs):
        unit = documents if kind_of(source.path) == ".txt" else None
        rows = whole_rows(source.path, unit, source.layout)
        for line, raw in islice(rows, source.limit):
            place = f"{source.path}:{line}"
            try:
                found += _loss_rows(place, decode(raw), source.layout, conversation, found)
            except RowError as error:
                skipped.append((place, f"{error.reason}: {error.detail}"))
    return found, skipped


def _loss_rows(
    place: str,
    row: Any,
    layout: Layout | None,
    conversation: Conversation,
    before: Sequence[LossRow],
) -> list[LossRow]:
    """The rows that ``row`` holds; a later piece of a document is added to the last of ``before``.
    Raises RowError."""
    known = format_of(row)
    plain = isinstance(row, str) or (known is not None and known.holds in DATA_TYPES["text"].reads)
    kind = "text" if plain else "sft"
    read = read_row(kind, row, layout=layout)
    found = []
    for one in (read, *read.branches):
        for columns, _ in DATA_TYPES[kind].tokenize(one, conversation, WHOLE):
            ids = list(columns["input_ids"])
            if kind == "text" and not one.begins:
                before[-1].ids.extend(ids)
                before[-1].labels.extend(ids)
            else:
                found.append(LossRow(place, ids, list(columns["labels"])))
    return found


def mean_loss(total: float, count: int) -> float:
    """Raises ValueError where no token is learned."""
    if count == 0:
        raise ValueError("no token of these rows is supervised: they hold no response")
    return total / count


def perplexity_of(losses: Sequence[tuple[float, int]]) -> float:
    """exp of the mean over all learned tokens. Raises ValueError where there are none."""
    total = math.fsum(loss for loss, _ in losses)
    return math.exp(mean_loss(total, sum(count for _, count in losses)))
