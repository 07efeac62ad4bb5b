"""What of OpenAI's protocol is refused by name, and which fields of a request change nothing."""

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

OFFERED = "POST /v1/chat/completions, POST /v1/completions and GET /v1/models"
# Fields that are not supported, with the values that ask for nothing.
FIELDS: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
}
# Of a message: a client sends back what it was given, nulls and all.
MESSAGE_FIELDS: dict[str, tuple[Any, ...]] = {
    "function_call": (None,),
    "audio": (None,),
}
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
MOST_NAMES = 20


class Refused(Exception):
    """A request that is refused with an error in OpenAI's format. ``kind``: its type, ``param``:
    the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refuse_fields(
    given: dict[str, Any] | None, table: dict[str, tuple[Any, ...]] = FIELDS, place: str = ""
) -> None:
    """Raise Refused for a field of ``table`` that asks for what is not supported."""
    for name, silent in table.items():
        value = (given or {}).get(name)
        if not any(_same(value, one) for one in silent):
            wanted = silent[1] if len(silent) > 1 else None
            raise Refused(
                400,
                f"{place}{name} is not served; leave it out or send {json.dumps(wanted)}",
                param=f"{place}{name}",
            )


def _same(value: Any, other: Any) -> bool:
    """Whether they are equal as JSON, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def part_text(part: dict[str, Any], place: str) -> str:
    """The text of a content part. Raises Refused naming an image, an audio, or another part."""
    kind = part.get("type")
    field = TEXT_PARTS.get(str(kind))
    if field is None:
        raise Refused(
            400,
            f"{place}: parts of type {str(kind)[:40]!r} are not served, this model reads text; "
            "send parts of type 'text'",
            param=place,
        )
    text = part.get(field)
    if not isinstance(text, str) or not is_unicode(text):
        raise Refused(400, f"{place}: a part of type {kind!r} needs {field}, a text", param=place)
    return text


def is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, which JSON can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def ignored_fields(body: BaseModel) -> str:
    """The names of unknown fields, which change nothing, for the header X-Ignored-Fields."""
    names = dict.fromkeys(_unknown(body))
    readable = [re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64] for name in names]
    more = ["..."] if len(readable) > MOST_NAMES else []
    return ", ".join(readable[:MOST_NAMES] + more)


def _unknown(model: BaseModel) -> Iterator[str]:
    refused = {**FIELDS, **MESSAGE_FIELDS}
    passed_on = getattr(type(model), "passed_on", False)  # to the chat template
    for name, value in ({} if passed_on else model.model_extra or {}).items():
        if name not in refused and value is not None:
            yield name
    for name in getattr(type(model), "unheeded", ()):
        if getattr(model, name):
            yield name
    for name in type(model).model_fields:
        value = getattr(model, name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, BaseModel):
                yield from (f"{name}.{inner}" for inner in _unknown(each))
