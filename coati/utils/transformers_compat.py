"""Differences between transformers 4 and 5, one function each.

tests/utils/test_transformers_compat.py shows what each bridges on the installed release.
"""

import re
from typing import Any


def transformers_major() -> int:
    """The installed transformers' major version, without importing it."""
    from importlib.metadata import version

    return int(version("transformers").split(".")[0])


def text_config(config: Any) -> Any:
    """The language model's part of a composite (multimodal) configuration, or ``config`` itself."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def names_of_experts(model: Any) -> tuple[str, ...]:
    """Names of linear layers that peft takes for a layer's experts, which transformers 5 joins to
    one parameter: it would adapt that parameter instead of any layer so named."""
    if transformers_major() < 5:
        return ()
    from peft.utils import transformers_weight_conversion as conversion

    family = getattr(getattr(model, "config", None), "model_type", None)
    if conversion.get_checkpoint_conversion_mapping(family) is None:
        return ()
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(family)
    fused = conversion._MOE_FUSED_TARGETS.get(pattern)
    return tuple(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern) or ()) if fused else ()


def masks_packs_itself() -> bool:
    """Whether models make the masks of packed rows from ``position_ids``."""
    return transformers_major() >= 5


def skip_pattern(part: str) -> str:
    """What names the modules below ``part`` of a name for quantization to leave alone: any part of
    a name in transformers 4, a regular expression from its beginning on in 5."""
    return f".*{re.escape(part)}" if transformers_major() >= 5 else part


def keeps_states(config: Any) -> bool:
    """Whether some layers of a model of ``config`` keep something else than keys and values of
    every token: states of convolutions or linear attention, chunks, keys that layers share."""
    if transformers_major() < 5:
        return False
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    text = text_config(config)
    chunks = getattr(text, "attention_chunk_size", None)
    if chunks or getattr(text, "num_kv_shared_layers", 0):
        return True
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return any(type(layer) not in plain for layer in DynamicCache(config=config).layers)


def body_name(model: Any) -> str:
    """The attribute of a causal language model that holds its transformer without the head; empty
    where ``model`` is that transformer. Llama 4's ``base_model_prefix`` names another."""
    names = (model.base_model_prefix, "model")
    return next((name for name in names if name and hasattr(model, name)), "")


def cache_keyword(accepted: set[str]) -> str:
    """The forward's keyword for the key-value cache among those that it names in ``accepted``."""
    return "cache" if "cache" in accepted else "past_key_values"


def named_special_tokens(tokenizer: Any) -> dict[str, str]:
    """{"bos_token": its text, ...} and, as "additional_special_tokens", the text of the list of
    further ones, which transformers 5 keeps apart."""
    found = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if transformers_major() >= 5 and (more := list(tokenizer.extra_special_tokens)):
        found["additional_special_tokens"] = str([str(token) for token in more])
    return found


def misplaced_generation_settings(config: Any) -> dict[str, tuple[Any, Any]]:
    """{name: (its value, the value that means unset)} of generation settings in a model's
    configuration: transformers 4 keeps them there and moves them when a model is saved, 5 refuses
    to save them."""
    if transformers_major() >= 5:
        return {name: (value, None) for name, value in config._get_generation_parameters().items()}
    return {
        name: (value, config._get_global_generation_defaults()[name])
        for name, value in config._get_non_default_generation_parameters().items()
    }


def dtype_keyword() -> str:
    """The keyword of ``from_pretrained`` for the type that weights are loaded in."""
    return "dtype" if transformers_major() >= 5 else "torch_dtype"


def tokenizer_class_names(entry: Any) -> tuple[str, ...]:
    """Class names in an entry of ``TOKENIZER_MAPPING_NAMES``: a pair of a slow and a fast class in
    transformers 4, one class or None in 5."""
    return tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if name)


def tokenizer_options(saved: dict[str, Any]) -> dict[str, Any] | None:
    """What to load a tokenizer with whose ``tokenizer_config.json`` is ``saved``: keywords of
    ``from_pretrained`` under transformers 4 if transformers 5 wrote the file, whose list of further
    tokens 4 cannot read; None where the installed release reads it as it is."""
    own_code = "AutoTokenizer" in saved.get("auto_map", {})
    further = saved.get("extra_special_tokens")
    of_5 = saved.get("backend") == "tokenizers" or isinstance(further, list)
    if transformers_major() >= 5 or own_code or not of_5:
        return None
    more = list(further) if isinstance(further, list) else []
    return {"extra_special_tokens": {}, "additional_special_tokens": more}


def adopt_config(config: Any) -> None:
    """Under transformers 4, give ``config``, which transformers 5 may have written, the settings of
    rotary embeddings and sliding windows under their old names; 4 would take its defaults without a
    word. Code of a checkpoint's own reads its configuration itself.

    Raises ValueError, without a path, for settings that 4 has no names for.
    """
    if transformers_major() >= 5 or not type(config).__module__.startswith("transformers.models."):
        return
    text = text_config(config)
    for part in [config] if text is config else [config, text]:
        rope = getattr(part, "rope_parameters", None)
        if isinstance(rope, dict):
            _adopt_rope(part, rope)
        if kinds := getattr(part, "layer_types", None):
            _adopt_windows(part, [kind == "sliding_attention" for kind in kinds])


def _adopt_rope(config: Any, rope: dict[str, Any]) -> None:
    if any(isinstance(value, dict) for value in rope.values()):  # {kind of layer: settings}
        local = rope.get("sliding_attention")
        if not local or not hasattr(config, "rope_local_base_freq"):
            raise _unknown(f"rope_parameters ({', '.join(rope)})")
        config.rope_local_base_freq = local["rope_theta"]
        rope = rope["full_attention"]
    names = {
        "rope_theta": ("rotary_emb_base", "rope_theta"),
        "partial_rotary_factor": ("rotary_pct", "partial_rotary_factor"),
    }
    for name, (special, usual) in names.items():
        for each in (special, usual) if name in rope else ():
            if each == usual or hasattr(config, each):
                setattr(config, each, rope[name])
    scaling = {name: value for name, value in rope.items() if name not in names}
    kind = scaling.get("rope_type", "default")
    original = scaling.get("original_max_position_embeddings")
    if kind == "yarn" and original:  # 4 computes the factor from these, whatever is written
        if scaling["factor"] != config.max_position_embeddings / original:
            raise _unknown(
                f"yarn factor {scaling['factor']} with {config.max_position_embeddings} positions, "
                f"originally {original},"
            )
    if config.model_type == "phi3" and kind == "longrope":
        config.original_max_position_embeddings = original
        scaling = {name: scaling[name] for name in ("short_factor", "long_factor")}
        scaling["type"] = kind
    config.rope_scaling = scaling if kind != "default" else None
    del config.rope_parameters
    try:  # what will be saved must be readable
        type(config)(**config.to_dict())
    except (KeyError, ValueError) as error:
        raise _unknown(f"rope_parameters of type {kind}") from error


def _adopt_windows(config: Any, sliding: list[bool]) -> None:
    """``sliding``: whether each layer has a window. transformers 4 computes it from the layer's
    number, or takes one mask for all."""
    layers = range(len(sliding))
    if hasattr(config, "sliding_window_pattern"):
        config.sliding_window_pattern = pattern = (
            sliding.index(False) if False in sliding else len(sliding)
        ) + 1
        there = [bool((layer + 1) % pattern) for layer in layers]
    elif config.model_type == "gemma2":
        there = [layer % 2 == 0 for layer in layers]
    else:
        if not any(sliding) and getattr(config, "sliding_window", None):
            config.sliding_window = None
            config.use_sliding_window = False
        there = [any(sliding)] * len(sliding)
    if there != sliding:
        raise _unknown("layer_types, with sliding windows in some layers")


def _unknown(what: str) -> ValueError:
    return ValueError(
        f"its {what} cannot be expressed in the installed transformers 4; use the default set, or "
        "a transformers 5"
    )


def set_config_dtype(config: Any, dtype: Any) -> None:
    """Record ``dtype`` of the saved weights: ``torch_dtype`` in transformers 4, ``dtype`` in 5."""
    setattr(config, dtype_keyword(), dtype)


def config_dtype(config: Any) -> Any:
    """What :func:`set_config_dtype` recorded, or None."""
    return getattr(config, dtype_keyword(), None)


def disk_names(module: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """``tensors`` {name: whole tensor} of ``module`` under the names and shapes of
    ``save_pretrained``: transformers 5 joins the experts of a layer in memory, files keep each."""
    if not tensors or transformers_major() < 5:
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(module, tensors)
