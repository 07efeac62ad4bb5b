"""A Ray cluster that a run uses beside its own processes; Ray is imported when one is joined."""

import logging
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SUPPORTED = ">=2.60,<2.61"  # as in setup.py's extra
_FIRST = (2, 60)
_AFTER = (2, 61)
INSTALL = "pip install 'coati[ray]'"
AUTO = "auto"
REACH_S = 10.0  # for the head to take a connection
JOIN_S = 45.0  # for Ray to make this process part of the cluster
PROBE_S = 120.0  # for a Python of another environment to say what it has
# Ray ends a process that has lost the cluster's head for a minute: the run shall save first.
_LOST_HEAD = ("RAY_gcs_rpc_server_reconnect_timeout_s", "86400")
_connected: dict[str, int] = {}  # address -> users in this process


def ray_problem() -> str | None:
    """Why Ray cannot be used here, with the remedy; None where it can. Imports nothing."""
    try:
        found = version("ray")
    except PackageNotFoundError:
        return f"Ray is not installed; run {INSTALL}"
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if not _FIRST <= numbers < _AFTER:
        return f"Ray {found} is installed, this needs {SUPPORTED}; run {INSTALL}"
    return None


def connect(address: str) -> Any:
    """The module ``ray``, connected to the cluster whose head is at ``address`` ("host:port"), or
    to the one that this host is part of ("auto"). Each call wants a :func:`disconnect`.

    Raises ValueError, whose message begins with the address, for a cluster that cannot be joined.
    """
    if problem := ray_problem():
        raise ValueError(f"{address}: {problem}")
    if _connected and address not in _connected:
        raise ValueError(f"{address}: this process is part of the cluster {next(iter(_connected))}")
    os.environ.setdefault(*_LOST_HEAD)
    if address != AUTO:
        _reach(address)
    import ray

    if not ray.is_initialized():
        _join(ray, address)
    _connected[address] = _connected.get(address, 0) + 1
    return ray


def _reach(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise ValueError(
            f"{address}: nothing answers there ({error}); start the cluster with `ray start "
            "--head` on one host and `ray start --address=HEAD:6379` on the others, this one too"
        ) from error


def _join(ray: Any, address: str) -> None:
    """In a thread: Ray takes SIGTERM for itself where it is called by the main one, and waits for
    minutes on what is no head."""
    quiet = logging.getLogger("ray")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    said = _within(
        JOIN_S,
        lambda: ray.init(address=address, log_to_driver=False, configure_logging=False),
    )
    quiet.setLevel(level)
    if said is None:
        return
    if "Version mismatch" in said:
        raise ValueError(f"{address}: {_one_line(said)}; all hosts need the same")
    if address == AUTO and "not find any running Ray" in said:
        raise ValueError(
            f"{address}: this host is not part of a Ray cluster; start one with `ray start "
            "--head`, join one with `ray start --address=HEAD:6379`, or name its head, HOST:6379"
        )
    raise ValueError(
        f"{address}: the cluster cannot be joined ({_one_line(said)}); this host must be part of "
        "it: `ray start --address=HEAD:6379`"
    )


def _within(seconds: float, work: Callable[[], Any]) -> str | None:
    """What ``work`` failed with; None where it has done its work."""
    said: list[str] = [f"no answer within {seconds:g} s"]

    def run() -> None:
        try:
            work()
            said.clear()
        except BaseException as error:
            cause = error.__cause__
            said[0] = str(error) + (f": {cause}" if cause is not None else "")

    thread = threading.Thread(target=run, daemon=True, name="ray")
    thread.start()
    thread.join(seconds)
    return said[0] if said else None


def head_answers(ray: Any) -> bool:
    """Whether the head of the cluster takes connections."""
    try:
        _reach(ray.get_runtime_context().gcs_address)
    except ValueError:
        return False
    return True


def disconnect(address: str) -> None:
    """The other side of :func:`connect`: the last one leaves the cluster, with what it started
    there."""
    if address not in _connected:
        return
    _connected[address] -= 1
    if _connected[address]:
        return
    del _connected[address]
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    _within(REACH_S, ray.shutdown)
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)


def check_room(ray: Any, count: int, cpus: float, gpus: float, spare: float = 0.0) -> None:
    """Raises ValueError where the whole cluster has no room for ``count`` actors, each with so many
    ``cpus`` and ``gpus``, and tasks on ``spare`` CPUs beside them."""
    each = {name: part for name, part in (("CPU", cpus), ("GPU", gpus)) if part}
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = 0
    for node in alive:
        room = [int(node.get(name, 0.0) / part + 1e-6) for name, part in each.items()]
        fit += min(room, default=count)
    left = sum(node.get("CPU", 0.0) for node in alive) - count * cpus
    if fit >= count and left < spare:
        raise ValueError(
            f"{count}: they leave {max(left, 0):g} CPUs of the cluster for the tasks of "
            f"--rewards_on_ray, which need {spare:g}; lower --rollout_worker_cpus, or leave one out"
        )
    if fit >= count:
        return
    total = ", ".join(f"{sum(node.get(name, 0.0) for node in alive):g} {name}s" for name in each)
    raise ValueError(
        f"{count}: {fit} have room on the {len(alive)} hosts of the cluster ({total} in all), each "
        f"with --rollout_worker_cpus {cpus:g} and --rollout_worker_gpus {gpus:g}"
    )


def check_python(ray: Any, path: str, modules: tuple[str, ...]) -> None:
    """Raises ValueError where ``path`` is not, on every host of the cluster that has CPUs, a Python
    of this minor release with this Ray and ``modules``: Ray would start it again and again."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    probe = ray.remote(num_cpus=0, max_retries=0)(_probe())
    answers = [
        probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(path, modules, PROBE_S)
        for node in nodes
    ]
    mine = {"Python": _minor(platform.python_version()), "ray": ray.__version__}
    for node, answer in zip(nodes, answers, strict=True):
        host = node["NodeManagerHostname"]
        try:
            found = ray.get(answer, timeout=PROBE_S + REACH_S)
        except ray.exceptions.RayError as error:
            raise ValueError(f"{path}: not tried on {host} ({_one_line(str(error))})") from error
        if isinstance(found, str):
            raise ValueError(f"{path}: on {host} {found}")
        theirs = {"Python": _minor(found["Python"]), "ray": found["ray"]}
        if theirs != mine:
            said = ", ".join(f"{name} {theirs[name]}" for name in theirs)
            here = ", ".join(f"{name} {mine[name]}" for name in mine)
            raise ValueError(
                f"{path}: on {host} it has {said}, this run {here}; Ray needs the same on both "
                "sides"
            )


def _minor(release: str) -> str:
    return ".".join(release.split(".")[:2])


def _probe() -> Callable[[str, tuple[str, ...], float], Any]:
    """A function that travels with its code: the hosts' own Python need not have this library."""

    def probe(path: str, modules: tuple[str, ...], seconds: float) -> Any:
        import json
        import subprocess

        text = (
            "import importlib, importlib.metadata, json, platform\n"
            f"for name in {modules!r}: importlib.import_module(name)\n"
            "print(json.dumps({'Python': platform.python_version(), 'ray': "
            "importlib.metadata.version('ray')}))"
        )
        try:
            done = subprocess.run(
                [path, "-c", text], capture_output=True, text=True, timeout=seconds
            )
            if done.returncode:
                return f"cannot be used: {done.stderr.strip().splitlines()[-1]}"
            return json.loads(done.stdout.strip().splitlines()[-1])
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
            return f"cannot be run: {error}"

    return probe


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
