"""The reward ``python_tests``: the share of its tests that the program in a response passes, in the
forms in which public sets of programming problems have them."""

import ast
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coati.rewards.background import map_bounded
from coati.rewards.failures import RowFailed, Unreachable
from coati.rewards.responses import Responses
from coati.rewards.sandbox.sandbox import WORDS, Case, Ending, Limits, Sandbox
from coati.utils.logging import get_logger

logger = get_logger(__name__)

_FENCED = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_LANGUAGES = ("python", "python3", "py")
TOLERANCE = 1e-6  # of decimal fractions in an output
FORMS = (
    "expected Python tests (assertions, test_... functions, or check(candidate) with entry_point), "
    'or JSON: {"inputs": [...], "outputs": [...], "fn_name": ...}, or a list of {"input", '
    '"output"} or of assertions'
)


@dataclass(frozen=True)
class CodeTest:
    """``expected``: the output of a program, or the result of a call; of tests: None."""

    case: Case
    expected: Any = None

    def passed(self, ending: Ending) -> bool:
        """Whether ``ending`` is right."""
        if self.case.kind == "tests":
            return ending.passed
        if self.case.kind == "call":
            return ending.result is not None and _same(json.loads(ending.result), self.expected)
        return (
            ending.how == "exit" and ending.code == 0 and _same_text(ending.stdout, self.expected)
        )


def program_of(response: str) -> str:
    """The last Python block of a response, or of blocks without a language where none is marked as
    Python; without blocks, all of it."""
    blocks = _FENCED.findall(response)
    python = [text for language, text in blocks if language.lower() in _LANGUAGES]
    unmarked = [text for language, text in blocks if not language]
    return (python or unmarked or [""])[-1] if blocks else response


def read_tests(text: str) -> list[CodeTest]:
    """The tests that ``text``, a row's gt_answer, holds: of HumanEval, MBPP, APPS, TACO,
    LiveCodeBench, PRIME and DeepCoder, or plain Python.

    Raises ValueError where it holds none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = text
    tests = _tests_in(found)
    if not tests:
        raise ValueError(f"there are no tests in it; {FORMS}")
    return tests


def _tests_in(found: Any) -> list[CodeTest]:
    if isinstance(found, str):
        return _from_source(found, None) if found.strip() else []
    if isinstance(found, list):
        return [test for each in found for test in _one(each, None)]
    if not isinstance(found, dict):
        raise ValueError(f"it is {found!r:.60}; {FORMS}")
    for key in ("test_cases", "tests", "input_output", "test_list", "unit_tests", "ground_truth"):
        if found.get(key):
            held = found[key]
            if isinstance(held, str):
                return read_tests(held)
            setup = found.get("test_setup_code") or found.get("test_imports") or ""
            setup = "\n".join(setup) if isinstance(setup, list) else setup
            if setup and isinstance(held, list) and all(isinstance(one, str) for one in held):
                return _tests_in([f"{setup}\n{one}" for one in held])
            return _tests_in(held)
    if "inputs" in found or "outputs" in found:
        return _pairs(found)
    return _one(found, found.get("fn_name"))


def _pairs(found: dict[str, Any]) -> list[CodeTest]:
    """APPS, TACO: lists of inputs and outputs."""
    inputs = found.get("inputs")
    outputs = found.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError(f"inputs and outputs are no lists; {FORMS}")
    if len(inputs) != len(outputs):
        raise ValueError(f"there are {len(inputs)} inputs and {len(outputs)} outputs")
    function = found.get("fn_name")
    return [
        test
        for given, expected in zip(inputs, outputs, strict=True)
        for test in _one({"input": given, "output": expected}, function)
    ]


def _one(found: Any, function: str | None) -> list[CodeTest]:
    if isinstance(found, str):
        return _from_source(found, None)
    if not isinstance(found, dict):
        raise ValueError(f"a test is {found!r:.60}; {FORMS}")
    if isinstance(found.get("test"), str):
        return _from_source(found["test"], found.get("entry_point"))
    metadata = found.get("metadata") if isinstance(found.get("metadata"), dict) else {}
    function = function or found.get("fn_name") or metadata.get("func_name")
    if "input" not in found or "output" not in found:
        raise ValueError(f"a test has {', '.join(map(str, found)) or 'nothing'}; {FORMS}")
    given = found["input"]
    expected = found["output"]
    if not function:
        return [CodeTest(Case("stdin", input=_as_input(given)), _as_input(expected))]
    if isinstance(given, str):  # LiveCodeBench: an argument in JSON on each line
        arguments = [_decoded(line) for line in given.splitlines() if line.strip()]
        return [
            CodeTest(Case("call", function=function, arguments=arguments), [_decoded(expected)])
        ]
    arguments = given if isinstance(given, list) else [given]
    # APPS wraps some results in a list of one, others not.
    both = [expected]
    if isinstance(expected, list) and len(expected) == 1:
        both.append(expected[0])
    return [CodeTest(Case("call", function=function, arguments=arguments), both)]


def _from_source(source: str, entry_point: Any) -> list[CodeTest]:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"its tests are no Python ({error})") from error
    return [CodeTest(Case("tests", source=source, entry_point=entry_point or None))]


def _as_input(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(_as_input(each) for each in value)
    return json.dumps(value)


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _same(result: Any, accepted: Sequence[Any]) -> bool:
    return any(_equal(result, _as_json(expected)) for expected in accepted)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        return numbers and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return one == other


def _same_text(found: str, expected: str) -> bool:
    """Equal but for blanks at the ends of lines, or word for word with decimal fractions that
    differ by :data:`TOLERANCE`."""
    lines, wanted = (
        [line.rstrip() for line in text.rstrip().split("\n")] for text in (found, expected)
    )
    if lines == wanted:
        return True
    if len(lines) != len(wanted):
        return False
    pairs = [(one.split(), other.split()) for one, other in zip(lines, wanted, strict=True)]
    return all(len(one) == len(other) and all(map(_same_word, one, other)) for one, other in pairs)


def _same_word(one: str, other: str) -> bool:
    if one == other:
        return True
    if "." not in other:
        return False
    try:
        return math.isclose(float(one), float(other), rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except ValueError:
        return False


def code_reward(limits: Limits, at_once: int) -> Callable[[Responses], list[float]]:
    """The reward function. A program that does harm, or tries to, fails its tests; the first of
    each kind is said. Raises Refused where programs cannot be isolated; the function raises
    RowFailed for a gt_answer without tests."""
    sandbox = Sandbox(limits)

    def share(batch: Responses, row: int) -> float:
        try:
            tests = read_tests(batch.gt_answers[row] or "")
        except ValueError as error:
            raise RowFailed(f"cannot read the tests of gt_answer: {error}", row) from error
        program = program_of(batch.responses[row])
        if not program.strip():
            return 0.0
        endings = sandbox.run(program, [test.case for test in tests])
        for ending in endings:
            if ending.how != "exit" or ending.reason == WORDS["memory"]:
                _say(ending, program)
        if endings[-1].how == "lost" and sandbox.run("", [Case("stdin")])[0].how != "exit":
            raise Unreachable(f"cannot isolate programs any more: {endings[-1].stderr!r}")
        right = [test.passed(ending) for test, ending in zip(tests, endings, strict=True)]
        return sum(right) / len(right)

    return lambda batch: map_bounded(lambda row: share(batch, row), len(batch), at_once)


_SAID: set[str] = set()


def _say(ending: Ending, program: str) -> None:
    if ending.reason not in _SAID:
        _SAID.add(ending.reason)
        logger.warning(
            f"python_tests: a program was ended by {ending.reason.removeprefix('killed by ')}, and "
            f"its test failed; it begins {program[:120]!r}. Others like it are not named"
        )
