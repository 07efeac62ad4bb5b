"""Models from a directory or a hub name: what a directory holds (adapter, base, configuration,
weights), and loaders whose errors say what is wrong with it. Imports nothing heavy."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coati.models.attention_choice import needs_eager, with_attention
from coati.models.directory_files import (
    check_adapter,
    check_index,
    check_small_files,
    mismatch,
)
from coati.models.generation_settings import (
    loadable,
    mend_model,
    mend_padding,
    without_complaints,
)
from coati.models.loading_errors import explained
from coati.models.loading_report import check_report, mismatched, without_report
from coati.models.quantization_registry import BASES
from coati.utils.json_io import load_json, load_object
from coati.utils.logging import get_logger
from coati.utils.transformers_compat import (
    adopt_config,
    body_name,
    dtype_keyword,
    transformers_major,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

logger = get_logger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "auto": "auto"}
ADAPTER_CONFIG = "adapter_config.json"
CHAIN = "lora_chain.json"  # beside an adapter that was joined with those it was trained on
LORA_SETTINGS = "lora_config.json"  # beside an adapter: what it was trained with
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
)
# Beginnings of names of heads, which a backbone leaves behind.
_SCALAR_HEADS = ("score.", "value_head.")
_HEADS = ("lm_head.", "embed_out.", *_SCALAR_HEADS)


# What a directory holds


def find_model(path: str | os.PathLike, *parts: str) -> str:
    """The model directory that ``path`` means: itself, its ``modeling``, or that of one of its
    ``parts`` ("actor", "critic"); what is no directory (a hub name, say) is returned as it is.

    Raises ValueError for a directory without a model, naming the checkpoints in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    for place in (folder, folder / "modeling", *(folder / part / "modeling" for part in parts)):
        if not is_bare(place) or has_weights(place):
            return str(place)
    if found := sorted(entry.name for entry in folder.glob("epoch-*_step-*")):
        raise ValueError(
            f"{path}: no final model here, but checkpoints; name one of them: {', '.join(found)}"
        )
    raise ValueError(
        f"{path} holds no model (config.json, adapter_config.json), nor does its modeling/ "
        f"directory; name the directory that the training script wrote; {_holds(folder)}"
    )


def is_bare(path: str | os.PathLike) -> bool:
    """Whether a directory has no configuration, so that its weights, if any, need one from
    elsewhere."""
    return not any((Path(path) / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def has_weights(path: str | os.PathLike) -> bool:
    """Whether a directory holds weights, whole or in parts."""
    return any(next(Path(path).glob(pattern), None) for pattern in _WEIGHTS)


def adapter_base(path: str | os.PathLike) -> str | None:
    """The base model of a directory that holds a PEFT adapter and no model, else None.

    Raises ValueError when the adapter does not say which, or it is not there.
    """
    directory = Path(path)
    if not (directory / ADAPTER_CONFIG).is_file() or (directory / "config.json").is_file():
        return None
    name = load_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        found = f"is {name!r}" if name else "is empty"
        raise ValueError(
            f"{directory / 'adapter_config.json'}: base_model_name_or_path {found}; write the "
            "base there, a directory or a hub name"
        )
    beside = directory / name
    base = str(beside) if not Path(name).is_dir() and beside.is_dir() else name
    if Path(base).is_dir() and Path(base).resolve() == directory.resolve():
        raise ValueError(
            f"{directory / 'adapter_config.json'}: base_model_name_or_path is this directory "
            "itself; write the base there that the adapter was trained on"
        )
    if base.startswith(("/", ".", "~")) and not Path(base).is_dir():
        raise ValueError(
            f"{directory / 'adapter_config.json'}: the base model {name} is not there; put it back "
            "or write its new place into base_model_name_or_path"
        )
    return base


def base_below(path: str | os.PathLike) -> str:
    """The model below the adapter of ``path``, which may lie on another adapter; ``path`` itself
    where it holds none."""
    seen: set[str] = set()
    while (base := adapter_base(path)) and base not in seen:
        seen.add(base)
        path = base
    return str(path)


def trained_from(path: str | os.PathLike) -> str | None:
    """What the adapter of a directory was trained on: an earlier adapter where the two were saved
    as one, else :func:`adapter_base`."""
    chain = Path(path) / CHAIN
    return load_json(chain)["trained_on"] if chain.is_file() else adapter_base(path)


def base_quantization(path: str | os.PathLike) -> str | None:
    """How the base was stored that the adapter of a directory was trained on (--quantize_base);
    None where it was not quantized."""
    file = Path(path) / LORA_SETTINGS
    kind = load_object(file).get("quantize_base") if file.is_file() else None
    if kind is not None and kind not in BASES:
        raise ValueError(
            f"{file}: quantize_base is {kind!r}; expected null or one of {', '.join(BASES)}"
        )
    return kind


def _holds(directory: Path) -> str:
    there = sorted(entry.name for entry in directory.iterdir())
    return f"it holds {', '.join(there[:8]) + (', ...' if len(there) > 8 else '') or 'nothing'}"


def check_directory(path: str | os.PathLike, kind: str) -> None:
    """Raise ValueError for a path that looks local and holds no ``kind``, "model" or "tokenizer";
    hub names pass."""
    directory = Path(path)
    wanted = f"a Hugging Face {kind} directory or a name on the hub"
    if directory.is_file():
        raise ValueError(f"{path} is a file; expected {wanted}")
    if not directory.is_dir():
        if os.path.isabs(path) or str(path).startswith((".", "~")) or str(path).count("/") > 1:
            raise ValueError(f"{path}: no such directory; expected {wanted}")
        return
    inside = directory / "modeling"
    holds = _holds(directory)
    tokenizer = any(
        "token" in entry.name or "vocab" in entry.name or entry.name == "config.json"
        for entry in directory.iterdir()
    )
    absent = not tokenizer if kind == "tokenizer" else not has_weights(directory)
    if is_bare(directory) and absent and not is_bare(inside):
        raise ValueError(
            f"{path} is the directory of a run; its {kind} is in {inside}, name that one"
        )
    if kind == "tokenizer" and not tokenizer:
        raise ValueError(
            f"{path}: no tokenizer files (tokenizer.json, tokenizer_config.json); {holds}"
        )
    if kind == "model" and not (directory / "config.json").is_file():
        raise ValueError(
            f"{path}: no config.json, so this is not a Hugging Face model directory; {holds}"
        )
    if kind == "model" and not has_weights(directory):
        raise ValueError(
            f"{path}: no weights (model.safetensors, pytorch_model.bin or parts with an index); "
            f"{holds}"
        )


# Loaders


def load_config(path: str | os.PathLike, trust_remote_code: bool = False):
    """The configuration of ``path``. Raises ValueError as :func:`load_causal_lm` does, before
    weights are read."""
    check_directory(path, "model")
    return load_configuration(path, trust_remote_code)


def load_configuration(path: str | os.PathLike, trust_remote_code: bool = False):
    """The configuration of ``path``, which may hold nothing else."""
    from transformers import AutoConfig

    check_small_files(path)
    try:
        with without_complaints():
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        adopt_config(config)
        return config
    except Exception as error:  # classes of their own in strict configurations, any in remote code
        raise explained(path, "model", error) from error


def load_causal_lm(
    path: str | os.PathLike,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    strict: bool = False,
    placing: dict[str, Any] | None = None,
    quantize_base: str | None = None,
):
    """The language model of ``path``: a Hugging Face directory, a hub name, or a PEFT adapter
    (merged into its base).

    ``dtype`` is a key of DTYPES ("auto": as stored). ``strict``: weights without a use are an
    error, not a notice.
    ``placing``: further keywords of ``from_pretrained``, for quantized models. ``quantize_base``:
    how linear layers are stored, a key of BASES, for LoRA adapters on them; the weights are read
    from the mapped file one by one. Raises ValueError
    when the directory lacks configuration or weights, when a file is damaged, when weights are
    missing from it, and for code that was not trusted.
    """
    from transformers import AutoModelForCausalLM

    options = _load_options(dtype, attn_implementation, trust_remote_code) | (placing or {})
    if (base := adapter_base(path)) is None:
        stored = "auto" if quantize_base else dtype
        model = _load(AutoModelForCausalLM, path, stored, options, strict=strict)
        return quantized(model, quantize_base, dtype)
    # Rounded as in training, from the weights as they are on the disk.
    late = base_quantization(path) is not None and dtype != "fp32"
    read = "auto" if late else dtype
    model = merge_adapter(load_causal_lm(base, dtype=read, strict=strict, **options), path)
    if late and dtype != "auto":
        import torch

        model.to(getattr(torch, DTYPES[dtype]))
    # An adapter trained on top names this directory as its base, not the base of the base.
    model.name_or_path = model.config._name_or_path = str(path)
    return quantized(model, quantize_base, dtype)


def quantized(model: Any, kind: str | None, dtype: str) -> Any:
    """``model`` with its linear layers stored as ``kind`` and the rest in ``dtype``; None: as it
    is."""
    if kind is None:
        return model
    from coati.models.lora.quantized_base import quantize_base

    return quantize_base(model, kind, dtype)


def load_backbone(
    path: str | os.PathLike,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    keep_lm_head: bool = False,
):
    """The model of ``path`` without any head, or with the vocabulary head alone when
    ``keep_lm_head``; arguments and errors as :func:`load_causal_lm`."""
    from transformers import AutoModel, AutoModelForCausalLM

    options = _load_options(dtype, attn_implementation, trust_remote_code)
    if adapter_base(path) or is_composite_directory(path, trust_remote_code):
        model = load_causal_lm(path, dtype=dtype, **options)
        return model if keep_lm_head else getattr(model, body_name(model))
    auto_class = AutoModelForCausalLM if keep_lm_head else AutoModel
    heads = _SCALAR_HEADS if keep_lm_head else _HEADS
    return _load(auto_class, path, dtype, options, heads=heads)


def is_composite_directory(path: str | os.PathLike, trust_remote_code: bool = False) -> bool:
    """Whether ``path`` holds a multimodal model, whose language model :func:`load_causal_lm`
    gives."""
    from coati.models.composite import is_composite

    return is_composite(load_config(path, trust_remote_code))


def adapted(base: "nn.Module", directory: str | os.PathLike) -> "PeftModel":
    """``base`` with the adapter of ``directory`` around it, a PeftModel. An adapter that was
    trained on a quantized base gets one of the same values.

    Raises ValueError when the adapter cannot be read or its tensors are not exactly those that its
    settings ask for.
    """
    from peft import PeftModel
    from peft.utils import load_peft_weights

    check_adapter(directory)
    _round_for(base, directory)
    try:
        _grow_for(base, load_peft_weights(str(directory), device="cpu"))
        model = PeftModel.from_pretrained(base, str(directory))
        held = {
            name for name in load_peft_weights(str(directory), device="cpu") if ".lora_" in name
        }
    except Exception as error:  # safetensors and pickle have error classes of their own
        raise explained(directory, "adapter", error) from error
    dora = ("lora_magnitude_vector.weight", "lora_magnitude_vector")  # so named in files
    names_here = (name.replace(".default", "") for name in model.state_dict() if ".lora_" in name)
    wanted = {name.replace(*dora) for name in names_here}
    for names, what in (
        (wanted - held, "lacks"),
        (held - wanted, "has tensors that its settings have no use for:"),
    ):
        if names:
            raise ValueError(
                f"{directory}: the adapter {what} {min(names)} ({len(names)} such names); it "
                "belongs to another base model, or was cut when it was copied"
            )
    return model


def _round_for(base: "nn.Module", directory: str | os.PathLike) -> None:
    kind = base_quantization(directory)
    if kind is None or getattr(base, "is_quantized", False):  # in few bits already, by --quant
        return
    from coati.models.lora.quantized_base import round_base

    logger.info(
        f"{directory} was trained on a base quantized to {kind}: the base gets the same values, "
        f"which differ from the original's by {round_base(base, kind)}"
    )


def _grow_for(base: "nn.Module", tensors: dict[str, Any]) -> None:
    """Give ``base`` the vocabulary of an adapter that holds an embedding of another size, as
    tokens that were added do."""
    from coati.models.added_tokens import resize_embeddings, vocabulary_modules

    names = vocabulary_modules(base) if hasattr(base, "get_output_embeddings") else []
    for name in names:
        whole = tensors.get(f"base_model.model.{name}.weight")
        if whole is not None and len(whole) != base.get_submodule(name).weight.shape[0]:
            resize_embeddings(base, len(whole))


def merge_adapter(base: "nn.Module", directory: str | os.PathLike) -> Any:
    """``base`` with the adapter of ``directory`` added into its weights; errors as
    :func:`adapted`."""
    from coati.models.lora.lora import merge_lora

    logger.info(
        f"{directory} holds a LoRA adapter; it is merged into its base {adapter_base(directory)}"
    )
    return merge_lora(adapted(base, directory))


def _load_options(
    dtype: str, attn_implementation: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    # None, passed on, means eager in some versions and a choice in others.
    if attn_implementation is not None:
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
    check_directory(path, "model")
    from transformers.utils.logging import disable_progress_bar

    from coati.models.composite import classes_of, is_composite, load_text_part

    if os.environ.get("RANK", "0") != "0":
        disable_progress_bar()  # one bar is enough
    options = options | {dtype_keyword(): DTYPES[dtype]}
    settings, dropped = loadable(path)
    config = load_configuration(path, options["trust_remote_code"])
    check_index(path)
    changes = mend_padding(config)
    composite = is_composite(config)
    if composite:  # refused in its own words, before weights are read
        model_class = classes_of(path, config)[1]
    else:
        model_class = auto_class._model_mapping.get(type(config), None)
    if note := needs_eager(model_class, config, options.get("attn_implementation")):
        logger.warning_once(note)
        options["attn_implementation"] = "eager"
    # Under 4 the file itself may be transformers 5's.
    if transformers_major() < 5 or (changes and not composite):
        options["config"] = config
    options |= settings
    if composite:
        read = partial(load_text_part, path, config)
    else:
        read = partial(_read, auto_class, path)
    try:
        with without_report(), without_complaints():
            model, report = with_attention(read, config, options)
    except Exception as error:  # safetensors and pickle have error classes of their own
        if wrong := mismatched(read, config, options):
            raise ValueError(mismatch(path, *wrong)) from error
        raise explained(path, "model", error) from error
    check_report(path, model, report, heads, strict)
    mend_model(model, path, [*dropped, *changes])
    return model


def _read(auto_class: Any, path: str | os.PathLike, options: dict[str, Any]):
    return auto_class.from_pretrained(path, output_loading_info=True, **options)


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
