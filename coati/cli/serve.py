"""The flags of the web server, and what is checked of them before a model is loaded."""

import os
import socket
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from pathlib import Path

from coati.cli.checks import checked
from coati.cli.inference import add_sampling_flags
from coati.cli.model_flags import (
    add_beta_gen_flag,
    add_own_template_flag,
    add_quant_flag,
    add_template_args_flag,
    add_tokenizer_flag,
    add_trust_flag,
)
from coati.cli.parser import OlderFlags, Parser
from coati.cli.program_settings import ServerSettings
from coati.cli.settings import filled
from coati.cli.values import add_count, add_number, add_text, whole_number
from coati.utils.logging import get_logger

logger = get_logger(__name__)

TOKEN_VARIABLE = "COATI_SERVER_TOKEN"
ORIGIN_VARIABLE = "CORS_ORIGIN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def server_parser() -> Parser:
    """The parser of ``coati serve``."""
    parser = Parser(
        prog="coati serve",
        usage="%(prog)s MODEL [flags]",
        description="Serves a model over HTTP: OpenAI-compatible chat completions, /generate, and "
        "a web chat page. `MODEL` may also be given without `--model_path`.",
    )
    parser.add_argument("pretrained", nargs="?", help=SUPPRESS)
    add_text(
        parser,
        "--model_path",
        "--model",
        unit="MODEL",
        help="Hugging Face directory or hub name, LoRA adapter, or training checkpoint (required)",
    )
    add_tokenizer_flag(parser)
    add_own_template_flag(parser)
    add_template_args_flag(parser)
    add_text(
        parser,
        "--served_model_name",
        unit="NAME",
        help="model name in the API; default: the directory's name",
    )
    add_trust_flag(parser)
    add_quant_flag(parser)
    add_beta_gen_flag(parser)
    _add_network_flags(parser)
    _add_limits(parser)
    add_sampling_flags(parser, seed=False)
    return parser


def _add_network_flags(parser: Parser) -> None:
    group = parser.add_argument_group("network")
    add_text(
        group,
        "--http_host",
        "--host",
        default="127.0.0.1",
        unit="ADDRESS",
        help="address to bind; 0.0.0.0: reachable from other machines",
    )
    group.add_argument(
        "--http_port",
        "--port",
        type=whole_number(0),
        default=7070,
        metavar="PORT",
        help="0: any free port, which is printed",
    )
    add_text(
        group,
        "--token_file",
        unit="FILE",
        help="file whose first line is the bearer token clients must send; default: the "
        f"environment variable {TOKEN_VARIABLE}, else none",
    )
    add_text(
        group,
        "--cors_origins",
        unit="ORIGIN,...",
        help="origins of other web pages that may call the server (CORS); default: the environment "
        f"variable {ORIGIN_VARIABLE}, else none",
    )
    add_text(
        group,
        "--profanity_file",
        unit="FILE",
        help="words refused in messages, and before which a response ends: a JSON list, or one per "
        "line",
    )


def _add_limits(parser: Parser) -> None:
    group = parser.add_argument_group("limits")
    add_count(
        group,
        "--model_max_length",
        least=2,
        help="maximum tokens of dialogue and response together, which bounds memory; requests for "
        "more are refused; default: what the model has, to which requests are cut",
    )
    add_count(
        group,
        "--max_new_tokens",
        help="maximum tokens per response; requests for more are refused; default: what the model "
        "has room for, and 512 for a request that does not say",
    )
    add_count(group, "--max_batch", default=8, help="requests decoded at the same time")
    add_count(
        group,
        "--max_queue",
        default=64,
        help="requests that may wait; further ones get status 429",
    )
    add_number(
        group,
        "--timeout",
        default=300.0,
        unit="SECONDS",
        exclusive=True,
        help="time limit of a request, including its wait in the queue",
    )
    add_count(
        group,
        "--shutdown_timeout",
        default=30,
        least=0,
        unit="SECONDS",
        help="grace period for running requests after SIGTERM or Ctrl-C",
    )


def name_one_model(parser: Parser, args: Namespace, what: str) -> None:
    """Resolve ``model_path``, which may come as the positional ``pretrained``; ``what`` it is."""
    if args.pretrained and args.model_path:
        parser.error(f"{args.pretrained} and --model_path {args.model_path}: name one model")
    args.model_path = args.model_path or args.pretrained
    if args.model_path is None:
        parser.error(f"--model_path is required: {what}")


def parse_server(
    argv: Sequence[str] | None = None,
    older: OlderFlags | None = None,
    prog: str | None = None,
) -> ServerSettings:
    """The checked flags, with ``token`` (None: no authentication) and ``cors_origins`` as a tuple.

    Exits with code 2 and one line naming a wrong flag.
    """
    parser = server_parser().named(prog)
    args = checked(parser, argv, older=older)
    name_one_model(parser, args, "a model directory, a LoRA adapter or a training checkpoint")
    limits = args.max_new_tokens, args.model_max_length
    if None not in limits and args.max_new_tokens >= args.model_max_length:
        parser.error(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in "
            f"--model_max_length {args.model_max_length}"
        )
    if args.http_port > 65535:
        parser.error(f"--http_port {args.http_port}: the highest port is 65535")
    args.served_model_name = args.served_model_name or _name_of(args.model_path)
    origins = (
        args.cors_origins if args.cors_origins is not None else os.environ.get(ORIGIN_VARIABLE, "")
    )
    args.cors_origins = tuple(origin.strip() for origin in origins.split(",") if origin.strip())
    args.token = _token(parser, args.token_file)
    if args.token is None and args.http_host not in LOOPBACK:
        logger.warning_once(
            f"--http_host {args.http_host} without --token_file: anyone who can reach this address "
            "can use the model"
        )
    return filled(ServerSettings, vars(args))


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to ``host`` and ``port``, taken before the model is loaded. Raises ValueError
    naming the flag."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # otherwise another server could still take the port while the model loads
    except socket.gaierror as error:
        raise ValueError(f"--http_host {host}: no such address ({error.strerror})") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"--http_port {port} on {host} is not available ({reason}); name another one"
        ) from error
    return bound


def _name_of(path: str) -> str:
    """``out/sft/modeling`` is called sft: every output directory has a ``modeling``."""
    parts = [part for part in Path(path).absolute().parts if part not in ("modeling", "actor")]
    return parts[-1]


def _token(parser: Parser, file: str | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        # Not the error's own text, which may quote what the file holds.
        parser.error(
            f"--token_file {file}: not readable ({type(error).__name__}); its first line must be "
            "the token"
        )
    token = lines[0].strip() if lines else ""
    if not token or not token.isascii():
        parser.error(f"--token_file {file}: expected the token, in ASCII, on its first line")
    return token
