"""What started this process: the launcher's own command line, read from the processes above it."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from coati.utils.logging import get_logger
from coati.utils.redaction import is_secret

logger = get_logger(__name__)

LAUNCHERS = ("colossalai", "torchrun")
TORCH_RUN = ["-m", "torch.distributed.run"]
NODE_RANK = re.compile("--node[_-]rank")
SHORTEST_SECRET = 8  # shorter values stand in a command line by chance
PORT = 29500


@cache
def ancestors() -> tuple[tuple[str, ...], ...]:
    """The command lines of the processes above this one, the nearest first; () where /proc does not
    tell."""
    found = []
    number = os.getppid()
    while number > 1:
        place = Path("/proc") / str(number)
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            state = (place / "stat").read_text()
        except OSError:
            break
        found.append(tuple(word.decode(errors="replace") for word in words if word))
        number = int(state.rpartition(")")[2].split()[1])
    return tuple(found)


def launcher_words(above: Sequence[Sequence[str]], program: Sequence[str]) -> list[str] | None:
    """``["torchrun", "--nnodes", "2", ..., SCRIPT]``: of the highest launcher among the command
    lines ``above``, as it was given, up to the ``program`` (a script, or ``-m`` and a module); None
    where there is none.

    The highest: ``colossalai run`` starts torchrun on each host.
    """
    size = len(program)
    for words in reversed(above):
        name, rest = _start_of(words) or ("", [])
        for index in range(len(rest)):
            if rest[index : index + size] == list(program):
                return [name, *rest[: index + size]]
    return None


def _start_of(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """The launcher that a command line runs, and the words after it."""
    for index, word in enumerate(words[:2]):
        name = os.path.basename(word)
        if name in LAUNCHERS:
            return name, list(words[index + 1 :])
    if list(words[1:3]) == TORCH_RUN:
        return "torchrun", list(words[3:])
    return None


def started_again(
    above: Sequence[Sequence[str]], script: str, module: str | None, variables: Mapping[str, str]
) -> tuple[list[str], str]:
    """The words that start this run's processes again, up to its flags, and where they have to be
    given: "", or "on every host".

    ``script``: this program's file; ``module``: the one whose file that is. ``variables``: the
    environment.
    """
    program = ["-m", module] if module else [script]
    hosts = int(variables.get("GROUP_WORLD_SIZE", "1"))
    words = launcher_words(above, program) or launcher_words(above, [script])
    if words is None and "TORCHELASTIC_RUN_ID" not in variables:
        return ["python", *program], "for every rank, as before"  # by hand, or by a scheduler
    if words is None:
        words = ["torchrun", *_rendezvous(hosts, variables)]
        words += ["--nproc_per_node", variables["LOCAL_WORLD_SIZE"], *program]
    if hosts == 1 or words[0] != "torchrun":
        return words, ""
    numbered = any(NODE_RANK.match(word) for word in words)
    return words, f"on every host{', with its own --node_rank' if numbered else ''}"


def _rendezvous(hosts: int, variables: Mapping[str, str]) -> list[str]:
    if hosts == 1:
        return []
    endpoint = f"{variables['MASTER_ADDR']}:{PORT}"
    name = variables["TORCHELASTIC_RUN_ID"]
    where = ["--rdzv-backend", "c10d", "--rdzv-id", name, "--rdzv-endpoint", endpoint]
    return ["--nnodes", str(hosts), *where]


def warn_of_secrets() -> None:
    """Say which variables with secrets stand in a command line above this process, where every user
    of the host sees them: ``colossalai run`` hands on the environment so."""
    lines = [" ".join(words) for words in ancestors()]
    seen = sorted(
        name
        for name, value in os.environ.items()
        if is_secret(name)
        and len(value) >= SHORTEST_SECRET
        and any(f'{name}="{value}"' in line for line in lines)
    )
    if seen:
        logger.warning(
            f"{' and '.join(seen)} can be read by every user of the hosts (ps): the launcher has "
            "put the environment on a command line, as colossalai run does. Start with coati "
            "--hostfile, which sends it over ssh's input; or keep it in a file (hf auth login, "
            "wandb login), unset the variable, and make a new secret"
        )
