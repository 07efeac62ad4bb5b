"""Measurements of a model: perplexity, size of its weights, generation speed."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coati.dataset.chat.conversation import Conversation
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.input_files import source_rows
from coati.dataset.rows.row_errors import RowError
from coati.inference.evaluate.document_loss import perplexity_of, row_loss
from coati.inference.model_loading import Loaded
from coati.models.generation.loop import generate, generate_streaming
from coati.utils.logging import get_logger
from coati.utils.phases import phase

logger = get_logger(__name__)

# Token ids and labels (IGNORE_INDEX where not supervised) of one conversation.
Row = tuple[list[int], list[int]]
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "wpe", "embed_out", "word_embeddings", "embed_in")
BF16_BYTES = 2


@phase("reading conversations")
def read_conversations(
    inputs: Sequence[str | os.PathLike],
    conversation: Conversation,
    max_length: int,
    limit: int | None = None,
) -> list[Row]:
    """The first ``limit`` conversations of files, tokenized as for supervised fine-tuning.

    Raises:
        ValueError: if no row can be used, with the reason of the first.
    """
    rows: list[Row] = []
    reasons: list[str] = []
    for place, row in source_rows(inputs, "sft"):
        try:
            if isinstance(row, RowError):
                raise row
            columns, _ = DATA_TYPES["sft"].tokenize(row, conversation, max_length)[-1]
        except RowError as error:
            reasons.append(f"{place}: {error.reason}: {error.detail}")
            continue
        rows.append((list(columns["input_ids"]), list(columns["labels"])))
        if len(rows) == limit:
            break
    if not rows:
        raise ValueError(
            f"{' '.join(map(str, inputs))}: no usable conversation ({(reasons or ['empty'])[0]})"
        )
    if reasons:
        logger.warning_once(
            f"{len(reasons)} of {len(rows) + len(reasons)} conversations are left out, the first: "
            f"{reasons[0]}"
        )
    return rows


@phase("measuring perplexity")
def perplexity(model: Any, rows: Sequence[Row]) -> float:
    """exp of the mean cross-entropy (nats) over all supervised tokens of ``rows``; one row per
    forward.

    Raises:
        ValueError: if no token is supervised.
    """
    return perplexity_of([row_loss(model, ids, labels, len(ids)) for ids, labels in rows])


@dataclass(frozen=True)
class Size:
    """Bytes of weights on disk: ``embeddings`` (input and output), ``layers`` (all others), and the
    number of ``parameters`` of the latter."""

    embeddings: int
    layers: int
    parameters: int = 0

    def ratio(self, original: "Size") -> float:
        """``layers`` as a fraction of the bytes of ``original``'s layers in bf16."""
        return self.layers / (BF16_BYTES * original.parameters)


def size_of(folder: str | os.PathLike) -> Size:
    """Size of the safetensors files of a directory.

    Raises:
        ValueError: if there are none.
    """
    from safetensors import safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors files to measure")
    embeddings = layers = parameters = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                tensor = tensors.get_tensor(name)
                bytes_ = tensor.numel() * tensor.element_size()
                if any(part in name for part in EMBEDDINGS):
                    embeddings += bytes_
                else:
                    layers += bytes_
                    parameters += tensor.numel()
    return Size(embeddings, layers, parameters)


@dataclass(frozen=True)
class Speed:
    """Generation speed: time to the first token for a batch of one, and new tokens per second of a
    whole ``batch``."""

    batch: int
    first_token_seconds: float
    tokens_per_second: float


@phase("measuring speed")
def speed_of(loaded: Loaded, batch: int, prompt_tokens: int = 64, new_tokens: int = 32) -> Speed:
    """Time ``batch`` greedy responses of exactly ``new_tokens`` tokens each, after a short
    warm-up."""
    model = loaded.model
    device = next(model.parameters()).device
    vocabulary = len(loaded.tokenizer)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, prompt_tokens), generator=generator).to(device)
    settings = {"stop_sequences": [], "do_sample": False}
    generate(model, ids[:1], max_new_tokens=2, **settings)
    start = time.perf_counter()
    next(iter(generate_streaming(model, ids[:1], max_new_tokens=1, **settings)))
    first_token = time.perf_counter() - start
    start = time.perf_counter()
    generate(model, ids, max_new_tokens=new_tokens, **settings)
    return Speed(batch, first_token, batch * new_tokens / (time.perf_counter() - start))
