"""Functions that wait: of a batch and of one response, how many at a time, and what ends them."""

import asyncio
import functools
import threading
import time

import pytest

from coati.rewards.responses import Responses
from coati.rewards.reward_options import RewardOptions
from coati.rewards.scorer import Rewards


def batch(count=4, **columns):
    responses = [str(n) for n in range(count)]
    return Responses(["p"] * count, responses, [str(2 * n) for n in range(count)], **columns)


def of(function, timeout=20.0, **options):
    name = "python:mine"
    return Rewards(
        [name], timeout=timeout, given={name: function}, options=RewardOptions(**options)
    )


async def of_batch(responses, gt_answers):
    await asyncio.sleep(0.01)
    return [int(truth) - int(text) for text, truth in zip(responses, gt_answers, strict=True)]


async def of_one(response, gt_answer, max_new_tokens=None):
    await asyncio.sleep(0.01)
    return int(gt_answer) - int(response)


def plain_of_one(response, gt_answer):
    return int(gt_answer) - int(response)


class Client:
    async def __call__(self, response, **rest):
        return len(rest) + int(response)


def test_each_kind_gives_a_score_for_each_response():
    for function in (of_batch, of_one, plain_of_one):
        assert of(function)(batch()).total == [0, 1, 2, 3]
    assert of(Client())(batch()).total == [6, 7, 8, 9]
    assert of(functools.partial(of_one, max_new_tokens=3))(batch()).total == [0, 1, 2, 3]


def test_only_what_waits_is_computed_beside():
    assert of(of_batch).beside and of(of_one).beside and of(Client()).beside
    assert not of(plain_of_one).beside


def test_a_file_may_hold_one(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("async def reward(responses):\n    return [1.0] * len(responses)\n")
    assert Rewards([f"{path}:reward"])(batch()).total == [1.0] * 4


@pytest.mark.parametrize("at_once", [1, 3])
def test_so_many_responses_are_asked_about_at_a_time(at_once):
    running, most = 0, 0

    async def count(response):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        return 0.0

    of(count, concurrency=at_once)(batch(9))
    assert most == at_once


def test_all_calls_share_one_loop_so_that_a_client_keeps_its_connections():
    loops = set()

    async def remember(responses):
        loops.add(id(asyncio.get_running_loop()))
        return [0.0] * len(responses)

    rewards = of(remember)
    for _ in range(3):
        rewards(batch())
    assert len(loops) == 1


async def fails_at_two(response):
    return 1 / (int(response) - 2)


async def batch_fails_at_two(responses):
    return [1 / (int(text) - 2) for text in responses]


async def slow_at_two(response):
    await asyncio.sleep(30 if response == "2" else 0)
    return 0.0


async def batch_slow_at_two(responses):
    await asyncio.sleep(30 if "2" in responses else 0)
    return [0.0] * len(responses)


async def blocking_at_two(responses):
    while "2" in responses:
        time.sleep(0.01)
    return [0.0] * len(responses)


async def nan_at_two(response):
    return float("nan") if response == "2" else 0.0


async def leaves(responses):
    raise SystemExit(3)


async def leaves_at_two(response):
    if response == "2":
        raise SystemExit(3)
    return 0.0


async def cancels_itself(responses):
    asyncio.current_task().cancel()
    await asyncio.sleep(1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails_at_two, r"raised ZeroDivisionError: .*test_async_functions.py:\d+\); response 2 of"),
        (batch_fails_at_two, r"raised ZeroDivisionError: .*response 2 of"),
        (slow_at_two, r"took longer than 0.6 s; response 2 of the batch: prompt 'p', response '2'"),
        (batch_slow_at_two, r"took longer than 0.6 s for 4 responses; response 2 of"),
        (blocking_at_two, r"took longer than 0.6 s for 4 responses; response 2 of"),
        (nan_at_two, r"returned nan \(float\) for response 2"),
        (leaves, r"raised RuntimeError: sys.exit\(3\).*; response 0 of"),
        (leaves_at_two, r"raised RuntimeError: sys.exit\(3\).*; response 2 of"),
        (cancels_itself, r"the coroutine canceled itself.*; response 0 of"),
    ],
)
def test_a_failure_names_the_response(function, message):
    began = time.monotonic()
    with pytest.raises(ValueError, match=message):
        of(function, timeout=0.6)(batch())
    assert time.monotonic() - began < 15
    assert of(of_one)(batch()).total == [0, 1, 2, 3]  # on a loop that works


def test_what_begins_early_is_ready_when_it_is_asked_for():
    """The reward of the first batch runs while the caller does something else."""
    begun, free = threading.Event(), threading.Event()

    async def waits(responses):
        begun.set()
        while not free.is_set():
            await asyncio.sleep(0.005)
        return [float(text) for text in responses]

    rewards = of(waits)
    first = rewards.begin(batch(2))
    assert begun.wait(10)
    second = rewards.begin(batch(3))
    free.set()
    assert second().total == [0, 1, 2] and first().total == [0, 1]


def test_a_failure_comes_with_the_result_not_before():
    result = of(fails_at_two).begin(batch())
    time.sleep(0.05)
    with pytest.raises(ValueError, match="response 2 of the batch"):
        result()
    with pytest.raises(ValueError, match="response 2 of the batch"):
        result()  # and again
