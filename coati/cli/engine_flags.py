"""Which engine writes the responses of PPO and GRPO, and how weights reach it: the flags and their
checks."""

import importlib.util
import os
from argparse import Namespace, _ActionsContainer
from urllib.parse import urlsplit

from coati.cli.parser import Parser
from coati.cli.ray_flags import OF_WORKERS, add_ray_flags, check_ray
from coati.cli.values import add_number, add_switch, add_text

ENGINES = ("model", "vllm", "http", "ray")
SYNCS = ("http", "disk", "ipc", "nccl")
TIMEOUT_S = 600.0
SHARE = 0.4
OF_VLLM = {"vllm_memory_share": SHARE, "vllm_sleep": False}
OF_BOTH = {"rollout_timeout": TIMEOUT_S}
OF_SERVERS = {
    "rollout_sync": SYNCS[0],
    "rollout_weights_dir": None,
    "rollout_token_env": None,
}


def add_engine_choice(group: _ActionsContainer) -> None:
    """``--rollout_engine``, which stands among the flags of rollouts."""
    group.add_argument(
        "--rollout_engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what generates responses: the trained model itself, vLLM in this process (one GPU), "
        "servers (--rollout_url, which implies http), or actors of a Ray cluster "
        "(--rollout_workers, which implies ray)",
    )


def add_engine_flags(parser: Parser) -> None:
    """The engines that are not the trained model."""
    group = parser.add_argument_group(
        "rollout servers and vLLM", "Responses from other processes: coati rollout-server."
    )
    group.add_argument(
        "--rollout_url",
        nargs="+",
        default=[],
        metavar="URL",
        help="servers that generate responses, http://HOST:PORT each; rows are dealt out over them",
    )
    group.add_argument(
        "--rollout_sync",
        choices=SYNCS,
        default=SYNCS[0],
        help="how new weights reach the servers. http: fetched from rank 0; disk: read from "
        "--rollout_weights_dir; ipc: in memory of the GPU that a server shares with rank 0; nccl: "
        "from rank 0's GPU to the servers'",
    )
    add_text(
        group,
        "--rollout_weights_dir",
        help="where published weights lie until the last response that needs them is in; with "
        "--rollout_sync disk the servers must see it; default: in --save_dir",
    )
    add_number(
        group,
        "--rollout_timeout",
        default=TIMEOUT_S,
        unit="SECONDS",
        exclusive=True,
        help="time limit of a request; when no server or Ray actor has worked for so long, the run "
        "saves and stops",
    )
    add_text(
        group,
        "--rollout_token_env",
        unit="NAME",
        help="environment variable that holds the bearer token of the servers; default: none",
    )
    add_number(
        group,
        "--vllm_memory_share",
        default=SHARE,
        unit="SHARE",
        exclusive=True,
        most=1,
        help="share of the GPU's memory for vLLM in this process; training has the rest",
    )
    add_switch(
        group,
        "--vllm_sleep",
        help="vLLM in this process gives its GPU memory back while the model is trained",
    )
    add_ray_flags(parser)


def check_engine(args: Namespace) -> None:
    """Raises ValueError for an engine that cannot work; ``--rollout_url`` and ``--rollout_workers``
    resolve ``rollout_engine``."""
    check_ray(args)
    if args.rollout_url:
        if args.rollout_engine == "vllm":
            raise ValueError(
                "--rollout_url names servers, --rollout_engine vllm samples in this process; leave "
                "one of the two out"
            )
        args.rollout_engine = "http"
    elif args.rollout_engine == "http":
        raise ValueError(
            "--rollout_engine http needs --rollout_url: the address of each server that coati "
            "rollout-server started"
        )
    if args.rollout_engine != "http":
        refuse_without(args, OF_SERVERS, "--rollout_url")
    if args.rollout_engine not in ("http", "ray"):
        refuse_without(args, OF_BOTH, "--rollout_url or --rollout_workers")
    if args.rollout_engine != "ray":
        refuse_without(args, OF_WORKERS, "--rollout_workers")
    if args.rollout_engine != "vllm":
        refuse_without(args, OF_VLLM, "--rollout_engine vllm")
    if args.rollout_engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "--rollout_engine vllm: vllm is not installed; install it (it needs a GPU), run it as "
            "a server in an environment of its own (--rollout_url), or leave this out"
        )
    if args.rollout_engine == "http":
        _check_servers(args)


def refuse_without(args: Namespace, flags: dict[str, object], owner: str) -> None:
    """Raises ValueError for the first of ``flags`` (name -> default) that is given, though not
    ``owner``."""
    for name, default in flags.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name} does nothing without {owner}; leave it out")


def _check_servers(args: Namespace) -> None:
    for url in args.rollout_url:
        if problem := wrong_url(url):
            raise ValueError(f"--rollout_url {url}: {problem}")
    # Not a set: the first to stand twice is named.
    for number, url in enumerate(args.rollout_url):
        if url.rstrip("/") in [one.rstrip("/") for one in args.rollout_url[:number]]:
            raise ValueError(f"--rollout_url {url} stands twice; name each server once")
    name = args.rollout_token_env
    if name is not None and not os.environ.get(name):
        raise ValueError(
            f"--rollout_token_env {name}: the variable is not set; put the servers' token into it"
        )


def wrong_url(url: str) -> str | None:
    """What is wrong with the address of a server; None where nothing is."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname)
        fine = fine and parts.path in ("", "/") and not parts.query and parts.username is None
        _ = parts.port
    except ValueError:
        fine = False
    return None if fine else "expected the address of a server, http://HOST:PORT"
