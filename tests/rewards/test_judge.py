"""A language model as a judge: what it is asked, how its verdict is read, and what is kept."""

import json
import logging
import threading

import pytest

from coati.rewards import endpoint, judge
from coati.rewards.responses import Responses
from coati.rewards.reward_options import JUDGE_PROMPT, JudgeOptions, RewardOptions
from coati.rewards.scorer import Rewards
from coati.utils.logging import forget_warnings
from coati.utils.user_cache import entries
from tests.rewards.endpoints import answering


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(endpoint, "BACKOFF_S", (0.01,))
    monkeypatch.delenv(judge.KEY_VARIABLE, raising=False)
    forget_warnings()


def says(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def batch(*responses, truths=None):
    return Responses(["a {prompt}"] * len(responses), list(responses), truths or [])


def rewards(server, timeout=5.0, concurrency=16, **options):
    made = JudgeOptions(server.url.replace("/score", "/v1"), "m", **options)
    return Rewards(
        ["judge"], timeout=timeout, options=RewardOptions(concurrency=concurrency, judge=made)
    )


def by_length(number, body, headers):
    return says(f"Score: {len(body['messages'][0]['content'])}")


def test_the_judge_is_asked_the_prompt_with_its_places_filled():
    seen = []

    def answer(number, body, headers):
        seen.append((body, headers["Authorization"]))
        return says("It is good.\nScore: 7.5")

    with answering(answer) as server:
        found = rewards(server, prompt="P {prompt} R {response} T {gt_answer} {other}")
        assert found(batch("r {gt_answer}", truths=["t"])).parts == {"judge": [7.5]}
    body, authorization = seen[0]
    assert body["messages"] == [
        {"role": "user", "content": "P a {prompt} R r {gt_answer} T t {other}"}
    ]
    assert body["model"] == "m" and body["temperature"] == 0 and authorization is None
    assert found.needs_gt_answer and not rewards(server).needs_gt_answer


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ("Score: 8", 8.0),
        ("Score: 3, no: the rating is good.\n**Score:** 9/10", 9.0),
        ("score = -0.5", -0.5),
        ("<think>Score: 1?</think> Rating: 4", 4.0),
    ],
)
def test_the_last_score_of_a_verdict_counts(verdict, score):
    with answering(lambda *_: says(verdict)) as server:
        assert rewards(server)(batch("r")).total == [score]


def test_another_pattern_reads_another_score():
    with answering(lambda *_: says('{"grade": 2, "sure": 1}')) as server:
        assert rewards(server, pattern=r'"grade": (\d+)')(batch("r")).total == [2.0]


def test_equal_responses_are_judged_once_and_never_again(tmp_path):
    with answering(by_length) as server:
        first = rewards(server)(batch("one", "three", "one"))
        assert len(server.bodies) == 2 and first.total[0] == first.total[2] != first.total[1]
        assert rewards(server)(batch("three", "one")).total == first.total[1::-1]
        assert len(server.bodies) == 2
        assert rewards(server, prompt="another {response}")(batch("one")).total == [11.0]
    assert len(server.bodies) == 3
    [entry] = [entry for entry in entries() if entry.kind == "judge"]
    assert entry.size > 0


def test_a_damaged_cache_is_asked_again():
    with answering(by_length) as server:
        first = rewards(server)(batch("one")).total
        for file in judge.cache_root().rglob("*.json"):
            file.write_text("{half")
        assert rewards(server)(batch("one")).total == first
    assert len(server.bodies) == 2


def test_a_verdict_without_a_score_is_asked_for_again_and_not_kept():
    def answer(number, body, headers):
        return says("I cannot say." if number < 2 else "Score: 6")

    with answering(answer) as server:
        assert rewards(server)(batch("r")).total == [6.0]
        assert [body["temperature"] for body in server.bodies] == [0.0, 0.5, 0.5]
        assert rewards(server)(batch("r")).total == [6.0]
    assert len(server.bodies) == 3


def test_a_response_without_a_verdict_is_named_or_gets_the_score_of_the_flag(caplog):
    def answer(number, body, headers):
        return says("no" if "bad" in body["messages"][0]["content"] else "Score: 1")

    with answering(answer) as server:
        with pytest.raises(ValueError) as error:
            rewards(server)(batch("good", "bad"))
        assert "gave 3 verdicts without a score; the last ends 'no'" in str(error.value)
        assert "response 1 of the batch" in str(error.value)
        assert "--judge_failed SCORE" in str(error.value)
        with caplog.at_level(logging.WARNING):
            lenient = rewards(server, concurrency=1, failed=-1.0)
            assert lenient(batch("bad", "good", "bad too")).total == [-1.0, 1.0, -1.0]
    assert caplog.text.count("such responses get --judge_failed -1") == 1


def test_the_key_is_sent_and_never_said(monkeypatch, caplog):
    monkeypatch.setenv(judge.KEY_VARIABLE, "sk-very-secret")

    def answer(number, body, headers):
        return 401, {"error": {"message": f"Incorrect API key: {headers['Authorization']}"}}

    with answering(answer) as server, pytest.raises(ValueError, match="status 401") as error:
        rewards(server)(batch("r"))
    assert "sk-very" not in str(error.value) + caplog.text


def test_a_model_without_temperature_is_asked_without():
    def answer(number, body, headers):
        if "temperature" in body:
            return 400, {"error": {"message": "Unsupported value: 'temperature'"}}
        return says("Score: 5")

    with answering(answer) as server:
        assert rewards(server)(batch("r", "s")).total == [5.0, 5.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": {"message": "no model m"}}), r"status 404: no model m$"),
        ((400, {"error": "too long"}), r"status 400: too long; response 0 of"),
        ({"object": "list"}, r"answered {\"object\": \"list\"}; expected OpenAI's chat completion"),
        ("<html>", r"answered '<html>', which is no JSON"),
    ],
)
def test_what_is_no_judge_is_named_with_its_place(answer, message):
    with answering(lambda *_: answer) as server, pytest.raises(ValueError, match=message) as error:
        rewards(server)(batch("r"))
    assert str(error.value).startswith(f"reward judge ({server.url.replace('/score', '/v1')})")


def test_a_row_without_the_answer_that_the_prompt_wants():
    with answering(by_length) as server, pytest.raises(ValueError, match="response 1 of the batch"):
        rewards(server, prompt="{response} {gt_answer}")(batch("a", "b", truths=["t", None]))


def test_so_many_are_asked_at_a_time():
    running, most, lock = 0, 0, threading.Lock()

    def answer(number, body, headers):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.03)
        with lock:
            running -= 1
        return says("Score: 1")

    with answering(answer) as server:
        rewards(server, concurrency=3)(batch(*map(str, range(12))))
    assert 2 <= most <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "judge it"}, r"--judge_prompt: the text has no {response}"),
        ({"pattern": "("}, r"--judge_pattern '\(' is no pattern"),
        ({"pattern": r"\d+"}, r"has no group \(...\), which is to be the score"),
        ({"url": "host/v1"}, r"--judge_url host/v1: expected a URL"),
        ({"url": "http://u:p@h/v1"}, r"ends up in logs"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        JudgeOptions(**{"url": "http://h/v1", "model": "m", **options})


def test_the_default_prompt_shows_both_and_asks_for_what_the_default_pattern_reads():
    options = JudgeOptions("http://h/v1", "m")
    assert options.places == {"prompt", "response"} and "Score: N" in JUDGE_PROMPT
    text = options.text({"prompt": "{response}", "response": "{prompt}", "gt_answer": None})
    assert "<prompt>\n{response}\n</prompt>" in text and json.dumps(text)


def test_a_judge_has_to_be_named():
    with pytest.raises(ValueError, match="reward judge: name an OpenAI-compatible server"):
        Rewards(["judge"])
