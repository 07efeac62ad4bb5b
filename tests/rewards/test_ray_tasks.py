"""Reward functions as tasks of a Ray cluster: their numbers and messages are those of the process.
tests/end_to_end/test_ray.py runs a cluster."""

from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from coati.rewards import ray_tasks
from coati.rewards.reward_options import RewardOptions
from coati.rewards.scorer import Rewards
from coati.rewards.source_rewards import SourceRewards
from tests.experience_maker.fake_ray import FakeRay
from tests.rewards.test_scorer import batch, user, write

HERE = RewardOptions(ray_address="127.0.0.1:6379")


@pytest.fixture
def ray(monkeypatch):
    """Tasks run at once; ``faults``: what the next results fail with; ``asked``: their names."""
    found = FakeRay()
    found.asked = []

    def remote(**options):
        assert options == {"num_cpus": 0.0, "max_retries": -1, "scheduling_strategy": "SPREAD"}

        def of(function):
            def task(*arguments):
                found.asked.append(arguments[0])
                return SimpleNamespace(result=lambda timeout: _told(function, arguments))

            return SimpleNamespace(remote=task)

        return of

    def _told(function, arguments):
        if found.faults.get("task"):
            raise found.faults["task"].popleft()
        return function(*arguments)

    monkeypatch.setattr(found, "remote", remote, raising=False)
    monkeypatch.setattr(ray_tasks, "connect", lambda address: found)
    monkeypatch.setattr(ray_tasks, "head_answers", lambda ray: found.answers)
    found.answers = True
    return found


def both(names, **more):
    return Rewards(names, **more), Rewards(names, options=HERE, **more)


def test_the_rewards_are_those_of_the_process(ray, tmp_path):
    own = user(tmp_path, "[len(text) + 0.5 for text in responses]")
    waits = write(tmp_path, "async def one(response):\n    return len(response)\n", "waits.py")
    here, there = both(["gsm8k", "length", own, f"{waits}:one"], weights=[1, 2, 3, 4])
    given = batch(lengths=[1, 2, 4], max_new_tokens=4)
    assert there(given) == here(given)
    assert ray.asked == ["gsm8k", "length", own, f"{waits}:one"]
    assert there.beside and there.needs_gt_answer


def test_sources_have_tasks_of_their_own(ray, tmp_path):
    own = user(tmp_path, "[len(text) + 0.5 for text in responses]")
    named = {"math": ["gsm8k"], "*": [own]}
    given = replace(batch(lengths=[1, 2, 4], max_new_tokens=4), sources=["law", "math", None])
    found = []
    for options in (RewardOptions(), HERE):
        sets = {source: Rewards(names, options=options) for source, names in named.items()}
        found.append(SourceRewards(sets, Rewards(["length"], options=options))(given))
    assert found[0].total == found[1].total
    assert sorted(ray.asked) == sorted(["gsm8k", "length", own])


def test_what_waits_for_others_and_what_a_caller_gave_is_no_task(ray):
    given = {"python:mine": lambda responses: [1.0] * len(responses)}
    assert Rewards([*given], given=given, options=HERE)(batch()).total == [1.0] * 3
    assert not ray.asked
    for name in ("judge", "http://a:1/score", "python:mine"):
        assert not ray_tasks.can_be_a_task(name)


@pytest.mark.parametrize(
    ("expression", "timeout"),
    [
        ("[1 / (len(text) - 3) for text in responses]", None),
        ("[time.sleep(2 * (text == '5')) or 0 for text in responses]", 0.3),
        ("[1.0]", None),
        ("[math.nan] * len(responses)", None),
    ],
)
def test_a_function_that_fails_is_told_as_in_the_process(ray, tmp_path, expression, timeout):
    name = user(tmp_path, expression)
    said = []
    for rewards in both([name], timeout=timeout):
        with pytest.raises(ValueError) as failed:
            rewards(batch())
        said.append(str(failed.value))
    assert said[0] == said[1]


def test_a_file_or_function_that_is_not_there_is_said_at_the_start(ray, tmp_path):
    with pytest.raises(ValueError, match="wants nothing_known"):
        Rewards([user(tmp_path, "[]", "nothing_known")], options=HERE)
    assert not ray.asked


def test_a_slow_cluster_is_waited_for_and_a_lost_one_named(ray, monkeypatch):
    from ray.exceptions import GetTimeoutError

    ray.faults["task"] = deque(GetTimeoutError("later") for _ in range(9))
    assert Rewards(["gsm8k"], options=HERE)(batch()).total == Rewards(["gsm8k"])(batch()).total
    assert not ray.faults["task"]
    ray.answers = False
    ray.faults["task"] = deque(GetTimeoutError("later") for _ in range(9))
    with pytest.raises(ValueError, match=r"reward gsm8k \(Ray\) the head of the cluster does not"):
        Rewards(["gsm8k"], options=HERE)(batch())


def test_a_host_without_what_a_function_needs_is_named(ray):
    from ray.exceptions import RuntimeEnvSetupError

    ray.faults["task"] = deque([RuntimeEnvSetupError("no\nroom")])
    with pytest.raises(ValueError, match=r"reward gsm8k \(Ray\) .*no room"):
        Rewards(["gsm8k"], options=HERE)(batch())
