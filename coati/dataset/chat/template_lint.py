"""All that is wrong or remarkable about a chat template, at once: what ``--check_template`` prints.

template_check.py stops at the first fault, because a row must not be made with it; here every check
looks for itself.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any

import jinja2

from coati.dataset.chat.chat_encoder import ChatEncoder
from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.template import render_template, special_tokens
from coati.dataset.chat.template_file import read_fields
from coati.dataset.chat.template_probe import (
    ANSWERS,
    QUESTIONS,
    dialogue,
    render_masked_probe,
    tails,
)
from coati.utils.json_io import load_json

SYSTEM = "Probe system message"
THOUGHT = "<think>\nProbe thought\n</think>\n\n"
Found = tuple[str, str]  # ("error" or "warning", sentence)


@dataclass
class TemplateReport:
    """``shown``: the probe dialogue as rendered, its supervised text marked where it can be told.
    With ``errors`` training on the template would be wrong; ``warnings`` name what is handled but
    worth knowing."""

    shown: str = ""
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> str:
        """The whole report as text."""
        verdict = (
            f"{len(self.errors)} error{'s' if len(self.errors) > 1 else ''}: training on this "
            "template would be wrong"
            if self.errors
            else "no errors: this template can be trained on"
        )
        parts = [self.shown] if self.shown else []
        parts += [f"warning: {text}" for text in self.warnings] + [
            f"error: {text}" for text in self.errors
        ]
        return "\n".join([*parts, verdict])


def check_template(
    tokenizer,
    config: dict | str | os.PathLike | None,
    template_mode: str = "per_turn",
    color: bool = False,
) -> TemplateReport:
    """Examine the template of ``config``, which setup_conversation_template would take, with
    ``tokenizer``. Writes nothing."""
    report = TemplateReport()
    source, folder, values = "conversation template", Path("."), config or {}
    try:
        if isinstance(config, str | os.PathLike):
            source, folder = str(config), Path(config).parent
            values = load_json(config) if os.path.isfile(config) else {}
        fields = read_fields(values, tokenizer, source, folder)
        probe = Probe(tokenizer, fields, template_mode)
        for kind, text in probe.findings():
            (report.errors if kind == "error" else report.warnings).append(text)
    except (ValueError, OSError) as error:
        report.errors.append(str(error))
        return report
    report.shown = probe.text
    try:
        conversation = Conversation(tokenizer, template_mode=template_mode, **fields)
    except ValueError as error:
        report.errors = report.errors or [str(error).splitlines()[0]]
        return report
    report.shown = f"{render_masked_probe(conversation, color)}\n{_tokens(tokenizer)}"
    report.warnings += _stop_warnings(conversation, fields["stop_ids"])
    return report


def _tokens(tokenizer) -> str:
    names = (
        ("bos", tokenizer.bos_token, tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token, tokenizer.eos_token_id),
    )
    return ", ".join(
        f"{name} {text!r} ({number})" if text else f"no {name}" for name, text, number in names
    )


def _stop_warnings(conversation: Conversation, given: list[list[int]]) -> Iterator[str]:
    if given and given != conversation.stop_ids:
        yield f"stop_ids {given} do not fit this tokenizer and these answers and became {conversation.stop_ids}"
    marker, ids = (
        conversation.end_of_assistant,
        conversation.tokenizer.encode(conversation.end_of_assistant, add_special_tokens=False),
    )
    if len(ids) > 1:
        yield (
            f"the end marker {marker!r} is no token of its own here but {len(ids)} ordinary ones: "
            "a model has to spell "
            "it to stop; a tokenizer with this marker as a control token learns it faster"
        )


class Probe:
    """The probe dialogue under one template; :meth:`findings` runs every check that still makes
    sense."""

    def __init__(self, tokenizer, fields: dict[str, Any], template_mode: str) -> None:
        self.tokenizer, self.fields, self.template_mode = tokenizer, fields, template_mode
        self.system = fields["system_message"]
        self.names = special_tokens(tokenizer)
        self.encoder = ChatEncoder(tokenizer, fields["end_of_assistant"] or "")
        self.text = ""

    def render(self, messages: list[dict], generation: bool = False) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return render_template(
            self.fields["chat_template"], [*system, *messages], self.names, generation
        )

    def findings(self) -> Iterator[Found]:
        """(kind, sentence) of everything found."""
        yield from self._refusals()
        if not self.text:
            return
        yield from self._lost()
        checks: tuple[Callable[[], Iterator[Found]], ...] = (
            self._system_messages,
            self._doubled_bos,
            self._endings,
            self._rewriting,
            self._generation_prompt,
        )
        for check in checks:
            try:
                yield from check()
            except (
                jinja2.TemplateError,
                ValueError,
            ) as error:  # a content that is not where it should be
                yield (
                    "error",
                    f"{check.__name__.strip('_').replace('_', ' ')} cannot be examined: {error}",
                )

    def _refusals(self) -> Iterator[Found]:
        for system in dict.fromkeys((self.system, None)):
            try:
                self.system = system
                self.text = self.render(dialogue())
                return
            except jinja2.TemplateError as error:
                what = "a system message" if system else "an ordinary dialogue"
                how = "set system_message to null" if system else "mend chat_template"
                yield "error", f"the template refuses {what} ({error}); {how}"

    def _lost(self) -> Iterator[Found]:
        for content in (*QUESTIONS, *ANSWERS):
            if (count := self.text.count(content)) != 1:
                yield (
                    "error",
                    f"the message {content!r} is in the rendered text {count} times, not once",
                )

    def _system_messages(self) -> Iterator[Found]:
        kept, self.system = self.system, SYSTEM
        try:
            if SYSTEM not in self.render(dialogue()):
                yield (
                    "warning",
                    "a system message is dropped: rows that have one are trained without it"
                    + (", and system_message does nothing" if kept else ""),
                )
        except jinja2.TemplateError as error:
            yield (
                "warning",
                f"a system message is refused ({error}): rows that have one are dropped and "
                "counted",
            )
        finally:
            self.system = kept

    def _doubled_bos(self) -> Iterator[Found]:
        bos = self.tokenizer.bos_token_id
        if bos is not None and self.encoder.encode(self.text, [])[1][:2] == [bos, bos]:
            yield (
                "error",
                (
                    "the text begins with two begin-of-sequence tokens "
                    f"({self.tokenizer.bos_token!r}, id {bos}); let "
                    "chat_template write bos_token once, or not at all"
                ),
            )

    def _endings(self) -> Iterator[Found]:
        ends = tails((self.render(dialogue()[:2]), self.text))
        common, given = commonprefix(ends), self.fields["end_of_assistant"]
        controls = [marker for marker in self.encoder.markers if marker in common]
        found = (
            min(controls, key=lambda m: (common.index(m), -len(m))) if controls else common.strip()
        )
        if not common.strip() and not given:
            yield (
                "error",
                "no text follows every answer, so a model cannot learn to stop; let chat_template "
                "write one",
            )
            return
        if given and not all(given in end for end in ends):
            hint = f"; here {found!r} would do" if found else ""
            yield "error", f"end_of_assistant {given!r} does not follow every answer{hint}"
            given = None
        yield from self._after_the_end(given or found, ends)

    def _after_the_end(self, marker: str, ends: list[str]) -> Iterator[Found]:
        # What follows the end marker of a finished dialogue is never trained.
        after = ends[2].partition(marker)[2]
        control = set(self.encoder.controls.values()) - {self.tokenizer.unk_token}
        outside = [token for token in control if token and token in after]
        if outside:
            first = min(outside, key=after.index)
            yield (
                "error",
                (
                    f"the end token {first!r} stands after end_of_assistant {marker!r}, outside "
                    "the mask: a model is not "
                    f"trained to write it; set end_of_assistant to {first!r}"
                ),
            )
        eos = self.tokenizer.eos_token
        if eos is None:
            yield (
                "warning",
                "the tokenizer has no end-of-sequence token: generation stops at stop_ids alone",
            )
        elif eos not in marker and eos not in outside:
            yield (
                "warning",
                (
                    f"answers end with {marker!r}; the tokenizer's end-of-sequence token {eos!r} "
                    "is never written, so "
                    "programs that stop at it alone do not stop: give them stop_ids"
                ),
            )

    def _rewriting(self) -> Iterator[Found]:
        for thought in ("", THOUGHT):
            turns = dialogue(tuple(thought + answer for answer in ANSWERS))
            first, both = self.render(turns[:2]), self.render(turns)
            end = first.rindex(ANSWERS[0]) + len(ANSWERS[0])
            if not both.startswith(first[:end]):
                kind = "error" if self.template_mode == "refuse" else "warning"
                yield (
                    kind,
                    (
                        "not prefix-preserving: an earlier assistant turn is rendered otherwise "
                        "once the dialogue goes on"
                        f"{' (a thought is dropped)' if thought else ''}; one training row is made "
                        "per assistant turn, and "
                        "--template_mode refuse refuses it"
                    ),
                )
                return

    def _generation_prompt(self) -> Iterator[Found]:
        for turn in (1, 3):
            messages = dialogue()
            plain, prompt = (
                self.render(messages[:turn]),
                self.render(messages[:turn], generation=True),
            )
            whole = self.render(messages[: turn + 1])
            if prompt == plain and (
                header := whole[len(plain) : whole.index(ANSWERS[turn // 2])].strip()
            ):
                yield (
                    "warning",
                    f"there is no generation prompt: {header!r}, which precedes answers, is added",
                )
                return
            if not whole.startswith(prompt):
                yield (
                    "warning",
                    (
                        f"the generation prompt {prompt[len(plain) :]!r} is not a prefix of the "
                        "finished turn: answers are "
                        "trained from their first character on"
                    ),
                )
                return
