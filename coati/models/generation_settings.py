"""A base model's generation settings, mended when it is loaded so that transformers saves them
again: it reads settings that contradict each other, and refuses to write them. Imports nothing
heavy."""

import copy
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coati.utils.json_io import load_json
from coati.utils.logging import get_logger
from coati.utils.transformers_compat import misplaced_generation_settings, text_config

logger = get_logger(__name__)

FILE = "generation_config.json"
# What only sampling reads, what only beam search reads, and what means "unset" where it is not 1.
_SAMPLING: tuple[str, ...] = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
_NUMBERS: tuple[str, ...] = (
    *_SAMPLING,
    "length_penalty",
    "diversity_penalty",
    "repetition_penalty",
    "num_beams",
    "max_length",
    "max_new_tokens",
    "min_length",
    "num_return_sequences",
)
_UNSET: dict[str, Any] = {
    "top_k": 50,
    "early_stopping": False,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def read_settings(path: Any) -> dict[str, Any]:
    """``generation_config.json`` of a directory; empty where there is none (a hub name, say).

    Raises ValueError, naming the file and the key, for what transformers would drop without a word
    or fail on later: no JSON object, a text where a number belongs.
    """
    file = Path(path) / FILE
    if not file.is_file():
        return {}
    try:
        content = load_json(file)
    except (ValueError, OSError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(
            f"{file}: not readable as JSON ({error}); copy it again, or remove it to take "
            "transformers' defaults"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found a {type(content).__name__}")
    for key, value in content.items():
        if (wanted := _wrong_type(key, value)) is not None:
            raise ValueError(
                f"{file}: {key} is {value!r}, expected {wanted}; correct it, or remove that line"
            )
    return content


def _wrong_type(key: str, value: Any) -> str | None:
    if value is None:
        return None
    if key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
        return "a number"
    if key == "do_sample" and not isinstance(value, bool):
        return "true or false"
    if key == "early_stopping" and not (isinstance(value, bool) or value == "never"):
        return 'true, false or "never"'
    if key in _TOKENS:
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
            return "a token id" if key != "eos_token_id" else "a token id or a list of them"
    return None


def loadable(path: Any) -> tuple[dict[str, Any], list[str]]:
    """Keywords of ``from_pretrained`` that replace the generation settings of ``path`` where
    transformers would not even load them, and what was changed; empty otherwise. Raises as
    :func:`read_settings`."""
    given = read_settings(path)
    if not given:
        return {}, []
    from transformers import GenerationConfig

    changes: list[str] = []
    left = dict(given)
    with warnings.catch_warnings(), without_complaints():
        warnings.simplefilter("ignore")
        while complaint := _attempt(lambda: GenerationConfig.from_dict(dict(left))):
            named = [name for name in re.findall(r"`(\w+)`", complaint) if name in left]
            free = [name for name in left if name not in _TOKENS] or list(left)
            name = (named or free)[0]
            changes.append(f"{name} {left.pop(name)} -> none")
        settings = GenerationConfig.from_dict(left)
    return ({"generation_config": settings}, changes) if changes else ({}, [])


def mend_padding(config: Any) -> list[str]:
    """Change a padding id of ``config`` that is none (-1, or beyond the vocabulary) to none, and
    return what was changed, in words. To be done before a model is built of it: -1 is the last row
    for an embedding, whose gradient would be dropped without a word."""
    text = text_config(config)
    changes = [_mend_padding(part) for part in ([config] if text is config else [config, text])]
    return list(dict.fromkeys(change for change in changes if change))


def _mend_padding(config: Any) -> str | None:
    pad = getattr(config, "pad_token_id", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(pad, int) or (pad >= 0 and not (isinstance(size, int) and pad >= size)):
        return None
    config.pad_token_id = None
    return f"pad_token_id {pad} -> none"


def _mend_config(config: Any) -> list[str]:
    """Take generation settings out of a model's configuration, whose place is beside it."""
    misplaced = misplaced_generation_settings(config)
    for name, (_, default) in misplaced.items():
        setattr(config, name, default)
    changes = [f"{name} {value} left out of config.json" for name, (value, _) in misplaced.items()]
    return mend_padding(config) + changes


def mended(settings: Any, given: dict[str, Any] | None = None) -> tuple[Any, list[str]]:
    """A copy of a ``GenerationConfig`` that transformers' own strict check accepts, and what was
    changed, in words; ``settings`` itself and nothing where it is accepted as it is.

    Settings that need sampling turn sampling on, as their publisher meant, unless ``given``, the
    file, says ``do_sample: false`` or a temperature of 0: then they go. Settings of beam search
    without beams go, and so does whatever else the check names. Lists of end tokens stay.
    """
    if settings is None:
        return None, []
    original = settings
    settings = copy.deepcopy(settings)
    changes: list[str] = []
    if isinstance(settings.pad_token_id, int) and settings.pad_token_id < 0:
        changes.append(f"pad_token_id {settings.pad_token_id} -> none")
        settings.pad_token_id = None
    changes += _mend_sampling(settings, given or {})
    if (settings.num_beams or 1) == 1:
        changes += [_reset(settings, name) for name in _BEAMS if _is_set(settings, name)]
    while complaint := complaint_about(settings):
        changes.append(_reset(settings, _blamed(settings, complaint)))
    return (settings, changes) if changes else (original, [])


def _mend_sampling(settings: Any, given: dict[str, Any]) -> list[str]:
    names = [name for name in _SAMPLING if _is_set(settings, name)]
    if settings.temperature is not None and settings.temperature <= 0:
        changes = [_reset(settings, name) for name in names]
        if settings.do_sample:
            settings.do_sample = False
            changes.append("do_sample true -> false, as a temperature of 0 means")
        return changes
    if not names or settings.do_sample:
        return []
    if given.get("do_sample") is False:
        return [_reset(settings, name) for name in names]
    settings.do_sample = True
    values = ", ".join(f"{name} {getattr(settings, name)}" for name in names)
    return [f"do_sample -> true, which {values} need{'s' if len(names) == 1 else ''}"]


def _is_set(settings: Any, name: str) -> bool:
    value = getattr(settings, name, None)
    return value is not None and value != _UNSET.get(name, 1.0)


def _reset(settings: Any, name: str) -> str:
    value = getattr(settings, name)
    fresh = type(settings)()
    if hasattr(fresh, name):
        setattr(settings, name, getattr(fresh, name))
    else:
        delattr(settings, name)
    return f"{name} {value} -> none"


def _blamed(settings: Any, complaint: str) -> str:
    """The setting to drop: the first that the complaint names, else the one without which there is
    no complaint, else any."""
    fresh = type(settings)()
    changed = [
        name
        for name, value in vars(settings).items()
        if not name.startswith("_")
        and name not in (*_TOKENS, "transformers_version")
        and value != getattr(fresh, name, object())
    ]
    if named := [name for name in re.findall(r"`(\w+)`", complaint) if name in changed]:
        modes = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
        return next((name for name in named if name not in modes), named[0])
    for name in changed:
        without = copy.deepcopy(settings)
        _reset(without, name)
        if not complaint_about(without):
            return name
    if not changed:
        raise ValueError(f"transformers refuses its own default generation settings: {complaint}")
    return changed[0]


def complaint_about(settings: Any) -> str | None:
    """Why transformers would refuse to save ``settings``, a ``GenerationConfig``; None where it
    would not. The installed release decides."""
    strict = {"strict": True} if "strict" in inspect.signature(settings.validate).parameters else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if refused := _attempt(lambda: copy.deepcopy(settings).validate(**strict)):
            return refused
    return "; ".join(str(warning.message) for warning in caught) or None


def _attempt(work: Callable[[], object]) -> str | None:
    try:
        work()
    except Exception as error:  # values of a wrong type end in errors of every kind
        return f"{type(error).__name__}: {error}"
    return None


def mend_model(model: Any, path: Any = None, changes: Iterable[str] = ()) -> None:
    """Mend what ``model`` would be saved with, in place, and say once what was changed into what.
    ``changes``: those that were made before it was built."""
    given = read_settings(path) if path is not None else {}
    told = [*changes, *_mend_config(model.config)]
    if (composite := getattr(model, "composite", None)) is not None:
        told += _mend_config(composite.config)
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        model.generation_config, more = mended(settings, given)
        told += more
    if told:
        where = f"{path}: " if path is not None else ""
        logger.warning_once(
            f"{where}generation settings that transformers would not save were mended: "
            f"{'; '.join(dict.fromkeys(told))}"
        )


def with_end_tokens(settings: Any, ids: Iterable[int]) -> Any:
    """A copy of ``settings`` whose list of end tokens also has ``ids``, after those it has."""
    settings = copy.deepcopy(settings)
    held = settings.eos_token_id
    ends = list(held) if isinstance(held, list | tuple) else [] if held is None else [held]
    ends += [each for each in dict.fromkeys(ids) if each not in ends]
    if len(ends) > 1 or not isinstance(held, list | tuple):
        settings.eos_token_id = ends if len(ends) > 1 else (ends or [None])[0]
    return settings


@contextmanager
def without_complaints() -> Iterator[None]:
    """Without transformers' own warnings of settings that are mended afterward."""
    loggers = ("transformers.generation.configuration_utils", "transformers.configuration_utils")

    def told_here(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "generation flags" not in text and "pad_token_id must be" not in text

    for name in loggers:
        logging.getLogger(name).addFilter(told_here)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="transformers.generation.configuration_utils")
            yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeFilter(told_here)
