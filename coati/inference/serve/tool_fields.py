"""Tools in requests and calls in messages, as OpenAI's protocol has them."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from coati.dataset.chat.call_bodies import Call
from coati.inference.serve.not_served import Refused, is_unicode


def _unicode(value: str) -> str:
    if not is_unicode(value):
        raise ValueError("a lone surrogate is no text")
    return value


# Pydantic looks at surrogates where a field is a text and nothing else.
Text = Annotated[str, AfterValidator(_unicode)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]{1,128}$")]


class FunctionFields(BaseModel):
    """A function that may be called; further fields are shown to the model. ``strict`` changes
    nothing: nothing constrains what the model writes."""

    model_config = ConfigDict(extra="allow")
    passed_on: ClassVar[bool] = True
    unheeded: ClassVar[tuple[str, ...]] = ("strict",)

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolFields(BaseModel):
    model_config = ConfigDict(extra="allow")
    passed_on: ClassVar[bool] = True

    type: Literal["function"]
    function: FunctionFields


class NamedFunction(BaseModel):
    name: FunctionName


class NamedTool(BaseModel):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(BaseModel):
    """``arguments``: a JSON object, as text."""

    name: FunctionName
    arguments: Text | dict[str, Any]


class CallFields(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def plain(self, place: str) -> dict[str, Any]:
        """The call as a conversation template takes it. Raises Refused for arguments that are no
        JSON object."""
        arguments = self.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = ""
        if not isinstance(arguments, dict):
            field = f"{place}.function.arguments"
            raise Refused(400, f"{field}: expected a JSON object, as text", param=field)
        call: dict[str, Any] = {
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }
        return call | ({"id": self.id} if self.id else {})


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools. ``tools``: as the template is given them, none where none may
    be called. ``forced``: the function that must be called, "" for any; None: none must.
    ``single``: at most one call."""

    tools: tuple[dict[str, Any], ...] = ()
    forced: str | None = None
    single: bool = False


def tool_use(
    tools: Sequence[ToolFields] | None, choice: ToolChoice | None, parallel: bool | None
) -> ToolUse:
    """Raises Refused for a choice that the tools do not allow."""
    names = [tool.function.name for tool in tools or ()]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise Refused(400, f"tools: {doubled[0]!r} is there twice", param="tools")
    named = choice.function.name if isinstance(choice, NamedTool) else None
    if not names and (named is not None or choice == "required"):
        raise Refused(400, "tool_choice asks for a call, and there are no tools", param="tools")
    if named is not None and named not in names:
        raise Refused(
            400,
            f"tool_choice names {named!r}, which is none of the tools ({', '.join(names)[:200]})",
            param="tool_choice",
        )
    if choice == "none" or not tools:
        return ToolUse()
    return ToolUse(
        tuple(
            tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}}) for tool in tools
        ),
        "" if choice == "required" else named,
        parallel is False or named is not None,
    )


class CallOut(BaseModel):
    """A call in a response."""

    class Function(BaseModel):
        name: str
        arguments: str

    id: str
    type: Literal["function"] = "function"
    function: Function


def call_out(call: Call) -> CallOut:
    """``call`` with an id of its own, unless the model wrote one."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    if not is_unicode(arguments):
        arguments = json.dumps(call.arguments)
    made = CallOut.Function(name=call.name, arguments=arguments)
    return CallOut(id=call.id or f"call_{uuid.uuid4().hex[:24]}", function=made)


def check_results(messages: Sequence[dict[str, Any]]) -> None:
    """Raise Refused for a result (role tool) that follows no call, or is of another one."""
    open_ids: list[str | None] | None = None
    for number, message in enumerate(messages):
        if message["role"] != "tool":
            calls = message.get("tool_calls")
            open_ids = [call.get("id") for call in calls] if calls else None
            continue
        place = f"messages.{number}"
        if open_ids is None:
            raise Refused(
                400,
                f"{place}: a result (role 'tool') follows no message of the assistant with "
                "tool_calls",
                param=f"{place}.role",
            )
        given = message.get("tool_call_id")
        known = [id for id in open_ids if id is not None]
        if known and given not in known:
            found = "is missing" if given is None else f"{given[:64]!r} is none of the calls"
            raise Refused(
                400,
                f"{place}.tool_call_id {found}; before it are {', '.join(known)[:200]}",
                param=f"{place}.tool_call_id",
            )
