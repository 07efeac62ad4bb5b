"""What the template of a conversation does otherwise than the tokenizer's own."""

from collections.abc import Iterator
from typing import Any

import jinja2

from coati.dataset.chat.template_abilities import Abilities
from coati.dataset.chat.template_probe import QUESTIONS, TemplateProbe, dialogue

_THOUGHTS = {
    "all": "writes the thoughts of all responses",
    "last": "writes the thoughts after the last question alone",
    "none": "drops thoughts",
}


def differences(tokenizer: Any, own: str, probe: TemplateProbe) -> Iterator[str]:
    """Lines on what the template ``own`` does otherwise than that of ``probe``."""
    theirs = TemplateProbe(tokenizer, own, None, None, probe.template_mode)
    try:
        next(theirs.findings(), None)
        found = list(_differences(theirs, probe))
    except (jinja2.TemplateError, ValueError) as error:
        yield f"the tokenizer's own chat template cannot be compared: {error}"
        return
    for line in found:
        yield f"the tokenizer's own chat template {line}"


def _differences(own: TemplateProbe, probe: TemplateProbe) -> Iterator[str]:
    before = [one.render(dialogue()[:1]).partition(QUESTIONS[0])[0] for one in (own, probe)]
    if before[0] != before[1]:
        yield f"writes {before[0]!r} before a first question, this one {before[1]!r}"
    if own.derived_end != probe.end:
        yield f"ends responses with {own.derived_end!r}, this one with {probe.end!r}"
    theirs = own.abilities
    ours = probe.abilities
    if theirs.thoughts != ours.thoughts:
        yield f"{_THOUGHTS[theirs.thoughts]}, this one {_THOUGHTS[ours.thoughts]}"
    for name, what in (("opened", "opens a thought"), ("empty", "writes an empty thought")):
        if getattr(theirs, name) != getattr(ours, name):
            written = getattr(theirs, name)
            yield (
                f"{what}, {written!r}, this one does not"
                if written
                else (f"does not do what this one does: it {what}, {getattr(ours, name)!r}")
            )
    if theirs.lacking != ours.lacking:
        yield f"{_of_tools(theirs)}, this one {_of_tools(ours)}"


def _of_tools(abilities: Abilities) -> str:
    return (
        f"writes no {abilities.lacking.replace(', ', ' and no ')}"
        if abilities.lacking
        else ("writes tools, their calls and their results")
    )
