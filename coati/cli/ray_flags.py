"""Flags of rollouts on a Ray cluster, and their checks. Imports no Ray."""

from argparse import Namespace

from coati.cli.parser import Parser
from coati.cli.values import add_count, add_number, add_switch, add_text
from coati.utils.ray_cluster import AUTO, ray_problem

OF_WORKERS = {
    "rollout_worker_cpus": 1.0,
    "rollout_worker_gpus": 0.0,
    "rollout_python": None,
}


def add_ray_flags(parser: Parser) -> None:
    """The group of a Ray cluster."""
    group = parser.add_argument_group(
        "Ray",
        "Responses by actors of a Ray cluster, rewards by its tasks; training stays in its own "
        "processes.",
    )
    add_count(
        group,
        "--rollout_workers",
        unit="N",
        help="actors that generate responses, each with a copy of the model; rows are dealt out "
        "over them",
    )
    add_text(
        group,
        "--ray_address",
        default=AUTO,
        unit="HOST:PORT",
        help="head of the cluster, which the host of rank 0 must be part of (ray start); auto: the "
        "cluster that it is part of",
    )
    add_text(
        group,
        "--rollout_python",
        unit="PATH",
        help="Python that runs the actors, of another environment on their hosts: the same minor "
        "release and the same Ray as here, and this library; default: the one that runs Ray there",
    )
    add_number(
        group,
        "--rollout_worker_cpus",
        default=1.0,
        unit="CPUS",
        exclusive=True,
        help="of the cluster, for each actor; so many threads it computes with",
    )
    add_number(
        group,
        "--rollout_worker_gpus",
        default=0.0,
        unit="GPUS",
        help="of the cluster, for each actor: 1, or 0.5 for two on a card; 0: it samples on CPUs",
    )
    add_switch(
        group,
        "--rewards_on_ray",
        help="compute --reward_functions (but judge and endpoints) as tasks of the cluster, while "
        "others are sampled; the host of each rank must be part of it",
    )


def check_ray(args: Namespace) -> None:
    """Raises ValueError for a cluster that cannot be used; ``--rollout_workers`` resolves
    ``rollout_engine``."""
    if args.rollout_workers is not None:
        _check_workers(args)
    elif args.rollout_engine == "ray":
        raise ValueError(
            "--rollout_engine ray needs --rollout_workers: how many actors generate responses"
        )
    if args.rewards_on_ray and not (args.reward_functions or args.source_rewards):
        raise ValueError(
            "--rewards_on_ray does nothing without --reward_functions: a reward model scores in "
            "the training processes"
        )
    users = [name for name in ("rollout_workers", "rewards_on_ray") if getattr(args, name)]
    if not users:
        if args.ray_address != AUTO:
            raise ValueError(
                "--ray_address does nothing without --rollout_workers or --rewards_on_ray; leave "
                "it out"
            )
        return
    if problem := ray_problem():
        raise ValueError(f"--{users[0]}: {problem}, or leave this out")
    if problem := _wrong_address(args.ray_address):
        raise ValueError(f"--ray_address {args.ray_address}: {problem}")


def _check_workers(args: Namespace) -> None:
    if args.rollout_url:
        raise ValueError(
            "--rollout_url names servers, --rollout_workers asks a Ray cluster for actors; leave "
            "one of the two out"
        )
    if args.rollout_engine == "vllm":
        raise ValueError(
            "--rollout_workers asks a Ray cluster for actors, --rollout_engine vllm samples in "
            "this process; leave one of the two out"
        )
    args.rollout_engine = "ray"


def _wrong_address(address: str) -> str | None:
    host, _, port = address.rpartition(":")
    fine = bool(host) and "/" not in host and port.isdecimal() and 0 < int(port) < 65536
    if address == AUTO or fine:
        return None
    if "://" in address:
        return "expected the head itself, HOST:6379; Ray's client (ray://) is not used"
    return "expected auto, or the head of a cluster, HOST:PORT (6379 by default)"
