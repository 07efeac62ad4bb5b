"""Which code computes a model's elementwise layers (``--kernels``). Imports nothing heavy.

On an NVIDIA GPU: Liger's Triton kernels (arXiv 2410.10989) for RMSNorm, rotary embedding and gated
feed-forward blocks, where the package is installed and knows the family. Never its cross-entropy:
the library's head forms no logits (head.py). On a CPU: fused_layers.py.
"""

import importlib.util
import inspect
from typing import Any

from coati.utils.logging import get_logger
from coati.utils.transformers_compat import text_config

logger = get_logger(__name__)

AUTO = "auto"
LIGER = "liger"
KERNELS = {
    AUTO: "liger on an NVIDIA GPU where it can, fused functions of this library on a CPU",
    LIGER: "Liger's kernels, or an error",
    "torch": "the code of transformers as it is",
}
# What a function of Liger replaces, by the name of its argument.
_PARTS = {
    "rope": "rotary embedding",
    "rms_norm": "RMSNorm",
    "layer_norm": "LayerNorm",
    "swiglu": "SwiGLU",
    "geglu": "GeGLU",
}
_NEVER = ("cross_entropy", "fused_linear_cross_entropy")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def choose_kernels(model: Any, asked: str, device: str, own_layers: bool = True) -> None:
    """Change ``model``'s layers to what ``asked`` of :data:`KERNELS` says, on ``device`` ("cuda" or
    "cpu"), and say once what was replaced by what. It holds for all models of a family, so one
    process has one choice. ``own_layers``: the plugin leaves whole layers in place; where it splits
    or shards them, Liger's kernels would get parts.

    Raises ValueError where Liger was asked for and cannot be.
    """
    if asked not in KERNELS:
        raise ValueError(f"--kernels {asked!r}: choose from {', '.join(KERNELS)}")
    model = _unwrapped(model)
    if asked == LIGER or (asked == AUTO and device == "cuda"):
        reason = _liger_problem(model, device, own_layers)
        reason = reason or _apply_liger(model)
        if reason is None:
            return
        if asked == LIGER:
            raise ValueError(f"--kernels liger: {reason}; use --kernels auto")
        logger.warning_once(f"--kernels auto: {reason}; transformers' own layers are used")
    elif device == "cpu":
        _fuse(model, asked == AUTO)


def _unwrapped(model: Any) -> Any:
    """The language model below adapters and below a scalar head."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(model, "backbone", model)


def _liger_problem(model: Any, device: str, own_layers: bool) -> str | None:
    """Why Liger cannot be applied; None where it can."""
    if device != "cuda":
        return "Liger's kernels need an NVIDIA GPU, and there is none"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install 'coati[liger]')"
    if not own_layers:
        return "this plugin splits or shards the layers, which Liger's kernels need whole"
    kind = text_config(model.config).model_type
    if kind not in _families():
        return f"Liger has no kernels for {kind} models"
    return None


def _families() -> dict[str, Any]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def _apply_liger(model: Any) -> str | None:
    """Why it could not be; None where it was, which is then said."""
    config = text_config(model.config)
    function = _families()[config.model_type]
    known = inspect.signature(function).parameters
    asked = {name: bool(known[name].default) for name in _PARTS if name in known}
    # Adapters of experts, and experts over processes, are this library's own.
    if any(getattr(config, name, None) for name in _EXPERTS):
        asked |= {name: False for name in ("swiglu", "geglu") if name in known}
    try:
        function(model=model, **asked, **{name: False for name in _NEVER if name in known})
    except (ImportError, AttributeError, TypeError, NotImplementedError) as error:
        return (
            f"this release of Liger does not fit this one of transformers for {config.model_type} "
            f"models ({type(error).__name__}: {error}); it may have replaced some layers before"
        )
    parts = ", ".join(_PARTS[name] for name, on in asked.items() if on)
    logger.info_once(f"--kernels: {parts} of {config.model_type} run as Liger's kernels")
    return None


def _fuse(model: Any, on: bool) -> None:
    from coati.models.fused_layers import fuse_layers, switch

    if not on:
        switch(False)
    elif fused := fuse_layers(model):
        kind = text_config(model.config).model_type
        logger.debug(
            f"--kernels: {', '.join(fused)} of {kind} run as fused functions of this library"
        )
