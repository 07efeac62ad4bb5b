"""The reference answer of a prompt, for rewards that verify it: gsm8k, MATH, verl, OpenR1,
multiple choice, and the tests of programs."""

import json
import re
from typing import Any

from coati.dataset.rows.column_use import Fields, holds
from coati.dataset.rows.embedded_text import decoded
from coati.dataset.rows.numerals import is_number
from coati.dataset.rows.rounds import KEYS_OF_CHOICE, chosen_letter
from coati.dataset.rows.row_errors import RowError

# The column, the first that holds one; a whole solution last.
COLUMNS = (
    "ground_truth",
    "reward_model",
    "final_answer",
    "expected_answer",
    "reference_answer",
    "answer",
    "answerKey",
    "answer_key",
    "solution",
    "answers",
)
_COLUMNS = frozenset(COLUMNS)
# Tests of a program, each with the columns that belong to it: MBPP, APPS and TACO, HumanEval
TESTS = {
    "test_list": ("test_setup_code", "test_imports"),
    "input_output": (),
    "test": ("entry_point",),
}
_TESTS = frozenset(TESTS)
_GSM8K = re.compile(r"####\s*(.+?)\s*$", re.MULTILINE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def ground_truth(row: Fields) -> str | None:
    """The reference answer of ``row``, lists and objects as JSON; None where it has none. Raises
    RowError for a gt_answer or tests that are none."""
    given = row.peek("gt_answer")
    if given not in (None, "", [], {}):
        if isinstance(given, list | dict):
            return _json("gt_answer", row["gt_answer"])
        if not (isinstance(given, str | bool) or is_number(given)):
            raise RowError("bad_gt_answer", f"gt_answer is {given!r:.60}")
        return str(row["gt_answer"])
    if row.peek("test_cases") not in (None, ""):
        return _json("test_cases", row["test_cases"])
    if not _TESTS.isdisjoint(row) and (tests := _program_tests(row)) is not None:
        return tests
    for key in () if _COLUMNS.isdisjoint(row) else COLUMNS:
        if holds(row.peek(key)) and (found := _truth(row, key)) is not None:
            return found
    return None


def _json(name: str, found: Any) -> str:
    try:
        return json.dumps(found, ensure_ascii=False)
    except TypeError as error:  # dates or bytes out of a parquet file
        raise RowError("bad_gt_answer", f"{name}: {error}") from error


def _program_tests(row: Fields) -> str | None:
    """The tests of a program, as :func:`~coati.rewards.code_tests.read_tests` takes them."""
    for name, beside in TESTS.items():
        found = row.peek(name)
        more = [key for key in beside if holds(row.peek(key))]
        if not holds(found) or (name == "test" and not more):
            continue
        if isinstance(found, str) and not more:
            return str(row[name])
        return _json(name, {key: row[key] for key in (name, *more)})
    return None


def _truth(row: Fields, key: str) -> str | None:
    found = row.peek(key)
    if key == "reward_model":
        found = decoded(found) if isinstance(found, str) else found
        if not isinstance(found, dict) or not holds(found.get("ground_truth")):
            return None
        if isinstance(row.peek(key), dict):
            return _as_text(row.inside(key)["ground_truth"])
        row.get(key)
        return _as_text(found["ground_truth"])
    if key in KEYS_OF_CHOICE and (letter := chosen_letter(row, found)) is not None:
        row.get(key)
        return letter
    if key == "answers":  # SQuAD's: spans of the context, the first of them
        found = found.get("text") if isinstance(found, dict) else found
        found = found[0] if isinstance(found, list) and found else None
    if not (isinstance(found, str) or is_number(found)):
        if key != "ground_truth" or not isinstance(found, dict | list):
            return None
    row.get(key)
    return final_answer(found) if isinstance(found, str) else _as_text(found)


def _as_text(found: Any) -> str:
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)


def final_answer(text: str) -> str:
    """What a solution ends with: after gsm8k's ``####``, else in the last ``\\boxed{}``, else
    all of it."""
    marks = _GSM8K.findall(text)
    if marks:
        return marks[-1].replace(",", "") if re.fullmatch(r"-?[\d,.]+", marks[-1]) else marks[-1]
    boxes = list(_BOXED.finditer(text))
    return (_closed(text, boxes[-1].end()) if boxes else None) or text


def _closed(text: str, start: int) -> str | None:
    """What stands in the braces opened before ``start``."""
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start:place].strip()
    return None
