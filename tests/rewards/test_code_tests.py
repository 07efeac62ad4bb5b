"""The reward python_tests: which program, which tests, and when an output is right."""

import json
import logging

import pytest

from coati.rewards import code_tests
from coati.rewards.code_tests import code_reward, program_of, read_tests
from coati.rewards.failures import RowFailed
from coati.rewards.responses import Responses
from coati.rewards.sandbox import sandbox
from coati.rewards.sandbox.sandbox import MIB, Ending, Limits

isolated = pytest.mark.skipif(
    all(sandbox.problem_of(engine) for engine in sandbox.ENGINES), reason="no isolation here"
)
LIMITS = Limits(seconds=3.0, memory=256 * MIB)


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("print(1)", "print(1)"),
        ("So:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```py\na\n```\nbetter:\n```python3\nb\n```", "b\n"),
        ("```\nplain\n```", "plain\n"),
        ("```python\na\n```\nOutput:\n```\n5\n```", "a\n"),
        ("```python\ncut off", "cut off"),
        ("```bash\nls\n```", ""),
        ("```python\na\n```\nrun it:\n```bash\npython a.py\n```", "a\n"),
    ],
)
def test_the_last_python_block_is_the_program(response, program):
    assert program_of(response) == program


APPS = {"inputs": ["1\n", ["2", "3"]], "outputs": ["2\n", ["4", "6"]]}
CALLS = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[2], 4]}
LIVE = [
    {"input": "[1, 2]\n3", "output": "6", "testtype": "functional", "metadata": {"func_name": "g"}}
]
HUMAN = {"test": "def check(candidate):\n    assert candidate(1) == 2", "entry_point": "f"}
DOUBLE = "n = [int(w) for w in open(0).read().split()]\nprint(*[2 * i for i in n], sep='\\n')"
TWICE = "def f(n):\n    return 2 * n\n\ndef g(a, b):\n    return sum(a) + b"


@isolated
@pytest.mark.parametrize(
    ("tests", "program", "share"),
    [
        (json.dumps(APPS), DOUBLE, 1.0),
        (json.dumps({"input_output": json.dumps(APPS)}), DOUBLE, 1.0),
        (json.dumps(APPS), "print(int(input()) * 2)", 0.5),
        (json.dumps({"test_cases": [{"input": "5", "output": "10"}]}), DOUBLE, 1.0),
        (json.dumps([{"input": 5, "output": 10}, {"input": 5, "output": 11}]), DOUBLE, 0.5),
        (json.dumps(CALLS), TWICE, 1.0),
        (json.dumps(CALLS), "class Solution:\n    def f(self, n): return 2", 0.5),
        (json.dumps(LIVE), TWICE, 1.0),
        (json.dumps(HUMAN), TWICE, 1.0),
        (json.dumps(["assert f(1) == 2", "assert f(2) == 5"]), TWICE, 0.5),
        (json.dumps({"test_list": ["assert h == 2"], "test_setup_code": "h = f(1)"}), TWICE, 1.0),
        ("assert f(3) == 6", TWICE, 1.0),
        ("from solution import f\n\ndef test_f():\n    assert f(3) == 7", TWICE, 0.0),
        ("assert f(3) == 6", "def f(:", 0.0),
        ("assert f(3) == 6", "```bash\nls\n```", 0.0),
        (json.dumps(["assert f(1) == 2"] * 2), "while True: pass", 0.0),
    ],
)
def test_the_share_of_the_tests_that_pass(tests, program, share):
    batch = Responses(["p"], [program], [tests])
    assert code_reward(Limits(seconds=0.5 if "True" in program else 5.0), 2)(batch) == [share]


@pytest.mark.parametrize(
    ("found", "expected", "right"),
    [
        ("1 2\n", "1 2", True),
        ("1 2  \n\n", "1 2", True),
        ("1  2", "1 2", True),
        ("1\n2", "1 2", False),
        ("0.3333333", "0.33333333", True),
        ("0.34", "0.33", False),
        ("1.0", "1", False),  # the output that is wanted is no fraction
        ("nan", "0.5", False),
        ("", "0", False),
        ("yes", "Yes", False),
    ],
)
def test_when_an_output_is_right(found, expected, right):
    [test] = read_tests(json.dumps([{"input": "", "output": expected}]))
    assert test.passed(Ending("exit", 0, stdout=found)) is right
    assert not test.passed(Ending("exit", 1, stdout=found))
    assert not test.passed(Ending("time", None, stdout=found))


@pytest.mark.parametrize(
    ("found", "expected", "right"),
    [
        ([1, 2], [1, 2], True),
        ([[1, 2]], [1, 2], False),
        (5, [5], True),  # APPS wraps some results
        (0.1 + 0.2, 0.3, True),
        (True, 1, False),
        ({"a": [1]}, {"a": [1]}, True),
        (None, None, True),
        ("5", 5, False),
    ],
)
def test_when_a_result_is_right(found, expected, right):
    [test] = read_tests(json.dumps({"fn_name": "f", "inputs": [[]], "outputs": [expected]}))
    assert test.passed(Ending("exit", 0, result=json.dumps(found))) is right


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("", "there are no tests in it; expected Python tests"),
        ("[]", "there are no tests in it"),
        ("42", "it is 42; expected Python tests"),
        ("the answer is 4", "its tests are no Python"),
        ('{"inputs": ["1"], "outputs": []}', "there are 1 inputs and 0 outputs"),
        ('{"inputs": "1", "outputs": []}', "inputs and outputs are no lists"),
        ('[{"input": "1"}]', "a test has input; expected Python tests"),
        ("[3]", "a test is 3; expected Python tests"),
        ("{}", "a test has nothing"),
    ],
)
def test_a_gt_answer_without_tests_is_named(tests, message):
    with pytest.raises(ValueError, match=message):
        read_tests(tests)


@isolated
def test_a_row_without_tests_ends_the_batch_by_its_number():
    with pytest.raises(RowFailed, match="cannot read the tests of gt_answer") as failed:
        code_reward(LIMITS, 2)(Responses(["p"] * 2, ["x"] * 2, ["assert x", ""]))
    assert failed.value.row == 1


@isolated
def test_what_is_ended_by_a_limit_is_said_once_for_each_kind(caplog, monkeypatch):
    monkeypatch.setattr(code_tests, "_SAID", set())
    programs = ["while True: pass"] * 2 + ["while True: print('x' * 999)", "x = 2", "x = 1"]
    limits = Limits(seconds=1.0, memory=256 * MIB)
    with caplog.at_level(logging.WARNING):
        scores = code_reward(limits, 2)(Responses(["p"] * 5, programs, ["assert x == 1"] * 5))
    assert scores == [0, 0, 0, 0, 1]
    said = [one.getMessage() for one in caplog.records]
    assert len(said) == 2 and any("ended by the time limit" in one for one in said)
    assert any("the limit of output" in one and "while True: print" in one for one in said)
