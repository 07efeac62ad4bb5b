"""Consoles of the chat: a plain terminal, one with colors, or a pipe. Loads neither torch nor
transformers."""

import sys
from collections.abc import Iterable, Iterator

EXIT = "exit"
CLEAR = "clear"


class SimpleConsole:
    """Plain text; responses are streamed. From a pipe, questions are read line by line and
    echoed."""

    def questions(self) -> Iterator[str]:
        """What the user types, until end of input or ``exit``; empty lines are skipped."""
        while True:
            try:
                line = self.read().strip()
            except EOFError:
                return
            if line == EXIT:
                return
            if not line:
                continue
            if line != CLEAR and not sys.stdin.isatty():
                self.repeat(line)
            yield line

    def read(self) -> str:
        return input("user: " if sys.stdin.isatty() else "")

    def repeat(self, question: str) -> None:
        """Echo a question that was not typed here."""
        print(f"user: {question}", flush=True)

    def respond(self, pieces: Iterable[str]) -> None:
        print("assistant: ", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)

    def note(self, text: str) -> None:
        """A remark that is not part of the conversation."""
        print(f"({text})", file=sys.stderr, flush=True)

    def clear(self) -> None:
        self.note("new conversation")


class DummyConsole(SimpleConsole):
    """For programs: whole responses on standard output, nothing else."""

    def read(self) -> str:
        return input()

    def repeat(self, question: str) -> None:
        pass

    def respond(self, pieces: Iterable[str]) -> None:
        print("".join(pieces), flush=True)


class RichConsole(SimpleConsole):
    """Colors, and responses rendered as Markdown, by rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self.screen = Console()

    def read(self) -> str:
        return self.screen.input("[bold cyan]user:[/] ") if sys.stdin.isatty() else input()

    def repeat(self, question: str) -> None:
        self.screen.print("[bold cyan]user:[/]", end=" ")
        self.screen.print(question, markup=False, highlight=False)

    def respond(self, pieces: Iterable[str]) -> None:
        from rich.live import Live
        from rich.markdown import Markdown

        self.screen.print("[bold green]assistant:[/]")
        if not self.screen.is_terminal:
            self.screen.print("".join(pieces), markup=False, highlight=False)
            return
        text = ""
        with Live(console=self.screen, refresh_per_second=8) as live:
            for piece in pieces:
                text += piece
                live.update(Markdown(text))

    def clear(self) -> None:
        self.screen.clear()  # does nothing where the output is not a terminal


CONSOLES = {"rich": RichConsole, "simple": SimpleConsole, "dummy": DummyConsole}
