"""What ends a response: one answer for chat, server, samples, rollouts and export."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from coati.models.generation.model_call import innermost


def end_tokens(model: nn.Module) -> list[int]:
    """The token ids that end a response in transformers' ``generate``: ``eos_token_id`` of the
    generation settings, one or a list (Llama 3.1 has three), else of the model's configuration."""
    inner = innermost(model)
    for settings in (getattr(inner, "generation_config", None), getattr(inner, "config", None)):
        found = getattr(settings, "eos_token_id", None)
        if found is not None:
            ids = found if isinstance(found, list | tuple) else [found]
            return [int(id) for id in ids if int(id) >= 0]  # -1 stands for none
    return []


def stop_sequences(
    stop_ids: Iterable[Sequence[int]], tokenizer: Any, model: nn.Module | None
) -> list[list[int]]:
    """All that ends a response: the template's ``stop_ids``, the tokenizer's EOS token, and the end
    tokens of ``model``, each a token sequence. Generation ends after any of them."""
    stops = [list(stop) for stop in stop_ids]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    others = [] if model is None else end_tokens(model)
    for token in (*own, *others):
        if [token] not in stops:
            stops.append([token])
    return stops
