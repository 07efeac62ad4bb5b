"""Rows that join and leave, with layers that keep a state instead of keys: each row's tokens are
those it gets alone."""

import pytest
import torch

from coati.models.generation.decoder import Decoder
from coati.models.generation.kv_cache import LayerCache, RowCache
from coati.models.generation.model_call import cache_for
from coati.models.generation.sampling import Sampling
from tests.models_table.families import BY_TYPE, known, tiny_model
from tests.tiny import tiny_llama

STATES = (
    "qwen3_next",
    "qwen3_5_text",
    "lfm2",
    "lfm2_moe",
    "falcon_h1",
    "bamba",
    "nemotron_h",
    "granitemoehybrid",
    "llama4_text",
    "deepseek_v32",
    "glm_moe_dsa",
    "kimi_linear",
    "jamba",
)
FAMILIES = [name for name in STATES if known(BY_TYPE[name])]
GREEDY = Sampling(do_sample=False)


def decoder(model, *prompts: list[int], first: int = 0) -> Decoder:
    """Of ``prompts``, padded on the left; rows are numbered from ``first``."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    numbers = torch.arange(first, first + len(prompts))
    return Decoder(model, ids, mask, GREEDY, row_ids=numbers)


def take(batch: Decoder, count: int, found: dict[int, list[int]]) -> None:
    for _ in range(count):
        for number, token in zip(batch.row_ids.tolist(), batch.step().tokens.tolist(), strict=True):
            found.setdefault(number, []).append(token)


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_rows_that_join_and_leave_get_their_tokens(name):
    model = tiny_model(BY_TYPE[name]).eval()
    prompts = [[5, 9, 200, 31, 7, 8, 90, 17, 44], [12, 13], [301, 4, 77, 5, 5]]
    alone: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        take(decoder(model, prompt, first=number), 8, alone)
    found: dict[int, list[int]] = {}
    batch = decoder(model, *prompts[:2])
    take(batch, 3, found)
    late = decoder(model, prompts[2], first=2)
    take(late, 1, found)
    batch.join(late)
    take(batch, 2, found)
    batch.leave(batch.row_ids != 0)
    take(batch, 3, found)
    assert found[0] == alone[0][:5]
    assert found[1] == alone[1][:8] and found[2] == alone[2][:6]


def test_keys_and_values_of_every_token_stay_in_the_fast_cache():
    assert type(cache_for(tiny_llama(), 1, 10)) is RowCache
    for name in FAMILIES:
        assert type(cache_for(tiny_model(BY_TYPE[name]), 1, 10)) is LayerCache


def test_a_model_with_a_cache_class_of_its_own_is_refused(monkeypatch):
    """As MiniMax's lightning attention brings."""
    import sys

    from transformers import DynamicCache

    model = tiny_llama()
    module = sys.modules[type(model).__module__]
    own = type("OwnCache", (DynamicCache,), {"__module__": module.__name__})
    monkeypatch.setattr(module, "OwnCache", own, raising=False)
    with pytest.raises(ValueError, match="cache class of its own .OwnCache.*can be trained"):
        cache_for(model, 1, 10)
