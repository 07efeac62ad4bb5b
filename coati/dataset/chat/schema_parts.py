"""Which parts of the schemas of tools a chat template writes: some write the names of arguments
and their types alone, so that a model never sees what else a file says of them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]
# Where a part stands: in the function, in its parameters, in an argument, or in a field of one.
FUNCTION = "function"
PARAMETERS = "parameters"
ARGUMENT = "argument"
FIELD = "field"
# What is counted of rows with tools, by names that the report knows.
SCHEMAS_DROPPED = "tools whose schemas the template writes in part"
SCHEMA_PART = "not written of schemas: "
_TEXT = {"type": "string"}
# What an argument may have, each with a value and what the argument has beside it.
_OF_ARGUMENTS: dict[str, tuple[Any, Schema]] = {
    "description": ("Probe detail", _TEXT),
    "enum": (["Probe one", "Probe two"], _TEXT),
    "const": ("Probe one", _TEXT),
    "default": ("Probe one", _TEXT),
    "examples": (["Probe one"], _TEXT),
    "format": ("date", _TEXT),
    "pattern": ("^probe$", _TEXT),
    "minLength": (3, _TEXT),
    "maxLength": (77, _TEXT),
    "minimum": (3, {"type": "integer"}),
    "maximum": (77, {"type": "integer"}),
    "items": ({"type": "integer"}, {"type": "array"}),
    "minItems": (3, {"type": "array"}),
    "maxItems": (77, {"type": "array"}),
    "properties": ({"probe_field": _TEXT}, {"type": "object"}),
    "required": (["probe_field"], {"type": "object", "properties": {"probe_field": _TEXT}}),
    "anyOf": ([{"type": "integer"}, {"type": "null"}], {}),
    "oneOf": ([{"type": "integer"}, {"type": "null"}], {}),
    "allOf": ([{"type": "integer"}], {}),
    "$ref": ("#/$defs/Probe", {}),
}
_OF_PARAMETERS: dict[str, Any] = {
    "required": ["probe_argument"],
    "description": "Probe detail",
    "$defs": {"Probe": {"type": "integer"}},
    "definitions": {"Probe": {"type": "integer"}},
}
_OF_FUNCTIONS: dict[str, Any] = {"description": "Probe detail"}
# Of an argument, what holds further schemas: one, several by name, and a list of them.
_INNER = ("items",)
_NAMED = ("properties", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "allOf")


def lost_parts(render: Callable[[list[Schema]], str]) -> frozenset[str]:
    """What of a schema makes no difference to the text that ``render`` gives for a list of tools:
    ``function.description``, ``argument.enum``, ``field.default`` and the like."""
    return frozenset(
        part for part, without, whole in _probes() if render([without]) == render([whole]) != ""
    )


def _probes() -> Iterator[tuple[str, Schema, Schema]]:
    """``(part, tool without it, tool with it)``."""
    plain = _tool(_TEXT)
    for key, value in _OF_FUNCTIONS.items():
        whole = copy.deepcopy(plain)
        without = copy.deepcopy(plain)
        without["function"].pop(key)
        whole["function"][key] = value
        yield f"{FUNCTION}.{key}", without, whole
    for key, value in _OF_PARAMETERS.items():
        whole = copy.deepcopy(plain)
        whole["function"]["parameters"][key] = value
        yield f"{PARAMETERS}.{key}", plain, whole
    for key, (value, beside) in _OF_ARGUMENTS.items():
        without = {**beside}
        whole = {**beside, key: value}
        yield f"{ARGUMENT}.{key}", _tool(without), _tool(whole)
        yield f"{FIELD}.{key}", _tool(_object(without)), _tool(_object(whole))


def _object(field: Schema) -> Schema:
    return {"type": "object", "properties": {"probe_field": field}}


def _tool(argument: Schema) -> Schema:
    parameters = {"type": "object", "properties": {"probe_argument": argument}}
    function = {"name": "probe_function", "description": "Probe", "parameters": parameters}
    return {"type": "function", "function": function}


def parts_of(tools: list[Schema]) -> set[str]:
    """The parts that ``tools`` have, by the names of :func:`lost_parts`."""
    found: set[str] = set()
    for tool in tools:
        function = tool.get("function", tool)
        found.update(f"{FUNCTION}.{key}" for key, value in function.items() if value)
        parameters = function.get("parameters")
        if isinstance(parameters, dict):
            found.update(f"{PARAMETERS}.{key}" for key, value in parameters.items() if value)
            for argument in _inner(parameters):
                _collect(argument, ARGUMENT, found)
    return found


def dropped_notes(lost: frozenset[str], tools: list[Schema]) -> set[str]:
    """What is to be counted of a row with ``tools``, whose template does not write ``lost``."""
    dropped = lost & parts_of(tools) if lost else set()
    return {SCHEMAS_DROPPED, *(SCHEMA_PART + part for part in dropped)} if dropped else set()


def _collect(schema: Schema, place: str, found: set[str]) -> None:
    found.update(f"{place}.{key}" for key, value in schema.items() if value not in (None, "", []))
    for inner in _inner(schema):
        _collect(inner, FIELD, found)


def _inner(schema: Schema) -> Iterator[Schema]:
    """The schemas right inside ``schema``."""
    found = [schema.get(key) for key in _INNER]
    found += [
        one for key in _NAMED if isinstance(schema.get(key), dict) for one in schema[key].values()
    ]
    found += [one for key in _LISTED if isinstance(schema.get(key), list) for one in schema[key]]
    return (one for one in found if isinstance(one, dict))
