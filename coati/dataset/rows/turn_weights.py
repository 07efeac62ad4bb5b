"""How much a turn counts in the loss, where the file says so."""

from typing import Any

from coati.dataset.rows.column_use import Fields
from coati.dataset.rows.numerals import number_of
from coati.dataset.rows.row_errors import RowError

# OpenAI's, axolotl's, ms-swift's and LLaMA-Factory's names.
FIELDS = ("weight", "train", "loss", "loss_weight")
DETAILS = "train_detail"
WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}
Spans = list[list[Any]]  # [first, end, weight], in characters of the content


def weight_of(fields: Fields, where: str) -> float | None:
    """The weight of a message, from 0 to 1; None where the file says nothing. Raises RowError."""
    found = {key: fields[key] for key in FIELDS if fields.peek(key) is not None}
    weights = {key: _number(value, f"{where}: {key}") for key, value in found.items()}
    if len(set(weights.values())) > 1:
        said = ", ".join(f"{key} {found[key]!r:.40}" for key in found)
        raise RowError("bad_weight", f"{where} has {said}: which of them counts?")
    return next(iter(weights.values()), None)


def _number(value: Any, where: str) -> float:
    if isinstance(value, str):
        value = WORDS.get(value.strip().lower(), value)
    number = number_of(value)
    if not 0 <= number <= 1:
        raise RowError("bad_weight", f"{where} is {value!r:.60}, expected true, false or 0 to 1")
    return number


def spans_of(fields: Fields, content: str, where: str) -> Spans:
    """axolotl's ``train_detail``: a list of ``{begin_offset, end_offset, train}``, the end being
    that of the last character. Raises RowError."""
    found = fields.peek(DETAILS)
    if not found:
        return []
    fields.get(DETAILS)
    if not isinstance(found, list):
        raise RowError("bad_weight", f"{where}: {DETAILS} is {found!r:.60}, expected a list")
    spans = []
    for detail in found:
        if not isinstance(detail, dict):
            raise RowError("bad_weight", f"{where}: {DETAILS} holds {detail!r:.60}")
        one = Fields(detail, fields.use, f"{fields.path}{DETAILS}[].")
        first = one.get("begin_offset")
        last = one.get("end_offset")
        weight = _number(one.get("train"), f"{where}: {DETAILS}: train")
        one.close()
        if not (_is_place(first) and _is_place(last) and first <= last < len(content)):
            raise RowError(
                "bad_weight",
                f"{where}: {DETAILS} goes from {first!r:.20} to {last!r:.20}, the content has "
                f"{len(content)} characters",
            )
        spans.append([first, last + 1, weight])
    return sorted(spans)


def _is_place(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def moved(spans: Spans, offset: int, where: str) -> Spans:
    """``spans`` of a content whose first ``offset`` characters became the thought."""
    if spans and offset and spans[0][0] < offset:
        raise RowError(
            "bad_weight",
            f"{where}: {DETAILS} weighs a thought; give the thought a field of its own",
        )
    return [[first - offset, end - offset, weight] for first, end, weight in spans]
