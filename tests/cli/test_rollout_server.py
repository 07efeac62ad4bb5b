"""The flags of coati rollout-server, and the command that it becomes where vLLM is installed."""

import importlib.util
import sys

import pytest

from coati.cli.rollout_server import parse_rollout_server
from coati.recipes.verbs import rollout_server
from coati.recipes.verbs.rollout_server import vllm_command


@pytest.fixture
def model(tmp_path) -> str:
    folder = tmp_path / "run" / "actor" / "modeling"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return str(tmp_path / "run")


@pytest.fixture
def with_vllm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(rollout_server, "is_for_cpus", lambda: False)


@pytest.fixture
def without_vllm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def parsed(*words):
    return parse_rollout_server([str(word) for word in words])


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        parsed(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_without_vllm_the_own_sampler_serves_on_loopback_and_says_so(without_vllm, capsys):
    found = parsed("--model", "m")
    assert (found.engine, found.http_host, found.http_port, found.token) == (
        "own",
        "127.0.0.1",
        9001,
        None,
    )
    assert "the library's own sampler serves" in capsys.readouterr().err


def test_another_address_without_a_token_is_warned_of(without_vllm, capsys, monkeypatch):
    parsed("--model", "m", "--host", "10.0.0.1", "--engine", "own")
    assert "can use the model and change its weights" in capsys.readouterr().err
    monkeypatch.setenv("WORD", " secret ")
    found = parsed("--model", "m", "--host", "10.0.0.1", "--engine", "own", "--token_env", "WORD")
    assert found.token == "secret" and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--model_path is required"),
        (("--model", "m", "--engine", "vllm"), "vllm is not installed here"),
        (("--model", "m", "--tensor_parallel", "2"), "--tensor_parallel belongs to vLLM"),
        (("--model", "m", "--vllm_args=--x"), "--vllm_args belongs to vLLM"),
        (("--model", "m", "--port", "70000"), "the highest port is 65535"),
        (("--model", "m", "--token_env", "NOT_SET"), "--token_env NOT_SET: the variable holds no"),
    ],
)
def test_what_cannot_be_is_refused(without_vllm, capsys, words, said):
    assert said in refused(capsys, *words)


def test_vllm_needs_a_port(with_vllm, capsys):
    assert "vLLM needs a port" in refused(capsys, "--model", "m", "--port", "0")
    assert "--vllm_args" in refused(capsys, "--model", "m", "--vllm_args", "'open")


def test_vllm_is_started_with_the_routes_that_training_needs(with_vllm, model, monkeypatch):
    monkeypatch.delenv("COATI_ROLLOUT_TOKEN", raising=False)
    command, variables = vllm_command(parsed("--model", model))
    place = f"{model}/actor/modeling"
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert [command[command.index(flag) + 1] for flag in ("--model", "--served-model-name")] == [
        place,
        place,
    ]
    extension = command[command.index("--worker-extension-cls") + 1]
    module, _, name = extension.rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    assert command[command.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert variables["VLLM_SERVER_DEV_MODE"] == "1" and "--middleware" not in command
    assert "--enforce-eager" not in command and "COATI_ROLLOUT_TOKEN" not in variables


def test_vllms_flags_and_the_token_are_passed_on(with_vllm, model, monkeypatch):
    monkeypatch.setattr(rollout_server, "is_for_cpus", lambda: True)
    monkeypatch.setenv("WORD", "secret")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    words = ["--model", model, "--token_env", "WORD", "--dtype", "bf16", "--max_length", "99"]
    words += ["--tensor_parallel", "4", "--vllm_memory_share", "0.5"]
    command, variables = vllm_command(parsed(*words, "--vllm_args", "--max-num-seqs 64"))
    for flag, value in {
        "--dtype": "bfloat16",
        "--max-model-len": "99",
        "--tensor-parallel-size": "4",
        "--gpu-memory-utilization": "0.5",
        "--max-num-seqs": "64",
    }.items():
        assert command[command.index(flag) + 1] == value
    assert command[command.index("--middleware") + 1].endswith("vllm_worker.TokenGuard")
    assert variables["COATI_ROLLOUT_TOKEN"] == "secret" and "secret" not in " ".join(command)
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= set(command)
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "7"
