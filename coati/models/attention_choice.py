"""Which attention implementation of transformers a model runs. Imports nothing heavy."""

import importlib.util
from collections.abc import Callable
from typing import Any

from coati.utils.logging import get_logger
from coati.utils.transformers_compat import text_config

logger = get_logger(__name__)


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
        reason = (
            "the package flash-attn is not installed (pip install flash-attn --no-build-isolation)"
        )
    elif dtype not in ("bf16", "fp16"):
        reason = f"it has no {dtype}"
    else:
        return "flash_attention_2"
    logger.warning_once(
        f"--use_flash_attn: {reason}; PyTorch's scaled_dot_product_attention is used instead"
    )
    return "sdpa"


def needs_eager(model_class: Any, config: Any, asked: str | None) -> str | None:
    """Why a model must run transformers' eager attention rather than ``asked``; None where it need
    not. ``model_class``: None for code of the checkpoint's own."""
    if asked in (None, "sdpa") and caps_scores(config):
        return eager_note(config)
    if asked == "sdpa" and not getattr(model_class, "_supports_sdpa", True):
        return no_sdpa_note(config)
    return None


NO_SDPA = "scaled_dot_product_attention"  # in what transformers says of a model without it


def no_sdpa_note(config: Any) -> str:
    """What is logged where a family lacks it."""
    return (
        f"there is no scaled_dot_product_attention for {config.model_type} models; eager attention "
        "is used"
    )


def caps_scores(config: Any) -> bool:
    """Whether attention caps its scores (Gemma 2), which PyTorch's scaled_dot_product_attention
    leaves out without a word."""
    return getattr(text_config(config), "attn_logit_softcapping", None) is not None


def eager_note(config: Any) -> str:
    """What is logged where eager attention replaces it."""
    return (
        f"{config.model_type} caps its attention scores, which scaled_dot_product_attention cannot "
        "do; eager attention is used"
    )


def with_attention(read: Callable[..., Any], config: Any, options: dict[str, Any]):
    """``read(options)``, with eager attention where code of the checkpoint's own, which is known
    only now, lacks "sdpa"."""
    try:
        return read(options)
    except ValueError as error:
        if options.get("attn_implementation") != "sdpa" or NO_SDPA not in str(error):
            raise
        logger.warning_once(no_sdpa_note(config))
        return read(options | {"attn_implementation": "eager"})
