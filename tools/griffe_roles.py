"""For the site's API pages: docstrings of this code use Sphinx's roles and literal blocks, the site
renders Markdown."""

import re

import griffe

_ROLE = re.compile(r":\w+:`~?\.?([^`]+)`")


def markdown_of(docstring: str) -> str:
    """``docstring`` with roles as code spans and a ``::`` before a literal block as a colon."""
    return re.sub(r"::$", ":", _ROLE.sub(r"`\1`", docstring), flags=re.MULTILINE)


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = markdown_of(obj.docstring.value)
