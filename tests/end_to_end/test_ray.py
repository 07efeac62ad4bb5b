"""GRPO with rollouts by actors of a real Ray cluster: two raylets on this machine, an actor killed
while it samples, two training processes, and a run that goes on."""

import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from coati.parallel.checkpoint import checkpoints
from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.online_inputs import metrics, of_episode, weights
from tests.end_to_end.test_online_plugins import (
    assert_same_first_episode,
    assert_same_weights,
    shares,
)
from tests.end_to_end.worker import Ended, Fault, Run

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

# Both sides on loopback: Ray binds the machine's own address otherwise.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
PORTS = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
TRIES = 4  # a raylet whose agents start slowly on a busy machine gives up


def node(number: int) -> dict:
    first = 27200 + 10 * number
    ports = {name: first + i for i, name in enumerate((*PORTS, "metrics_export_port"))}
    return {
        "num_cpus": 1,
        "object_store_memory": 100 * 2**20,
        "node_ip_address": "127.0.0.1",
        **ports,
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOOPBACK.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        patch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", False)
        for left in reversed(range(TRIES)):
            started = Cluster()
            try:
                started.add_node(**node(2 * left), include_dashboard=False)
                started.add_node(**node(2 * left + 1))
                break
            except Exception:
                started.shutdown()
                if not left:
                    raise
        try:
            yield started
        finally:
            started.shutdown()


@pytest.fixture
def words(cluster, online_words, tmp_path):
    """``words(name, more...)``: three episodes of GRPO, sampled by two workers of the cluster."""
    every = ("--num_episodes", "3", "--save_interval", "1", "--rollout_workers", "2")
    every += ("--ray_address", cluster.address)

    def words(name: str, *more: str) -> list[str]:
        return online_words("grpo", tmp_path / name, *every, *more)

    return words


def ended(nproc: int, *cases: list[str], code: int = 0) -> list[Ended]:
    """The ends of all ranks, of one run after the other."""
    runs = {str(n): Run(words, script="train_grpo.py") for n, words in enumerate(cases)}
    env = {"CUDA_VISIBLE_DEVICES": "", **LOOPBACK}
    ranks = run(nproc, "tests.end_to_end.worker:train_each", runs, env=env, timeout=400)
    found = [rank[name] for name in runs for rank in ranks]
    assert [one.code for one in found] == [code] * len(found), [one.err for one in found]
    return found


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """``work(ended)`` in a thread, which is over when what is inside is."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def actors() -> list[psutil.Process]:
    """The processes that sample, of the cluster of this test."""
    found = []
    for one in psutil.Process().children(recursive=True):
        try:
            if one.cmdline() and one.cmdline()[0].startswith("ray::RolloutActor"):
                found.append(one)
        except psutil.Error:
            continue
    return found


def has_learned(place: Path) -> bool:
    """Whether the run in ``place`` has logged an episode."""
    log = place / "metrics.jsonl"
    return log.exists() and '"train/reward"' in log.read_text()


def kill_after_first(place: Path, killed: list[int]) -> Callable[[threading.Event], None]:
    """Once the run has logged an episode: one actor is held until it has a call, then killed."""

    def work(over: threading.Event) -> None:
        while not over.wait(0.01):
            if not has_learned(place):
                continue
            victim = actors()[0]
            victim.send_signal(signal.SIGSTOP)
            over.wait(1.0)
            killed.append(victim.pid)
            victim.kill()
            return

    return work


def test_two_workers_are_sampling_in_the_process(words, online_words, online_places, tmp_path):
    """One training process, then two: what is asked ahead, in step and in several turns, and with
    rewards that are computed there."""
    turns = ("--max_seq_len", "60", "--max_length", "144", "--prompt_dataset", "$rows")
    turns += ("--max_turns", "3", "--environment", f"{online_places['echo']}:Echo")
    kinds = {"step": (), "ahead": ("--rollouts_ahead", "1"), "turns": turns}
    there = ("--rewards_on_ray", "--rollout_worker_cpus", "0.5")
    three = ("--num_episodes", "3")
    alone = [online_words("grpo", tmp_path / f"a {k}", *three, *w) for k, w in kinds.items()]
    ended(1, *alone)
    ended(1, *[words(f"1 {kind}", *more) for kind, more in kinds.items()])
    two = {kind: (*more, *shares("grpo", 2)) for kind, more in kinds.items()}
    two["step"] += there
    ended(2, *[words(f"2 {kind}", *more) for kind, more in two.items()])
    start = Path(online_places["model"])
    for kind, count in itertools.product(kinds, (1, 2)):
        mine = tmp_path / f"{count} {kind}"
        expected = metrics(tmp_path / f"a {kind}")
        found = metrics(mine)
        assert_same_first_episode(of_episode(found, 1), of_episode(expected, 1), True)
        assert_same_weights(mine, tmp_path / f"a {kind}", start)
    assert of_episode(metrics(tmp_path / "2 ahead"), 2)["staleness"] > 0


@pytest.mark.parametrize("nproc", [1, 2])
def test_an_actor_killed_in_mid_answer_changes_no_bit(nproc, words, tmp_path):
    more = ("--rollouts_ahead", "1", *shares("grpo", nproc))
    ended(nproc, words("whole", *more))
    killed: list[int] = []
    with beside(kill_after_first(tmp_path / "killed", killed)):
        found = ended(nproc, words("killed", *more))
    assert killed and not psutil.pid_exists(killed[0])
    assert "rollout worker left out, its rows go to the others" in found[0].err
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert not actors(), "the actors of a run end with it"


def test_a_killed_trainer_goes_on_to_the_bit_with_other_workers(words, tmp_path):
    more = ("--rollouts_ahead", "1", *shares("grpo", 2))
    ended(2, words("whole", *more))
    fault = Fault("update", 2, "after", rank=0)
    killed = Run(words("killed", *more), fault, script="train_grpo.py")
    env = {"CUDA_VISIBLE_DEVICES": "", **LOOPBACK}
    with pytest.raises(WorkerFailed):
        run(2, "tests.end_to_end.worker:train", killed, env=env, timeout=200)
    again = ("--checkpoint_path", "auto", "--rollout_worker_cpus", "0.5")
    ended(2, words("killed", *more, *again))
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_other_environments_and_wrong_clusters_are_named(words, tmp_path):
    ended(1, words("other", "--num_episodes", "1", "--rollout_python", sys.executable))
    for name, more, said in (
        ("none", ("--rollout_python", "/nowhere/python"), "--rollout_python /nowhere/python: on"),
        ("bare", ("--rollout_python", "/usr/bin/python3"), "cannot be used: ModuleNotFoundError"),
        ("many", ("--rollout_workers", "3"), "--rollout_workers 3: 2 have room on the 2 hosts"),
        ("away", ("--ray_address", "127.0.0.1:9"), "--ray_address 127.0.0.1:9: nothing answers"),
    ):
        (found,) = ended(1, words(name, *more), code=1)
        assert said in found.err and "Traceback" not in found.err, found.err


def test_a_cluster_that_is_lost_ends_the_run_with_a_checkpoint(words, cluster, tmp_path):
    """Last: there is no cluster afterward. Ray itself would end the process after a minute."""
    place = tmp_path / "lost"

    def work(over: threading.Event) -> None:
        while not over.wait(0.01):
            if has_learned(place):
                cluster.head_node.all_processes["gcs_server"][0].process.kill()
                for one in actors():
                    one.kill()
                return

    many = ("--num_episodes", "99", "--save_interval", "0", "--rollout_timeout", "75")
    began = time.monotonic()
    with beside(work):
        (found,) = ended(1, words("lost", *many), code=1)
    assert "no rollout worker has worked for 75 s (--rollout_timeout)" in found.err
    assert time.monotonic() - began > 75
    assert checkpoints(place)
