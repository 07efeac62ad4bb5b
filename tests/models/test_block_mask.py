"""Rows of a pack do not see each other: the mask by hand, and a changed row that changes no other,
by either route."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from coati.models.block_mask import block_diagonal_mask, holds_for, sliding_window, with_block_mask
from coati.models.head import Head, scatter_token_logprobs
from coati.models.padding_free import PaddingFree
from coati.parallel.boost import check_packs
from coati.parallel.options import ParallelOptions
from coati.utils.transformers_compat import transformers_major
from tests.models_table.families import FAMILIES, known, tiny_model
from tests.parallel.packing_cases import one_by_one, packed, rows_of
from tests.tiny import tiny_llama

BY_TYPE = {family.type: family for family in FAMILIES if known(family) and not family.remote}
# These make masks, and BLOOM its positions, from the padding; under transformers 5 also those with
# layers that keep a state of all tokens before.
APART = set(BY_TYPE) - (
    {
        "bamba",
        "bloom",
        "deepseek_v4",
        "falcon",
        "falcon_h1",
        "gpt_oss",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2",
        "lfm2_moe",
        "llama4_text",
        "minimax",
        "nemotron_h",
        "opt",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
    }
    if transformers_major() >= 5
    else {"gpt2", "bloom"}
)
# Refused by name (families.py): its padding becomes NaN, and a probe has none.
REFUSED = {"gemma3n_text"}


def test_the_mask_by_hand():
    """Rows of 2 and 1 tokens and a padding position: each looks at its own row up to itself."""
    mask = block_diagonal_mask(torch.tensor([[0, 1, 0, 0]]), torch.float32)
    assert mask.shape == (1, 1, 4, 4) and set(mask.unique().tolist()) == {
        0.0,
        torch.finfo(torch.float32).min,
    }
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_batches_of_rows_keep_their_mask():
    inputs = {"input_ids": torch.zeros(1, 2), "attention_mask": torch.ones(1, 2)}
    assert with_block_mask(inputs, torch.float32) is inputs


def flat(model, batch: dict, padding_free: PaddingFree | None) -> torch.Tensor:
    """Log-probs of the labeled tokens, row after row."""
    head = Head.install(model)
    inputs = {
        key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch
    }
    if padding_free is not None:
        rows = padding_free.unpad(batch)
        head.set_targets(rows.targets)
        inputs = rows.inputs
    else:
        head.set(batch["labels"])
        inputs = with_block_mask(inputs, torch.float32)
    logps = model(**inputs, use_cache=False).logits
    head.remove()
    return logps[0]


ROUTES = {"masked": lambda model: None, "end to end": PaddingFree.of}


@pytest.mark.parametrize("route", ROUTES)
def test_log_probs_and_gradients_are_those_of_the_rows_one_by_one(route):
    model = tiny_llama(tie=True).eval()
    weights = torch.linspace(-1, 2, 200)
    results = {}
    for name, batch, padding_free in (
        ("packed", packed(rows_of(0)), ROUTES[route](model)),
        ("rows", one_by_one(rows_of(0)), None),
    ):
        model.zero_grad()
        logps = flat(model, batch, padding_free)
        (logps * weights[: len(logps)]).sum().backward()
        results[name] = logps.detach(), [parameter.grad.clone() for parameter in model.parameters()]
    torch.testing.assert_close(results["packed"][0], results["rows"][0], rtol=0, atol=1e-5)
    for found, expected in zip(results["packed"][1], results["rows"][1], strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("place", range(7))
def test_changing_one_row_changes_no_other(route, place):
    """Seven rows in four packs; all tokens of one become others; the rest of the log-probs stay bit
    for bit."""
    model = tiny_llama().eval()
    packs = rows_of(2)
    pack, row = [(p, r) for p, rows in enumerate(packs) for r in range(len(rows))][place]
    other = [[ids.clone() for ids in one] for one in packs]
    other[pack][row] = (other[pack][row] + 1) % 384
    with torch.no_grad():
        before, after = (flat(model, packed(rows), ROUTES[route](model)) for rows in (packs, other))
    counts = [max(len(ids) - 2, 0) for one in packs for ids in one]
    same = [a.equal(b) for a, b in zip(before.split(counts), after.split(counts), strict=True)]
    assert same == [n != place or not counts[n] for n in range(len(counts))]


@pytest.mark.parametrize("family", sorted(BY_TYPE))
def test_every_family_keeps_rows_apart_or_is_refused(family):
    model = tiny_model(BY_TYPE[family]).eval()
    assert holds_for(model) == (family in APART)
    if not holds_for(model) or family in REFUSED:
        return
    with torch.no_grad():
        logps = flat(model, packed(rows_of(1)), None)
        alone = flat(model, one_by_one(rows_of(1)), None)
    torch.testing.assert_close(logps, alone, rtol=0, atol=2e-5)


def test_the_probe_leaves_the_mode_as_it_was():
    for mode in (True, False):
        assert holds_for(model := tiny_llama().train(mode)) and model.training is mode


def test_adapters_do_not_hide_the_model_from_the_probe():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assert holds_for(get_peft_model(tiny_llama(attn_implementation="eager"), config))
    bloom = get_peft_model(
        tiny_model(BY_TYPE["bloom"]), LoraConfig(r=4, target_modules=["query_key_value"])
    )
    assert not holds_for(bloom)


def test_blocks_that_are_counted_from_the_beginning_of_a_pack_are_refused():
    """MiniMax-M3's, which the few tokens of a probe would all have in the first block."""
    model = tiny_llama()
    model.config.index_topk_blocks = 16
    model.config.index_block_size = 128
    assert not holds_for(model)
    with pytest.raises(ValueError, match="counts the blocks .* from the beginning of the pack"):
        check_packs(model, ParallelOptions())


def test_sliding_windows():
    mistral = tiny_model(
        replace(BY_TYPE["mistral"], config=BY_TYPE["mistral"].config | {"sliding_window": 11})
    )
    assert sliding_window(mistral.config) == 11
    assert sliding_window(tiny_llama().config) is None
    blocks = SimpleNamespace(sliding_window=4096, index_topk_blocks=16, index_block_size=128)
    assert sliding_window(blocks) == 2048  # MiniMax-M3
    assert (
        sliding_window(tiny_model(BY_TYPE["qwen2"]).config) is None
    )  # has a width, and a switch that is off


def test_gather_of_packs_has_the_shape_of_labels():
    """Labels of a pack lie where they lie without packing: the head's order is theirs."""
    model, batch = tiny_llama().eval(), packed(rows_of(0))
    with torch.no_grad():
        table = scatter_token_logprobs(flat(model, batch, None)[None], batch["labels"])
    assert ((table != 0) == (batch["labels"][:, 1:] != -100)).all()
