"""The server as clients know it: OpenAI's own, many at once, some that vanish; random bodies;
shutting down."""

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from coati.cli import serve as flags
from tests.inference.serving import NAME, running, until

SCRIPT = (
    Path(__file__).resolve().parents[2] / "examples" / "inference" / "web_chatbot" / "server.py"
)
HELLO = [{"role": "user", "content": "hello"}]
TOKEN = "sesame"


@pytest.fixture(scope="module")
def server():
    with running(endless=True, max_batch=8, max_queue=64) as server:
        yield server


def client_of(server, **options):
    import openai

    return openai.OpenAI(
        base_url=server.url + "/v1", api_key="none needed", max_retries=0, timeout=60, **options
    )


def test_the_openai_client_works_unchanged(server):
    client = client_of(server)
    assert [model.id for model in client.models.list()] == [NAME] and client.models.retrieve(
        NAME
    ).id == NAME
    whole = client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=20)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 20
    chunks = list(
        client.chat.completions.create(
            model=NAME,
            messages=HELLO,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, last, counted = chunks
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
        == whole.choices[0].message.content
    )
    assert pieces[0].choices[0].delta.role == "assistant" and len(pieces) > 5
    assert (
        last.choices[0].finish_reason == "length"
        and counted.usage == whole.usage
        and counted.choices == []
    )
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_openai_client_stops_seeds_and_is_refused(server):
    import openai

    client = client_of(server)
    ask = {"model": NAME, "messages": HELLO, "max_tokens": 30}
    whole = client.chat.completions.create(**ask).choices[0].message.content
    stop = whole[5:8]
    stopped = client.chat.completions.create(**ask, stop=stop)
    assert stopped.choices[0].message.content == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop" and stopped.usage.completion_tokens < 30
    hot = [client.chat.completions.create(**ask, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    texts = [each.choices[0].message.content for each in hot]
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(openai.BadRequestError, match="template has none: it writes no tools"):
        client.chat.completions.create(
            **ask, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(**{**ask, "model": "gpt-9"})
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.chat.completions.create(**ask, temperature=9)


def ask_in_turn(server, count, rounds):
    """``count`` clients that each stream ``rounds`` answers: (question, text, finish or status) of
    each."""
    found = queue.Queue()

    def one(number):
        client = client_of(server)
        for turn in range(rounds):
            question = "hello " * (1 + (number + turn) % 5)
            messages = [{"role": "user", "content": question}]
            chunks = client.chat.completions.create(
                model=NAME, messages=messages, max_tokens=10 + 2 * (number % 5), stream=True
            )
            parts = list(chunks)
            text = "".join(part.choices[0].delta.content or "" for part in parts)
            found.put((question, 10 + 2 * (number % 5), text, parts[-1].choices[0].finish_reason))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return list(found.queue)


def single(server, question, new):
    body = {"model": NAME, "messages": [{"role": "user", "content": question}], "max_tokens": new}
    found = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).json()
    return found["choices"][0]["message"]["content"]


def test_sixteen_clients_at_once_get_the_answers_of_single_requests(server):
    answers = ask_in_turn(server, 16, 2)
    assert len(answers) == 32 and {finish for *_, finish in answers} <= {"stop", "length"}
    for question, new in {(question, new) for question, new, *_ in answers}:
        expected = single(server, question, new)
        assert {text for q, n, text, _ in answers if (q, n) == (question, new)} == {expected}


def test_a_client_that_vanishes_frees_its_place():
    """Killed while it streams, waits for the whole, or waits in the queue."""
    body = {"model": NAME, "messages": HELLO, "max_tokens": 400}
    with running(endless=True, pause=0.02, max_batch=2) as server:
        sockets = [_raw(server, body | {"stream": True}), _raw(server, body), _raw(server, body)]
        assert sockets[0].recv(200).startswith(b"HTTP/1.1 200")
        assert until(lambda: (server.engine.running, server.engine.waiting) == (2, 1))
        for each in sockets:
            each.close()
        assert until(lambda: server.engine.running == server.engine.waiting == 0, 5)
        assert server.engine.metrics.requests.labels("canceled")._value.get() == 3
        assert single(server, "hello", 3)


def _raw(server, body):
    """A connection that has sent ``body`` and not yet read."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    )
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_random_bodies_never_make_the_server_fail():
    """Bodies made from the server's own description; what it answers is what the description
    says."""
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    with running(web={"max_new_tokens": 4}, max_queue=1000) as server:
        schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
        tried = []
        for result in schema.get_all_operations():
            operation = result.ok()

            @hypothesis.settings(
                max_examples=15,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy())
            def call(case):
                case.call_and_validate(checks=checks, timeout=30)

            call()
            tried.append(operation.path)
        assert {"/v1/chat/completions", "/generate", "/generate/stream", "/v1/models"} <= set(tried)
        assert server.engine.alive and single(server, "hello", 3)


@pytest.mark.slow
def test_sixty_four_clients_for_a_minute():
    """No answer but whole ones and 429; greedy answers are those of single requests."""
    end, found = time.monotonic() + 60, queue.Queue()
    with running(max_batch=8, max_queue=32) as server:
        wanted = {count: single(server, "hello " * count, 20) for count in range(1, 6)}

        def one(number):
            import openai

            client, count = client_of(server), 1 + number % 5
            ask = {
                "model": NAME,
                "messages": [{"role": "user", "content": "hello " * count}],
                "max_tokens": 20,
            }
            while time.monotonic() < end:
                try:
                    parts = list(client.chat.completions.create(**ask, stream=True))
                except openai.RateLimitError:
                    found.put("429")
                    time.sleep(0.2)
                    continue
                text = "".join(part.choices[0].delta.content or "" for part in parts)
                whole = (
                    parts[-1].choices[0].finish_reason in ("stop", "length")
                    and text == wanted[count]
                )
                found.put("whole" if whole else f"broken: {text!r}")

        threads = [threading.Thread(target=one, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(180)
        results = list(found.queue)
        assert set(results) == {"whole", "429"} and results.count("whole") > 64
        assert until(lambda: server.engine.running == server.engine.waiting == 0)


def test_a_port_in_use_is_one_line_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, str(SCRIPT), "no-model-needed", "--http_port", str(port)]
        environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[3])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    message = (
        f"--http_port {port} on 127.0.0.1 is not available (Address already in use); "
        "name another one"
    )
    assert done.stderr == f"server.py: error: {message}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model_path is required"),
        (["a", "--model_path", "b"], "name one model"),
        (
            ["m", "--max_new_tokens", "99", "--model_max_length", "99"],
            "--max_new_tokens 99 leaves no room",
        ),
        (["m", "--http_port", "70000"], "--http_port 70000"),
        (
            ["m", "--token_file", "/no/file"],
            "--token_file /no/file: not readable (FileNotFoundError)",
        ),
        (["m", "--max_queue", "0"], "--max_queue"),
        (["m", "--portt", "1"], "--port"),
    ],
)
def test_bad_flags_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        flags.parse_server(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_flags_and_variables(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv(flags.TOKEN_VARIABLE, raising=False)
    args = flags.parse_server(["out/sft/modeling"])
    assert (args.http_host, args.token, args.cors_origins, args.served_model_name) == (
        "127.0.0.1",
        None,
        (),
        "sft",
    )
    monkeypatch.setenv(flags.TOKEN_VARIABLE, TOKEN)
    monkeypatch.setenv(flags.ORIGIN_VARIABLE, "https://a.example, https://b.example")
    args = flags.parse_server(["--model_path", "m"])
    assert args.token == TOKEN and args.cors_origins == ("https://a.example", "https://b.example")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SystemExit):
        flags.parse_server(["m", "--token_file", str(tmp_path / "empty")])
    assert "expected the token" in capsys.readouterr().err
    monkeypatch.delenv(flags.TOKEN_VARIABLE)
    args = flags.parse_server(["--model", "m", "--host", "0.0.0.0", "--port", "1"])
    assert (args.model_path, args.http_host, args.http_port) == ("m", "0.0.0.0", 1)
    assert args.max_new_tokens is None and args.model_max_length is None
    assert "anyone who can reach this address can use the model" in capsys.readouterr().err


def test_an_address_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="--http_host no.such.host.invalid: no such address"):
        flags.listening_socket("no.such.host.invalid", 0)
