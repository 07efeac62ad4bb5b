"""The flags of the server that generates responses for a run, and what is checked of them before a
model is loaded."""

import importlib.util
import os
import shlex
from argparse import SUPPRESS
from collections.abc import Sequence

from coati.cli.checks import checked
from coati.cli.model_flags import add_trust_flag
from coati.cli.parser import OlderFlags, Parser
from coati.cli.program_settings import RolloutServerSettings
from coati.cli.serve import LOOPBACK, name_one_model
from coati.cli.settings import filled
from coati.cli.values import add_count, add_number, add_text, whole_number
from coati.models.loading import DTYPES
from coati.utils.logging import get_logger

logger = get_logger(__name__)

PORT = 9001
OF_VLLM = {"tensor_parallel": 1, "vllm_memory_share": None, "vllm_args": None}


def rollout_server_parser() -> Parser:
    """The parser of ``coati rollout-server``."""
    parser = Parser(
        prog="coati rollout-server",
        usage="%(prog)s MODEL [flags]",
        description="Generates the responses of coati ppo and coati grpo (--rollout_url), in a "
        "process, an environment and on a host of its own: with vLLM where that is installed, else "
        "with the library's own sampler behind the same routes. Whoever reaches it can use the "
        "model and change its weights: loopback or a private network only.",
    )
    parser.add_argument("pretrained", nargs="?", help=SUPPRESS)
    add_text(
        parser,
        "--model_path",
        "--model",
        unit="MODEL",
        help="Hugging Face directory or hub name of the model that is trained (required)",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "own"),
        default="auto",
        help="what generates; auto: vLLM where it is installed, else the library's own sampler, "
        "whose responses are those of sampling in the training process",
    )
    _add_network_flags(parser)
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="auto",
        help="precision of the weights; auto: as stored. That of --mixed_precision keeps the "
        "log-probs of both sides close",
    )
    add_count(
        parser,
        "--max_length",
        least=2,
        unit="TOKENS",
        help="prompt and response together; default: what the model has positions for",
    )
    add_trust_flag(parser)
    _add_vllm_flags(parser)
    return parser


def _add_network_flags(parser: Parser) -> None:
    group = parser.add_argument_group("network")
    add_text(
        group,
        "--http_host",
        "--host",
        default="127.0.0.1",
        unit="ADDRESS",
        help="address to bind; that of a private network for trainers on other hosts",
    )
    group.add_argument(
        "--http_port",
        "--port",
        type=whole_number(0),
        default=PORT,
        metavar="PORT",
        help="0: any free port, which is printed (not with vLLM)",
    )
    add_text(
        group,
        "--token_env",
        unit="NAME",
        help="environment variable with the bearer token that every request must bring; default: "
        "none",
    )


def _add_vllm_flags(parser: Parser) -> None:
    group = parser.add_argument_group("vLLM")
    add_count(group, "--tensor_parallel", default=1, help="GPUs that share the model")
    add_number(
        group,
        "--vllm_memory_share",
        unit="SHARE",
        exclusive=True,
        most=1,
        help="share of the GPU's memory; default: vLLM's own",
    )
    add_text(
        group,
        "--vllm_args",
        unit="FLAGS",
        help="further flags of vLLM's server, in one word: --vllm_args='--max-num-seqs 64'",
    )


def parse_rollout_server(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> RolloutServerSettings:
    """The checked flags, with ``engine`` resolved and ``token`` read.

    Exits with code 2 and one line naming a wrong flag.
    """
    parser = rollout_server_parser().named(prog)
    args = checked(parser, argv, older=older)
    name_one_model(parser, args, "the directory of the model that is trained")
    if args.http_port > 65535:
        parser.error(f"--http_port {args.http_port}: the highest port is 65535")
    args.engine = _engine(parser, args.engine)
    if args.engine == "own":
        for name, default in OF_VLLM.items():
            if getattr(args, name) != default:
                parser.error(f"--{name} belongs to vLLM, and the library's own sampler serves here")
    elif args.http_port == 0:
        parser.error("--http_port 0: vLLM needs a port; name one")
    args.token = _token(parser, args.token_env)
    try:
        args.vllm_args = shlex.split(args.vllm_args or "")
    except ValueError as error:
        parser.error(f"--vllm_args {args.vllm_args!r}: {error}")
    if args.token is None and args.http_host not in LOOPBACK:
        logger.warning_once(
            f"--http_host {args.http_host} without --token_env: anyone who can reach this address "
            "can use the model and change its weights"
        )
    return filled(RolloutServerSettings, vars(args))


def _engine(parser: Parser, asked: str) -> str:
    there = importlib.util.find_spec("vllm") is not None
    if asked == "vllm" and not there:
        parser.error(
            "--engine vllm: vllm is not installed here; make an environment for it (python "
            "tools/venv.py .venv-vllm --vllm), or take --engine own"
        )
    if asked == "auto" and not there:
        logger.info("vllm is not installed here: the library's own sampler serves.")
    return "vllm" if there and asked != "own" else "own"


def _token(parser: Parser, name: str | None) -> str | None:
    if name is None:
        return None
    token = os.environ.get(name, "").strip()
    if not token or not token.isascii():
        parser.error(f"--token_env {name}: the variable holds no token (ASCII)")
    return token
