"""How a causal language model is called with a key-value cache, whatever wraps it."""

import inspect
import sys

import torch
from torch import Tensor, nn
from transformers import Cache

from coati.models.generation.kv_cache import LayerCache, RowCache, TupleCache
from coati.utils.transformers_compat import cache_keyword, keeps_states


def innermost(model: nn.Module) -> nn.Module:
    """The transformers model inside plugin wrappers and adapters."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepted_by(model: nn.Module) -> set[str]:
    """The keywords that the model's forward names; wrappers pass everything on, so the innermost
    decides."""
    return set(inspect.signature(innermost(model).forward).parameters)


def cache_for(model: nn.Module, rows: int, columns: int) -> RowCache | LayerCache | TupleCache:
    """An empty cache of the kind that ``model`` fills, for ``rows`` rows and up to ``columns``
    columns.

    Raises:
        ValueError: for a model that brings a cache class of its own.
    """
    inner = innermost(model)
    module = sys.modules[type(inner).__module__]
    own = [name for name, each in vars(module).items() if _is_own_cache(each, module.__name__)]
    if own:
        raise ValueError(
            f"{type(inner).__name__} keeps its states in a cache class of its own ({own[0]}), "
            "which the sampling loop does not know; it can be trained, but not sampled from here"
        )
    config = getattr(inner, "config", None)
    if hasattr(config, "get_text_config") and keeps_states(config):
        return LayerCache(inner.config)
    if getattr(inner, "_supports_cache_class", True):
        return RowCache(rows, columns)
    return TupleCache()


def _is_own_cache(value: object, module: str) -> bool:
    if not isinstance(value, type) or value.__module__ != module:
        return False
    # transformers 5 has a base class of the caches of single layers, too.
    layers = any(base.__name__ == "CacheLayerMixin" for base in value.__mro__)
    return layers or issubclass(value, Cache)


def call_with_cache(
    model: nn.Module,
    accepted: set[str],
    cache: RowCache | LayerCache | TupleCache,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
) -> Tensor:
    """``ids`` and ``positions`` (rows, n) through the model, after what ``cache`` holds; logits
    (rows, 1 or n, V).

    ``mask`` (rows, shown): 1 on the columns of the cache and of ``ids`` that hold tokens.
    ``accepted``: the keywords of the model's forward.

    Raises:
        ValueError: for a model that does not fill the cache.
    """
    shown = mask.shape[1]
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        cache_keyword(accepted): cache.states if isinstance(cache, TupleCache) else cache,
        "use_cache": True,
        "cache_position": torch.arange(shown - ids.shape[1], shown, device=ids.device),
        "logits_to_keep": 1,  # of a long prompt only the last position goes through the head
    }
    outputs = model(**{name: value for name, value in inputs.items() if name in accepted})
    if isinstance(cache, TupleCache):
        cache.states = outputs.past_key_values
    if cache.get_seq_length() != shown:
        raise ValueError(
            f"{type(innermost(model)).__name__} fills no key-value cache here; it cannot sample"
        )
    return _plain(outputs.logits)


def call_without_padding(
    model: nn.Module, accepted: set[str], cache: RowCache, inputs: dict, mask: Tensor
) -> Tensor:
    """Prompts as one row without padding through the model, into an empty ``cache``; logits (B, V)
    after each prompt's last token.

    ``inputs``: of :meth:`PaddingFree.pack`. ``mask`` (B, P): where their tokens stand with padding.
    """
    last = mask.sum(dim=1).cumsum(dim=0) - 1
    keep = {"logits_to_keep": last} if "logits_to_keep" in accepted else {}
    with cache.filled_without_padding(mask):
        held = {cache_keyword(accepted): cache}
        outputs = model(**inputs, **held, use_cache=True, **keep)
    logits = _plain(outputs.logits)[0]
    return logits if keep else logits[last]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)  # Gemini's tensors do not follow in-place operations
