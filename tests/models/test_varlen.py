"""Rows laid end to end give what padded rows give, or the model is not given them."""

import pytest
import torch
from torch.testing import assert_close

from coati.models.head import Head
from coati.models.varlen import Packing
from tests.tiny import tiny_llama


def batch(side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of 9, 4 and 1 real tokens; labels on some of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 384, (3, 9), generator=generator)
    position = torch.arange(9) if side == "right" else torch.arange(9).flip(0)
    mask = (position < torch.tensor([9, 4, 1])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 2:5] = -100
    labels[mask.cumsum(1) <= 1] = -100  # a row's first token is predicted by nothing
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("side", ["right", "left"])
def test_log_probs_and_gradients_are_those_of_padded_rows(side):
    rows, results = batch(side), []
    for packed in (False, True):
        model = tiny_llama()
        packing, head = Packing.of(model), Head.install(model)
        if packed:
            laid = packing.pack(rows)
            head.set_targets(laid.targets)
            logps = model(**laid.inputs, use_cache=False).logits
        else:
            head.set(rows["labels"])
            # With left padding plain transformers needs the positions spelled out.
            positions = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
            logps = model(rows["input_ids"], rows["attention_mask"], position_ids=positions, use_cache=False).logits
        (-logps.sum()).backward()
        results.append((logps, model.model.layers[0].self_attn.q_proj.weight.grad, model.lm_head.weight.grad))
    for padded, laid_out in zip(*results, strict=True):
        assert_close(laid_out, padded, rtol=1e-5, atol=1e-6)


def test_a_packed_batch_is_one_row_of_the_real_tokens_in_order():
    rows = batch()
    packed = Packing.of(tiny_llama()).pack(rows)
    assert packed.inputs["input_ids"].tolist() == [rows["input_ids"][rows["attention_mask"].bool()].tolist()]
    assert packed.inputs["position_ids"].tolist() == [[*range(9), *range(4), 0]]
    assert packed.inputs["cu_seq_lens_q"].tolist() == [0, 9, 13, 14]
    # The last token of a row predicts nothing, not the first token of the next row.
    assert [packed.targets[0, end].item() for end in (8, 12, 13)] == [-100] * 3


def test_a_model_whose_attention_cannot_be_told_row_ends_is_given_padded_rows():
    assert Packing.of(tiny_llama(attn_implementation="eager")) is None


def test_a_row_longer_than_the_sliding_window_stays_padded():
    assert Packing(longest=8).pack(batch()) is None
    assert Packing(longest=9).pack(batch()) is not None
