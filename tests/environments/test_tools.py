"""The built-in environments, what they say to calls that cannot be answered, and how environments
are named."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from coati.environments.calculator import Calculator, compute
from coati.environments.environment_table import (
    ENVIRONMENTS,
    check_environment,
    environment_arguments,
)
from coati.environments.folder_search import FolderSearch, Passages
from coati.environments.named_environment import environment_factory
from coati.environments.tool_environment import ToolError
from coati.environments.turn_tokens import UNREADABLE
from tests.environments.scripted import call


def said(environment, *calls, content=""):
    return environment.step({"role": "assistant", "content": content, "tool_calls": list(calls)})


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*(3+4)", "84"),
        ("2 ** 10 - 1", "1023"),
        ("7 // 2 + 7 % 2", "4"),
        ("1/3", "0.333333333333333"),
        ("0.1 + 0.2", "0.3"),
        ("-5 + +2", "-3"),
        ("1,000 * 2", "2000"),
        ("2^3", "8"),
        ("4 ** 0.5", "2"),
    ],
)
def test_what_is_computed(expression, value):
    assert compute(expression) == value


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("1/0", "division by zero"),
        ("1%0", "division by zero"),
        ("__import__('os')", "no expression of numbers"),
        ("a + 1", "no expression of numbers"),
        ("1 +", "no expression of numbers"),
        ("", "no expression of numbers"),
        ("True + 1", "no expression of numbers"),
        ("9**9**9", "the result is too large"),
        ("9**999999999", "the result is too large"),
        ("10**900 * 10**900", "the result is too large"),
        ("(-8) ** 0.5", "a root of a negative number"),
        ("0 ** (-1)", "division by zero"),
        ("(" * 400 + "1", "no expression of numbers"),
        ("1+" * 600 + "1", "at most 1000 are taken"),
        ("1" + "\0", "no expression of numbers"),
        (None, "no expression of numbers"),
        ([1, 2], "no expression of numbers"),
        ("1j", "no expression of numbers"),
        ("9e99999", "no expression of numbers|too large"),
    ],
)
def test_what_is_not(expression, problem):
    with pytest.raises(ToolError, match=problem):
        compute(expression)


def test_a_dialogue_with_the_calculator():
    one = Calculator()
    row = {"messages": [{"role": "user", "content": "6*7?"}], "gt_answer": "so 6 * 7\n#### 42"}
    assert one.reset(row) == row["messages"]
    turn = said(
        one,
        {**call("calculator", expression="6*7"), "id": "a1"},
        call("calculator", expression="1/0"),
    )
    assert not turn.done and turn.reward == 0
    assert turn.messages == [
        {"role": "tool", "name": "calculator", "content": "42", "tool_call_id": "a1"},
        {"role": "tool", "name": "calculator", "content": "error: division by zero"},
    ]
    assert one.failed_calls == 1
    for text, reward in (("It is 42.", 1.0), ("It is 41.", 0.0), ("Nothing.", 0.0), ("42.0", 1.0)):
        turn = one.step({"role": "assistant", "content": text})
        assert (turn.done, turn.reward) == (True, reward), text


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (call("abacus", expression="1"), "error: there is no tool abacus; there is calculator"),
        (call("calculator"), "error: calculator needs expression"),
        (
            call("calculator", expression="1", base=2),
            "error: calculator takes no base; it takes expression",
        ),
        (
            {"type": "function", "function": {"name": "calculator", "arguments": [1]}},
            "error: the arguments of calculator are no object",
        ),
    ],
)
def test_a_call_that_fits_no_tool_is_answered(asked, answer):
    one = Calculator()
    one.reset({"messages": []})
    assert [each["content"] for each in said(one, asked).messages] == [answer]
    assert one.failed_calls == 1 and UNREADABLE != answer


def test_search(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "birds.txt").write_text(
        "The heron is a wading bird.\n\nThe egret is white.\n\n" + "Sand. " * 300
    )
    (tmp_path / "deep" / "fish.md").write_text("A pike eats perch.")
    (tmp_path / "other.bin").write_bytes(b"heron\xff")
    one = FolderSearch(str(tmp_path), 1)
    one.reset({"messages": []})
    (found,) = said(one, call("search", query="what is a HERON")).messages
    assert found["content"].startswith("[birds.txt] The heron is a wading bird.")
    (found,) = said(one, call("search", query="pike perch")).messages
    assert found["content"] == "[deep/fish.md] A pike eats perch."
    (found,) = said(one, call("search", query="zebra")).messages
    assert found["content"] == "error: nothing was found"
    assert all(len(text) <= 800 for _, text in one.passages.texts)
    for arguments, problem in (
        ({}, "name the folder"),
        ({"folder": str(tmp_path / "none")}, "there is no such folder"),
        ({"folder": str(tmp_path), "results": 0}, "expected a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=f"--environment search: .*{problem}"):
            environment_factory("search", arguments)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no text"):
        FolderSearch(str(tmp_path / "empty"))


def test_bm25_by_hand():
    """Two passages of two words; a word of one of them: ln(1 + 1.5 / 1.5) x 1 x 2.2 / (1 + 1.2)."""
    passages = Passages([("a", "heron bird"), ("b", "egret bird")])
    assert passages._score("heron", 0) == pytest.approx(0.6931, abs=1e-4)
    assert passages.best("heron bird", 5) == [("a", "heron bird"), ("b", "egret bird")]


def test_python_programs_run_in_the_sandbox_alone(monkeypatch):
    """What is asked of it, and what becomes of its endings."""
    asked = []

    class Sandbox:
        def __init__(self, limits):
            self.limits = limits

        def run(self, program, cases):
            asked.append((program, [case.kind for case in cases], self.limits))
            return [endings.pop(0)]

    module = ModuleType("coati.rewards.sandbox.sandbox")
    module.MIB = 2**20
    module.Limits = lambda **given: SimpleNamespace(**given)
    module.Case = lambda kind: SimpleNamespace(kind=kind)
    module.Sandbox = Sandbox
    monkeypatch.setitem(sys.modules, "coati.rewards.sandbox", ModuleType("coati.rewards.sandbox"))
    monkeypatch.setitem(sys.modules, "coati.rewards.sandbox.sandbox", module)
    from coati.environments.python_tool import PythonTool, _sandbox

    _sandbox.cache_clear()
    endings = [
        SimpleNamespace(how="exit", code=0, stdout="5\n", reason=""),
        SimpleNamespace(how="exit", code=0, stdout="", reason=""),
        SimpleNamespace(how="exit", code=1, stdout="1\n", reason="ValueError: no"),
        SimpleNamespace(how="time", code=None, stdout="", reason="the time limit"),
        SimpleNamespace(how="exit", code=0, stdout="x" * 5000, reason=""),
    ]
    one = PythonTool(seconds=2.0, memory_mib=64)
    one.reset({"messages": []})
    texts = [said(one, call("python", code="print(5)")).messages[0]["content"] for _ in range(5)]
    _sandbox.cache_clear()
    assert texts[:4] == [
        "5",
        "(nothing was printed)",
        "error: ValueError: no\n1",
        "error: the time limit",
    ]
    assert texts[4].endswith("\n(1000 characters more)") and one.failed_calls == 2
    assert asked[0][:2] == ("print(5)", ["stdin"])
    assert vars(asked[0][2]) == {"seconds": 2.0, "memory": 64 * 2**20}


# Names


OWN = """
class Mine:
    def __init__(self, size=3):
        self.size = size
    def reset(self, row):
        return row["messages"]
    def step(self, response):
        pass

class Half:
    def reset(self, row):
        pass

class Fails:
    def __init__(self):
        raise RuntimeError("no database")

function = len
"""


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("calculater", "unknown; did you mean calculator?"),
        ("chess", "unknown. There are calculator, python, search, and path.py:Class"),
        ("{}", "name the class too"),
        ("{}:", "name the class too"),
        ("{}:Other", "has no Other; it defines Mine, Half, Fails"),
        ("nowhere.py:Mine", "there is no file nowhere.py"),
    ],
)
def test_names_that_are_none(tmp_path, name, problem):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(ValueError) as caught:
        check_environment(name.format(path))
    assert problem in str(caught.value) and "--environment" in str(caught.value)


def test_files_that_are_no_python(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("class Mine(:\n")
    with pytest.raises(ValueError, match="own.py:1: "):
        check_environment(f"{path}:Mine")


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("Half", {}, "Half has no step; an environment has reset"),
        ("Fails", {}, "cannot be made with no arguments .*RuntimeError: no database"),
        ("Mine", {"width": 5}, "cannot be made with .*width.*unexpected keyword"),
        ("function", {}, "has no class function"),
    ],
)
def test_classes_that_are_none(tmp_path, name, arguments, problem):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(ValueError, match=problem):
        environment_factory(f"{path}:{name}", arguments)


def test_a_class_of_ones_own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    check_environment(f"{path}:Mine")
    make = environment_factory(f"{path}:Mine", {"size": 5})
    assert make().size == 5 and make() is not make()
    path.write_text("import os\nos.abort\nraise SystemExit(3)\nclass Mine: pass\n")
    with pytest.raises(ValueError, match="running .*own.py failed: SystemExit: 3"):
        environment_factory(f"{path}:Mine", {})


def test_arguments():
    assert environment_arguments("search", '{"folder": "a"}') == {"folder": "a"}
    assert environment_arguments("calculator", None) == {}
    assert environment_arguments("own.py:Mine", '{"any": [1]}') == {"any": [1]}
    for name, text, problem in (
        ("search", "folder=a", "no JSON"),
        ("search", "[1]", "expected a JSON object"),
        ("search", '{"path": "a"}', "search takes no 'path'; it takes folder, results"),
        ("calculator", '{"digits": 5}', "takes no 'digits'; it takes none"),
    ):
        with pytest.raises(ValueError, match=f"--environment_args.*{problem}"):
            environment_arguments(name, text)


def test_the_table_names_what_there_is():
    for name, row in ENVIRONMENTS.items():
        if name != "python":  # refused where nothing isolates it
            continue
        module, _, kind = row.place.partition(":")
        assert hasattr(__import__(module, fromlist=[kind]), kind)
    environment_factory("calculator", {})
