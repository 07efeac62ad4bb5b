"""What of a row was read, so that the rest can be named: nothing is left out silently.

A reader takes columns out of :class:`Fields`, which remembers them; what nobody asked for ends up
in a :class:`ColumnUse` under its path (``metadata``, ``messages[].images``).
"""

import re
from collections.abc import Iterable
from typing import Any

# Names of columns and fields whose content belongs into training, so that leaving it out deserves a
# warning. Of prompts only what belongs to the question.
QUESTION_PARTS = frozenset(
    "system system_prompt system_message context contexts passage document choices options history "
    "tools functions tool_choice".split()
)
THOUGHTS = frozenset(
    "reasoning_content reasoning reasoning_details thinking thought thoughts rationale cot "
    "complex_cot chain_of_thought reasoning_trace scratchpad analysis".split()
)
TRUTHS = frozenset(
    "gt_answer ground_truth ground_truths answer answers answer_key answerkey solution solutions "
    "final_answer expected_answer reference_answer reference test_cases reward_model".split()
)
CALLS = frozenset("tool_calls tool_call function_call function_calls tool_results".split())
JUDGMENTS = frozenset(
    "label labels kto_tag weight weights sample_weight train loss loss_weight loss_mask "
    "train_detail".split()
)
_MEDIA = re.compile(r"(?:^|_)(?:image|audio|video|pixel|img|picture|speech)s?(?:$|_)")
SWITCHES = frozenset(("on", "off", "true", "false", "yes", "no", "high", "medium", "low", "none"))


def holds(value: Any) -> bool:
    """Whether there is anything in ``value``: neither null, nor blank, nor empty throughout."""
    if value is None:
        return False
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return any(map(holds, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds, value))
    return True


class ColumnUse:
    """The columns and fields of one row that were not read, with their values.

    ``hidden``: the paths of those that are not to be read, of which nothing is said.
    """

    __slots__ = ("hidden", "left")

    def __init__(self, hidden: frozenset[str] = frozenset()):
        self.left: dict[str, list[Any]] = {}
        self.hidden = hidden

    def leave(self, name: str, value: Any) -> None:
        """Note that ``value``, found under ``name``, is not read; nothing for what is empty."""
        if name not in self.hidden and holds(value):
            self.left.setdefault(name, []).append(value)

    def unused(self, texts: Iterable[str], whole: bool, truth: bool = False) -> dict[str, bool]:
        """Each name with whether it carries content that is missing in the row's ``texts``.

        ``whole``: responses, labels and weights matter, not the question alone; ``truth``: the
        reference answer was found, so that another is not missed.
        """
        if not self.left:
            return {}
        said = set(texts)
        return {
            name: carries(name, whole)
            and not (truth and _last(name) in TRUTHS)
            and not all(_is_said(name, value, said) for value in values)
            for name, values in self.left.items()
        }


def carries(name: str, whole: bool = True) -> bool:
    """Whether a column or field of this name usually holds content."""
    last = _last(name)
    if last in QUESTION_PARTS or last in THOUGHTS or last in TRUTHS or _MEDIA.search(last):
        return True
    return whole and (last in CALLS or last in JUDGMENTS)


def _last(name: str) -> str:
    """The last part of a path, in one spelling."""
    last = name.rpartition(".")[2].lower().removesuffix("[]")
    return re.sub(r"[^a-z0-9]+", "_", last).strip("_")


def _is_said(name: str, value: Any, said: set[str]) -> bool:
    """Whether a text (or each text of messages) stands in the row anyway, or only switches thoughts
    on or off."""
    if isinstance(value, str):
        if _last(name) in THOUGHTS and value.strip().lower() in SWITCHES:
            return True
        if _last(name) in TRUTHS:  # a final answer stands at the end of its solution
            return any(value.strip() in text for text in said)
        return value in said or value.strip() in said
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        texts = [one.get("content", one.get("value")) for one in value]
        return all(isinstance(text, str) and text in said for text in texts)
    return False


def first_of(keys: Iterable[str], row: dict) -> str | None:
    """The first of ``keys`` under which ``row`` has anything but null; that is not yet read."""
    for key in keys:
        if dict.get(row, key) is not None:
            return key
    return None


class Fields(dict):
    """A row, or an object inside it, that remembers which of its keys were read.

    ``answers`` are the keys read as responses, which a prompt leaves out.
    """

    __slots__ = ("_inside", "_read", "answers", "names", "path", "use")

    def __init__(self, row: dict, use: ColumnUse, path: str = "", names: dict | None = None):
        if use.hidden:
            spelled = names or {}
            hidden = use.hidden
            row = {k: v for k, v in row.items() if f"{path}{spelled.get(k, k)}" not in hidden}
        dict.__init__(self, row)
        self.use = use
        self.path = path
        self.names = names  # as the file spells them
        self.answers: tuple[str, ...] = ()
        self._read: set[str] = set()
        self._inside: list[Fields] | None = None

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return dict.__getitem__(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return dict.get(self, key, default)

    def peek(self, key: str) -> Any:
        """The value under ``key``, which does not count as read."""
        return dict.get(self, key)

    def first(self, keys: Iterable[str]) -> str | None:
        """The first of ``keys`` that is there and not null."""
        return first_of(keys, self)

    def take(self, keys: Iterable[str]) -> Any:
        """The value of the first of ``keys`` that holds anything."""
        for key in keys:
            if holds(dict.get(self, key)):
                return self[key]
        return None

    def answer(self, key: str) -> Any:
        """The value under ``key``, read as a response."""
        self.answers += (key,)
        return self[key]

    def inside(self, key: str) -> "Fields":
        """The object under ``key``, whose own keys are accounted for one by one."""
        inner = Fields(self[key], self.use, f"{self.path}{key}.")
        self._inside = [*(self._inside or ()), inner]
        return inner

    def unread(self, *keys: str) -> None:
        """What was read is left out after all."""
        self._read.difference_update(keys)

    def close(self) -> None:
        """Note what was not read."""
        for inner in self._inside or ():
            inner.close()
        if len(self._read) >= len(self) and self._read.issuperset(self):
            return
        names = self.names or {}
        for key, value in self.items():
            if key not in self._read:
                self.use.leave(f"{self.path}{names.get(key, key)}", value)
