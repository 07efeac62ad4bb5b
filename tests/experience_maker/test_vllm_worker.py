"""What runs inside vLLM's server, without vLLM: the guard of its routes, and what its workers are
asked."""

import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from coati.experience_maker.rollouts.vllm_worker import RolloutWorker, TokenGuard
from coati.experience_maker.rollouts.weight_files import Place, write_weights
from tests.tiny import tiny_llama


class Worker(RolloutWorker):
    def __init__(self) -> None:
        self.taken = {}
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                hf_config=tiny_llama().config,
                dtype=torch.bfloat16,
                max_model_len=77,
                logprobs_mode="processed_logprobs",
            ),
            parallel_config=SimpleNamespace(world_size=2),
        )

    def reload_weights(self, weights_iterator):
        for name, tensor in weights_iterator:
            self.taken[name] = tensor


def test_what_a_worker_says_travels_as_json():
    said = json.loads(json.dumps(Worker().describe_model()))
    assert said["engine"] == "vllm" and said["dtype"] == "bfloat16" and said["world"] == 2
    assert (said["max_model_len"], said["facts"]["vocab_size"]) == (77, 384)


def test_a_worker_takes_published_weights_and_refuses_damaged_ones(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    published = write_weights(tmp_path, 5, tensors)
    place = Place(published.name, path=str(published.folder)).to_json()
    worker = Worker()
    assert worker.load_published(place) == {"name": published.name}
    assert all(torch.equal(worker.taken[name], tensor) for name, tensor in tensors.items())
    file = next(published.folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="is not what was published"):
        worker.load_published(place)


def test_the_worker_is_light_to_import():
    """It lives in vLLM's environment, which lacks most of this library's packages."""
    code = (
        "import sys; import coati.experience_maker.rollouts.vllm_worker; "
        "print([m for m in ('colossalai', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_guard_lets_nobody_in_without_the_token(monkeypatch):
    monkeypatch.setenv("COATI_ROLLOUT_TOKEN", "word")
    inside = []

    async def app(scope, receive, send):
        inside.append(scope.get("path", scope["type"]))

    guard = TokenGuard(app)

    def asked(path, *headers, kind="http") -> list:
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": kind, "path": path, "headers": list(headers)}
        asyncio.run(guard(scope, None, send))
        return sent

    for headers in ([], [(b"authorization", b"Bearer other")], [(b"authorization", b"word")]):
        for path in ("/v1/completions", "/collective_rpc", "/pause", "/health/../pause"):
            assert asked(path, *headers)[0]["status"] == 401
    assert not inside
    right = (b"authorization", b"Bearer word")
    assert asked("/collective_rpc", right) == [] and asked("/health") == []
    assert asked("", kind="lifespan") == []
    assert inside == ["/collective_rpc", "/health", ""]
