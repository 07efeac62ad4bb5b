"""Scores of a reward model for the rows of data files: single responses, or both sides of a
pair."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coati.dataset.chat.conversation import Conversation
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.column_names import Layout, renamed
from coati.dataset.rows.format_keys import respelled
from coati.dataset.rows.formats import format_of, read_row
from coati.dataset.rows.input_files import decode, find_sources, raw_rows
from coati.dataset.rows.row_errors import RowError
from coati.dataset.rows.source_row import SourceRow
from coati.inference.model_loading import conversation_of
from coati.models.generation.response_table import left_pad
from coati.models.loading import adapter_base, find_model, load_config
from coati.models.reward_model import RewardModel
from coati.models.tokenizer import check_vocabulary, load_tokenizer
from coati.utils.output_paths import with_folder
from coati.utils.phases import phase
from coati.utils.statistics import wilson_interval

# From the color-blind safe palette of Okabe and Ito.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#777777")


@dataclass
class ScoredRow:
    """One row: where it stands, its data type, and its scores (chosen, rejected; or one)."""

    place: str
    kind: str
    label: bool | None = None
    ids: list[list[int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        if self.kind == "preference":
            chosen, rejected = self.scores
            return {
                "row": self.place,
                "chosen": chosen,
                "rejected": rejected,
                "right": chosen > rejected,
            }
        one = {"row": self.place, "score": self.scores[0]}
        return one if self.label is None else one | {"label": self.label}


@phase("loading the reward model")
def load_reward_model(
    path: str | os.PathLike,
    template: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    template_args: dict[str, Any] | None = None,
) -> tuple[RewardModel, Any, Conversation]:
    """Reward model, tokenizer and template of a directory or checkpoint that coati rm wrote.

    Raises ValueError where there is no scalar head.
    """
    directory = find_model(path, "actor")
    if adapter_base(directory) is None:
        load_config(directory, trust_remote_code)  # its own faults, before a tokenizer has them
    tokenizer = load_tokenizer(directory, trust_remote_code)
    conversation = conversation_of(directory, tokenizer, template, template_args)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "fp32" if device == "cpu" else "auto"
    model = RewardModel.from_pretrained(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer)
    return model.to(device).eval(), tokenizer, conversation


def rows_to_score(
    inputs: Sequence[str], conversation: Conversation, max_length: int
) -> Iterator[ScoredRow | tuple[str, str]]:
    """Each row of the files, tokenized as for training; for a row that cannot be used ``(place,
    reason)``."""
    for source, line, raw in raw_rows(find_sources(inputs)):
        place = f"{source.path}:{line}"
        try:
            kind, found = _read(decode(raw), source.layout)
        except RowError as error:
            yield place, f"{error.reason}: {error.detail}"
            continue
        for one in (found, *found.branches):
            try:
                yield _tokenized(place, kind, one, conversation, max_length)
            except RowError as error:
                yield place, f"{error.reason}: {error.detail}"


def row_to_score(place: str, row: Any, conversation: Conversation, max_length: int) -> ScoredRow:
    """A decoded ``row``, tokenized as for training. Raises RowError where it cannot be used, and
    for one that holds several, as a tree of messages does."""
    kind, found = _read(row)
    if found.branches:
        raise RowError(
            "wrong_keys",
            f"holds {1 + len(found.branches)} {kind} rows, expected one: write it into a file, all "
            "of whose rows coati score scores",
        )
    return _tokenized(place, kind, found, conversation, max_length)


def _read(row: Any, layout: Layout | None = None) -> tuple[str, SourceRow]:
    """``(data type, row)``, whose columns ``layout`` may name. Raises RowError."""
    kind = _kind(renamed(row, layout)[0] if layout and isinstance(row, dict) else row)
    return kind, read_row(kind, row, layout=layout)


def _tokenized(
    place: str, kind: str, row: SourceRow, conversation: Conversation, max_length: int
) -> ScoredRow:
    columns, _ = DATA_TYPES[kind].tokenize(row, conversation, max_length)[-1]
    sides = DATA_TYPES[kind].sides(columns)
    return ScoredRow(place, kind, columns.get("label"), [side.ids for side in sides])


def _kind(row: Any) -> str:
    """A pair, a labeled response, or a conversation whose last response is to be scored."""
    row = respelled(row)[0]
    keys = set(row) if isinstance(row, dict) else set()
    particular = [type for type in DATA_TYPES.values() if type.raw_keys]
    for type in particular:
        if keys.issuperset(type.raw_keys):
            return type.name
    found = format_of(row)
    names = [type.name for type in particular if found and found.holds in type.reads]
    return names[0] if names else "sft"


@torch.no_grad()
@phase("scoring")
def score(model: nn.Module, rows: Sequence[ScoredRow], pad_id: int, batch_size: int = 16) -> None:
    """Fill in the scores of ``rows``, in batches of sequences of like length."""
    sides = [(row, side) for row in rows for side in range(len(row.ids))]
    sides.sort(key=lambda pair: len(pair[0].ids[pair[1]]))
    for row in rows:
        row.scores = [0.0] * len(row.ids)
    device = next(model.parameters()).device
    for start in range(0, len(sides), batch_size):
        batch = sides[start : start + batch_size]
        ids, mask = left_pad([row.ids[side] for row, side in batch], pad_id, device)
        for (row, side), value in zip(batch, model(ids, mask).tolist(), strict=True):
            row.scores[side] = value


def summary(rows: Sequence[ScoredRow]) -> list[str]:
    """Lines about the scores: accuracy on pairs with its 95% interval, then mean and spread."""
    lines = []
    pairs = [row.scores for row in rows if row.kind == "preference"]
    if pairs:
        right = sum((a > b) + 0.5 * (a == b) for a, b in pairs)
        low, high = wilson_interval(right, len(pairs))
        lines.append(
            f"accuracy {right / len(pairs):.4f} on {len(pairs)} pairs (95% {low:.3f} to {high:.3f})"
        )
    groups = groups_of(rows)
    for name, values in groups.items():
        spread = float(values.std()) if len(values) > 1 else 0.0
        lines.append(
            f"{name}: mean {float(values.mean()):.4f}, standard deviation {spread:.4f}, "
            f"{len(values)} scores"
        )
    return lines


def groups_of(rows: Sequence[ScoredRow]) -> dict[str, Tensor]:
    """Scores by what they are of: chosen, rejected, good, bad, or all."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        names = ("chosen", "rejected") if row.kind == "preference" else ("all",)
        if row.kind == "kto":
            names = ("good" if row.label else "bad",)
        for name, value in zip(names, row.scores, strict=True):
            groups.setdefault(name, []).append(value)
    return {name: torch.tensor(values) for name, values in groups.items()}


def write_histogram(groups: dict[str, Tensor], file: str | os.PathLike, bins: int = 40) -> Path:
    """A PNG of the distribution of each group's scores over one axis."""
    from matplotlib.figure import Figure

    low = min(float(values.min()) for values in groups.values())
    high = max(float(values.max()) for values in groups.values())
    figure = Figure(figsize=(9.6, 4.8), dpi=100)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.07, right=0.97)
    for color, (name, values) in zip(COLORS, groups.items(), strict=False):
        label = f"{name} ({len(values)})"
        axes.hist(values.numpy(), bins, (low, high), color=color, alpha=0.6, label=label)
    axes.margins(x=0)
    axes.set_xlabel("score")
    figure.legend(loc="upper center", ncols=len(groups))
    figure.savefig(with_folder(file), format="png")
    return Path(file)
