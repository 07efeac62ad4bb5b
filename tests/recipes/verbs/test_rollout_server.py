"""coati rollout-server as a process: from its command to a response, through a kill, to its end."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from coati.experience_maker.rollouts.rollout_client import RolloutServer, ServerFailed
from tests.end_to_end.inputs import ROOT
from tests.experience_maker.rollout_servers import FakeEngine, http_rollout
from tests.experience_maker.test_http_rollout import MASK, NOISE, PROMPTS, in_process, same
from tests.tiny import tiny_llama


@pytest.fixture
def model(tmp_path) -> str:
    folder = tmp_path / "model"
    tiny_llama(seed=0).save_pretrained(folder)
    return str(folder)


def started(model: str, port: int = 0) -> tuple[subprocess.Popen, str]:
    words = ["rollout-server", model, "--engine", "own", "--port", str(port), "--dtype", "fp32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "coati", *words, "--token_env", "TEST_TOKEN"],
        env={**os.environ, "TEST_TOKEN": "word", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith(f"{model} at http://127.0.0.1:"), line
    return process, line.split()[-1]


def test_a_server_that_is_killed_in_mid_answer_and_started_again(model, tmp_path):
    policy = tiny_llama(seed=1)
    process, url = started(model)
    try:
        with pytest.raises(ServerFailed, match="wants a token"):
            RolloutServer(url).connect()
        rollout = http_rollout(FakeEngine(policy), [url], tmp_path, token="word", timeout=60)
        rollout.publish(2, policy.state_dict().items())
        same(
            rollout.ask(PROMPTS, MASK, noise=NOISE, temperature=0.8).result(), in_process(policy), 2
        )
        rollout.stops = ()
        rollout.max_new_tokens = 400
        asked = rollout.ask(PROMPTS, MASK, noise=NOISE, temperature=0.8)
        time.sleep(0.3)
        assert not asked._ask.finished.is_set()
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process, _ = started(model, int(url.rpartition(":")[2]))
        found = asked.result()
        assert found.lengths.tolist() == [400] * 4 and found.version == 2
        rollout.stops = ((30,), (7, 8))
        rollout.max_new_tokens = 6
        same(
            rollout.ask(PROMPTS, MASK, noise=NOISE, temperature=0.8).result(), in_process(policy), 2
        )
        rollout.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert torch.isfinite(found.sampled_logprobs).all()
