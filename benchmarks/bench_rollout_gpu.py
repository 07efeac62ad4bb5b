"""Rollout servers on a GPU: seconds of a publish by each way, and tokens per second of vLLM beside
the library's own sampler.

Each item prints a line when it is done and is in the JSON from then on; one that cannot run here is
named with the reason. Model: the shape of SmolLM2-135M with random weights, bf16 on a GPU.

  publish_disk, publish_http, publish_nccl, publish_ipc   new weights to a server on the same card
  (nccl takes two cards: the server gets the second)
  rollout_vllm, rollout_own   64 prompts of 64 tokens, 128 new ones each, by a server of either kind
  sleep   vLLM in this process gives its memory back and wakes up

vLLM is looked for in --vllm_python, the interpreter of its environment (`python tools/venv.py
vllm`). --cpu runs every path that a CPU has, small, with the library's own sampler as the server.

    python benchmarks/bench_rollout_gpu.py [--only publish_ipc ...] [--output results.json]
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bench_publish import model_of_135m  # noqa: E402

SYNCS = ("disk", "http", "nccl", "ipc")
ITEMS = (*(f"publish_{sync}" for sync in SYNCS), "rollout_vllm", "rollout_own", "sleep")
ROUNDS = 5
START_S = 300


class NotHere(Exception):
    """Why an item cannot run on this machine."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS))
    default = ROOT / ".venv-vllm" / "bin" / "python"
    parser.add_argument("--vllm_python", default=str(default), help="default: .venv-vllm's")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


class Machine:
    """What there is to measure with, and the model in ``folder``."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        import torch

        self.cpu = args.cpu
        self.cards = 0 if args.cpu else torch.cuda.device_count()
        self.vllm_python = args.vllm_python
        self.device = torch.device("cuda" if self.cards else "cpu")
        self.folder = folder
        self.dtype = "bf16" if self.cards else "fp32"
        model = small_model() if args.cpu else model_of_135m(self.dtype)
        model.save_pretrained(folder / "model")
        state = model.state_dict()
        self.tensors = {n: t for n, t in state.items() if n != "lm_head.weight"}  # tied
        self.prompts, self.prompt_tokens, self.new_tokens = (4, 8, 8) if args.cpu else (64, 64, 128)

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


def publish(machine: Machine, sync: str) -> dict[str, float]:
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


def rollout(machine: Machine, engine: str) -> dict[str, float]:
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


def sleep(machine: Machine) -> dict[str, float]:
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
    slept = time.perf_counter()
    freed = torch.cuda.mem_get_info()[0] - before
    llm.wake_up()
    woken = time.perf_counter() - slept
    return {"freed_mb": freed / 1e6, "sleep_s": slept - began, "wake_s": woken}


def work_of(item: str) -> Callable[[Machine], dict[str, float]]:
    kind, _, which = item.partition("_")
    if kind == "publish":
        return lambda machine: publish(machine, which)
    if kind == "rollout":
        return lambda machine: rollout(machine, which)
    return sleep


def main() -> None:
    args = parse()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        machine = Machine(args, Path(name))
        for item in args.only:
            try:
                found[item] = work_of(item)(machine)
            except NotHere as error:
                found[item] = {"skipped": str(error)}
            said = ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in found[item].items()
            )
            print(f"{item}: {said}", flush=True)
            if args.output:
                Path(args.output).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
