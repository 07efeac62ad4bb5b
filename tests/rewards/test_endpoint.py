"""A reward behind HTTP: what is sent, what is tried again, and what is said of what comes back."""

import json
import re
import socket
import time

import pytest

from coati.rewards import endpoint
from coati.rewards.registry import check_rewards
from coati.rewards.responses import Responses
from coati.rewards.scorer import Rewards
from tests.rewards.endpoints import answering


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF_S", (0.01, 0.02))
    monkeypatch.delenv(endpoint.TOKEN_VARIABLE, raising=False)


def batch(*responses, **columns):
    count = len(responses)
    return Responses([f"p{n}" for n in range(count)], list(responses), ["4"] * count, **columns)


def lengths(number, body, headers):
    return {"scores": [len(text) for text in body["responses"]]}


def test_the_batch_is_sent_and_its_scores_are_weighted():
    with answering(lengths) as server:
        rewards = Rewards([server.url, "length"], [2.0, 1.0])
        sent = batch("a", "bcd", lengths=[1, 3], stopped=[True, False], max_new_tokens=4)
        scored = rewards(sent)
    assert scored.parts == {"score": [1.0, 3.0], "length": [-0.25, -0.75]}
    assert scored.total == [1.75, 5.25]
    assert server.bodies == [
        {
            "prompts": ["p0", "p1"],
            "responses": ["a", "bcd"],
            "gt_answers": ["4", "4"],
            "lengths": [1, 3],
            "stopped": [True, False],
            "max_new_tokens": 4,
            "tags": None,
        }
    ]
    assert rewards.beside and not Rewards(["length"]).beside


def test_a_list_alone_will_do_and_any_text_arrives():
    text = "ü \ud800 \x00 \n 😀"
    with answering(lambda n, body, h: [float(body["responses"][0] == text)]) as server:
        assert Rewards([server.url])(batch(text)).total == [1.0]


def test_two_endpoints_of_one_name_are_told_apart():
    with answering(lengths) as one, answering(lengths) as other:
        assert list(Rewards([one.url, other.url]).weights) == [one.url, other.url]
        assert list(Rewards([one.url.replace("/score", "")]).weights) == [one.url.split("/")[2]]


def test_the_token_is_sent_and_never_said(monkeypatch):
    monkeypatch.setenv(endpoint.TOKEN_VARIABLE, "sesame-open")
    seen = []

    def refused(number, body, headers):
        seen.append(headers["Authorization"])
        return 401, {"error": f"wrong key {headers['Authorization']}"}

    with answering(refused) as server, pytest.raises(ValueError, match="status 401") as error:
        Rewards([server.url])(batch("a"))
    assert seen[0] == "Bearer sesame-open"
    assert "sesame" not in str(error.value) and endpoint.TOKEN_VARIABLE in str(error.value)
    monkeypatch.setenv(endpoint.TOKEN_VARIABLE, "two words")
    with pytest.raises(ValueError, match=f"{endpoint.TOKEN_VARIABLE} holds no token") as error:
        Rewards([server.url])
    assert "two words" not in str(error.value)


@pytest.mark.parametrize("passing", [503, 500, 429, None])
def test_what_may_pass_is_tried_again(passing):
    def answer(number, body, headers):
        if number < 3:
            return None if passing is None else (passing, "later")
        return lengths(number, body, headers)

    with answering(answer) as server:
        assert Rewards([server.url])(batch("ab")).total == [2.0]
    assert len(server.bodies) == 4


def test_a_server_that_comes_up_meanwhile_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rewards = Rewards([f"http://127.0.0.1:{port}/score"], timeout=0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be reached \(Connection refused\) \(\d+ tries\)"):
        rewards(batch("a"))
    assert 0.3 < time.monotonic() - began < 5


WRONG = {
    "too few": ({"scores": [1.0]}, r"returned 1 values .*expected a list of 2 numbers"),
    "NaN": (
        '{"scores": [1, NaN]}',
        r"returned nan \(float\) for response 1 of the batch: prompt 'p1', response 'bc'",
    ),
    "null": ({"scores": [None, 1]}, r"returned None \(NoneType\) for response 0"),
    "text": ({"scores": ["1", 1]}, r"returned '1' \(str\) for response 0"),
    "no scores": ({"score": 1}, r"answered '{\"score\": 1}'; expected {\"scores\": "),
    "a number": (3, r"answered '3'; expected {\"scores\": \[a number each\]}"),
    "HTML": ("<html>Welcome</html>", r"answered '<html>Welcome</html>', which is no JSON; is this"),
    "nothing": ("", r"answered nothing, which is no JSON"),
    "nested": ("[" * 10**5, r"which is no JSON"),
    "not there": ((404, "<html>Not Found"), r"answered status 404: '<html>Not Found'$"),
    "elsewhere": ((302, "http://other/score"), r"answered status 302 to http://other/score; name"),
    "a row": (
        (422, {"error": {"message": "too long", "index": 1}}),
        r"answered status 422: too long; response 1 of the batch: prompt 'p1', response 'bc'",
    ),
    "its detail": ((400, {"error": "no such model"}), r"answered status 400: no such model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_named_with_its_sample(name):
    answer, message = WRONG[name]
    with answering(lambda *_: answer) as server, pytest.raises(ValueError) as error:
        Rewards([server.url], timeout=3)(batch("a", "bc"))
    said = str(error.value)
    assert re.search(message, said, re.DOTALL), said
    assert said.startswith("reward score ") and "\n" not in said and len(said) < 600


def test_the_response_that_an_endpoint_cannot_take_is_found():
    def answer(number, body, headers):
        return (400, "bad") if "bad" in body["responses"] else lengths(number, body, headers)

    with answering(answer) as server, pytest.raises(ValueError, match="response 1 of the batch"):
        Rewards([server.url], timeout=3)(batch("a", "bad", "c"))


@pytest.mark.parametrize("slow", ["silent", "dripping"])
def test_a_slow_endpoint_does_not_hang_the_run(slow):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def drip():
            import contextlib

            with contextlib.suppress(OSError):
                connection = server.accept()[0]
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while True:
                    connection.sendall(b"[")
                    time.sleep(0.05)

        if slow == "dripping":
            import threading

            threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"did not answer within 0.\d+ s"):
            Rewards([f"http://127.0.0.1:{port}/score"], timeout=0.6)(batch("a", "b"))
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http:///score", r"expected a URL such as http://host:8000/score"),
        ("http://host:port/score", r"expected a URL"),
        ("http://a b/score", r"expected a URL"),
        ("http://me:secret@host/score", r"what is in a URL ends up in logs"),
        ("http://host/score?token=secret", r"what is in a URL ends up in logs"),
    ],
)
def test_a_url_that_is_none(url, message):
    with pytest.raises(ValueError, match=message) as error:
        check_rewards([url])
    assert "secret" not in str(error.value)


def test_a_url_may_end_like_a_file():
    assert check_rewards(["http://h/a.py:f", "https://h/b"]) == ["http://h/a.py:f", "https://h/b"]
    assert json.dumps(check_rewards(["http://[::1]:8000/score"]))
