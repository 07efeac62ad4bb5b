"""Consoles of the chat: a plain terminal, one with colors, or a pipe. Loads neither torch nor
transformers."""

import json
import sys
from collections.abc import Iterable, Iterator

from coati.dataset.chat.response_parts import CALL, CONTENT, THOUGHT, Part

EXIT = "exit"
CLEAR = "clear"


def call_text(part: Part) -> str:
    """A call as people write one: ``name({"key": "value"})``."""
    if part.call is None:
        return ""
    return f"{part.call.name}({json.dumps(part.call.arguments, ensure_ascii=False)})"


class SimpleConsole:
    """Plain text; responses are streamed, thoughts and calls on lines of their own. From a pipe,
    questions are read line by line and echoed."""

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

    def respond(self, parts: Iterable[Part]) -> None:
        begins = {CONTENT: "assistant: ", THOUGHT: "thought: ", CALL: "call: "}
        before = None
        for part in parts:
            if part.kind != before or part.kind == CALL:
                print("" if before is None else "\n", begins[part.kind], sep="", end="")
                before = part.kind
            print(call_text(part) or part.text, end="", flush=True)
        print("" if before else begins[CONTENT], flush=True)

    def note(self, text: str) -> None:
        """A remark that is not part of the conversation."""
        print(f"({text})", file=sys.stderr, flush=True)

    def clear(self) -> None:
        self.note("new conversation")


class DummyConsole(SimpleConsole):
    """For programs: whole responses on standard output, without their thoughts; calls as JSON, one
    a line."""

    def read(self) -> str:
        return input()

    def repeat(self, question: str) -> None:
        pass

    def respond(self, parts: Iterable[Part]) -> None:
        lines = []
        content = ""
        for part in parts:
            if part.call is not None:
                call = {"name": part.call.name, "arguments": part.call.arguments}
                lines.append(json.dumps(call, ensure_ascii=False))
            elif part.kind == CONTENT:
                content += part.text
        print("\n".join([content] * bool(content or not lines) + lines), flush=True)


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

    def respond(self, parts: Iterable[Part]) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.markdown import Markdown
        from rich.text import Text

        self.screen.print("[bold green]assistant:[/]")
        shown: list[tuple[str, str]] = []  # each with its kind

        def add(part: Part) -> None:
            if shown and shown[-1][0] == part.kind != CALL:
                shown[-1] = (part.kind, shown[-1][1] + part.text)
            else:
                shown.append((part.kind, call_text(part) or part.text))

        def block(kind: str, text: str) -> Markdown | Text:
            if kind == CONTENT and self.screen.is_terminal:
                return Markdown(text)
            return Text(text, style={THOUGHT: "dim italic", CALL: "yellow"}.get(kind, ""))

        if not self.screen.is_terminal:
            for part in parts:
                add(part)
            self.screen.print(Group(*(block(*each) for each in shown)))
            return
        with Live(console=self.screen, refresh_per_second=8) as live:
            for part in parts:
                add(part)
                live.update(Group(*(block(*each) for each in shown)))

    def clear(self) -> None:
        self.screen.clear()  # does nothing where the output is not a terminal


CONSOLES = {"rich": RichConsole, "simple": SimpleConsole, "dummy": DummyConsole}
