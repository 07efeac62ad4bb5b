"""``coati VERB``: the list of verbs, and running one of them. Imports nothing heavy."""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from coati.cli.checks import check_models
from coati.cli.parser import OlderFlags
from coati.cli.verb import Verb
from coati.recipes import launcher, verbs
from coati.utils.errors import RunFailed, no_early_exit, no_silent_exit
from coati.utils.interrupt import interrupts_noted
from coati.utils.liveness import at_forced_end
from coati.utils.logging import unsaid
from coati.utils.output_paths import check_outputs
from coati.utils.phases import import_libraries

PROGRAM = "coati"
INTERRUPTED = 130  # what a shell reports for SIGINT


def names() -> list[str]:
    """Every verb: the modules of ``coati.recipes.verbs``."""
    return [module.name.replace("_", "-") for module in iter_modules(verbs.__path__)]


def load(name: str) -> Verb:
    """The verb of that name. Raises ValueError with the nearest one."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"unknown verb {name!r}{hint} `{PROGRAM} --help` lists them")
    return _module(name).VERB


def summary(name: str) -> str:
    """The first sentence about a verb."""
    text = " ".join((_module(name).__doc__ or "").split("\n\n")[0].split())
    return text.rstrip(".")


def _module(name: str) -> Any:
    return import_module(f"{verbs.__name__}.{name.replace('-', '_')}")


def run(
    name: str,
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    older: OlderFlags | None = None,
) -> None:
    """Run the verb ``name`` with the flags ``argv``, in several processes where they ask for it.

    ``prog``: what messages call the program, by default the script that was started. ``older``:
    flags of earlier releases. An expected error ends the process with code 1 and one line.
    """
    verb = load(name)
    prog = prog or Path(sys.argv[0]).name
    _no_bars_in_pipes()
    given = list(sys.argv[1:] if argv is None else argv)
    # The launcher, which read the flags first, has said what is to be said about them.
    with unsaid(launcher.ERROR_FILE in os.environ):
        settings = verb.parse(
            verb.words(given), prog=prog, **({} if older is None else {"older": older})
        )
    try:
        if launcher.ERROR_FILE not in os.environ:  # else the launcher has checked them
            check_outputs(getattr(settings, "flags", None) or vars(settings))
        if verb.processes:
            check_models(settings)
        if verb.processes and settings.launch.wanted:
            if not settings.launch.no_preflight:
                from coati.recipes.doctor.preflight import preflight

                preflight(settings)
            sys.exit(launcher.launch(settings.launch, [*_program(name), *given]))
        with (
            launcher.rank_at_work(),
            no_silent_exit(lambda said: _say(f"{prog}: error: {said}")),
            no_early_exit(),
        ):
            if verb.processes:
                _run_in_group(verb, settings, prog)
            else:
                verb.function()(settings)
    except (ValueError, OSError, RunFailed) as error:
        _fail(f"{prog}: error: {error}")
    except KeyboardInterrupt:
        _fail(f"{prog}: interrupted", INTERRUPTED)


def _run_in_group(verb: Verb, settings: Any, prog: str) -> None:
    """Run a verb that several processes may run together. Raises RunFailed naming the rank, where
    another one has ended."""
    # What torch's store says of a lost connection, with a stack in C++, stands in the error, too.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import_libraries()
    with interrupts_noted():
        function = verb.function()
        from coati.parallel.launch import explained, shut_down
        from coati.recipes.run_dir import locks_released, release_locks

    with (
        interrupts_noted(),
        at_forced_end(lambda _: release_locks()),
        # On a line of its own, not behind a progress bar.
        at_forced_end(lambda message: _say(f"{prog}: error: {message}", before="\n")),
        locks_released(),
    ):
        try:
            function(settings)
            shut_down(wait=True)
        except RuntimeError as error:
            reason = explained(error)
            if reason is error:
                raise
            raise reason from None


def _no_bars_in_pipes() -> None:
    """The bars of transformers, datasets and the hub redraw a line, which only a terminal can."""
    if not sys.stderr.isatty():
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def _fail(message: str, code: int = 1) -> None:
    """End with ``code`` and its ``message``."""
    _say(message)
    sys.exit(code)


def _say(message: str, before: str = "") -> None:
    """The launcher, where there is one, says the message once for all ranks."""
    file = os.environ.get(launcher.ERROR_FILE)
    rank = os.environ.get("RANK", "0")
    if file is not None:
        Path(file).write_text(message, encoding="utf-8")
    else:
        line = f"[rank {rank}] {message}" if rank != "0" else message
        print(f"{before}{line}", file=sys.stderr, flush=True)


def _program(name: str) -> list[str]:
    """What python is given to run the verb, before its flags: this command or the script that was
    started."""
    if not is_command():
        return [sys.argv[0]]
    # The installed program itself: `python -m` would import what lies in the working directory.
    installed = Path(sys.argv[0]).name == PROGRAM
    return [sys.argv[0], name] if installed else ["-m", PROGRAM, name]


def is_command() -> bool:
    """Whether the process is ``coati`` or ``python -m coati``, not a script of examples/."""
    return Path(sys.argv[0]).name in (PROGRAM, "__main__.py")
