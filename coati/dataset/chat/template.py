"""Jinja chat templates, loaded, compiled and rendered as transformers does, with errors that name
the line."""

import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coati.utils.json_io import load_json


class GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}``, which marks responses in some templates, as plain
    text: response spans are found by probing the template instead."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters, which is wrong in a prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=16)
def compile_template(text: str) -> jinja2.Template:
    """Compile ``text``, once per process. Raises ValueError with line and cause for a Jinja syntax
    error."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        lines = text.splitlines() or [""]
        found = lines[min(error.lineno, len(lines)) - 1].strip()
        shown = found if len(found) <= 160 else found[:157] + "..."
        raise ValueError(
            f"chat_template: Jinja syntax error in line {error.lineno} ({error.message}), found "
            f"{shown!r}; fix the template, or leave chat_template out to use the tokenizer's own"
        ) from error
    # Every rendering copies the globals. Copying Jinja's ChainMap would take longer than rendering.
    template.globals = dict(template.globals)
    return template


def special_tokens(tokenizer) -> dict[str, str]:
    """The tokens that a template may refer to: ``bos_token``, ``eos_token``, ... -> their text."""
    return {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }


def render_template(
    text: str, messages: list[dict[str, str]], tokens: dict[str, str], generation: bool
) -> str:
    """The conversation as text; ``tokens`` are from :func:`special_tokens`, ``generation`` adds the
    generation prompt. Raises ``jinja2.TemplateError`` if the template rejects ``messages``."""
    return compile_template(text).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=generation, **tokens
    )


def read_chat_template(value: str, folder: Path) -> str:
    """The template text that the value of a ``chat_template`` field refers to.

    ``value`` is Jinja text, the path of a ``.jinja`` file (relative to ``folder`` or the working
    directory), a model directory, or a model name on the hub.

    Raises:
        ValueError: if ``value`` is none of them, or has no template.
    """
    if "{{" in value or "{%" in value or "\n" in value:
        return value
    for path in (folder / value, Path(value)):
        if path.is_file():
            return path.read_text(encoding="utf-8")
        if path.is_dir():
            return _from_model_directory(path)
    if Path(value).suffix in (".jinja", ".j2", ".json", ".txt"):
        raise ValueError(
            f"chat_template: there is no file {value} in {folder} or the working directory; "
            "expected Jinja text or the path of a file"
        )
    return _from_hub(value)


def _from_model_directory(path: Path) -> str:
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = load_json(path / name).get("chat_template") if (path / name).is_file() else None
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template:
            return template
    raise ValueError(
        f"chat_template: the directory {path} holds no chat template (looked in "
        "chat_template.jinja, tokenizer_config.json, chat_template.json); write the Jinja text or "
        "name another model"
    )


def _from_hub(name: str) -> str:
    from transformers import AutoTokenizer

    try:
        template = AutoTokenizer.from_pretrained(name).chat_template
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"chat_template: {name!r} is neither Jinja text, nor a file, nor a model directory, "
            f"nor a model that can be loaded here ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(template, str):
        raise ValueError(
            f"chat_template: the tokenizer of {name!r} has no chat template; write the Jinja text "
            "instead"
        )
    return template
