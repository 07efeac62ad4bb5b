"""Rows of token ids to padded tensors. Padding knows lengths, never token values: the pad id may
equal eos."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coati.utils.constants import IGNORE_INDEX
from coati.utils.logging import get_logger

logger = get_logger(__name__)


def pad(rows: Sequence[Sequence[int]], width: int, value: int, side: str = "right") -> Tensor:
    """(B, width) long tensor of ``rows``, each filled up with ``value`` on ``side``."""
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for index, row in enumerate(rows):
        cells = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        out[index, cells] = torch.as_tensor(row, dtype=torch.long)
    return out


def pad_weights(rows: Sequence[Sequence[float]], width: int, side: str = "right") -> Tensor:
    """(B, width) fp32 tensor of ``rows``, each filled up with 0 on ``side``."""
    out = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        cells = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        out[index, cells] = torch.as_tensor(row, dtype=torch.float32)
    return out


def weights_of(row: dict[str, Any], length: int) -> Sequence[float]:
    """The ``loss_weights`` of the first ``length`` tokens of a row; 1 each where it has none."""
    given = row.get("loss_weights")
    return [1.0] * length if given is None else given[:length]


def attention_mask(lengths: Sequence[int], width: int, side: str = "right") -> Tensor:
    """(B, width) long tensor, 1 at the true tokens of rows of these ``lengths``."""
    position = torch.arange(width)
    if side == "left":
        position = position.flip(0)
    return (position[None] < torch.as_tensor(lengths)[:, None]).long()


def supervise_all(
    batch: dict[str, Any], blank: Sequence[bool] | None = None, ignore_index: int = IGNORE_INDEX
) -> dict[str, Any]:
    """What ``apply_loss_mask=False`` means: ``batch`` with every real token supervised.

    Every ``*loss_mask`` (B, S) becomes its attention mask; without one ``labels`` (B, S) become the
    input ids, and no token has a weight of its own. Never supervised: padding, the first token of a
    row (there is nothing to predict it from), and blank rows, which keep a rank in step: those of
    ``blank``, else those in which nothing is supervised.
    """
    batch = {name: value for name, value in batch.items() if name != "loss_weights"}
    masks = [name for name in batch if name.endswith("loss_mask")]
    for name in masks:
        real = batch[name.replace("loss_mask", "attention_mask")].bool()
        batch[name] = real & batch[name].bool().any(1, keepdim=True)
    if not masks:
        hidden = ~batch["attention_mask"].bool()
        first = (hidden.logical_not().cumsum(1) == 1) & ~hidden
        hidden[:, 1:] |= first[:, 1:]
        if "position_ids" in batch:  # of a pack: no token is predicted from another row's
            hidden |= batch["position_ids"] == 0
        if blank is not None:
            hidden[torch.tensor(blank)] = True
        elif "labels" in batch:
            hidden |= (batch["labels"] == ignore_index).all(1, keepdim=True)
        batch["labels"] = batch["input_ids"].masked_fill(hidden, ignore_index)
    return batch


class _Collator:
    """What all collators share.

    Args:
        tokenizer: gives the pad id and the padding side ("right" is what training uses).
        max_length: the longest row in tokens.
        ignore_index: label of positions without loss.
        apply_loss_mask: False trains on every real token (never on padding, never on a blank row).
        pad_to_multiple_of: widths are rounded up to this.
    """

    def __init__(
        self,
        tokenizer,
        max_length: int = 4096,
        ignore_index: int = IGNORE_INDEX,
        *,
        apply_loss_mask: bool = True,
        pad_to_multiple_of: int = 1,
    ) -> None:
        pad_id = tokenizer.pad_token_id
        self.pad_id = pad_id if pad_id is not None else (tokenizer.eos_token_id or 0)
        self.side = tokenizer.padding_side
        self.max_length = max_length
        self.ignore_index = ignore_index
        self.apply_loss_mask = apply_loss_mask
        self.multiple = pad_to_multiple_of

    def _width(self, lengths: Sequence[int]) -> int:
        return -(-max(lengths) // self.multiple) * self.multiple

    def _masked(
        self, ids: list[list[int]], masks: list[list[bool]], width: int, prefix: str = ""
    ) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``loss_mask`` (bool), each (B, width), their names
        after ``prefix``."""
        attention = attention_mask([len(row) for row in ids], width, self.side)
        return {
            f"{prefix}input_ids": pad(ids, width, self.pad_id, self.side),
            f"{prefix}attention_mask": attention,
            f"{prefix}loss_mask": pad(masks, width, 0, self.side).bool(),
        }

    def _check(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"a row of {length} tokens, max_length {self.max_length}: cutting it would take "
                "the end of a response; raise --max_length, or prepare the data again with "
                f"--max_length {self.max_length}"
            )


class DataCollatorForSupervisedDataset(_Collator):
    """Rows with ``input_ids`` and ``labels`` to ``input_ids, attention_mask, labels``, each (B, S),
    and ``loss_weights`` (B, S) fp32 where a row of the batch has them.

    S is the longest row of the batch, at most ``max_length``, rounded up to ``pad_to_multiple_of``.

    Args:
        tokenizer: gives the pad id and the padding side ("right" is what training uses).
        max_length: longer rows are cut at the end.
        ignore_index: label of positions without loss.
        apply_loss_mask: False trains on every real token (never on padding).
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [row["input_ids"][: self.max_length] for row in rows]
        labels = [row["labels"][: self.max_length] for row in rows]
        if self.side == "left":  # a row's first token would be asked of the padding before it
            labels = [[self.ignore_index, *row[1:]] for row in labels]
        lengths = [len(row) for row in ids]
        width = self._width(lengths)
        batch = {
            "input_ids": pad(ids, width, self.pad_id, self.side),
            "attention_mask": attention_mask(lengths, width, self.side),
            "labels": pad(labels, width, self.ignore_index, self.side),
        }
        if any(row.get("loss_weights") is not None for row in rows):
            weights = [
                weights_of(row, len(row_ids)) for row, row_ids in zip(rows, ids, strict=True)
            ]
            batch["loss_weights"] = pad_weights(weights, width, self.side)
        if self.apply_loss_mask:
            return batch
        blank = [bool(row.get("blank")) for row in rows]
        return supervise_all(batch, blank, self.ignore_index)

    def blank(self, row: dict[str, Any]) -> dict[str, Any]:
        """``row`` without anything supervised: keeps a rank in step that has no row left."""
        ids = row["input_ids"][:2]
        return {"input_ids": ids, "labels": [self.ignore_index] * len(ids), "blank": True}


class DataCollatorForPromptDataset(_Collator):
    """Rows with ``input_ids`` to ``input_ids, attention_mask``, each (B, S) and padded on the left,
    and ``gt_answer``.

    ``gt_answer`` is a list of B strings or None; ``dialogue``, where rows have it, a list of JSON
    texts that environments begin with; ``source``, where ``sources`` are wanted, their categories,
    of names or None. A prompt longer than ``max_length`` loses its beginning,
    never the generation prompt at its end, and a warning is logged once.
    """

    def __init__(self, tokenizer: Any, max_length: int = 4096, sources: bool = False) -> None:
        super().__init__(tokenizer, max_length)
        self.sources = sources

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        if longest > self.max_length:
            logger.warning_once(
                f"prompts of more than {self.max_length} tokens lose their beginning"
            )
        ids = [row["input_ids"][-self.max_length :] for row in rows]
        lengths = [len(row) for row in ids]
        width = self._width(lengths)
        return {
            "input_ids": pad(ids, width, self.pad_id, "left"),
            "attention_mask": attention_mask(lengths, width, "left"),
            "gt_answer": [row.get("gt_answer") for row in rows],
            **({"dialogue": [row["dialogue"] for row in rows]} if "dialogue" in rows[0] else {}),
            **({"source": [row.get("seq_category") for row in rows]} if self.sources else {}),
        }

    def blank(self, row: dict[str, Any]) -> dict[str, Any]:
        """A short prompt in place of a missing one."""
        return {
            "input_ids": row["input_ids"][-2:],
            "gt_answer": row.get("gt_answer"),
            **{name: row[name] for name in ("dialogue", "seq_category") if name in row},
            "blank": True,
        }


class DataCollatorForPreferenceDataset(_Collator):
    """Preference rows to ``{chosen,reject}_{input_ids,attention_mask,loss_mask}``, each (B, S), and
    ``margin`` (B,), with ``weight`` (B,) where a row of the batch has one.

    S is the longest of all chosen and rejected rows, so that the two can form one batch.
    ``loss_mask`` (bool) is True on the last response; rows with an empty one are ignored. A missing
    margin is 0, a missing weight 1. Raises ValueError for a row longer than ``max_length``: a
    truncated pair is not the pair that was judged.
    """

    # Prefix of the columns -> prefix in a batch, as in ColossalChat.
    SIDES = {"chosen_": "chosen_", "rejected_": "reject_"}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = self._width([len(row[f"{side}input_ids"]) for row in rows for side in self.SIDES])
        self._check(max(len(row[f"{side}input_ids"]) for row in rows for side in self.SIDES))
        batch = {
            "margin": torch.tensor([row.get("margin") or 0.0 for row in rows], dtype=torch.float32)
        }
        weights = [row.get("weight") for row in rows]
        if any(weight is not None for weight in weights):
            full = [1.0 if weight is None else weight for weight in weights]
            batch["weight"] = torch.tensor(full, dtype=torch.float32)
        for side, name in self.SIDES.items():
            ids = [row[f"{side}input_ids"] for row in rows]
            batch |= self._masked(ids, [row[f"{side}loss_mask"] for row in rows], width, name)
        return batch if self.apply_loss_mask else supervise_all(batch)

    def blank(self, row: dict[str, Any]) -> dict[str, Any]:
        """``row`` without anything supervised: keeps a rank in step that has no row left."""
        blank = {"blank": True}
        for side in self.SIDES:
            ids = row[f"{side}input_ids"][:2]
            blank |= {f"{side}input_ids": ids, f"{side}loss_mask": [False] * len(ids)}
        return blank


class DataCollatorForScoredDataset(_Collator):
    """Scored conversations to ``input_ids, attention_mask, loss_mask`` (B, S), padded on the right,
    and ``reward`` (B,) fp32. Raises ValueError for a row longer than ``max_length``, of which the
    end, that the score is of, would be cut off."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.side = "right"

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [row["input_ids"] for row in rows]
        longest = max(map(len, ids))
        self._check(longest)
        batch = self._masked(ids, [row["loss_mask"] for row in rows], self._width([longest]))
        batch["reward"] = torch.tensor([row["reward"] for row in rows], dtype=torch.float32)
        return batch if self.apply_loss_mask else supervise_all(batch)

    def blank(self, row: dict[str, Any]) -> dict[str, Any]:
        """``row`` without anything supervised: keeps a rank in step that has no row left."""
        ids = row["input_ids"][:2]
        mask = [False] * len(ids)
        return {"input_ids": ids, "loss_mask": mask, "reward": 0.0, "blank": True}


class DataCollatorForKTODataset(_Collator):
    """Judged responses to ``input_ids, attention_mask, loss_mask`` (B, S), ``label`` (B,) bool, and
    their KL rows.

    The KL row of a prompt is that prompt with the response of another row: ``kl_input_ids,
    kl_attention_mask, kl_loss_mask``, each (B, K). A loader that knows the global batch of an
    optimizer step puts that response's ids (column ``completion`` of the partner) into
    ``row["kl_completion"]``; without it the partner is the next row of the batch, the first after
    the last. A row that has no partner (a batch of one), or a blank one, has a KL row in which
    nothing is marked. Rows are padded on the right.

    A row longer than ``max_length`` raises ValueError; a KL row that would be longer loses the
    beginning of its prompt, never a token of the response.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.side = "right"

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        for row in rows:
            self._check(len(row["prompt"]) + len(row["completion"]))
        batch = self._responses([(row["prompt"], row["completion"]) for row in rows])
        kl = [
            (row["prompt"], partner)
            for row, partner in zip(rows, self._partners(rows), strict=True)
        ]
        kl = [(prompt[-(self.max_length - len(partner)) :], partner) for prompt, partner in kl]
        label = torch.tensor([bool(row["label"]) for row in rows])
        batch |= {"label": label, **self._responses(kl, "kl_")}
        return batch if self.apply_loss_mask else supervise_all(batch)

    def _responses(
        self, pairs: list[tuple[list[int], list[int]]], prefix: str = ""
    ) -> dict[str, Tensor]:
        ids = [prompt + response for prompt, response in pairs]
        masks = [[False] * len(prompt) + [True] * len(response) for prompt, response in pairs]
        return self._masked(ids, masks, self._width([len(row) for row in ids]), prefix)

    @staticmethod
    def _partners(rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        real = [index for index, row in enumerate(rows) if row["completion"]]
        following = dict(zip(real, real[1:] + real[:1], strict=True)) if len(real) > 1 else {}
        return [
            row.get("kl_completion", rows[following[i]]["completion"] if i in following else [])
            for i, row in enumerate(rows)
        ]

    def blank(self, row: dict[str, Any]) -> dict[str, Any]:
        """``row`` without a response, for a rank that has no row left but must take part."""
        return {
            "prompt": row["prompt"][:2],
            "completion": [],
            "label": False,
            "kl_completion": [],
            "blank": True,
        }
