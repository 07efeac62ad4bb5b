"""Rows replaced as they end: every row's response is the one that it has in a batch of all."""

import pytest
import torch

from coati.models.generation import kv_cache
from coati.models.generation.decoder import Decoder
from coati.models.generation.loop import generate
from coati.models.generation.row_noise import row_noise
from tests.models.generation.test_decoder import MODELS

LIMITS = [3, 17, 1, 9, 24, 2, 8, 8, 1, 30, 5, 12, 4]


def prompts(count, groups=1, seed=0):
    """(B, P) ids and mask: ``count`` prompts of 2 to 14 tokens, each ``groups`` times."""
    torch.manual_seed(seed)
    lengths = torch.randint(2, 15, (count,)).repeat_interleave(groups)
    ids = torch.randint(3, 380, (count, 14)).repeat_interleave(groups, 0)
    mask = (torch.arange(14) >= 14 - lengths[:, None]).long()
    return ids * mask, mask


def sampled(model, ids, mask, at_once=None, **keywords):
    limits = (LIMITS * 3)[: len(ids)]
    return generate(
        model,
        ids,
        mask,
        stop_sequences=[[7], [11], [19, 23]],
        max_new_tokens=30,
        limits=limits,
        noise=row_noise(3, 1, range(len(ids)), 30),
        return_logprobs=True,
        rows_at_once=at_once,
        **keywords,
    )


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("greedy", [False, True])
def test_responses_are_those_of_one_batch_of_all(family, at_once, greedy):
    model = MODELS[family]()
    ids, mask = prompts(13)
    settings = {"do_sample": not greedy}
    whole = sampled(model, ids, mask, **settings)
    found = sampled(model, ids, mask, at_once, **settings)
    assert torch.equal(found.sequences, whole.sequences)
    assert torch.equal(found.lengths, whole.lengths) and torch.equal(found.stopped, whole.stopped)
    torch.testing.assert_close(found.logprobs, whole.logprobs, atol=1e-5, rtol=1e-5)


@pytest.fixture
def forwards(monkeypatch):
    """(rows, tokens) of each forward that is given prompts, and the most rows of a step."""
    seen = {"prompts": 0, "rows": 0}
    call, step = Decoder._call, Decoder.step

    def calling(self, ids, mask, positions):
        if self.cache.get_seq_length() == 0:
            seen["prompts"] += len(ids)
        return call(self, ids, mask, positions)

    def stepping(self):
        seen["rows"] = max(seen["rows"], len(self.row_ids))
        return step(self)

    monkeypatch.setattr(Decoder, "_call", calling)
    monkeypatch.setattr(Decoder, "step", stepping)
    return seen


@pytest.mark.parametrize("at_once", [2, 3, 5, 7])
def test_a_prompt_of_a_group_goes_through_the_model_once(forwards, at_once):
    """Groups of 6 are admitted in several parts."""
    model = MODELS["llama"]()
    ids, mask = prompts(5, groups=6)
    found = sampled(model, ids, mask, at_once)
    assert forwards == {"prompts": 5, "rows": at_once}
    whole = sampled(model, ids, mask)
    assert torch.equal(found.sequences, whole.sequences)


def test_the_cache_stays_as_wide_as_the_longest_row_and_some_columns(monkeypatch):
    monkeypatch.setattr(kv_cache, "GROWTH", 8)
    monkeypatch.setattr("coati.models.generation.loop.GROWTH", 8)
    monkeypatch.setattr(kv_cache, "_WORTHWHILE", 4)
    widths, step = [], Decoder.step

    def stepping(self):
        made = step(self)
        widths.append(self.cache._layers[0][0].shape)
        return made

    monkeypatch.setattr(Decoder, "step", stepping)
    model = MODELS["llama"]()
    ids, mask = prompts(13)
    found = sampled(model, ids.repeat(3, 1), mask.repeat(3, 1), 4)
    assert max(shape[2] for shape in widths) <= 14 + 30 + 8
    assert max(shape[0] for shape in widths) == 4
    assert torch.equal(
        found.sequences, sampled(model, ids.repeat(3, 1), mask.repeat(3, 1)).sequences
    )


def test_rows_take_the_places_of_those_that_left_without_a_copy_of_the_cache(monkeypatch):
    monkeypatch.setattr(
        kv_cache.RowCache, "_join_anew", lambda *a: pytest.fail("the cache was made anew")
    )
    ids, mask = prompts(13)
    mask[:4] = 1  # the first are as long as any
    sampled(MODELS["llama"](), ids, mask, 4)


def test_what_cannot_be_replaced_is_refused():
    model = MODELS["llama"]()
    ids, mask = prompts(4)
    with pytest.raises(ValueError, match="replaced as they end"):
        sampled(model, ids, mask, 2, stop_flag=lambda ended: ended)
    with pytest.raises(ValueError, match="noise"):
        generate(model, ids, mask, stop_sequences=[[1]], max_new_tokens=4, rows_at_once=2)
