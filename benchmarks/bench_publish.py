"""What it takes to publish new weights to where rollouts are sampled: bytes, and seconds by disk,
by HTTP and by Ray.

A model of 135M parameters (the shape of SmolLM2-135M, random weights, --dtype) in a server process
of its own (`coati rollout-server --engine own`, on this machine), which is told of new weights
--rounds times each way, in turn. Written: from tensors in memory to files with digests, in a thread
beside training. Taken: the pause, the way to the server, the comparison of digests, the copy into
the model and the first request after it being let in again. With --ray the same to two actors of a
cluster of two raylets on this machine (loopback): written is ray.put, taken is what an actor needs
on the host of the trainer (the same store) and on the other one (a copy over the network before).
The median is printed.

    python benchmarks/bench_publish.py [--rounds 5] [--dtype fp32] [--ray] [--output results.json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="publishes of each way")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--ray", action="store_true", help="through Ray's object store, too")
    parser.add_argument("--output", help="write the figures as JSON")
    return parser.parse_args()


def model_of_135m(dtype: str):
    """A Llama of the sizes of SmolLM2-135M."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)


@contextmanager
def server_of(folder: Path, **options):
    """The URL of a server of the model in ``folder``, in a process of its own. ``options``: of
    ``subprocess.Popen``."""
    words = ["rollout-server", str(folder), "--engine", "own", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "coati", *words],
        stdout=subprocess.PIPE,
        text=True,
        **{"env": os.environ | {"PYTHONPATH": str(ROOT)}, **options},
    )
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def cluster_of_two():
    """The address of a Ray cluster of two raylets on this machine's loopback."""
    # Otherwise both bind the machine's own address.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    room = {"num_cpus": 1, "object_store_memory": 2 << 30, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**room, "include_dashboard": False})
    try:
        cluster.add_node(**room)
        yield cluster.address
    finally:
        cluster.shutdown()


def measure_ray(folder: Path, tensors: dict, args: argparse.Namespace) -> dict[str, dict]:
    """As :func:`measure`, of an actor on each of two hosts."""
    from coati.experience_maker.rollouts.ray_rollout import RayOptions, RayStore, RayWorker
    from coati.utils.ray_cluster import connect, disconnect

    found: dict[str, dict[str, list[float]]] = {}
    with cluster_of_two() as address:
        ray = connect(address)
        options = RayOptions(2, str(folder), {}, 512, address=address, precision=args.dtype)
        workers = [RayWorker(ray, number, options) for number in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.connect()
        store = RayStore(ray)
        here = ray.get_runtime_context().get_node_id()
        at = {}
        for worker in workers:
            state = ray._private.state.actors(worker._actor._actor_id.hex())
            at["ray" if state["Address"]["NodeID"] == here else "ray, other host"] = worker
        for version in range(args.rounds):
            tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
            began = time.perf_counter()
            weights = store.put(version, tensors)
            place = weights.published()
            written = time.perf_counter() - began
            for name, worker in at.items():
                began = time.perf_counter()
                worker.take_weights(place)
                times = found.setdefault(name, {"written": [], "taken": []})
                times["written"].append(written)
                times["taken"].append(time.perf_counter() - began)
            store.keep_only(lambda last=weights: [last])
        store.close()
        disconnect(address)
    return found


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    from coati.experience_maker.rollouts.rollout_client import RolloutServer
    from coati.experience_maker.rollouts.weight_store import WeightStore

    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_of_135m(args.dtype)
        model.save_pretrained(folder / "model")
        tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        with server_of(folder / "model") as url:
            server = RolloutServer(url)
            server.connect()
            stores = {sync: WeightStore(folder / sync, sync, [url]) for sync in ("disk", "http")}
            for version in range(args.rounds):
                for sync, store in stores.items():
                    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
                    began = time.perf_counter()
                    weights = store.put(version, tensors)
                    weights.wait()
                    written = time.perf_counter()
                    with store.offered(weights, url, 1) as place:
                        server.take_weights(place)
                    taken = time.perf_counter()
                    times = found.setdefault(sync, {"written": [], "taken": []})
                    times["written"].append(written - began)
                    times["taken"].append(taken - written)
            for store in stores.values():
                store.close()
        if args.ray:
            found |= measure_ray(folder / "model", tensors, args)
    return {
        sync: {"megabytes": size / 1e6} | {name: median(values) for name, values in times.items()}
        for sync, times in found.items()
    }


def main() -> None:
    args = parse()
    figures = measure(args)
    for sync, row in figures.items():
        print(
            f"{sync}: {row['megabytes']:.0f} MB, written in {row['written']:.2f} s, taken by the "
            f"sampler in {row['taken']:.2f} s"
        )
    if args.output:
        Path(args.output).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
