"""The server's answers to good and bad requests, over loopback."""

import hashlib
import json
from pathlib import Path

import httpx
import pytest

from coati.inference.serve import middleware
from coati.inference.serve.middleware import ASSETS
from tests.inference.serving import NAME, running, until

VENDOR = Path(middleware.__file__).parent / "vendor"
LONG_TURN = {"instruction": "hello " * 600}
JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def call_of(arguments):
    return {
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": arguments},
    }


CALLED = {"role": "assistant", "content": None, "tool_calls": [call_of('{"n": 1}')]}
OLD = {"history": [{"instruction": "hello", "response": ""}]}


@pytest.fixture(scope="module")
def open_server():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def client(open_server):
    with httpx.Client(base_url=open_server.url, timeout=60) as client:
        yield client


def chat(client, **fields):
    # Written here, because httpx does not write lone surrogates.
    body = json.dumps({"model": NAME, "messages": HELLO, "max_tokens": 8} | fields)
    return client.post("/v1/chat/completions", content=body, headers=JSON)


def error(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def test_a_completion_counts_its_tokens(client, open_server):
    body = chat(client).json()
    prompt = len(open_server.engine.encode(HELLO))
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 8,
        "total_tokens": prompt + 8,
    }
    assert (
        body["choices"][0]["finish_reason"] == "length" and body["choices"][0]["message"]["content"]
    )
    assert body["object"] == "chat.completion" and body["model"] == NAME


def test_contents_in_parts_and_developers_are_understood(client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "be kind"}, *HELLO]
    text = chat(client, messages=messages).json()["choices"][0]["message"]["content"]
    assert text == chat(client, messages=plain).json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "status", "message", "param"),
    [
        ({"n": 17}, 422, "n: ", "n"),
        ({"tools": [{}]}, 422, "tools.0.type: Field required", "tools.0.type"),
        ({"tools": [TOOL]}, 400, "tools: this model's chat template has none", "tools"),
        ({"functions": [{}]}, 400, "functions is not served; leave it out or send []", "functions"),
        ({"tool_choice": "required"}, 400, "tool_choice asks for a call, and there are", "tools"),
        ({"chat_template_kwargs": {"x": 1}}, 400, "reads no 'x'", "chat_template_kwargs"),
        ({"reasoning_effort": "low"}, 400, "neither reasoning_effort nor", "reasoning_effort"),
        ({"reasoning_effort": "lots"}, 422, "reasoning_effort: ", "reasoning_effort"),
        (
            {"chat_template_kwargs": {"tools": []}},
            400,
            "tools is given to every template",
            "chat_template_kwargs",
        ),
        (
            {"response_format": {"type": "json_object"}},
            400,
            "response_format is not served",
            "response_format",
        ),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs: true", "top_logprobs"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias is not served", "logit_bias"),
        ({"max_tokens": 401}, 400, "max_tokens is 401, at most 400 are given", "max_tokens"),
        (
            {"messages": [{"role": "user", "content": "hello " * 400}]},
            400,
            "together more than this server's limit of 512",
            "messages",
        ),
        (
            {"messages": [{"role": "assistant", "content": "hi"}]},
            400,
            "the last message must be",
            "messages",
        ),
        ({"model": "gpt-9"}, 404, "the model 'gpt-9' is not served here, but 'tiny'", "model"),
        ({"messages": []}, 422, "messages: ", "messages"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            400,
            "messages.0: a result (role 'tool') follows no message of the assistant with tool_call",
            "messages.0.role",
        ),
        (
            {"messages": [{"role": "function", "content": "x"}]},
            400,
            "messages.0.role: 'function' is not served; send the result as role 'tool'",
            "messages.0.role",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
            400,
            "messages.0.tool_call_id has no place in role 'user'",
            "messages.0.tool_call_id",
        ),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            422,
            "messages.0.role: ",
            "messages.0.role",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            400,
            "messages.0.content is null",
            "messages.0.content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages.0.content.0: parts of type 'image_url' are not served",
            "messages.0.content.0",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
            400,
            "messages.0.content.0: a part of type 'text' needs text, a text",
            "messages.0.content.0",
        ),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            422,
            "messages.0.content: a lone surrogate is no text",
            "messages.0.content",
        ),
        ({"stop": ["a", 1]}, 422, "stop.1: Input should be a valid string", "stop.1"),
        ({"stop": "\ud800"}, 422, "stop: a lone surrogate is no text", "stop"),
        ({"max_tokens": 0}, 422, "max_tokens: must be at least 1; null or -1", "max_tokens"),
        ({"echo": True}, 400, "echo is not served; leave it out or send false", "echo"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            400,
            "parts of type 'input_audio' are not served",
            "messages.0.content.0",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
            422,
            "messages.1.tool_calls.0.function: Field required",
            "messages.1.tool_calls.0.function",
        ),
        (
            {"messages": [*HELLO, {**CALLED, "tool_calls": [call_of("[1]")]}, *HELLO]},
            400,
            "messages.1.tool_calls.0.function.arguments: expected a JSON object, as text",
            "messages.1.tool_calls.0.function.arguments",
        ),
        (
            {"messages": [*HELLO, CALLED]},
            400,
            "the last one, which is the assistant's and is continued, holds tool_calls",
            "messages",
        ),
        (
            {"messages": [*HELLO, CALLED, {"role": "tool", "content": "5"}]},
            400,
            "messages.2.tool_call_id is missing; before it are call_1",
            "messages.2.tool_call_id",
        ),
        (
            {"messages": [*HELLO, CALLED, {"role": "tool", "tool_call_id": "x", "content": "5"}]},
            400,
            "messages.2.tool_call_id 'x' is none of the calls; before it are call_1",
            "messages.2.tool_call_id",
        ),
        (
            {"messages": [*HELLO, CALLED, *HELLO]},
            400,
            "the chat template refuses these messages",
            "messages",
        ),
        (
            {"continue_final_message": True},
            400,
            "the last message is not the assistant's",
            "continue_final_message",
        ),
        ({"max_tokens": 0}, 422, "must be at least 1; null or -1", "max_tokens"),
        ({"max_tokens": False}, 422, "must be a number, not false", "max_tokens"),
        ({"max_tokens": -2}, 422, "max_tokens: ", "max_tokens"),
        *(
            ({name: number}, 422, f"{name}: must be a number, not a string", name)
            for name in ("max_tokens", "max_completion_tokens", "n", "seed", "top_k", "top_p")
            for number in ("5", "0.5", "")
        ),
        ({"temperature": "0.5"}, 422, "temperature: must be a number, not a string", "temperature"),
        ({"min_p": 2}, 422, "min_p: ", "min_p"),
        ({"temperature": 3}, 422, "temperature: ", "temperature"),
        ({"top_p": 0}, 422, "top_p: ", "top_p"),
        ({"stop": ["a"] * 5}, 400, "stop holds 5 strings, at most 4 are taken", "stop"),
    ],
)
def test_what_cannot_be_served_is_refused_in_openais_shape(client, fields, status, message, param):
    found = error(chat(client, **fields), status)
    assert message in found["message"] and (param is None or found["param"] == param)


@pytest.mark.parametrize(
    "field",
    (
        *("max_tokens", "max_completion_tokens", "n", "seed", "top_logprobs", "temperature"),
        *("top_p", "top_k", "min_p", "repetition_penalty", "best_of"),
    ),
)
def test_true_is_no_number(client, field):
    found = error(
        chat(client, **{field: True, "logprobs": True}), 400 if field == "best_of" else 422
    )
    assert found["param"] == field


@pytest.mark.parametrize("field", ["stream", "logprobs", "continue_final_message"])
def test_1_is_no_boolean(client, field):
    assert error(chat(client, **{field: 1}), 422)["param"] == field


def test_a_false_penalty_is_not_0(client):
    assert error(chat(client, frequency_penalty=False), 400)["param"] == "frequency_penalty"


def test_fields_that_ask_for_nothing_are_let_through(client):
    fields = {
        "n": 1,
        "user": "me",
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "tools": [],
        "logit_bias": {},
    }
    response = chat(client, **fields, store=False, response_format={"type": "text"})
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "user, store"
    assert "x-ignored-fields" not in chat(client).headers


def test_nulls_and_empty_values_ask_for_nothing(client):
    """Every field that OpenAI's schema lets be null, and how people write "no limit"."""
    plain = chat(client, max_tokens=None).json()["choices"][0]
    names = (
        "stream stream_options temperature top_p top_k min_p seed stop n logprobs top_logprobs "
        "max_completion_tokens tools tool_choice response_format logit_bias frequency_penalty "
        "presence_penalty modalities audio user metadata store continue_final_message"
    )
    response = chat(client, max_tokens=None, **dict.fromkeys(names.split()))
    assert response.json()["choices"][0] == plain
    assert "x-ignored-fields" not in response.headers
    for fields in ({"stop": ""}, {"stop": []}, {"stop": [""]}, {"max_completion_tokens": -1}):
        assert chat(client, **{"max_tokens": -1} | fields).json()["choices"][0] == plain
    said = {
        "role": "assistant",
        "content": "hi",
        "refusal": None,
        "tool_calls": None,
        "audio": None,
    }
    assert chat(client, messages=[*HELLO, said, *HELLO]).status_code == 200


def test_unknown_fields_are_listed_in_a_header_that_nobody_can_break(client):
    named = [{"role": "user", "content": "hello", "name": "me", "weight": 1}]
    fields = {"a\r\nx-evil: 1": 1, "stream_options": {"include_obfuscation": False}}
    found = chat(client, messages=named, **fields).headers
    listed = "a??x-evil??1, stream_options.include_obfuscation, messages.name, messages.weight"
    assert sorted(found["x-ignored-fields"].split(", ")) == sorted(listed.split(", "))
    assert "x-evil" not in found
    many = chat(client, **{f"field{k}": k for k in range(40)}).headers["x-ignored-fields"]
    assert many.endswith("field19, ...")
    with client.stream(
        "POST", "/v1/chat/completions", json=_long(max_tokens=2, stream=True, user="me")
    ) as streamed:
        assert streamed.headers["x-ignored-fields"] == "user"


def test_other_endpoints_are_refused_by_name(client):
    for path in ("/v1/embeddings", "/v1/responses", "/v1/audio/speech"):
        message = error(client.post(path, json={"model": NAME, "input": "x"}), 404)["message"]
        assert message.startswith(f"{path} is not served; this server offers POST /v1/chat/comp")


def test_a_request_is_cut_to_what_the_model_has_unless_a_limit_was_told():
    with (
        running(web={"max_new_tokens": None}, endless=True, max_length=None) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        prompt = len(server.engine.encode(HELLO))
        body = chat(client, max_tokens=10**6).json()
        assert (
            body["usage"]["total_tokens"] == 512 and body["choices"][0]["finish_reason"] == "length"
        )
        assert body["usage"]["completion_tokens"] == 512 - prompt
        long = [{"role": "user", "content": "hello " * 400}]
        found = error(chat(client, messages=long), 400)
        assert found["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[]", b'"x"', b'{"messages": NaN}', b'{"model": "\\ud800"}']
)
def test_bad_json_is_422_everywhere(client, body):
    for path in ("/v1/chat/completions", "/generate", "/generate/stream"):
        found = error(
            client.post(path, content=body, headers={"Content-Type": "application/json"}), 422
        )
        assert found["param"] != "1" and "Value error" not in found["message"]
        if body == b"{":
            assert found["message"].startswith("the body is not JSON: Expecting property name")


def test_a_long_prompt_is_blamed_on_the_field_that_holds_it(client):
    long = {"/v1/completions": ("prompt", "hello " * 600), "/generate": ("history", [LONG_TURN])}
    for path, (field, value) in long.items():
        found = error(client.post(path, json={"model": NAME, field: value}), 400)
        assert found["param"] == field and found["code"] == "context_length_exceeded"


def test_json_that_a_foreign_page_could_send_unasked_is_refused(client):
    """A form or text/plain needs no permission of CORS, so it must not be read."""
    body = json.dumps({"model": NAME, "messages": HELLO})
    error(
        client.post("/v1/chat/completions", content=body, headers={"Content-Type": "text/plain"}),
        422,
    )


def test_unknown_places_methods_and_huge_bodies(client):
    error(client.get("/nowhere"), 404)
    error(client.get("/v1/chat/completions"), 405)
    error(chat(client, messages=[{"role": "user", "content": "x" * 5_000_000}]), 413)

    def parts():
        for _ in range(50):
            yield b"x" * 100_000

    error(
        client.post("/generate", content=parts(), headers={"Content-Type": "application/json"}), 413
    )


def test_the_model_is_listed_with_its_length(client):
    listed = client.get("/v1/models").json()
    assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [(NAME, 512)]
    assert client.get(f"/v1/models/{NAME}").json() == listed["data"][0]
    error(client.get("/v1/models/other"), 404)


def test_the_older_generate(client):
    """A text, and the same one as events `generate` and `end`; an empty response is no turn of the
    dialogue."""
    body = {**OLD, "max_new_tokens": 30, "temperature": 0}
    text = client.post("/generate", json=body).json()
    assert text == chat(client, max_tokens=30).json()["choices"][0]["message"]["content"]
    events = client.post("/generate/stream", json=body)
    assert events.headers["content-type"].startswith("text/event-stream")
    *pieces, end = [block.split("\n") for block in events.text.removesuffix("\n\n").split("\n\n")]
    assert end == ["event: end", "data:"] and all(lines[0] == "event: generate" for lines in pieces)
    assert (
        "".join("\n".join(line.removeprefix("data: ") for line in lines[1:]) for lines in pieces)
        == text
    )
    assert (
        "at most 400"
        in error(client.post("/generate", json={**OLD, "max_new_tokens": 401}), 400)["message"]
    )
    error(client.post("/generate", json={"history": []}), 422)


def test_health_and_metrics(client):
    # The place of the answer before this test is free a moment after its last piece.
    assert until(
        lambda: client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}, 5
    )
    before = _counter(client, 'coati_requests_total{outcome="length"}')
    tokens = _counter(client, "coati_generated_tokens_total")
    chat(client)
    assert until(
        lambda: _counter(client, 'coati_requests_total{outcome="length"}') == before + 1, 5
    )
    assert _counter(client, "coati_generated_tokens_total") == tokens + 8
    assert _counter(client, "coati_first_token_seconds_count") > 0


def _counter(client, name):
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)


def test_no_page_of_elsewhere_may_read_answers_unless_named(client):
    theirs = {"Origin": "https://elsewhere.example"}
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=theirs).headers
    with running(web={"cors_origins": ("https://elsewhere.example",)}) as server:
        answer = httpx.get(server.url + "/v1/models", headers=theirs)
        assert answer.headers["access-control-allow-origin"] == "https://elsewhere.example"
        other = httpx.get(server.url + "/v1/models", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_token_hosts_and_words():
    web = {"token": "sesame", "hosts": ("127.0.0.1",)}
    with (
        running(web=web, words=["darn"]) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        for path in ("/v1/models", "/metrics"):
            assert error(client.get(path), 401)["code"] == "invalid_api_key"
        wrong = (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic sesame"},
            {"Authorization": "Bearer"},
        )
        for headers in wrong:
            error(client.post("/v1/chat/completions", json={}, headers=headers), 401)
        assert client.get("/health").status_code == client.get("/").status_code == 200
        right = {"Authorization": "Bearer sesame"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
        client.headers.update(right)
        found = error(chat(client, messages=[{"role": "user", "content": "oh DARN it"}]), 400)
        assert found["code"] == "content_filter"


def test_a_full_queue_is_429_and_a_late_answer_504():
    settings = {"endless": True, "pause": 0.02, "max_batch": 1, "max_queue": 1, "timeout": 1.0}
    with running(**settings) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", "/v1/chat/completions", json=_long(stream=True)) as first:
            lines = first.iter_lines()
            assert next(lines).startswith("data: ")
            with httpx.Client(base_url=server.url, timeout=60) as other:
                import threading

                codes = []
                waits = threading.Thread(
                    target=lambda: codes.append(other.post("/v1/chat/completions", json=_long()))
                )
                waits.start()
                assert until(lambda: server.engine.waiting == 1)
                refused = client.post("/v1/chat/completions", json=_long())
                assert (
                    error(refused, 429)["code"] == "queue_full"
                    and refused.headers["retry-after"] == "1"
                )
                waits.join(20)
                assert error(codes[0], 504)["type"] == "timeout_error"
            # What has begun to stream ends with the error as an event.
            last = [line for line in lines if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"


def _long(**fields):
    return {"model": NAME, "messages": HELLO, "max_tokens": 400} | fields


def test_the_page_may_load_nothing_but_itself(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert (
        "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    )
    assert (
        "http://" not in page.text and "https://" not in page.text and "innerHTML" not in page.text
    )


def test_the_pages_libraries_are_the_released_ones(client):
    listed = (VENDOR / "VERSIONS.txt").read_text().splitlines()
    rows = [line.split() for line in listed if len((line.split() or [""])[-1]) == 64]
    assert [row[0] for row in rows] == list(ASSETS)
    for name, *_, digest in rows:
        served = client.get(f"/assets/{name}")
        assert hashlib.sha256(served.content).hexdigest() == digest
        assert served.headers["content-type"].startswith("text/javascript")
        assert served.headers["x-content-type-options"] == "nosniff"
    for name in ("LICENSE.markdown-it", "../web.py", "..%2fweb.py"):
        assert client.get(f"/assets/{name}").status_code == 404


def test_no_documentation_page_with_foreign_scripts(client):
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
    assert "/v1/chat/completions" in client.get("/openapi.json").json()["paths"]
