"""server.py as a process: what it logs, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.inference.serving import until
from tests.inference.test_model_loading import write

SCRIPT = (
    Path(__file__).resolve().parents[2] / "examples" / "inference" / "web_chatbot" / "server.py"
)
TOKEN = "sesame-open-please"


@pytest.fixture
def started(tmp_path):
    """Start server.py with the tiny model on a free port: the process, its url, and what it
    printed."""
    write(tmp_path / "tiny")
    (tmp_path / "token").write_text(TOKEN + "\n")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[3]), "HF_HUB_OFFLINE": "1"}
    log = open(tmp_path / "log", "w+")
    given = ["--http_port", "0", "--token_file", str(tmp_path / "token"), "--temperature", "0"]
    command = [sys.executable, str(SCRIPT), str(tmp_path / "tiny"), *given]
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    text = (tmp_path / "log").read_text
    try:
        # "Uvicorn running" comes from some releases alone when it is given a socket.
        assert until(
            lambda: "Application startup complete" in text() or process.poll() is not None, 240
        ), text()
        assert process.poll() is None, text()
        yield process, re.search(r"tiny at (http://127\.0\.0\.1:\d+)", text())[1], text
    finally:
        process.kill()
        process.wait()
        log.close()


def test_the_program_keeps_its_token_to_itself_and_finishes_what_it_began(started):
    process, url, text = started
    mine, wrong = {"Authorization": f"Bearer {TOKEN}"}, {"Authorization": "Bearer my-other-secret"}
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "private words"}],
        "max_tokens": 60,
    }
    assert httpx.get(url + "/v1/models", headers=wrong).status_code == 401
    assert (
        httpx.post(
            url + "/v1/chat/completions", content=b"{" + TOKEN.encode(), headers=mine
        ).status_code
        == 422
    )
    whole = httpx.post(url + "/v1/chat/completions", json=body, headers=mine, timeout=60).json()
    body["stream"], place = True, url + "/v1/chat/completions"
    with httpx.stream("POST", place, json=body, headers=mine, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    streamed = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert streamed == whole["choices"][0]["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert process.wait(30) == 0
    assert "Traceback" not in text() and '"POST /v1/chat/completions HTTP/1.1" 200' in text()
    for secret in (TOKEN, "my-other-secret", "private words"):
        assert secret not in text()
