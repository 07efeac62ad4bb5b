"""All that is wrong or remarkable about a chat template, at once: what ``--check_template`` prints.

A Conversation stops at the first finding that is refused, because a row must not be made with it;
here all findings are named.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from coati.dataset.chat.conversation import Conversation
from coati.dataset.chat.masked_text import segments, show_mask
from coati.dataset.chat.template_abilities import NONE, Abilities
from coati.dataset.chat.template_comparison import differences
from coati.dataset.chat.template_file import open_config, own_template, read_fields
from coati.dataset.chat.template_probe import TemplateProbe, dialogue
from coati.dataset.chat.tokenizer_fit import cut


@dataclass
class TemplateReport:
    """``shown``: the probe dialogue as rendered, its supervised text marked where it can be told.
    With ``errors`` training on the template would be wrong; ``warnings`` name what is handled but
    worth knowing, ``notes`` what the template can do."""

    shown: str = ""
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> str:
        """The whole report as text."""
        verdict = (
            f"{len(self.errors)} error{'s' if len(self.errors) > 1 else ''}: training on this "
            "template would be wrong"
            if self.errors
            else "no errors: this template can be trained on"
        )
        parts = [self.shown] if self.shown else []
        parts += self.notes
        parts += [f"warning: {text}" for text in self.warnings]
        parts += [f"error: {text}" for text in self.errors]
        return "\n".join([*parts, verdict])


def check_template(
    tokenizer,
    config: dict | str | os.PathLike | None,
    template_mode: str = "per_turn",
    color: bool = False,
    template_args: dict[str, Any] | None = None,
) -> TemplateReport:
    """Examine the template of ``config``, which setup_conversation_template would take, with
    ``tokenizer``; ``template_args`` take the place of its own. Writes nothing."""
    report = TemplateReport()
    own = own_template(tokenizer)
    try:
        values, source, folder = open_config(config)
        if template_args is not None:
            values = {**values, "template_args": template_args}
        fields = read_fields(values, tokenizer, source, folder)
        probe = TemplateProbe(
            tokenizer,
            fields["chat_template"],
            fields["system_message"],
            fields["end_of_assistant"],
            template_mode,
            template_args=fields["template_args"],
        )
        for finding in probe.findings():
            found = report.errors if finding.kind == "error" else report.warnings
            found.append(str(finding))
    except (ValueError, OSError) as error:
        report.errors.append(str(error))
        return report
    report.shown = probe.text
    try:
        conversation = Conversation(tokenizer, template_mode=template_mode, **fields)
    except ValueError as error:
        report.errors = report.errors or [str(error).splitlines()[0]]
        return report
    tokens = (
        ("bos", tokenizer.bos_token, tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token, tokenizer.eos_token_id),
    )
    named = ", ".join(
        f"{name} {text!r} ({i})" if text else f"no {name}" for name, text, i in tokens
    )
    report.shown = f"{render_masked_probe(conversation, color)}\n{named}"
    report.warnings += _stop_warnings(conversation, fields["stop_ids"])
    report.warnings += _dropped(conversation.abilities)
    report.notes += _tools(conversation.abilities)
    if own and own != fields["chat_template"]:
        report.notes += differences(tokenizer, own, probe)
    return report


def _dropped(abilities: Abilities) -> Iterator[str]:
    """What becomes of thoughts and calls, where it is not what was given."""
    if abilities.thoughts == NONE:
        yield (
            "a thought in an answer is not written at all: rows are trained without their "
            "thoughts, unless --thoughts keep writes them before the answers"
        )
    if abilities.opened:
        yield (
            f"the generation prompt opens a thought with {abilities.opened!r}: what a model is "
            "given begins with it, and responses with a thought are trained from there on"
        )
    if abilities.empty:
        yield (
            f"an answer without a thought gets an empty one, {abilities.empty!r}, which is not "
            "trained unless --empty_thoughts supervise asks for it"
        )
    if not abilities.speaks_and_calls:
        yield (
            "a text beside a call of a tool is not written: such rows are trained on the call alone"
        )
    if abilities.cuts:
        yield (
            f"what stands before {abilities.forms.tags[1]!r} in an answer is taken for a thought, "
            "wherever the answer has one"
        )
    if abilities.lost_parts:
        yield (
            f"of the schemas of tools {', '.join(sorted(abilities.lost_parts))} are not written: "
            "rows that have them are trained without them, and counted"
        )
    yield from _dropped_calls(abilities)


def _dropped_calls(abilities: Abilities) -> Iterator[str]:
    """Rows with calls that are not prepared, because the template would drop some."""
    if not abilities.calls:
        return
    counted = "rows that have them are dropped and counted"
    if abilities.call_end is None:
        yield f"no control token ends a call, so a model could not learn to stop: {counted}"
    if not abilities.calls_beside_text:
        yield f"calls of tools beside a text are not written: {counted}"
    if not abilities.parallel_calls:
        yield f"of several calls in one turn not all are written: {counted}"
    elif not abilities.parallel_results:
        yield f"of the results of several calls not all are written: {counted}"


def _tools(abilities: Abilities) -> Iterator[str]:
    """Whether rows with tools can be prepared."""
    if not abilities.lacking:
        yield "tools, their calls and their results are written"
    else:
        yield f"{abilities.lacking} are not written: rows that have them are dropped and counted"


def _stop_warnings(conversation: Conversation, given: list[list[int]]) -> Iterator[str]:
    if given and given != conversation.stop_ids:
        yield (
            f"stop_ids {given} do not fit this tokenizer and these responses and became "
            f"{conversation.stop_ids}"
        )
    marker = conversation.end_of_assistant
    ids = conversation.tokenizer.encode(marker, add_special_tokens=False)
    if len(ids) > 1:
        yield (
            f"the end marker {marker!r} is no token of its own here but {len(ids)} ordinary ones: "
            f"a model has to spell it ({cut(conversation.tokenizer, marker)}) to stop; a tokenizer "
            "with this marker as a control token "
            "learns it faster"
        )


def render_masked_probe(conversation, color: bool) -> str:
    """The probe dialogue as the template writes it, its supervised text marked; end markers and
    stop ids below."""
    rows = [
        show_mask(segments(row.input_ids, row.loss_mask, conversation.encoder.decode), color)
        for row in conversation.encode_turns(dialogue())
    ]
    end = f"end_of_assistant {conversation.end_of_assistant!r}, stop_ids {conversation.stop_ids}"
    return "\n---\n".join([*rows, end])
