"""Items of bench_gpu.py about rollout servers: seconds of a publish by each way, and tokens per
second of vLLM beside the library's own sampler.

Model: the shape of SmolLM2-135M with random weights, bf16 on a GPU. vLLM is looked for in
.venv-vllm (`python tools/venv.py vllm`), or in the environment of the interpreter that
COATI_VLLM_PYTHON names. ``tiny``: every path that a CPU has, small, with the library's own sampler
as the server.

  publish_disk, publish_http, publish_nccl, publish_ipc   new weights to a server on the same card
  (nccl takes two cards: the server gets the second)
  server_vllm, server_own   64 prompts of 64 tokens, 128 new ones each, by a server of either kind
  sleep   vLLM in this process gives its memory back and wakes up
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench_publish import model_of_135m
from benchmarks.gpu_item import Report
from benchmarks.gpu_models import NotHere

ROOT = Path(__file__).resolve().parents[1]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ROUNDS = 5
START_S = 300


class Machine:
    """What there is to measure with, and the model in ``folder``."""

    def __init__(self, tiny: bool, folder: Path) -> None:
        import torch

        self.cpu = tiny
        self.cards = 0 if tiny else torch.cuda.device_count()
        self.vllm_python = os.environ.get("COATI_VLLM_PYTHON", str(VLLM_PYTHON))
        self.device = torch.device("cuda" if self.cards else "cpu")
        self.folder = folder
        self.dtype = "bf16" if self.cards else "fp32"
        model = small_model() if tiny else model_of_135m(self.dtype)
        model.save_pretrained(folder / "model")
        state = model.state_dict()
        self.tensors = {n: t for n, t in state.items() if n != "lm_head.weight"}  # tied
        self.prompts, self.prompt_tokens, self.new_tokens = (4, 8, 8) if tiny else (64, 64, 128)

    def need_card(self, count: int = 1) -> None:
        if not self.cpu and self.cards < count:
            raise NotHere(f"needs {count} GPU{'s' * (count > 1)}, and there are {self.cards}")

    def server_words(self, engine: str, card: int) -> tuple[list[str], dict[str, str]]:
        python = sys.executable
        if engine == "vllm":
            if self.cpu or not Path(self.vllm_python).exists():
                raise NotHere(f"no environment with vLLM for a GPU ({self.vllm_python})")
            python = self.vllm_python
        words = ["-m", "coati", "rollout-server", str(self.folder / "model"), "--engine", engine]
        words += ["--dtype", self.dtype, "--max_length", "256", "--port", str(free_port())]
        if engine == "vllm":
            words += ["--vllm_memory_share", "0.3"]
        visible = {"CUDA_VISIBLE_DEVICES": str(card) if self.cards else ""}
        return [python, *words], os.environ | {"PYTHONPATH": str(ROOT)} | visible


def small_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    sizes |= {"vocab_size": 512, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes))


def free_port() -> int:
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@contextmanager
def server_of(machine: Machine, engine: str, card: int = 0) -> Iterator[Any]:
    """A connected server."""
    from coati.experience_maker.rollouts.rollout_client import RolloutServer, ServerFailed

    command, variables = machine.server_words(engine, card)
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)
    server = RolloutServer(f"http://127.0.0.1:{command[command.index('--port') + 1]}")
    end = time.monotonic() + START_S
    try:
        while True:
            try:
                server.connect()
                break
            except ServerFailed as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise NotHere(f"the server did not start: {error}") from error
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait()


def engine_of(machine: Machine) -> str:
    return "vllm" if Path(machine.vllm_python).exists() and not machine.cpu else "own"


def published(machine: Machine, sync: str) -> dict[str, Any]:
    from coati.experience_maker.rollouts.weight_store import make_store

    machine.need_card(2 if sync == "nccl" else 1)
    engine = engine_of(machine)
    with server_of(machine, engine, 1 if sync == "nccl" else 0) as server:
        store = make_store(machine.folder / sync, sync, [server.url], machine.device, 60)
        tensors = dict(machine.tensors)
        times = []
        for version in range(ROUNDS):
            tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
            began = time.perf_counter()
            weights = store.put(version, tensors)
            with store.offered(weights, server.url, 1) as place:
                server.take_weights(place)
            times.append(time.perf_counter() - began)
        server.compare(weights.published())
        store.close()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return {"engine": engine, "megabytes": size / 1e6, "seconds": median(times)}


def served(machine: Machine, engine: str) -> dict[str, Any]:
    from concurrent.futures import ThreadPoolExecutor

    from coati.experience_maker.rollouts.rollout_client import Row, Wanted
    from coati.experience_maker.rollouts.weight_store import make_store
    from coati.models.generation.sampling import Sampling

    machine.need_card()
    new = machine.new_tokens
    rows = [
        Row([5 + (n + k) % 200 for k in range(machine.prompt_tokens)], new, 1, 0, n)
        for n in range(machine.prompts)
    ]
    wanted = Wanted(Sampling(), ())
    with server_of(machine, engine) as server:
        store = make_store(machine.folder / "http", "http", [server.url], machine.device, 60)
        weights = store.put(0, machine.tensors)
        with store.offered(weights, server.url, 1) as place:
            server.take_weights(place)
        each = len(rows) if engine == "own" else 1
        parts = [rows[at : at + each] for at in range(0, len(rows), each)]
        times = []
        with ThreadPoolExecutor(len(parts)) as pool:
            for _ in range(1 + ROUNDS):
                began = time.perf_counter()
                for asked in [pool.submit(server.complete, p, wanted, place.name) for p in parts]:
                    asked.result()
                times.append(time.perf_counter() - began)
        store.close()
    return {"tokens_per_second": len(rows) * new / median(times[1:])}


def slept(machine: Machine) -> dict[str, Any]:
    machine.need_card()
    if machine.cpu:
        raise NotHere("vLLM does not sleep on a CPU")
    if importlib.util.find_spec("vllm") is None:
        raise NotHere("vllm is not installed in this environment")
    import torch
    from vllm import LLM

    llm = LLM(
        str(machine.folder / "model"),
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.3,
        enable_sleep_mode=True,
    )
    before = torch.cuda.mem_get_info()[0]
    began = time.perf_counter()
    llm.sleep(level=1)
    asleep = time.perf_counter()
    freed = torch.cuda.mem_get_info()[0] - before
    llm.wake_up()
    woken = time.perf_counter() - asleep
    return {"freed_mb": freed / 1e6, "sleep_s": asleep - began, "wake_s": woken}


def publish(report: Report, tiny: bool, sync: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        report.add(**published(Machine(tiny, Path(name)), sync))


def serve(report: Report, tiny: bool, engine: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        report.add(**served(Machine(tiny, Path(name)), engine))


def sleep(report: Report, tiny: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        report.add(**slept(Machine(tiny, Path(name))))
