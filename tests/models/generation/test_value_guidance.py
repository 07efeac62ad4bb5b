"""Decoding by ILQL's heads: the equation, by hand and by whole matrices, and what it leaves."""

import pytest
import torch

from coati.models.generation.loop import generate, generate_streaming
from coati.models.generation.value_guidance import ValueGuidance, guided, unguided
from coati.models.head import Head
from coati.models.ilql_heads import ILQLHeads, attach
from tests.tiny import tiny_llama


class Embedding(torch.nn.Module):
    """A model whose logits are its states."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Identity()

    def get_output_embeddings(self):
        return self.head


def heads_of(q1: list[float], q2: list[float], v: float) -> ILQLHeads:
    """Heads that say the same of every state."""
    heads = ILQLHeads(len(q1), len(q1))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.zero_()
        heads.q1[2].bias.copy_(torch.tensor(q1))
        heads.q2[2].bias.copy_(torch.tensor(q2))
        heads.v[2].bias.fill_(v)
    heads.sync(1.0)
    return heads


def test_the_scores_by_hand():
    """pi = (1/2, 1/4, 1/4); min Q' = (1, 3, 0), V = 1: A = (0, 2, -1). beta 2: log pi + (0, 4, -2);
    the third is not among the best 2."""
    model = Embedding()
    heads = heads_of([1.0, 5.0, 0.0], [2.0, 3.0, 4.0], 1.0)
    ValueGuidance(model, heads, 2.0, top_k=2).install()
    logits = torch.tensor([[[0.5, 0.25, 0.25]]]).log() + 7.0  # a constant changes nothing
    scores = model.head(logits)[0, 0]
    wanted = torch.tensor([0.5, 0.25]).log() + torch.tensor([0.0, 4.0])
    torch.testing.assert_close(scores[:2], wanted)
    assert scores[2] == -torch.inf


def test_decoding_is_the_argmax_of_the_sum_and_ends_with_the_block():
    model = tiny_llama().eval()
    heads = attach(model, seed=2)
    del model.ilql_heads  # at inference the heads are no part of the model
    with torch.no_grad():
        for name in heads.targets:
            heads.targets[name] = torch.randn_like(heads.targets[name])
    ids = torch.tensor([[5, 6, 7, 8]])
    ask = {"stop_sequences": [], "max_new_tokens": 6, "do_sample": False}
    plain = generate(model, ids, **ask).responses()[0]
    sequence = ids
    for _ in range(6):
        with torch.no_grad():
            states = model.model(input_ids=sequence)[0][:, -1]
            scores = model.lm_head(states).log_softmax(-1) + 3 * heads.advantages(states)
        sequence = torch.cat([sequence, scores.argmax(-1, keepdim=True)], 1)
    with guided(model, heads, 3.0):
        found = generate(model, ids, **ask).responses()[0]
        streamed = list(generate_streaming(model, ids, **ask))
    assert found == streamed == sequence[0, 4:].tolist() != plain
    with guided(model, heads, 0.0):
        assert generate(model, ids, **ask).responses()[0] == plain
    assert generate(model, ids, **ask).responses()[0] == plain
    assert "forward" not in model.lm_head.__dict__


def test_the_policy_of_a_guided_model_is_there_to_be_measured():
    model = tiny_llama().eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = model(ids).logits
        with unguided(model):
            assert torch.equal(model(ids).logits, plain)
        ValueGuidance(model, ILQLHeads(64, 384), top_k=3).install()
        guided_scores = model(ids).logits
        assert (guided_scores == -torch.inf).any()
        with pytest.raises(RuntimeError, match="inside"), unguided(model):
            assert torch.equal(model(ids).logits, plain)
            raise RuntimeError("inside")
        assert torch.equal(model(ids).logits, guided_scores)


def test_a_sample_does_not_depend_on_its_batch():
    """Rows of other lengths, joined in one batch, decode as each does alone."""
    model = tiny_llama().eval()
    heads = attach(model, seed=2)
    prompts = torch.tensor([[0, 0, 5, 6], [9, 8, 7, 6], [5, 6, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    noise = torch.rand(3, 8, dtype=torch.float64)
    ask = {"stop_sequences": [], "max_new_tokens": 8}
    with guided(model, heads, 1.0):
        together = generate(model, prompts, mask, noise=noise, **ask).responses()
        alone = [
            generate(
                model, prompts[k : k + 1, 4 - int(mask[k].sum()) :], noise=noise[k : k + 1], **ask
            )
            for k in range(3)
        ]
    assert together == [one.responses()[0] for one in alone]


def test_it_stands_on_the_training_head_and_gives_it_back():
    model = tiny_llama()
    heads = attach(model)
    head = Head.install(model)
    before = model.lm_head.forward
    ids = torch.tensor([[5, 6, 7]])
    with guided(model, heads):
        assert model(input_ids=ids).logits.shape == (1, 3, 384)
    assert model.lm_head.forward == before
    head.set(ids)
    assert model(input_ids=ids).logits.shape == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_added_in_fp32(dtype):
    """A hundredth between two actions counts, however large both are."""
    heads = heads_of([300.0] * 384, [300.0] * 384, 0.0)
    heads.targets["q1.2.bias"][7] += 0.01
    heads.targets["q2.2.bias"][7] += 0.01
    for name in heads.targets:
        if name.endswith("0.weight"):
            heads.targets[name] = torch.zeros(128, 64)
        elif name.endswith("2.weight"):
            heads.targets[name] = torch.zeros(384, 128)
        elif name.endswith("0.bias"):
            heads.targets[name] = torch.zeros(128)
    heads.v = ILQLHeads(64, 384).v.to(dtype)
    found = heads.advantages(torch.randn(1, 64).to(dtype))[0]
    assert int(found.argmax()) == 7 and float(found[7] - found[6]) == pytest.approx(0.01, abs=1e-3)
