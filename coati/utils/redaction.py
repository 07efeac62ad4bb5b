"""Secrets kept out of what is written down: variables by their names, credentials in URLs, values
of flags."""

import re
from collections.abc import Iterable, Mapping

HIDDEN = "(hidden)"
_SECRET = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|BEARER|COOKIE|AUTHORIZATION"
    r"|(^|_)(API_?)?KEYS?(_|$)|APIKEY|._(PWD|PAT)$",
    re.I,
)
# Of a number of tokens, not a token: --max_new_tokens, --add_tokens; unlike HF_TOKENS.
_COUNTED = re.compile(r"tokens|(?i:(MAX|MIN|NUM|NEW)_\w*TOKENS|TOKENS?_(COUNT|LIMIT|IDS?)$)")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.I)
_QUERY = re.compile(
    r"(?P<name>[?&][\w.-]*(token|secret|signature|credential|passw\w*|key)=)[^&\s'\"]+", re.I
)


def is_secret(name: str) -> bool:
    """Whether a variable or flag of that name holds a secret: HF_TOKEN, WANDB_API_KEY, ..."""
    return bool(_SECRET.search(name)) and not _COUNTED.search(name)


def without_credentials(text: str) -> str:
    """``text`` with what stands before the ``@`` of a URL hidden, and the secrets in its query."""
    return _QUERY.sub(rf"\g<name>{HIDDEN}", _URL.sub(rf"\g<scheme>{HIDDEN}@", text))


def redacted(variables: Mapping[str, str]) -> dict[str, str]:
    """``variables`` with secrets and credentials hidden."""
    return {
        name: HIDDEN if is_secret(name) and value else without_credentials(value)
        for name, value in variables.items()
    }


def redacted_words(words: Iterable[str]) -> list[str]:
    """The words of a command line, with the values of secret flags and credentials hidden."""
    shown: list[str] = []
    hiding = False
    for word in words:
        flag = word.startswith("--")
        name, equals, _ = word.partition("=")
        if hiding and not flag:
            shown.append(HIDDEN)
        elif flag and equals and is_secret(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(without_credentials(word))
        hiding = flag and not equals and is_secret(name)
    return shown
