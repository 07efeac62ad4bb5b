"""Rewards by name and from files: numbers, weights, and what is said when a function misbehaves."""

import threading

import pytest

from coati.rewards.registry import ALIASES, REWARDS, check_rewards
from coati.rewards.responses import Responses
from coati.rewards.scorer import Rewards
from coati.rewards.time_limit import Overrun, time_limit
from coati.utils.logging import forget_warnings
from tests.rewards.test_functions import GOOD, TAGS


def batch(responses=("4", "5", "six"), **columns):
    count = len(responses)
    return Responses(
        ["2 + 2 ="] * count, list(responses), columns.pop("gt_answers", ["4"] * count), **columns
    )


def write(tmp_path, body, name="mine.py"):
    path = tmp_path / name
    path.write_text(body, encoding="utf-8")
    return path


def user(tmp_path, expression, arguments="responses, **keywords"):
    path = write(
        tmp_path, f"import math, time\n\n\ndef reward({arguments}):\n    return {expression}\n"
    )
    return f"{path}:reward"


def test_each_reward_is_kept_by_name_and_their_weighted_sum_is_the_score():
    scored = Rewards(["gsm8k", "length"], [0.5, -2.0])(batch(lengths=[1, 2, 4], max_new_tokens=4))
    assert scored.parts == {"gsm8k": [10, 1, 0], "length": [-0.25, -0.5, -1.0]}
    assert scored.total == [5 + 0.5, 0.5 + 1.0, 2.0]


def test_every_name_of_the_table_scores():
    responses = batch([GOOD], lengths=[3], max_new_tokens=6)
    scored = Rewards([name for name, row in REWARDS.items() if not row.beside], tags=TAGS)(
        responses
    )
    assert scored.parts == {
        "gsm8k": [10],
        "math_competition": [10],
        "format": [1],
        "length": [-0.5],
    }
    assert scored.total == [20.5]


def test_older_names_mean_the_same():
    for old, new in ALIASES.items():
        assert check_rewards([old]) == [new]
        assert Rewards([old])(batch()).parts == Rewards([new])(batch()).parts


def test_tags_come_from_the_template_or_the_batch():
    assert Rewards(["gsm8k"], tags=TAGS)(batch(["4"])).total == [0]
    assert Rewards(["gsm8k"])(batch(["4"], tags=TAGS)).total == [0]


def test_only_what_compares_needs_a_ground_truth():
    assert Rewards(["gsm8k"]).needs_gt_answer and not Rewards(["length"]).needs_gt_answer


# User functions


@pytest.mark.parametrize(
    "values",
    [
        "[1, 2.5, True]",
        "(1, 2.5, True)",
        "__import__('numpy').array([1, 2.5, 1])",
        "__import__('torch').tensor([1, 2.5, 1])",
        "list(__import__('numpy').array([1, 2.5, 1]))",
    ],
)
def test_a_users_function_may_return_any_list_of_numbers(tmp_path, values):
    scored = Rewards([user(tmp_path, values)])(batch())
    assert scored.total == [1.0, 2.5, 1.0] and scored.parts == {"reward": [1.0, 2.5, 1.0]}
    assert all(type(value) is float for value in scored.total)


def test_a_function_gets_what_it_names(tmp_path):
    arguments = "prompts, completions, gt_answers, lengths, stopped, max_new_tokens, factor=2"
    expression = (
        "[factor * (p + c == '2 + 2 =4') + n + s + max_new_tokens "
        "for p, c, n, s in zip(prompts, completions, lengths, stopped)]"
    )
    rewards = Rewards([user(tmp_path, expression, arguments)])
    assert rewards(
        batch(lengths=[1, 2, 3], stopped=[True, False, True], max_new_tokens=10)
    ).total == [14, 12, 14]


def test_files_of_two_functions_of_one_name_are_told_apart(tmp_path):
    names = [
        f"{write(tmp_path, f'def r(responses): return [{n}.0] * len(responses)', f'{n}.py')}:r"
        for n in (1, 2)
    ]
    scored = Rewards(names, [1.0, 10.0])(batch())
    assert scored.total == [21.0] * 3 and list(scored.parts) == names


def test_a_file_may_hold_dataclasses(tmp_path):
    body = (
        "from __future__ import annotations\nfrom dataclasses import "
        "dataclass\n\n\n@dataclass\nclass Settings:\n"
        "    bonus: float = 1.5\n\n\ndef reward(responses):\n    return [Settings().bonus for _ in "
        "responses]\n"
    )
    assert Rewards([f"{write(tmp_path, body)}:reward"])(batch()).total == [1.5] * 3


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("None", r"reward returned None \(NoneType\); expected a list of 3 numbers"),
        ("1.0", r"reward returned 1.0 \(float\); expected a list of 3 numbers"),
        ("__import__('torch').tensor(1.0)", r"\(Tensor\); expected a list of 3 numbers"),
        (
            "[1.0, 2.0]",
            r"returned 2 values \(\[1.0, 2.0\]\); expected a list of 3 numbers, one per response",
        ),
        (
            "[1.0, math.nan, 2.0]",
            r"returned nan \(float\) for response 1 .*'2 \+ 2 ='.*response '5', gt_answer '4'",
        ),
        ("[1.0, 2.0, -math.inf]", r"returned -inf \(float\) for response 2 of the batch"),
        ("[1.0, None, 2.0]", r"returned None \(NoneType\) for response 1"),
        ("[1.0, 'two', 2.0]", r"returned 'two' \(str\) for response 1"),
        ("[[1.0], [2.0], [3.0]]", r"returned \[1.0\] \(list\) for response 0"),
        (
            "[int(text) for text in responses]",
            r"raised ValueError: invalid literal .*mine.py:5\); response 2 .*'six'",
        ),
        (
            "[1 / (len(responses) - 3)]",
            r"raised ZeroDivisionError.*mine.py:5\); none of the 3 responses causes it alone",
        ),
    ],
)
def test_a_function_that_misbehaves_is_named_with_what_it_returned(tmp_path, expression, message):
    with pytest.raises(
        ValueError, match=f"^reward reward .*{message}" if "raised" in message else message
    ):
        Rewards([user(tmp_path, expression)])(batch())


@pytest.mark.parametrize(
    "slow",
    ["while text == '5': pass", "__import__('re').match('(a+)+b', 'a' * (40 * (text == '5')))"],
)
def test_a_function_that_takes_too_long_is_named_with_its_response(tmp_path, slow):
    loop = f"    for text in responses:\n        {slow}\n"
    body = f"def reward(responses):\n{loop}    return [0.0] * len(responses)\n"
    rewards = Rewards([f"{write(tmp_path, body)}:reward"], timeout=0.3)
    with pytest.raises(
        ValueError, match=r"reward reward took longer than 0.3 s for 3 responses; response 1 .*'5'"
    ):
        rewards(batch())


def test_catching_every_exception_does_not_stop_the_clock(tmp_path):
    body = (
        "def reward(responses):\n    while True:\n        try:\n            sum(range(100))\n"
        "        except Exception:\n            pass\n"
    )
    with pytest.raises(ValueError, match="took longer than"):
        Rewards([f"{write(tmp_path, body)}:reward"], timeout=0.2)(batch(["1"]))


def test_the_limit_is_gone_after_the_block():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    with time_limit(30):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert (
        signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) is before
    )
    with pytest.raises(Overrun), time_limit(0.01):
        while True:
            pass


def test_outside_the_main_thread_python_alone_is_limited_and_that_is_said(capsys):
    forget_warnings()
    found = []

    def score(*names, **more):
        try:
            found.append(Rewards(list(names), **more)(batch()).total)
        except ValueError as error:
            found.append(str(error))

    def endless(responses):
        while True:
            pass

    given = {"given": {"python:e": endless}, "timeout": 0.3}
    for names, more in ((["gsm8k"], {}), (["python:e"], given)):
        thread = threading.Thread(target=score, args=names, kwargs=more)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert found[0] == [10, 1, 0] and "reward e took longer than 0.3 s" in found[1]
    assert capsys.readouterr().err.count("limited in time between two steps of Python alone") == 1


# Refused before anything is scored


@pytest.mark.parametrize(
    ("body", "function", "message"),
    [
        ("def other(responses): return []", "reward", "has no reward; it defines other"),
        ("x = 1", "reward", "it defines no function"),
        ("def reward(responses: return", "reward", r"mine.py:1: "),
        (
            "def reward(responses): return []",
            "",
            r"name the function too, as in .*mine.py:my_reward",
        ),
        (
            "def reward(texts): return []",
            "reward",
            "called with prompts, .* as keywords; it wants texts",
        ),
        ("def reward(): return []", "reward", "it takes none of them"),
        ("def reward(responses, /): return []", "reward", "it wants responses"),
        (
            "import does_not_exist\ndef reward(responses): return []",
            "reward",
            r"ModuleNotFoundError.*mine.py:1",
        ),
        ("reward = 3", "reward", "has no function reward, but 3"),
        (
            "open('nowhere.txt')\ndef reward(responses): return []",
            "reward",
            r"FileNotFoundError.*mine.py:1",
        ),
    ],
)
def test_a_file_that_cannot_serve_says_why(tmp_path, body, function, message):
    path = write(tmp_path, body)
    with pytest.raises(ValueError, match=message):
        Rewards([f"{path}:{function}" if function else str(path)])


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (
            ["gsm8"],
            None,
            r"unknown reward 'gsm8'; did you mean gsm8k\? There are gsm8k, math_competition, "
            "format, ",
        ),
        (["gsm8k,length"], None, "'gsm8k,length'; separate names by spaces: gsm8k length"),
        (["nowhere.py:reward"], None, "there is no file nowhere.py"),
        (["gsm8k", "gsm8k_reward_fn"], None, "gsm8k is given twice"),
        (
            ["gsm8k", "length"],
            [1.0],
            r"--reward_weights has 1 values, --reward_functions 2 names \(gsm8k length\)",
        ),
        (["format"], None, "has no response_format_tags"),
        ([], None, "no reward function is given"),
    ],
)
def test_names_that_cannot_be(names, weights, message):
    with pytest.raises(ValueError, match=message):
        Rewards(names, weights)


def test_a_row_without_ground_truth_is_named():
    with pytest.raises(
        ValueError, match="gsm8k raised ValueError: the row has no gt_answer .*; response 1 of"
    ):
        Rewards(["gsm8k"])(batch(gt_answers=["4", None, "4"]))


def test_length_needs_to_know_the_room():
    with pytest.raises(ValueError, match="max_new_tokens"):
        Rewards(["length"])(batch())


def test_columns_of_a_batch_are_equally_long():
    with pytest.raises(ValueError, match=r"'prompts': 1, 'responses': 2"):
        Responses(["a"], ["b", "c"])


def test_names_are_checked_without_running_the_file(tmp_path):
    path = write(tmp_path, "raise SystemExit('run')\n\n\ndef reward(responses):\n    return []\n")
    assert check_rewards([f"{path}:reward", "length"]) == [f"{path}:reward", "length"]


def test_python_functions_stand_beside_named_ones():
    given = {"python:halves": lambda responses: [len(text) / 2 for text in responses]}
    scored = Rewards(["gsm8k", "python:halves"], [1.0, 4.0], given=given)(batch())
    assert scored.parts == {"gsm8k": [10, 1, 0], "halves": [0.5, 0.5, 1.5]}
    assert scored.total == [12, 3, 6]


def test_a_python_function_that_nobody_gives_or_that_asks_for_more_is_refused():
    with pytest.raises(ValueError, match="python:halves is a Python function that the caller"):
        Rewards(["python:halves"])
    with pytest.raises(ValueError, match="python:asks: .* wants tokenizer"):
        Rewards(["python:asks"], given={"python:asks": lambda responses, tokenizer: []})
