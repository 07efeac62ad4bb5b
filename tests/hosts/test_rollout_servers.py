"""GRPO with rollout servers on two hosts: what is trained is what one host trains, whatever becomes
of the cable between them."""

import time
from pathlib import Path

import pytest

from tests.end_to_end.inputs import write_model
from tests.end_to_end.online_inputs import MAX_LENGTH, NEW, prompts, weights, write_files
from tests.end_to_end.test_online_plugins import assert_same_weights
from tests.hosts.conftest import START_S, Process, TwoHosts

pytestmark = pytest.mark.slow

PORT = 9001
TIMEOUT_S = 6
EPISODES = 8
TOKEN = {"ROLLOUT_TOKEN": "only-for-us"}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    return {
        "model": write_model(folder / "model"),
        "prompts": prompts(folder / "prompts"),
        **write_files(folder),
    }


@pytest.fixture(scope="module")
def words(places) -> list[str]:
    """``coati grpo`` in fp32, one optimizer step an episode."""
    flags = {
        "pretrain": places["model"],
        "prompt_dataset": places["prompts"],
        "conversation_template_config": places["template"],
        "reward_functions": f"{places['functions']}:vowels",
        "plugin": "ddp",
        "mixed_precision": "fp32",
        "lr": "5e-3",
        "warmup_steps": "0",
        "max_length": str(MAX_LENGTH),
        "max_seq_len": str(NEW),
        "num_episodes": str(EPISODES),
        "num_generations": "4",
        "num_collect_steps": "1",
        "num_update_steps": "1",
        "save_interval": "1",
        "sample_interval": "0",
    }
    return ["grpo", *(word for name, value in flags.items() for word in (f"--{name}", value))]


ONE = ("--experience_batch_size", "4", "--train_batch_size", "4", "--accumulation_steps", "4")
TWO = ("--experience_batch_size", "2", "--train_batch_size", "4", "--accumulation_steps", "2")


@pytest.fixture(scope="module")
def whole(both_hosts, words, tmp_path_factory) -> Path:
    """A run that samples by itself on one host."""
    save_dir = tmp_path_factory.mktemp("whole") / "run"
    ended = both_hosts.wait(both_hosts.fork(1, [*words, *ONE, "--save_dir", str(save_dir)]))
    assert ended.code == 0, ended.err[-3000:]
    return save_dir


def serve(hosts: TwoHosts, node: int, places: dict[str, str]) -> tuple[str, Process]:
    """The URL of a server on a host, and its process, once it listens."""
    given = ["rollout-server", places["model"], "--engine", "own", "--host", hosts.address(node)]
    server = hosts.fork(
        node, [*given, "--port", str(PORT), "--token_env", "ROLLOUT_TOKEN"], **TOKEN
    )
    hosts.wait_for(server.files[0], f":{PORT}", START_S)
    return f"http://{hosts.address(node)}:{PORT}", server


def served(words: list[str], save_dir: Path, *urls: str) -> list[str]:
    more = ["--save_dir", str(save_dir), "--rollout_timeout", str(TIMEOUT_S)]
    return [*words, *more, "--rollout_token_env", "ROLLOUT_TOKEN", "--rollout_url", *urls]


def test_two_ranks_and_a_server_on_each_host(hosts, words, places, whole, tmp_path):
    urls = [serve(hosts, node, places)[0] for node in (1, 2)]
    ranks = hosts.ranks(served([*words, *TWO], tmp_path / "run", *urls), **TOKEN)
    assert [one.code for one in ranks] == [0, 0], ranks[0].err[-3000:]
    assert_same_weights(tmp_path / "run", whole, Path(places["model"]))


def test_the_rows_of_a_server_behind_a_cut_cable_go_to_the_other(
    hosts, words, places, whole, tmp_path
):
    urls = [serve(hosts, node, places)[0] for node in (1, 2)]
    run = hosts.fork(1, served([*words, *ONE], tmp_path / "run", *urls), **TOKEN)
    hosts.wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 2')
    hosts.tool("cut")
    ended = hosts.wait(run)
    assert ended.code == 0, ended.err[-3000:]
    assert f"rollout server left out, its rows go to the others until it returns: {urls[1]}" in (
        " ".join(ended.err.split())
    )
    assert_same_weights(tmp_path / "run", whole, Path(places["model"]))


def test_a_run_that_lost_its_only_server_saves_stops_and_goes_on(
    hosts, words, places, whole, tmp_path
):
    url, _ = serve(hosts, 2, places)
    given = served([*words, *ONE], tmp_path / "run", url)
    run = hosts.fork(1, given, **TOKEN)
    hosts.wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 2')
    hosts.tool("cut")
    began = time.monotonic()
    ended = hosts.wait(run)
    assert ended.code == 1
    assert time.monotonic() - began < 4 * TIMEOUT_S
    said = " ".join(ended.err.split())
    assert f"no rollout server has worked for {TIMEOUT_S} s (--rollout_timeout)" in said
    assert "Traceback" not in said
    hosts.tool("mend")
    again = hosts.wait(hosts.fork(1, [*given, "--checkpoint_path", "auto"], **TOKEN))
    assert again.code == 0, again.err[-3000:]
    assert weights(tmp_path / "run").keys() == weights(whole).keys()
    assert_same_weights(tmp_path / "run", whole, Path(places["model"]))
