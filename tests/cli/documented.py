"""Reads tests/data/documented_commands.txt."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent.parent / "data" / "documented_commands.txt"


@dataclass(frozen=True)
class Command:
    stage: str
    source: str
    text: str

    def words(self, variables: dict[str, str]) -> list[str]:
        """The words a shell would see: lines joined, ``$NAME`` and ``${name[@]}`` replaced."""
        joined = re.sub(r"\\\n|\\$", "", self.text)
        return shlex.split(
            re.sub(r"\$\{?(\w+)(?:\[@\])?\}?", lambda match: variables[match[1]], joined)
        )

    @property
    def processes(self) -> int:
        return int(re.search(r"--nproc_per_node[= ](\d+)", self.text)[1])


def documented_commands(stage: str | None = None) -> list[Command]:
    """All commands, or those of one stage, in the order of the file."""
    blocks = re.split(r"^@ ", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    commands = []
    for block in blocks:
        title, text = block.split("\n", 1)
        found, source = (part.strip() for part in title.split("|"))
        commands.append(Command(found, source, text.strip()))
    return [command for command in commands if stage in (None, command.stage)]
