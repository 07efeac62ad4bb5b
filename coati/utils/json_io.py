"""JSON and text files that are either whole or absent."""

import json
import os
from pathlib import Path
from typing import Any


def load_json(path: str | os.PathLike) -> Any:
    """Read one JSON document, with a byte order mark or without. Raises ValueError with the file,
    and line and column, when it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text, so no JSON (the first wrong byte: {error.start})"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})"
        ) from error


def load_object(path: str | os.PathLike) -> dict[str, Any]:
    """:func:`load_json` of a document that is an object. Raises ValueError for another kind."""
    found = load_json(path)
    if not isinstance(found, dict):
        kind = "null" if found is None else type(found).__name__
        raise ValueError(f"{path}: expected a JSON object {{...}}, found {kind}")
    return found


def save_json(obj: Any, path: str | os.PathLike) -> None:
    """Write ``obj`` as indented UTF-8 JSON under a temporary name, then rename it into place; makes
    the folder."""
    save_text(json.dumps(obj, indent=2, ensure_ascii=False) + "\n", path)


def save_text(text: str, path: str | os.PathLike) -> None:
    """Write ``text`` as UTF-8 under a temporary name, then rename it into place; makes the
    folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
