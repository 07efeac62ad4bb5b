"""The fields of a conversation template file, in today's layout and in the two older ones."""

import difflib
import os
from pathlib import Path
from typing import Any

from coati.dataset.chat.chat_encoder import special_ids
from coati.dataset.chat.template import one_template, read_chat_template
from coati.utils.json_io import load_json
from coati.utils.logging import get_logger
from coati.utils.resources import template_path

logger = get_logger(__name__)

OPTIONAL_FIELDS = ("response_format_tags", "template_args")  # written where they hold something
FIELDS = ("chat_template", "system_message", "stop_ids", "end_of_assistant", *OPTIONAL_FIELDS)
LINE_MARKERS = ("human_line_start", "human_line_end", "assistant_line_start", "assistant_line_end")
OLD_FIELDS = (*LINE_MARKERS, "end_of_system_line_position")


def open_config(config: dict | str | os.PathLike | None) -> tuple[dict[str, Any], str, Path]:
    """``(config, what messages call it, where its relative paths start)`` of a template given as
    its fields, as a file, by the name of one that comes with coati, or not at all; a file that is
    not there has no fields. Raises ValueError as :func:`~coati.utils.resources.template_path`."""
    if isinstance(config, str | os.PathLike):
        path = template_path(config, may_be_new=True)
        return (load_json(path) if path.is_file() else {}), str(config), path.parent
    return config or {}, "conversation template", Path(".")


def read_fields(config: dict[str, Any], tokenizer, source: str, folder: Path) -> dict[str, Any]:
    """The fields of ``config``; what it lacks is None (stop_ids: an empty list).

    ``source`` names the configuration in messages; ``folder`` is where relative paths start. Raises
    ValueError naming the field that is wrong.
    """
    if not isinstance(config, dict):
        raise ValueError(
            f"{source}: expected a JSON object with the fields {', '.join(FIELDS)}, found "
            f"{config!r:.80}"
        )
    _check_names(config, source)
    fields = {name: config.get(name) for name in FIELDS}
    for name in ("chat_template", "system_message", "end_of_assistant"):
        if fields[name] is not None and not isinstance(fields[name], str):
            raise ValueError(
                f"{source}: {name} must be a string or null, found {fields[name]!r:.80}"
            )
    tags = fields["response_format_tags"]
    if tags is not None and not isinstance(tags, dict):
        raise ValueError(
            f"{source}: response_format_tags must be an object or null, found {tags!r:.80}"
        )
    args = fields["template_args"]
    if args is not None and not isinstance(args, dict):
        raise ValueError(f"{source}: template_args must be an object or null, found {args!r:.80}")
    fields["template_args"] = args or {}
    if fields["chat_template"]:
        try:
            fields["chat_template"] = read_chat_template(fields["chat_template"], folder)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    else:
        fields["chat_template"] = tokenizer_template(tokenizer, source)
    if any(name in config for name in OLD_FIELDS):
        _adopt_line_markers(config, fields, tokenizer, source)
    fields["end_of_assistant"] = fields["end_of_assistant"] or None
    fields["stop_ids"] = read_stop_ids(
        fields["stop_ids"], tokenizer, fields["end_of_assistant"], source
    )
    _check_stop_ids(fields["stop_ids"], tokenizer, source)
    return fields


def _check_stop_ids(stop_ids: list[list[int]], tokenizer, source: str) -> None:
    """Raise ValueError for ids below 0; warn of ids that the tokenizer does not have."""
    for number in (number for stop in stop_ids for number in stop):
        if number < 0:
            raise ValueError(f"{source}: stop_ids holds {number}; token ids are 0 or more")
        if number >= len(tokenizer):
            logger.warning_once(
                f"{source}: stop_ids holds {number}, and the tokenizer has {len(tokenizer)} "
                "tokens: this stop never comes. Is the template of another model?"
            )


def _check_names(config: dict[str, Any], source: str) -> None:
    for name in config:
        if name in FIELDS or name in OLD_FIELDS:
            continue
        near = difflib.get_close_matches(name, FIELDS + OLD_FIELDS, n=1)
        if near:
            raise ValueError(f"{source}: unknown field {name!r}; did you mean {near[0]!r}?")
        logger.warning_once(
            f"{source}: the field {name!r} means nothing to a conversation template and is ignored"
        )


def own_template(tokenizer) -> str | None:
    """The tokenizer's own chat template, None where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return (one_template(template) if isinstance(template, dict) else template) or None


def tokenizer_template(tokenizer, source: str) -> str:
    """The tokenizer's own chat template. Raises ValueError saying which field to set when it has
    none."""
    template = own_template(tokenizer)
    if not template:
        raise ValueError(
            f"{source}: the tokenizer "
            f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__} has no chat "
            "template; set chat_template to Jinja text, to a .jinja file or to a model directory, "
            "or take a template that comes with coati, such as "
            "--conversation_template_config Qwen/Qwen3-8B (docs/data.md)"
        )
    return template


def _adopt_line_markers(config: dict, fields: dict, tokenizer, source: str) -> None:
    """Layout of the second generation: ids that begin and end each line, spans found by searching
    for them."""
    ids = config.get("assistant_line_end")
    taken = []
    if _is_sequence(ids):
        if fields["end_of_assistant"] is None:
            fields["end_of_assistant"] = (
                tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() or None
            )
            taken.append(f"end_of_assistant {fields['end_of_assistant']!r}")
        if fields["stop_ids"] is None:
            fields["stop_ids"] = [list(ids)]
            taken.append(f"stop_ids {[list(ids)]}")
    logger.warning_once(
        f"{source}: {', '.join(name for name in OLD_FIELDS if name in config)} belong to an older "
        "layout of this file; responses are now found through the chat template itself"
        + (f"; assistant_line_end was read as {' and '.join(taken)}" if taken else "")
    )


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def read_stop_ids(
    value: Any, tokenizer, end_of_assistant: str | None, source: str = "stop_ids"
) -> list[list[int]]:
    """Alternatives, each a token sequence, from any layout the field has had.

    ``[[2], [5, 6]]`` is taken as it is; ``["</s>"]`` is encoded; a flat list of ids is one sequence
    when it spells the end marker or holds ordinary tokens, and a list of alternatives when all its
    members are control tokens.
    """
    if value is None or value == []:
        return []
    if isinstance(value, list) and all(_is_sequence(item) for item in value):
        return [list(item) for item in value]
    if _is_sequence(value):
        return _read_flat(value, tokenizer, end_of_assistant, source)
    if isinstance(value, list) and all(isinstance(item, str) and item for item in value):
        read = [tokenizer.encode(item, add_special_tokens=False) for item in value]
        logger.warning_once(
            f"{source}: stop_ids {value} (an older layout: strings) was read as the token "
            f"sequences {read}"
        )
        return read
    raise ValueError(
        f"{source}: stop_ids must be a list of token sequences such as [[2], [7, 8]], found "
        f"{value!r:.80}; leave it out to have it derived"
    )


def _read_flat(
    value: list[int], tokenizer, end_of_assistant: str | None, source: str
) -> list[list[int]]:
    if len(value) == 1:
        return [value]
    spelled = (
        tokenizer.encode(end_of_assistant, add_special_tokens=False) if end_of_assistant else []
    )
    read = (
        [[item] for item in value]
        if value != spelled and special_ids(tokenizer).issuperset(value)
        else [value]
    )
    kind = "alternatives" if len(read) > 1 else "one sequence"
    logger.warning_once(
        f"{source}: the flat stop_ids {value} was read as {kind}: {read}; write it so to be "
        "unambiguous"
    )
    return read
