"""Chat with a model in the terminal."""

import sys
from contextlib import closing

from coati.cli.inference import inference_parser, parse_inference
from coati.cli.program_settings import ChatSettings
from coati.cli.row_flags import template_args
from coati.cli.verb import Verb
from coati.utils.phases import import_libraries

VERB = Verb(
    "models",
    inference_parser,
    parse_inference,
    "coati.recipes.verbs.chat:main",
    subject="--model_path",
)


def open_session(args: ChatSettings):
    import_libraries()
    from coati.inference import ChatSession, load
    from coati.inference.model_loading import with_system
    from coati.inference.transcript import read_tools
    from coati.models.generation.sampling import Sampling

    try:
        loaded = load(
            args.model_path,
            tokenizer_path=args.tokenizer_path,
            template=args.conversation_template_config,
            template_args=template_args(args.template_args),
            trust_remote_code=args.trust_remote_code,
            quant=args.quant,
            beta_gen=args.beta_gen,
        )
    except ValueError as error:
        if str(error).startswith("--"):
            raise
        # Every message of the loader begins with the path at fault.
        flags = ("conversation_template_config", "tokenizer_path", "model_path")
        at_fault = [
            flag
            for flag in flags
            if getattr(args, flag) and str(error).startswith(getattr(args, flag))
        ]
        raise ValueError(f"--{(at_fault or ['model_path'])[0]} {error}") from error
    if args.system_message is not None:
        loaded = with_system(loaded, args.system_message)
    sampling = Sampling.at(args.temperature, args.top_k, args.top_p, args.repetition_penalty)
    lengths = {"max_length": args.model_max_length, "max_new_tokens": args.max_new_tokens}
    tools = read_tools(args.tools) if args.tools else []
    return ChatSession(*loaded, sampling=sampling, seed=args.seed, tools=tools, **lengths)


def respond(session, screen, record, question: str | None) -> None:
    forgotten = session.forgotten
    try:
        with closing(session.respond(question)) as parts:
            screen.respond(parts)
    finally:
        record.add(session.messages)
    if session.forgotten > forgotten:
        screen.note(
            f"{session.forgotten} oldest rounds no longer fit into --model_max_length and are left "
            "out"
        )
    if session.empty:
        screen.note("empty response")
    if session.cut:
        screen.note(f"cut off at --max_new_tokens {session.max_new_tokens}")


def chat(session, screen, record, clear: str) -> None:
    """The conversation, until the questions end. Ctrl-C breaks off a response, not the
    conversation."""
    for question in screen.questions():
        if question == clear:
            session.clear()
            record.close()
            screen.clear()
            continue
        try:
            if session.open_calls and sys.stdin.isatty():
                session.give_result(question)
                if _wait_for_result(session, screen):
                    continue
                question = None
            respond(session, screen, record, question)
            _wait_for_result(session, screen)
        except KeyboardInterrupt:
            screen.note("broken off")
        except ValueError as error:
            if not sys.stdin.isatty():
                raise
            screen.note(str(error))


def _wait_for_result(session, screen) -> bool:
    """Say that what is typed next is the result of a call, if it is."""
    if session.open_calls and sys.stdin.isatty():
        screen.note(f"what you type next is the result of {session.open_calls[0]['name']}")
        return True
    return False


def main(args: ChatSettings) -> None:
    from coati.inference import console
    from coati.inference.transcript import Asked, Transcript, conversations

    screen = console.CONSOLES[args.io or ("rich" if sys.stdout.isatty() else "dummy")]()
    asked = (
        conversations(args.prompt_file)
        if args.prompt_file
        else [Asked([], question) for question in args.prompt]
    )
    session = open_session(args)
    try:
        with closing(Transcript(args.transcript)) as record:
            own_tools = session.tools
            for each in asked:
                session.clear()
                session.messages = list(each.before)
                session.use_tools(own_tools if each.tools is None else each.tools)
                screen.repeat(each.question)
                respond(session, screen, record, each.question)
                record.close()
            if not asked:
                if sys.stdin.isatty():
                    screen.note(f"{console.CLEAR}: a new dialogue; {console.EXIT}: the end")
                chat(session, screen, record, console.CLEAR)
    except KeyboardInterrupt:
        print(file=sys.stderr)
