"""Jinja chat templates, loaded, compiled and rendered as transformers does, with errors that name
the line."""

import json
import re
import traceback
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes

from coati.dataset.chat.template_sandbox import TemplateEnvironment
from coati.utils.json_io import load_object
from coati.utils.watchdog import Overrun, interrupted_after

RENDER_S = 10.0  # a rendering takes milliseconds


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=16)
def compile_template(text: str) -> jinja2.Template:
    """Compile ``text``, once per process. Raises ValueError with line and cause for a Jinja syntax
    error."""
    environment = TemplateEnvironment()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        with interrupted_after(RENDER_S):
            template = environment.from_string(text)
    except (RecursionError, MemoryError, ValueError, Overrun) as error:
        raise ValueError(
            f"chat_template: cannot be compiled ({type(error).__name__}: it is nested too deeply, "
            "or too large); fix the template, or leave chat_template out to use the tokenizer's own"
        ) from error
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


# What a template is given anyway, and no argument of a user may take the place of.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


def check_template_args(text: str, args: dict[str, Any]) -> None:
    """Raise ValueError for arguments that the template ``text`` does not name, or that are given to
    every template."""
    for name in args:
        if name in GIVEN:
            raise ValueError(f"template_args: {name} is given to every template; leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", text):
            known = ", ".join(arguments_of(text)) or "no arguments at all"
            raise ValueError(
                f"template_args: the chat template reads no {name!r}; it reads {known}"
            )


def with_defaults(text: str, args: dict[str, Any]) -> str:
    """The template ``text`` with ``args`` as the values of those that it is not given: for programs
    that know the template alone."""
    defaults = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif -%}}\n"
        for name, value in args.items()
    )
    # The empty expression keeps white space at the beginning from being taken for that of the tags.
    return "".join(defaults) + ("{{ '' }}" if args else "") + text


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)}: {_literal(inner)}" for key, inner in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else json.dumps(value)


def arguments_of(text: str) -> list[str]:
    """What the template ``text`` reads beside what it is given anyway."""
    environment = TemplateEnvironment()
    others = {*environment.globals, *GIVEN, "raise_exception", "strftime_now"}
    parsed = environment.parse(text)
    read = meta.find_undeclared_variables(parsed) - others
    own = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"}
    asked = {name for name in own if re.search(rf"\b{re.escape(name)} is (not )?defined", text)}
    return sorted(name for name in read - (own - asked) if not name.endswith("_token"))


def special_tokens(tokenizer) -> dict[str, str]:
    """The tokens that a template may refer to: ``bos_token``, ``eos_token``, ... -> their text."""
    return {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }


def render_template(
    text: str,
    messages: list[dict[str, Any]],
    tokens: dict[str, str],
    generation: bool,
    variables: dict[str, Any] | None = None,
) -> str:
    """The conversation as text; ``tokens`` are from :func:`special_tokens`, ``generation`` adds the
    generation prompt, ``variables`` are further ones, ``tools`` among them. Raises
    ``jinja2.TemplateError`` if the template rejects ``messages``, fails on them in any other way,
    or takes longer than :data:`RENDER_S` seconds."""
    template = compile_template(text)
    named = {"messages": messages, "add_generation_prompt": generation, **tokens}
    if variables:
        named |= variables
    named.setdefault("tools", None)
    try:
        with interrupted_after(RENDER_S):
            return template.render(documents=None, **named)
    except jinja2.TemplateError:
        raise
    except Overrun as error:
        raise jinja2.TemplateRuntimeError(
            f"it takes longer than {RENDER_S:g} s; does a loop have an end?"
        ) from error
    except Exception as error:  # whatever the expressions of a template do
        raise jinja2.TemplateRuntimeError(
            f"{type(error).__name__}: {error}{_line_of(error)}"
        ) from error


def _line_of(error: BaseException) -> str:
    """In which line of the template it was raised."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return f" (line {lines[-1]})" if lines else ""


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


def one_template(named: dict[str, str]) -> str | None:
    """The template named ``default``, and for rows with tools the one named ``tool_use``, as
    transformers chooses between them."""
    default = named.get("default")
    if default is None or "tool_use" not in named:
        return default
    with_tools, without = (text.removesuffix("\n") for text in (named["tool_use"], default))
    # The empty expressions keep white space at the ends from being taken for that of the tags.
    keep = "{{ '' }}"
    return f"{{% if tools %}}\n{with_tools}{keep}{{% else %}}\n{without}{keep}{{% endif %}}"


def _from_model_directory(path: Path) -> str:
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = (
            load_object(path / name).get("chat_template") if (path / name).is_file() else None
        )
        if isinstance(template, list):
            template = one_template({entry["name"]: entry["template"] for entry in template})
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
