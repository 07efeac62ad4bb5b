"""coati rollout-server on the real vLLM, in its own environment on a CPU: minutes, and only where
``python tools/venv.py vllm --cpu`` has made that environment."""

import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from coati.experience_maker.rollouts.rollout_client import RolloutServer, ServerFailed
from coati.models.generation.loop import Sampling, generate
from coati.models.generation.row_noise import NoiseRows
from tests.distributed.spawn import free_port
from tests.end_to_end.inputs import ROOT
from tests.end_to_end.online_inputs import metrics, of_episode, prompts, write_files
from tests.end_to_end.test_online_plugins import launched
from tests.experience_maker.rollout_servers import FakeEngine, http_rollout
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.slow

PLACES = (
    os.environ.get("COATI_VLLM_VENV", ""),
    ROOT / ".venv-vllm",
    Path.home() / ".cache" / "coati" / "venv-vllm",
)
START_S = 900  # three processes that import vLLM, on a busy machine
TOKEN = {"COATI_TEST_TOKEN": "a word"}
PROMPTS = torch.tensor([[2, 2, 5, 17], [9, 11, 42, 7], [2, 8, 8, 3], [2, 2, 2, 6]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]])
NOISE = NoiseRows(5, 3, [4, 9, 2, 7])
REWARD = """
def vowels(responses):
    return [sum(letter in "aeiou" for letter in text) / 4 for text in responses]
"""


def model_of(seed: int):
    # vLLM's attention on CPUs has no heads of 16 numbers, which tiny models have by default.
    return tiny_llama(seed=seed, hidden=256)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vllm") / "model"
    model_of(0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def url(place, tmp_path_factory):
    """A server that was started as a user starts it."""
    pythons = [Path(folder) / "bin" / "python" for folder in PLACES if folder]
    python = next((path for path in pythons if path.exists()), None)
    if python is None:
        pytest.skip("no environment with vLLM: make it with python tools/venv.py vllm --cpu")
    port = free_port()
    words = ["--model", place, "--port", str(port), "--dtype", "fp32", "--max_length", "256"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [python, "-m", "coati", "rollout-server", *words, "--token_env", *TOKEN],
            env={**os.environ, **TOKEN, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
            cwd=log.parent,
        )
    found = f"http://127.0.0.1:{port}"
    server = RolloutServer(found, token="a word", timeout=60)
    end = time.monotonic() + START_S
    try:
        while True:
            try:
                server.connect()
                break
            except ServerFailed as error:
                assert process.poll() is None and time.monotonic() < end, (
                    f"{error}\n{log.read_text()[-3000:]}"
                )
                time.sleep(1)
        yield found
    finally:
        process.terminate()
        process.wait(60)


def engine_on(url, model, folder, **options):
    return http_rollout(
        FakeEngine(model), [url], folder, token="a word", max_length=64, count=24, **options
    )


@pytest.mark.parametrize("sync", ["http", "disk", "nccl", "ipc"])
def test_log_probs_are_the_policys_after_every_publish(url, tmp_path, sync):
    policies = [model_of(1), model_of(2)]
    rollout = engine_on(url, policies[0], tmp_path, sync=sync, timeout=120)
    server = rollout.workers[0].server
    for version, policy in enumerate(policies):
        rollout.publish(version, policy.state_dict().items())
        for temperature in (1.0, 0.7):
            asked = [
                rollout.ask(PROMPTS, MASK, noise=NOISE, temperature=temperature) for _ in range(2)
            ]
            found, again = (one.result() for one in asked)
            assert torch.equal(found.sequences, again.sequences), "a row's seed repeats it"
            assert found.version == version
            assert_close(
                found.sampled_logprobs, logprobs(policy, found, temperature), rtol=0, atol=1e-4
            )
        assert server.compare(rollout._newest.published()) == 5, "all norms hold the same bytes"
        with pytest.raises(ServerFailed, match="another model.layers.0.input_layernorm.weight"):
            spoiled = model_of(3)
            torch.nn.init.constant_(spoiled.model.layers[0].input_layernorm.weight, 2.0)
            server.compare(rollout.store.put(9, dict(spoiled.state_dict())).published())
    rollout.close()


def logprobs(policy, found, temperature):
    """(B, N) of the policy at each token of a response."""
    said = torch.zeros_like(found.sampled_logprobs)
    for row, response in enumerate(found.responses()):
        ids = PROMPTS[row][MASK[row].bool()].tolist() + response
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([ids])).logits[0, :-1].float() / temperature
        own = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        said[row, : len(response)] = own[-len(response) :]
    return said


def test_greedy_answers_are_those_of_this_process(url, tmp_path):
    policy = model_of(4)
    rollout = engine_on(url, policy, tmp_path, sampling=Sampling(do_sample=False), timeout=120)
    rollout.publish(0, policy.state_dict().items())
    found = rollout.ask(PROMPTS, MASK, noise=NOISE, temperature=1.0).result()
    stops = [[30], [7, 8]]
    expected = generate(
        policy, PROMPTS, MASK, stop_sequences=stops, max_new_tokens=24, do_sample=False
    )
    assert found.responses() == expected.responses()
    assert found.stopped.tolist() == expected.stopped.tolist()
    ends = [[expected.responses()[0][3]]]
    rollout.stops = tuple(map(tuple, ends))
    found = rollout.ask(PROMPTS, MASK, noise=NOISE, temperature=1.0).result()
    expected = generate(
        policy, PROMPTS, MASK, stop_sequences=ends, max_new_tokens=24, do_sample=False
    )
    assert found.responses() == expected.responses() and found.stopped[0]
    rollout.close()


@pytest.fixture
def grpo(url, place, tmp_path, monkeypatch):
    """``grpo(**flags)``: the metrics of a run of GRPO on the server."""
    files = write_files(tmp_path)
    (tmp_path / "reward.py").write_text(REWARD)
    monkeypatch.setenv(*next(iter(TOKEN.items())))
    words = {
        "pretrain": place,
        "prompt_dataset": prompts(tmp_path / "prompts"),
        "conversation_template_config": files["template"],
        "save_dir": str(tmp_path / "run"),
        "reward_functions": f"{tmp_path / 'reward.py'}:vowels",
        "rollout_url": url,
        "rollout_token_env": next(iter(TOKEN)),
        "num_collect_steps": "1",
        "experience_batch_size": "4",
        "num_generations": "8",
        "train_batch_size": "16",
        "accumulation_steps": "2",
        "num_update_steps": "1",
        "max_length": "84",
        "max_seq_len": "10",
        "lr": "1e-3",
        "kl_coef": "0",
        "final_temperature": "1.0",
        "mixed_precision": "fp32",
        "warmup_steps": "0",
        "lr_scheduler": "constant",
    }

    def grpo(**flags):
        given = [word for name, value in (words | flags).items() for word in (f"--{name}", value)]
        launched(1, {"grpo": given}, timeout=500)
        return metrics(tmp_path / "run")

    return SimpleNamespace(run=grpo, files=files)


def test_dialogues_with_an_environment(grpo):
    """Token ids of one turn go into the next, and their log-probs are the policy's."""
    found = grpo.run(
        environment=f"{grpo.files['echo']}:Echo",
        prompt_dataset=grpo.files["rows"],
        max_turns="3",
        max_seq_len="60",
        max_length="144",
        num_episodes="2",
    )
    for episode in (1, 2):
        of = of_episode(found, episode)
        assert 1 < of["environment/turns"] <= 3
        assert of["reward/environment"] > 0
        assert of["rollout_gap"] < 1e-4


def test_a_grpo_run_learns_on_it(grpo):
    found = grpo.run(num_episodes="20")
    rewards = [of_episode(found, episode)["reward"] for episode in range(1, 21)]
    assert sum(rewards[-4:]) / 4 > 1.5 * sum(rewards[:4]) / 4, rewards
