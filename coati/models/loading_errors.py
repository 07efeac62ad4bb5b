"""What a loader of models failed with, in words that say what to do. Imports nothing heavy."""

import json
import os
from pathlib import Path

from coati.models.directory_files import damaged_file, damaged_weights, read_config, shortened


def explained(path: str | os.PathLike, kind: str, error: Exception) -> ValueError:
    """``error`` of a loader as a ValueError that names ``path`` and, where it is known, what to
    do."""
    said = str(error).strip().split("\n\n")[0].split("\nModel type should be")[0]
    text = shortened(f"{type(error).__name__}: {' '.join(said.split())}")
    if damaged_json := damaged_file(path):
        return ValueError(damaged_json)
    if "trust_remote_code" in str(error):
        return ValueError(
            f"{path} brings Python code of its own (auto_map in its configuration), which is not "
            "run unasked; read it, then pass --trust_remote_code"
        )
    if isinstance(error, json.JSONDecodeError):
        return ValueError(f"{path}: a configuration file is not valid JSON ({error})")
    if unknown := _unknown_family(path, str(error)):
        return ValueError(unknown)
    if damaged := damaged_weights(Path(path)):
        return ValueError(
            f"{damaged}: not readable as weights, truncated or damaged ({shortened(text, 120)}); "
            "copy it again"
        )
    remedy = "; copy its files again from where the model is from" if kind == "tokenizer" else ""
    return ValueError(f"{path}: the {kind} could not be loaded ({text}){remedy}")


def _unknown_family(path: str | os.PathLike, said: str) -> str | None:
    """What to do about a configuration of a family that the installed transformers lacks."""
    from importlib.metadata import version

    config = read_config(path)
    family = config.get("model_type")
    if not family or ("does not recognize" not in said and f"'{family}'" != said.strip()):
        return None
    wanted = config.get("transformers_version")
    installed = version("transformers")
    saved = f", which was saved with transformers {wanted}" if wanted else ""
    newer = f"'transformers>={wanted.split('.dev')[0]}'" if wanted else "transformers"
    what = f"run: pip install -U {newer}"
    if wanted and _numbers(wanted) <= _numbers(installed):
        what = "it may be code of its own (--trust_remote_code), or a misspelled model_type"
    return (
        f"{Path(path) / 'config.json'}: transformers {installed} does not know the model family "
        f"{family!r}{saved}; {what} (the default set of this library has 5.20, the pinned set 4.51)"
    )


def _numbers(release: str) -> list[int]:
    """Major and minor number of a release."""
    return [int(part) for part in release.split(".")[:2] if part.isdigit()]
