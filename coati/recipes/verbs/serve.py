"""Serve a model: OpenAI's protocol and a chat page."""

import signal
import sys

from coati.cli.program_settings import ServerSettings
from coati.cli.row_flags import template_args
from coati.cli.serve import LOOPBACK, listening_socket, parse_server, server_parser
from coati.cli.verb import Verb
from coati.utils.phases import import_libraries

VERB = Verb(
    "models",
    server_parser,
    parse_server,
    "coati.recipes.verbs.serve:main",
    subject="--model_path",
)


def is_reward_model(args: ServerSettings) -> bool:
    """Whether the model has the head of one, so that it scores responses and writes none. Raises
    ValueError for flags that it has no use for."""
    from coati.models.loading import find_model
    from coati.models.loading_errors import explained
    from coati.models.scalar_loading import head_state

    directory = find_model(args.model_path, "actor")
    try:
        head = head_state(directory)
    except Exception as error:  # safetensors and pickle have error classes of their own
        raise explained(directory, "model", error) from error
    if head is None:
        return False
    for flag in ("quant", "beta_gen", "profanity_file", "tokenizer_path"):
        if getattr(args, flag) is not None:
            raise ValueError(
                f"--{flag}: {args.model_path} is a reward model, which has no use for it"
            )
    return True


def reward_app(args: ServerSettings):
    """The application that answers POST /score."""
    from coati.inference.evaluate.score_rows import load_reward_model
    from coati.inference.serve.reward_web import RewardScorer, make_reward_app

    code = args.trust_remote_code
    model, tokenizer, conversation = load_reward_model(
        args.model_path, args.conversation_template_config, trust_remote_code=code
    )
    scorer = RewardScorer(model, tokenizer, conversation, args.model_max_length, args.max_batch)
    return make_reward_app(scorer, args.served_model_name, args.token, hosts_of(args))


def open_engine(args: ServerSettings):
    from coati.inference import load
    from coati.inference.serve.inference_engine import InferenceEngine
    from coati.inference.serve.stop_strings import read_words

    words = read_words(args.profanity_file) if args.profanity_file else []
    loaded = load(
        args.model_path,
        tokenizer_path=args.tokenizer_path,
        template=args.conversation_template_config,
        template_args=template_args(args.template_args),
        trust_remote_code=args.trust_remote_code,
        quant=args.quant,
        beta_gen=args.beta_gen,
    )
    return InferenceEngine(
        loaded,
        max_length=args.model_max_length,
        max_batch=args.max_batch,
        max_queue=args.max_queue,
        timeout=args.timeout,
        words=words,
    )


def hosts_of(args: ServerSettings) -> tuple[str, ...]:
    """Without a token only the address protects the model, so a web page that makes its name point
    here must not do."""
    return (*LOOPBACK, "[::1]") if args.token is None and args.http_host in LOOPBACK else ()


def app_of(args: ServerSettings, engine):
    from coati.inference.serve.web import WebSettings, make_app
    from coati.models.generation.sampling import Sampling

    sampling = Sampling.at(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    settings = WebSettings(
        args.served_model_name,
        sampling,
        args.max_new_tokens,
        args.token,
        args.cors_origins,
        hosts_of(args),
    )
    return make_app(engine, settings)


def main(args: ServerSettings) -> None:
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(0)
    )  # uvicorn raises it again once all is in order
    listening = listening_socket(args.http_host, args.http_port)
    try:
        import uvicorn

        import_libraries()
        app = reward_app(args) if is_reward_model(args) else app_of(args, open_engine(args))
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; the server needs: pip install 'coati[serve]'") from error
    host, port = listening.getsockname()[:2]
    print(
        f"{args.served_model_name} at http://{f'[{host}]' if ':' in host else host}:{port}",
        flush=True,
    )
    config = uvicorn.Config(app, timeout_graceful_shutdown=args.shutdown_timeout)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        print(file=sys.stderr)
