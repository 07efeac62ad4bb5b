"""What tells one model from another before any weights are compared."""

from collections.abc import Mapping
from typing import Any

# Of a language model's configuration, in the order in which differences are told.
_FACTS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


def facts_of(config: Any) -> dict[str, Any]:
    """The sizes and the family of a configuration, of its language model where it has several."""
    config = getattr(config, "text_config", None) or config
    return {name: getattr(config, name, None) for name in _FACTS}


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """``vocab_size 512 there, 384 here; ...``; None where what both say is the same."""
    found = [
        f"{name} {theirs[name]} there, {ours[name]} here"
        for name in _FACTS
        if theirs.get(name) is not None
        and ours.get(name) is not None
        and theirs[name] != ours[name]
    ]
    return "; ".join(found) or None
