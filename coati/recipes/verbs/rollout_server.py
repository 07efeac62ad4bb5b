"""Generate responses for PPO and GRPO in a process of its own."""

import importlib.metadata
import os
import signal
import sys
from pathlib import Path

from coati.cli.program_settings import RolloutServerSettings
from coati.cli.rollout_server import parse_rollout_server, rollout_server_parser
from coati.cli.serve import listening_socket
from coati.cli.verb import Verb
from coati.models.loading import DTYPES, find_model
from coati.utils.phases import import_libraries

VERB = Verb(
    "training",
    rollout_server_parser,
    parse_rollout_server,
    "coati.recipes.verbs.rollout_server:main",
    subject="--model_path",
)
LIBRARY = Path(__file__).resolve().parents[3]
# A small cache, and threads that are not bound to cores which others use.
ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
WORKER = "coati.experience_maker.rollouts.vllm_worker"


def main(args: RolloutServerSettings) -> None:
    if args.engine == "vllm":
        return _become_vllm(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listening = listening_socket(args.http_host, args.http_port)
    import_libraries()
    import torch

    from coati.experience_maker.rollouts.own_sampler import OwnSampler
    from coati.experience_maker.rollouts.own_server import OwnServer
    from coati.models.loading import load_causal_lm

    place = find_model(args.model_path, "actor")
    model = load_causal_lm(place, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    server = OwnServer(listening, OwnSampler(model, args.max_length), place, args.token)
    host, port = listening.getsockname()[:2]
    print(f"{place} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()


def _become_vllm(args: RolloutServerSettings) -> None:
    """Replace this process by vLLM's server: signals and its end are its own."""
    command, variables = vllm_command(args)
    os.execve(command[0], command, variables)


def vllm_command(args: RolloutServerSettings) -> tuple[list[str], dict[str, str]]:
    """What starts vLLM's server, with the routes by which weights reach it, and its variables."""
    place = find_model(args.model_path, "actor")
    variables = dict(os.environ)
    # The routes that training needs.
    variables["VLLM_SERVER_DEV_MODE"] = "1"
    # Its workers import the extension from this library.
    paths = [str(LIBRARY), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # The program, not `vllm serve`: that one does not find the package where it has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", place]
    command += ["--served-model-name", place]
    command += ["--host", args.http_host, "--port", str(args.http_port)]
    command += ["--dtype", DTYPES[args.dtype]]
    command += ["--worker-extension-cls", f"{WORKER}.RolloutWorker"]
    command += ["--logprobs-mode", "processed_logprobs", "--no-enable-prefix-caching"]
    if args.max_length is not None:
        command += ["--max-model-len", str(args.max_length)]
    if args.tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(args.tensor_parallel)]
    if args.vllm_memory_share is not None:
        command += ["--gpu-memory-utilization", f"{args.vllm_memory_share:g}"]
    if args.trust_remote_code:
        command.append("--trust-remote-code")
    if args.token is not None:
        from coati.experience_maker.rollouts.vllm_worker import TOKEN_VARIABLE

        variables[TOKEN_VARIABLE] = args.token
        command += ["--middleware", f"{WORKER}.TokenGuard"]
    if is_for_cpus():
        variables = ON_CPU | variables
        # Compilation takes minutes at the start; a prompt that is prefilled in parts ends vLLM 0.32
        # on a CPU where its request has a seed ("CPU Generator does not use offset").
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]
    return command + args.vllm_args, variables


def is_for_cpus() -> bool:
    """Whether the vLLM that is installed here runs on CPUs."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
