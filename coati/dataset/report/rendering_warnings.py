"""What became of thoughts, tools and weights when rows were rendered, where it deserves a second
look."""

from collections.abc import Iterator
from typing import Any

from coati.dataset.chat.dialogue import (
    DROPPED,
    EMPTY,
    ONLY_SFT,
    SPEECH_DROPPED,
    SYSTEM_DROPPED,
    UNUSED_WEIGHT,
)
from coati.dataset.chat.schema_parts import SCHEMA_PART, SCHEMAS_DROPPED


def rendering_warnings(report: dict[str, Any]) -> Iterator[str]:
    """One sentence per finding: what is odd and what to do about it."""
    traits = report["traits"]
    if rows := traits.get(DROPPED):
        yield (
            f"the chat template drops the thoughts of {rows} rows, which are trained without them: "
            "--thoughts keep writes them before the responses, --thoughts refuse leaves these rows "
            "out, --thoughts drop says that it is meant so"
        )
    if rows := traits.get(EMPTY):
        options = report.get("template", {}).get("options", {})
        masked = options.get("empty_thoughts", "mask") == "mask"
        done, other = ("masked", "supervise") if masked else ("learned", "mask")
        yield (
            f"the chat template writes an empty thought before responses of {rows} rows that have "
            f"none: it is {done} (--empty_thoughts {other} changes that)"
        )
    if rows := traits.get(SPEECH_DROPPED):
        yield (
            f"the chat template drops the text that stands beside a call of a tool in {rows} rows: "
            "they are trained on the call alone"
        )
    if rows := traits.get(SCHEMAS_DROPPED):
        parts = sorted(
            (name.removeprefix(SCHEMA_PART), count)
            for name, count in traits.items()
            if name.startswith(SCHEMA_PART)
        )
        named = ", ".join(f"{part} {count}" for part, count in parts)
        yield (
            f"the chat template does not write all of the tools' schemas in {rows} rows (part and "
            f"rows: {named}): the model does not see these parts, when it responds neither"
        )
    if rows := traits.get(SYSTEM_DROPPED):
        yield (
            f"the chat template drops the system message of {rows} rows once a tool has answered, "
            "as it does when the model responds"
        )
    if rows := traits.get(UNUSED_WEIGHT):
        yield (
            f"{rows} rows give a weight to turns that are not learned: --learn "
            "roles:user,assistant learns those of the user, too"
        )
    if rows := traits.get(ONLY_SFT):
        yield (
            f"{rows} rows give weights to turns, which rows of type {report['type']} do not have: "
            "the last response of each counts whole"
        )
    if entry := report["dropped"].get("tools_unsupported"):
        yield (
            f"{entry['rows']} rows need a chat template that writes tools, for example "
            f"{entry['first'][0]}"
        )
