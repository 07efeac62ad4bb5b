"""Measures of a model: perplexity on rows, bytes of its weights, generation speed."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from coati.dataset.chat.conversation import Conversation
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.input_files import find_files
from coati.dataset.rows.readers import decode, read_rows
from coati.dataset.rows.row_errors import RowError
from coati.inference.model_loading import Loaded
from coati.models.generation.loop import generate, generate_streaming
from coati.utils.constants import IGNORE_INDEX

# Token ids, and labels with IGNORE_INDEX where nothing is supervised.
Row = tuple[list[int], list[int]]
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "wpe", "embed_out", "word_embeddings", "embed_in")
BF16 = 2  # bytes


def rows_of(
    inputs: Sequence[str | os.PathLike],
    conversation: Conversation,
    max_length: int,
    most: int | None = None,
) -> list[Row]:
    """Conversations of files as token ids and labels, as for supervised fine-tuning; at most the
    first ``most``.

    Raises ValueError when no row can be used, with the reason of the first.
    """
    rows: list[Row] = []
    reasons: list[str] = []
    for file in find_files(inputs):
        for line, raw in read_rows(file):
            try:
                row = read_row("sft", decode(raw))
                columns, _ = DATA_TYPES["sft"].tokenize(row, conversation, max_length)[-1]
            except RowError as error:
                reasons.append(f"{file}:{line}: {error.reason}: {error.detail}")
                continue
            rows.append((list(columns["input_ids"]), list(columns["labels"])))
            if most is not None and len(rows) == most:
                return rows
    if not rows:
        raise ValueError(
            f"{' '.join(map(str, inputs))}: no conversation to use ({(reasons or ['empty'])[0]})"
        )
    return rows


@torch.no_grad()
def perplexity(model: Any, rows: Sequence[Row]) -> float:
    """exp of the mean negative log-probability of all supervised tokens of ``rows``, one row at a
    time.

    Raises ValueError when nothing is supervised.
    """
    total = 0.0
    count = 0
    device = next(model.parameters()).device
    for ids, labels in rows:
        logits = model(torch.tensor([ids], device=device)).logits[0, :-1].float()
        wanted = torch.tensor(labels[1:], device=device)
        total += float(F.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum"))
        count += int((wanted != IGNORE_INDEX).sum())
    if count == 0:
        raise ValueError("no token of these rows is supervised: they hold no response")
    return math.exp(total / count)


@dataclass(frozen=True)
class Size:
    """Bytes of weights on disk: of ``embeddings`` (and head), and ``inside``, of all others;
    ``parameters``: their number inside."""

    embeddings: int
    inside: int
    parameters: int = 0

    def ratio(self, original: "Size") -> float:
        """``inside`` against the same layers of ``original`` in bf16."""
        return self.inside / (BF16 * original.parameters)


def size_of(folder: str | os.PathLike) -> Size:
    """The weights of a directory, from the headers of its safetensors files.

    Raises ValueError where there are none.
    """
    from safetensors import safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors files to measure")
    embeddings = inside = parameters = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                tensor = tensors.get_tensor(name)
                bytes_ = tensor.numel() * tensor.element_size()
                if any(part in name for part in EMBEDDINGS):
                    embeddings += bytes_
                else:
                    inside, parameters = inside + bytes_, parameters + tensor.numel()
    return Size(embeddings, inside, parameters)


@dataclass(frozen=True)
class Speed:
    """``first``: seconds to the first token of one response; ``rate``: new tokens per second of a
    whole batch."""

    batch: int
    first: float
    rate: float


def speed_of(loaded: Loaded, batch: int, prompt_tokens: int = 64, new_tokens: int = 32) -> Speed:
    """Time of ``batch`` greedy responses of ``new_tokens`` tokens each, none ending earlier, after
    a short warm-up."""
    model = loaded.model
    device = next(model.parameters()).device
    known = len(loaded.tokenizer)
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(0, known, (batch, prompt_tokens), generator=drawn).to(device)
    endless = {"stop_sequences": [], "do_sample": False}
    generate(model, ids[:1], max_new_tokens=2, **endless)
    start = time.perf_counter()
    next(iter(generate_streaming(model, ids[:1], max_new_tokens=1, **endless)))
    first = time.perf_counter() - start
    start = time.perf_counter()
    generate(model, ids, max_new_tokens=new_tokens, **endless)
    return Speed(batch, first, batch * new_tokens / (time.perf_counter() - start))
