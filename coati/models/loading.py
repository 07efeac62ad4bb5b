"""Models and tokenizers from a directory or a hub name, with errors that say what is wrong with the
directory."""

import difflib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from coati.utils.json_io import load_json
from coati.utils.logging import get_logger

logger = get_logger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "auto": "auto"}
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
)


def load_tokenizer(path: str | os.PathLike, trust_remote_code: bool = False):
    """The tokenizer of ``path`` (a directory or a hub name), fast where there is one, always with a
    pad token.

    A missing pad token becomes the end token, which is harmless here: masks come from lengths.
    Raises ValueError for a class unknown to transformers, code that was not trusted, a missing
    directory and missing end token.
    """
    from transformers import AutoTokenizer

    _check_directory(path, "tokenizer")
    if not trust_remote_code:
        _check_tokenizer_class(Path(path) / "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise explained(path, "tokenizer", error) from error
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


def load_config(path: str | os.PathLike, trust_remote_code: bool = False):
    """The configuration of ``path``. Raises ValueError as :func:`load_causal_lm` does, before
    weights are read."""
    _check_directory(path, "model")
    return load_configuration(path, trust_remote_code)


def load_configuration(path: str | os.PathLike, trust_remote_code: bool = False):
    """The configuration of ``path``, which may hold nothing else."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise explained(path, "model", error) from error


def load_causal_lm(
    path: str | os.PathLike,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    strict: bool = False,
    placing: dict[str, Any] | None = None,
):
    """The language model of ``path``: a Hugging Face directory, a hub name, or a PEFT adapter
    (merged into its base).

    ``dtype`` is a key of DTYPES ("auto": as stored). ``strict``: weights without a use are an
    error, not a notice.
    ``placing``: further keywords of ``from_pretrained``, for quantized models. Raises ValueError
    when the directory lacks configuration or weights, when a file is damaged, when weights are
    missing from it, and for code that was not trusted.
    """
    from transformers import AutoModelForCausalLM

    options = _load_options(dtype, attn_implementation, trust_remote_code) | (placing or {})
    if adapter_base(path):
        return _with_adapter(Path(path), dtype, options, strict)
    return _load(AutoModelForCausalLM, path, dtype, options, strict=strict)


def load_backbone(
    path: str | os.PathLike,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
):
    """The model of ``path`` without any head; arguments and errors as :func:`load_causal_lm`."""
    from transformers import AutoModel

    options = _load_options(dtype, attn_implementation, trust_remote_code)
    if adapter_base(path):
        model = _with_adapter(Path(path), dtype, options, strict=False)
        return getattr(model, model.base_model_prefix)
    return _load(
        AutoModel, path, dtype, options, heads=("lm_head.", "score.", "value_head.", "embed_out.")
    )


def _load_options(
    dtype: str, attn_implementation: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (
        attn_implementation is not None
    ):  # None, passed on, means eager in some versions and a choice in others
        options["attn_implementation"] = attn_implementation
    return options


def _load(
    auto_class: Any,
    path: str | os.PathLike,
    dtype: str,
    options: dict[str, Any],
    heads: tuple[str, ...] = (),
    strict: bool = False,
):
    """``heads``: beginnings of names that are left behind on purpose."""
    _check_directory(path, "model")
    options = options | {"torch_dtype": DTYPES[dtype]}
    try:
        model, report = auto_class.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # safetensors and pickle have error classes of their own
        raise explained(path, "model", error) from error
    if unexpected := sorted(
        key for key in report["unexpected_keys"] if not key.startswith(heads or "\0")
    ):
        told = f"{path}: {type(model).__name__} has no use for {len(unexpected)} weights ({', '.join(unexpected[:3])})"
        if strict:
            raise ValueError(
                f"{told}; is this a model of another kind, a reward model or critic perhaps?"
            )
        logger.warning_once(told)
    if report["missing_keys"]:
        shown = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(
            f"{path}: {len(report['missing_keys'])} weights of {type(model).__name__} are not in "
            f"the files ({shown}); "
            "they would start at random. Is this a model of another kind, or an incomplete copy?"
        )
    return model


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """``config.json`` of a directory as it stands there; empty where there is none (a hub name,
    say)."""
    file = Path(path) / "config.json"
    return load_json(file) if file.is_file() else {}


def adapter_base(path: str | os.PathLike) -> str | None:
    """The base model of a directory that holds a PEFT adapter and no model, else None.

    Raises ValueError when the adapter does not say which, or it is not there.
    """
    directory = Path(path)
    if not (directory / "adapter_config.json").is_file() or (directory / "config.json").is_file():
        return None
    name = load_json(directory / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{directory / 'adapter_config.json'}: base_model_name_or_path is empty; write the "
            "base there"
        )
    beside = directory / name
    base = str(beside) if not Path(name).is_dir() and beside.is_dir() else name
    if os.path.isabs(base) and not Path(base).is_dir():
        raise ValueError(
            f"{directory / 'adapter_config.json'}: the base model {name} is not there; put it back "
            "or write its new "
            "place into base_model_name_or_path"
        )
    return base


def _with_adapter(directory: Path, dtype: str, options: dict[str, Any], strict: bool):
    from coati.models.lora.adapter_files import adapted
    from coati.models.lora.lora import merge_lora

    logger.warning_once(
        f"{directory} holds a LoRA adapter; it is merged into its base {adapter_base(directory)}"
    )
    base = load_causal_lm(adapter_base(directory), dtype=dtype, strict=strict, **options)
    model = merge_lora(adapted(base, directory))
    # An adapter trained on top names this directory as its base, not the base of the base.
    model.name_or_path = model.config._name_or_path = str(directory)
    return model


def choose_attention(use_flash_attn: bool, dtype: str, on_gpu: bool) -> str:
    """The ``attn_implementation`` for ``--use_flash_attn``; says once when it cannot be flash
    attention.

    ``dtype`` is what the model computes in ("fp32", "bf16", "fp16").
    """
    if not use_flash_attn:
        return "sdpa"
    if not on_gpu:
        reason = "it needs a GPU"
    elif importlib.util.find_spec("flash_attn") is None:
        reason = "the package flash-attn is not installed"
    elif dtype not in ("bf16", "fp16"):
        reason = f"it has no {dtype}"
    else:
        return "flash_attention_2"
    logger.warning_once(
        f"--use_flash_attn: {reason}; PyTorch's scaled_dot_product_attention is used instead"
    )
    return "sdpa"


def check_vocabulary(model, tokenizer) -> None:
    """Raise ValueError if the tokenizer can make ids that the model has no embedding for."""
    rows, known = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary, key=vocabulary.get)
    if vocabulary[largest] >= rows:
        raise ValueError(
            f"the tokenizer has {known} tokens (last: {largest!r}, id {vocabulary[largest]}), the "
            "model's vocabulary "
            f"{rows}; use the tokenizer that belongs to the model (--tokenizer_dir), or resize the "
            "model's embeddings"
        )
    if known < 0.75 * rows:
        logger.warning_once(
            f"the tokenizer has {known} tokens, the model's vocabulary {rows}: do they belong "
            "together?"
        )


def disable_dropout(model) -> None:
    """Set every dropout probability of ``model`` to 0, modules and plain attributes of attention
    layers alike."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and (
                "dropout" in name or name in ("layerdrop", "dropout_p")
            ):
                setattr(module, name, 0.0)


def get_model_numel(model) -> int:
    """How many parameters ``model`` has, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _check_directory(path: str | os.PathLike, kind: str) -> None:
    """Refuse a path that looks local and holds no model (or tokenizer); hub names pass."""
    directory, wanted = Path(path), f"a Hugging Face {kind} directory or a name on the hub"
    if directory.is_file():
        raise ValueError(f"{path} is a file; expected {wanted}")
    if not directory.is_dir():
        if os.path.isabs(path) or str(path).startswith((".", "~")) or str(path).count("/") > 1:
            raise ValueError(f"{path}: no such directory; expected {wanted}")
        return
    there = sorted(entry.name for entry in directory.iterdir())
    holds = f"it holds {', '.join(there[:8]) + (', ...' if len(there) > 8 else '') or 'nothing'}"
    if kind == "tokenizer" and not any(
        "token" in name or "vocab" in name or name == "config.json" for name in there
    ):
        raise ValueError(
            f"{path}: no tokenizer files (tokenizer.json, tokenizer_config.json); {holds}"
        )
    if kind == "model" and "config.json" not in there:
        raise ValueError(
            f"{path}: no config.json, so this is not a Hugging Face model directory; {holds}"
        )
    if kind == "model" and not any(list(directory.glob(pattern)) for pattern in _WEIGHTS):
        raise ValueError(
            f"{path}: no weights (model.safetensors, pytorch_model.bin or parts with an index); "
            f"{holds}"
        )


def _check_tokenizer_class(file: Path) -> None:
    """Name the line of tokenizer_config.json whose class transformers lacks (LLaMATokenizer of
    early conversions)."""
    from transformers.models.auto.tokenization_auto import (
        TOKENIZER_MAPPING_NAMES,
        tokenizer_class_from_name,
    )

    config = load_json(file) if file.is_file() else {}
    name = config.get("tokenizer_class")
    if (
        not name
        or "AutoTokenizer" in config.get("auto_map", {})
        or tokenizer_class_from_name(name) is not None
    ):
        return
    if tokenizer_class_from_name(f"{name}Fast") is not None:
        return
    known = {each for pair in TOKENIZER_MAPPING_NAMES.values() for each in pair if each}
    exact = [each for each in known if each.lower() == name.lower()]
    near = (exact or difflib.get_close_matches(name, sorted(known), n=1, cutoff=0))[0]
    lines = file.read_text(encoding="utf-8").splitlines()
    number = next((n for n, line in enumerate(lines, 1) if '"tokenizer_class"' in line), 1)
    raise ValueError(
        f'{file}:{number}: tokenizer_class "{name}" is unknown to transformers; write "{near}" there'
    )


def explained(path: str | os.PathLike, kind: str, error: Exception) -> ValueError:
    """``error`` of a loader as a ValueError that names ``path`` and, where it is known, what to
    do."""
    text = f"{type(error).__name__}: {error}".strip().split("\n\n")[0]
    if "trust_remote_code" in str(error):
        return ValueError(
            f"{path} brings Python code of its own (auto_map in its configuration), which is not "
            "run unasked; read it, "
            "then pass --trust_remote_code"
        )
    if isinstance(error, json.JSONDecodeError):
        return ValueError(f"{path}: a configuration file is not valid JSON ({error})")
    if damaged := _damaged_weights(Path(path)):
        return ValueError(
            f"{damaged}: not readable as weights, truncated or damaged ({text}); copy it again"
        )
    return ValueError(f"{path}: the {kind} could not be loaded ({text})")


def _damaged_weights(directory: Path) -> Path | None:
    from safetensors import SafetensorError, safe_open

    for file in sorted(directory.glob("*.safetensors")) if directory.is_dir() else ():
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return file
    return None
