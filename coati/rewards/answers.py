"""Final answers: found in a text, and compared as a mathematician would rather than letter by
letter."""

import re
from fractions import Fraction

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
# "#### 42", "the answer is 42", "Answer: 42"; the last one counts.
_MARKED = re.compile(r"(?:####|\banswer\s*(?:is|:|=))\s*:?\s*([^\n]+)", re.IGNORECASE)
_FENCED = re.compile(
    r"\$\$?(.+?)\$\$?(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]"
)  # $...$, \(...\), \[...\]
# What stands beside a number that is part of an expression.
_BEFORE = re.compile(r"[\\^_{}()\[\]+*/=<>√]\s*-?\s*$|\d\s*[-×·,]\s*$|[A-Za-z]$")
_AFTER = re.compile(
    r"[\^_{}(\[]|\s*[\\+*=<>√×·]|\s*[-/]\s*(?:[\d\\({]|[A-Za-z](?![A-Za-z]))|[A-Za-z](?![A-Za-z])|"
    r",\s*-?[\d\\]"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?")
# What only lays an expression out, or names a unit, and says nothing of its value.
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|limits|big[lr]?|Big[lr]?|,|;|!|:|\s)|\\?[$~]|\\(?=\()|\\(?=\))"
)
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNITS = re.compile(
    r"(?<=[\d}])\s*(?:\\%|%|\^?\{?\\circ\}?|°|degrees?|dollars?|cents?|units?|(?:square|cubic)?\s*"
    r"(?:inches|inch|feet|foot|miles?|meters?|metres?|centimeters?|hours?|minutes?|seconds?|"
    r"cm|km|mm|kg)\b(?:\^\d)?)\s*$",
    re.IGNORECASE,
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(\{[^{}]*\}|\d)\s*(\{[^{}]*\}|\d)")
_ROOT = re.compile(r"\\sqrt\s*(\d|[a-zA-Z])")
_MIXED = re.compile(r"^(-?)(\d+)\\frac\{(\d+)\}\{(\d+)\}$")


def boxed(text: str) -> str | None:
    r"""The content of the last whole ``\boxed{...}``, braces matched; None without one."""
    for start in reversed(list(_BOXED.finditer(text))):
        depth = 0
        begin = start.end()
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                if text[begin] == "{":
                    return text[begin + 1 : end].strip()
                break
    return None


def final_answer(text: str) -> str | None:
    r"""The answer that a response ends on: the last ``\boxed``, else what follows the last "####"
    or "answer is", else its last number; None where there is none of them."""
    if (inside := boxed(text)) is not None:
        return inside
    if marked := _MARKED.findall(text):
        return _answer_at(marked[-1])
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def answer_inside(solution: str) -> str:
    r"""The answer that ``solution`` is, which may be a sentence: as of :func:`final_answer`, but an
    expression stays whole."""
    if (inside := boxed(solution)) is not None:
        return inside
    if marked := _MARKED.findall(solution):
        return _answer_at(marked[-1])
    numbers = list(_NUMBER.finditer(solution))
    if _WORD.search(solution) and numbers and _is_plain(solution, numbers[-1]):
        return numbers[-1].group()
    return solution.strip()


def _answer_at(tail: str) -> str:
    """What ``tail``, the rest of a line, begins with: a number among words, else an expression up
    to the end of the sentence."""
    tail = tail.replace("**", "").strip()  # bold, as Markdown has it
    if fenced := _FENCED.match(tail):
        return next(filter(None, fenced.groups())).strip()
    number = _NUMBER.search(tail)
    if number is None:
        return tail.strip(" .*")
    if _is_plain(tail, number):
        return number.group()
    sentence = re.split(r"\.(?:\s|\*|$)", tail)[0].strip(" *")
    if "=" in sentence:  # of "x = 5" and "3 + 4 = 7" what they come to
        return _answer_at(sentence.rpartition("=")[2])
    return sentence


def _is_plain(text: str, number: re.Match) -> bool:
    """Whether ``number`` stands among words, and is no part of an expression."""
    before = text[: number.start()]
    return not _BEFORE.search(before) and not _AFTER.match(text[number.end() :])


def whole_number(text: str | None) -> int | None:
    """The integer that ``text`` is (1,234 and $7 and 3.0 are), or None."""
    number = None if text is None else _value(normalize(text))
    return int(number) if number is not None and number.denominator == 1 else None


def normalize(answer: str, separators: bool = True) -> str:
    r"""``answer`` in one spelling: no layout, units or blanks, fractions as ``\frac{a}{b}``; where
    ``separators``, commas between thousands are none between elements."""
    inside = boxed(answer)
    text = (answer if inside is None else inside).strip().rstrip(".")
    text = _LAYOUT.sub("", _TEXT.sub(r"\1", text)).replace("−", "-").replace("\\\\", "\\")
    text = _UNITS.sub("", text.strip())
    if separators and not re.match(r"\\?[(\[{]", text.strip()):
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"^[a-zA-Z](?:_\w+)?\s*=\s*", "", text.strip())  # "x = 5"
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    text = _FRACTION.sub(lambda m: f"\\frac{{{m[1].strip('{}')}}}{{{m[2].strip('{}')}}}", text)
    text = re.sub(r"^(-?\w+)\s*/\s*(\w+)$", r"\\frac{\1}{\2}", text)
    return re.sub(r"\s+", "", text).lower()


def _value(normal: str) -> Fraction | None:
    """The exact number that a normalized answer is, or None."""
    if mixed := _MIXED.match(normal):
        sign, whole, above, below = mixed.groups()
        return (
            None
            if int(below) == 0
            else (-1 if sign else 1) * (int(whole) + Fraction(int(above), int(below)))
        )
    plain = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}$", r"\1\2/\3", normal).replace("--", "")
    if not re.fullmatch(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:/-?\d+)?", plain) or len(plain) > 60:
        return None
    above, _, below = plain.partition("/")
    return None if below and int(below) == 0 else Fraction(above) / int(below or 1)


def same_answer(one: str, other: str) -> bool:
    r"""Whether two answers are equal: as exact numbers (1/2, 0.5, \frac12), element by element in
    tuples, lists and sets, or in their normal spelling. 1/3 and 0.333 are not."""
    if (listed := normalize(one, False)) == normalize(other, False):
        return listed != ""
    one = normalize(one)
    other = normalize(other)
    if one == other:
        return one != ""
    first = _elements(one)
    second = _elements(other)
    if first is not None and second is not None:
        return first[0] == second[0] and _same_elements(
            first[1], second[1], ordered=first[0] != "{}"
        )
    values = _value(one), _value(other)
    return values[0] is not None and values[0] == values[1]


def _same_elements(one: list[str], other: list[str], ordered: bool) -> bool:
    if len(one) != len(other):
        return False
    if ordered:
        return all(map(same_answer, one, other))
    left = list(other)
    for element in one:
        match = next((each for each in left if same_answer(element, each)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _elements(text: str) -> tuple[str, list[str]] | None:
    """Brackets and elements of a tuple, an interval or a set; None for anything else."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    if len(text) < 2 or text[0] not in "([{" or text[-1] not in ")]}":
        return None
    parts = []
    depth = 0
    start = 1
    for place, letter in enumerate(text[1:-1], start=1):
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return None
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return (text[0] + text[-1], [*parts, text[start:-1]]) if parts else None
