"""What the command writes where it is no terminal: whole lines of the library's own, and on
standard output what was asked for."""

import json
import os
import subprocess
import sys

import pytest

from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipes")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"hello {i}"},
                {"role": "assistant", "content": "are"},
            ]
        }
        for i in range(60)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def coati(place, *words):
    """The command in a process of its own, both outputs pipes."""
    alone = {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "COATI_ERROR_FILE"):
        alone.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-m", "coati", *words],
        cwd=place,
        env=alone | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run


def test_a_pipe_gets_whole_lines_of_the_librarys_own(place):
    words = ["--pretrain", "model", "--dataset", "rows.jsonl", "--eval_dataset", "rows.jsonl"]
    words += ["--output-dir", "out", "--max_steps", "3", "--gradient_accumulation_steps", "1"]
    run = coati(place, "sft", *words)
    assert not any(sign in run.stderr + run.stdout for sign in ("\r", "\x1b"))
    assert [line for line in run.stderr.splitlines() if not line.startswith("coati: ")] == []
    assert "coati: sft: step 1 of 3, loss" in run.stderr
    answer = coati(place, "chat", "out", "--prompt", "hello 1", "--max_new_tokens", "4")
    assert "user:" not in answer.stdout and "assistant:" not in answer.stdout
    assert answer.stdout.endswith("\n") and "\x1b" not in answer.stdout + answer.stderr
