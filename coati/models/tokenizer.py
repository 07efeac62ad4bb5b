"""Tokenizers from a directory or a hub name, and whether one fits a model. Imports nothing
heavy."""

import difflib
import os
from pathlib import Path

from coati.models.directory_files import check_small_files, check_types
from coati.models.loading import ADAPTER_CONFIG, check_directory
from coati.models.loading_errors import explained
from coati.utils.json_io import load_object
from coati.utils.logging import get_logger
from coati.utils.phases import phase
from coati.utils.transformers_compat import tokenizer_class_names, tokenizer_options

logger = get_logger(__name__)

# Words, numbers and signs with single spaces between them, as every tokenizer knows them.
PROBE = "The answer is 12, not 3."


@phase("loading the tokenizer")
def load_tokenizer(path: str | os.PathLike, trust_remote_code: bool = False):
    """The tokenizer of ``path`` (a directory or a hub name), fast where there is one, always with a
    pad token.

    A missing pad token becomes the end token, which is harmless here: masks come from lengths.
    Raises ValueError for a class unknown to transformers, code that was not trusted, a missing
    directory and missing end token.
    """
    check_directory(path, "tokenizer")
    check_small_files(path)
    file = _file(path, "tokenizer_config.json")
    saved = load_object(file) if file else {}
    if file:
        check_types(file, saved)
    options = tokenizer_options(saved)
    if not trust_remote_code and options is None and file:
        _check_class(file, saved)
    try:
        tokenizer = _read(path, options, trust_remote_code)
    except Exception as error:  # tokenizers raises Exception itself
        raise explained(path, "tokenizer", error) from error
    tokenizer = _as_its_file(path, tokenizer)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{path}: the tokenizer has neither eos_token nor pad_token; set them in its config"
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.warning_once(
            f"the tokenizer has no pad token; {tokenizer.eos_token!r} serves (masks come from "
            "lengths)"
        )
    return tokenizer


def find_tokenizer(directory: str | os.PathLike) -> str:
    """Where the tokenizer of a model directory is: there, or with its base where an adapter was
    saved without one."""
    adapter = Path(directory) / ADAPTER_CONFIG
    if not adapter.is_file() or (Path(directory) / "tokenizer_config.json").is_file():
        return str(directory)
    base = load_object(adapter).get("base_model_name_or_path") or str(directory)
    logger.info(f"{directory} holds no tokenizer; that of its base {base} is used")
    return base


def check_vocabulary(model, tokenizer) -> None:
    """Raise ValueError if the tokenizer can make ids that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    known = len(tokenizer)
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary, key=vocabulary.get)
    if vocabulary[largest] >= rows:
        raise ValueError(
            f"the tokenizer has {known} tokens (last: {largest!r}, id {vocabulary[largest]}), the "
            f"model's vocabulary {rows}; use the tokenizer that belongs to the model "
            "(--tokenizer_dir), or resize the model's embeddings"
        )
    if known < 0.75 * rows:
        logger.warning_once(
            f"the tokenizer has {known} tokens, the model's vocabulary {rows}: do they belong "
            "together?"
        )


def _file(path: str | os.PathLike, name: str) -> Path | None:
    """``name`` in a directory, or in the cache of a hub name; None where it is not."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(path, name)
    except (OSError, ValueError):  # AutoTokenizer will say what is wrong with the name
        return None
    return Path(found) if found else None


def _read(path: str | os.PathLike, options: dict | None, trust_remote_code: bool):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    if options is None:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if _file(path, "tokenizer.json") is None:
        return AutoTokenizer.from_pretrained(path, **options)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the class of transformers 5 is another, as is known
    try:
        return PreTrainedTokenizerFast.from_pretrained(path, **options)
    finally:
        logging.set_verbosity(verbosity)


def _as_its_file(path: str | os.PathLike, tokenizer):
    """``tokenizer``, or what tokenizer.json says where its class loses text that this keeps: those
    of transformers 5 rebuild it as their family has it, and several models (DeepSeek) name the
    class of another one."""
    file = _file(path, "tokenizer.json")
    if file is None or not getattr(tokenizer, "is_fast", False):
        return tokenizer
    if _gives_back(tokenizer.backend_tokenizer):
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if not _gives_back(Tokenizer.from_file(str(file))):
        return tokenizer
    logger.warning_once(
        f"{path}: read by {type(tokenizer).__name__}, which its configuration names, the tokenizer "
        "loses the spaces of a text; tokenizer.json is taken as it stands instead"
    )
    return PreTrainedTokenizerFast.from_pretrained(path)


def _gives_back(core) -> bool:
    """Whether a text comes back from its tokens, but for spaces at its beginning."""
    ids = core.encode(PROBE, add_special_tokens=False).ids
    return core.decode(ids).lstrip(" ") == PROBE


def _check_class(file: Path, config: dict) -> None:
    """Name the line of tokenizer_config.json whose class transformers lacks (LLaMATokenizer of
    early conversions)."""
    from transformers.models.auto.tokenization_auto import (
        TOKENIZER_MAPPING_NAMES,
        tokenizer_class_from_name,
    )

    name = config.get("tokenizer_class")
    if (
        not name
        or "AutoTokenizer" in config.get("auto_map", {})
        or tokenizer_class_from_name(name) is not None
    ):
        return
    if tokenizer_class_from_name(f"{name}Fast") is not None:
        return
    known = {
        name for entry in TOKENIZER_MAPPING_NAMES.values() for name in tokenizer_class_names(entry)
    }
    exact = [each for each in known if each.lower() == name.lower()]
    near = (exact or difflib.get_close_matches(name, sorted(known), n=1, cutoff=0))[0]
    lines = file.read_text(encoding="utf-8").splitlines()
    number = next((n for n, line in enumerate(lines, 1) if '"tokenizer_class"' in line), 1)
    raise ValueError(
        f'{file}:{number}: tokenizer_class "{name}" is unknown to transformers; write "{near}" '
        "there"
    )
