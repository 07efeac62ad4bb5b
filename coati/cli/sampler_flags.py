"""Which engine draws the responses of coati sample and coati evaluate: the flags and their
checks."""

import argparse
import importlib.util
import os
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from coati.cli.engine_flags import SHARE, TIMEOUT_S, wrong_url
from coati.cli.model_flags import (
    add_beta_gen_flag,
    add_own_template_flag,
    add_quant_flag,
    add_template_args_flag,
    add_tokenizer_flag,
    add_trust_flag,
)
from coati.cli.values import add_number, add_text
from coati.rewards.registry import check_url

ENGINES = ("model", "vllm")
# What says nothing to a server that has its own tokenizer and template.
OF_A_MODEL = (
    *("model_path", "tokenizer_path", "rollout_token_env", "quant", "beta_gen"),
    *("template_args", "trust_remote_code"),
)


@dataclass(frozen=True)
class SamplerSettings:
    """The engine. Without ``rollout_url`` and ``api_url`` the model of ``model_path`` samples in
    this process, by ``rollout_engine``."""

    model_path: str | None
    tokenizer_path: str | None
    conversation_template_config: str | None
    template_args: dict[str, Any] | None
    trust_remote_code: bool
    quant: str | None
    beta_gen: float | None
    rollout_engine: str
    rollout_url: list[str]
    rollout_timeout: float
    rollout_token_env: str | None
    vllm_memory_share: float
    api_url: str | None
    api_model: str | None

    @property
    def name(self) -> str:
        """What is sampled from, for people."""
        return self.model_path or f"{self.api_model} of {self.api_url}"

    @property
    def token(self) -> str | None:
        """The bearer token of ``--rollout_url``."""
        return None if self.rollout_token_env is None else os.environ[self.rollout_token_env]


def add_sampler_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """``--model_path``, what belongs to a model, and the group ``engine``; ``what``: help."""
    add_text(parser, "--model_path", unit="MODEL", help=what)
    add_tokenizer_flag(parser)
    add_own_template_flag(parser)
    add_template_args_flag(parser)
    add_trust_flag(parser)
    add_quant_flag(parser)
    add_beta_gen_flag(parser)
    group = parser.add_argument_group(
        "engine", "What draws the responses; without these flags the model, in this process."
    )
    group.add_argument(
        "--rollout_engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what generates responses in this process",
    )
    group.add_argument(
        "--rollout_url",
        nargs="+",
        default=[],
        metavar="URL",
        help="servers of coati rollout-server that serve --model_path, http://HOST:PORT each; rows "
        "are dealt out over them",
    )
    add_number(
        group,
        "--rollout_timeout",
        default=TIMEOUT_S,
        unit="SECONDS",
        exclusive=True,
        help="time limit of a request to a server",
    )
    add_text(
        group,
        "--rollout_token_env",
        unit="NAME",
        help="environment variable that holds the bearer token of --rollout_url; default: none",
    )
    add_text(
        group,
        "--api_url",
        unit="URL",
        help="any OpenAI-compatible server in place of --model_path, such as "
        "http://127.0.0.1:7070/v1, asked for chat completions; its key is read from the "
        "environment variable COATI_API_KEY",
    )
    add_text(group, "--api_model", unit="NAME", help="model of --api_url")
    add_number(
        group,
        "--vllm_memory_share",
        default=SHARE,
        unit="SHARE",
        exclusive=True,
        most=1,
        help="share of the GPU's memory for --rollout_engine vllm",
    )


def check_sampler(args: Namespace) -> None:
    """Raise ValueError, naming the flag, for no engine, several, or what belongs to another."""
    if args.api_url is not None:
        _check_api(args)
    elif args.model_path is None:
        raise ValueError(
            "--model_path is required: a model directory, a LoRA adapter or a training checkpoint "
            "(or --api_url and --api_model, an OpenAI-compatible server)"
        )
    elif args.api_model is not None:
        raise ValueError("--api_model does nothing without --api_url")
    vllm = args.rollout_engine == "vllm"
    if vllm and args.rollout_url:
        raise ValueError(
            "--rollout_url names servers, --rollout_engine vllm samples in this process; leave one "
            "of the two out"
        )
    if args.rollout_url:
        _check_servers(args)
    elif args.rollout_token_env is not None:
        raise ValueError("--rollout_token_env does nothing without --rollout_url; leave it out")
    if not args.rollout_url and args.api_url is None and args.rollout_timeout != TIMEOUT_S:
        raise ValueError("--rollout_timeout does nothing without --rollout_url or --api_url")
    if not vllm and args.vllm_memory_share != SHARE:
        raise ValueError("--vllm_memory_share does nothing without --rollout_engine vllm")
    if vllm or args.rollout_url:
        for flag in ("quant", "beta_gen"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag} belongs to the model in this process; leave it out")
    if vllm and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "--rollout_engine vllm: vllm is not installed; install it (it needs a GPU), run it as "
            "a server in an environment of its own (--rollout_url), or leave this out"
        )


def _check_api(args: Namespace) -> None:
    check_url("--api_url", args.api_url)
    if not args.api_model:
        raise ValueError("--api_model is missing: the model of --api_url")
    for flag in OF_A_MODEL:
        if not (getattr(args, flag) is None or getattr(args, flag) is False):
            raise ValueError(
                f"--{flag} does nothing with --api_url, whose server has a model and a template of "
                "its own; leave one of the two out"
            )
    for flag in ("rollout_url", "rollout_engine"):
        if getattr(args, flag) not in ([], ENGINES[0]):
            raise ValueError(f"--{flag} and --api_url both say who samples; leave one of them out")


def _check_servers(args: Namespace) -> None:
    for number, url in enumerate(args.rollout_url):
        if problem := wrong_url(url):
            raise ValueError(f"--rollout_url {url}: {problem}")
        if url.rstrip("/") in [one.rstrip("/") for one in args.rollout_url[:number]]:
            raise ValueError(f"--rollout_url {url} stands twice; name each server once")
    name = args.rollout_token_env
    if name is not None and not os.environ.get(name):
        raise ValueError(
            f"--rollout_token_env {name}: the variable is not set; put the servers' token into it"
        )
