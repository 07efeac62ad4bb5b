"""Streams over small files, and what their loaders give."""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from coati.dataset.chat.conversation import Conversation, setup_conversation_template
from coati.dataset.clean.cleaning import Cleaning
from coati.dataset.prepare.validation import BadRowBudget
from coati.dataset.prepare.write_pass import TokenizeWorker
from coati.dataset.stream.row_sources import sources_of
from coati.dataset.stream.row_stream import RowStream, StreamOptions
from coati.dataset.stream.source_order import SourceOrder, SourceRows
from coati.dataset.stream.stream_loader import StreamLoader
from tests.dataset.makers import chatml_tokenizer

# Earlier responses are marked: each response is a training row of its own.
PER_TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('before: ' if m.role == "
    "'assistant' and not loop.last else '') + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"whole": None, "per_turn": PER_TURN}


@cache
def template(name: str = "whole") -> Conversation:
    return setup_conversation_template(chatml_tokenizer(TEMPLATES[name]), {})


def talk(name: str, rounds: int = 1) -> dict[str, Any]:
    """A row whose messages say ``name``, and are the longer the later the round."""
    turns = []
    for number in range(rounds):
        turns.append({"role": "user", "content": f"{name} asks {number}"})
        turns.append({"role": "assistant", "content": f"{name} says {'so ' * number}"})
    return {"messages": turns}


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    """``rows`` as JSON lines; a text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_files(folder: Path, *counts: int, bad: Sequence[int] = ()) -> Path:
    """A folder with a file of each of ``counts`` rows, of 1 to 3 rounds; rows ``bad`` (numbered
    through all files) are malformed."""
    number = 0
    for file, count in enumerate(counts):
        rows: list[Any] = []
        for _ in range(count):
            rows.append("{" if number in bad else talk(f"row {number}", number % 3 + 1))
            number += 1
        write_lines(folder / f"part-{file}.jsonl", rows)
    return folder


def stream(
    *paths: Any,
    type: str = "sft",
    buffer: int = 8,
    seed: int = 1,
    weights: Sequence[float] = (),
    pack_length: int | None = None,
    max_length: int = 256,
    num_proc: int = 0,
    use: str = "whole",
    bad_ratio: float = 1.0,
    state: dict[str, Any] | None = None,
) -> RowStream:
    """As a run makes it of --dataset ``paths``."""
    found = [sources_of(str(path)) for path in paths]
    streams = found if weights else [[source for each in found for source in each]]
    orders = []
    files: list[str] = []
    for number, sources in enumerate(streams):
        first = len(files)
        orders.append(SourceOrder(sources, seed=seed, buffer=buffer, first=first, number=number))
        files += [source.name for source in sources]
    layouts = [source.layout for each in streams for source in each]
    worker = TokenizeWorker(
        type, None, files, template(use), max_length, False, Cleaning(), None, layouts
    )
    options = StreamOptions(type, max_length, seed, buffer > 0, pack_length, num_proc)
    source = SourceRows(orders, weights or [1.0], seed)
    return RowStream(source, worker, options, BadRowBudget(False, bad_ratio), state)


def rows_alone(found: list) -> list:
    """A collator that leaves rows as they are."""
    return found


def loader(found: RowStream, size: int = 4, rank: int = 0, ranks: int = 1, **more: Any):
    """Its global batches of ``size`` entries, in micro-batches of 2."""
    accumulation = size // (2 * ranks)
    return StreamLoader(
        found,
        rows_alone,
        batch_size=2,
        accumulation_steps=accumulation,
        dp_rank=rank,
        dp_size=ranks,
        **more,
    )


def batches(found: StreamLoader, count: int, at: tuple[int, int] = (0, 0)) -> Iterator[list]:
    """The first ``count`` global batches, each as one list of entries."""
    for micro_batches in islice(found.global_batches(*at), count):
        yield [entry for batch in micro_batches for entry in batch]


def said(row: dict[str, Any]) -> str:
    """The text of a training row."""
    return template().tokenizer.decode(row["input_ids"])
