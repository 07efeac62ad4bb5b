"""NEFTune's noise: its size and distribution, and what it depends on."""

import math

import pytest
import torch
from torch import nn

from coati.models.embedding_noise import EmbeddingNoise, uniform_noise
from tests.tiny import tiny_llama

ALPHA, SEED, WIDTH = 5.0, 42, 64


class Noisy:
    """A model whose embeddings are read after the noise; ``step`` may be set."""

    def __init__(self, alpha: float = ALPHA, seed: int = SEED) -> None:
        self.model = tiny_llama().train()
        self.step = 0
        self.noise = EmbeddingNoise(self.model, alpha, seed, lambda: self.step)
        self.seen: list[torch.Tensor] = []
        embedding = self.model.get_input_embeddings()
        embedding.register_forward_hook(lambda _, args, out: self.seen.append(out.detach()))
        self.weight = embedding.weight.detach()

    def of(self, ids: torch.Tensor, **inputs) -> torch.Tensor:
        """(B, S, d) what was added."""
        self.model(input_ids=ids, **inputs)
        return self.seen.pop() - nn.functional.embedding(ids, self.weight)


@pytest.fixture
def noisy() -> Noisy:
    return Noisy()


ROWS = torch.randint(3, 384, (3, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = (9, 4, 6)
MASK = (torch.arange(9)[None] < torch.tensor(LENGTHS)[:, None]).long()


def test_it_is_uniform_and_as_large_as_the_paper_says(noisy):
    noise = noisy.of(ROWS, attention_mask=MASK)
    for row, length in zip(noise, LENGTHS, strict=True):
        limit = ALPHA / math.sqrt(length * WIDTH)
        largest = float(row[:length].abs().max())
        assert 0.97 * limit < largest <= limit * (1 + 1e-5)
        assert not row[length:].any()  # padding
    many = uniform_noise(torch.arange(4096) % 300, torch.arange(4096), 256, 1, 2)
    many = many * math.sqrt(4096 * 256)
    assert float(many.min()) >= -1 and float(many.max()) < 1
    assert float(many.mean()) == pytest.approx(0, abs=3e-3)
    assert float(many.var()) == pytest.approx(1 / 3, rel=5e-3)
    # Neither neighboring tokens nor neighboring columns go together: 1 / sqrt(n) is chance.
    for one, other in ((many[1:], many[:-1]), (many[:, 1:], many[:, :-1])):
        assert float((one * other).mean() * 3) == pytest.approx(0, abs=5e-3)


def test_how_a_batch_is_cut_padded_or_packed_changes_nothing(noisy):
    whole = noisy.of(ROWS, attention_mask=MASK)
    for index, length in enumerate(LENGTHS):
        row = ROWS[index : index + 1, :length]
        alone = noisy.of(row, attention_mask=torch.ones_like(row))
        torch.testing.assert_close(alone[0], whole[index, :length])
    swapped = noisy.of(ROWS.flip(0), attention_mask=MASK.flip(0))
    torch.testing.assert_close(swapped, whole.flip(0))
    left = torch.stack([row.roll(9 - n) for row, n in zip(ROWS, LENGTHS, strict=True)])
    padded = noisy.of(left, attention_mask=MASK.flip(1))
    torch.testing.assert_close(padded[1, -4:], whole[1, :4])
    real = MASK.bool()
    positions = (MASK.cumsum(1) - 1)[real][None]
    packed = noisy.of(ROWS[real][None], position_ids=positions)
    torch.testing.assert_close(packed[0], whole[real])


def test_a_step_a_seed_and_a_token_change_all_of_it(noisy):
    first = noisy.of(ROWS[:1])
    noisy.step = 1
    later = noisy.of(ROWS[:1])
    assert float((first * later).mean() / first.square().mean()) == pytest.approx(0, abs=0.2)
    noisy.step = 0
    assert torch.equal(noisy.of(ROWS[:1]), first)  # as a resumed run has it
    other = ROWS[:1].clone()
    other[0, 8] += 1
    assert not torch.isclose(noisy.of(other), first).any(dim=-1).all()
    assert not torch.equal(Noisy(seed=43).of(ROWS[:1]), first)
    torch.testing.assert_close(Noisy(alpha=2 * ALPHA).of(ROWS[:1]), 2 * first, rtol=1e-4, atol=1e-6)


def test_evaluation_and_generation_have_none(noisy):
    noisy.model.eval()
    assert not noisy.of(ROWS, attention_mask=MASK).any()
    noisy.model.train()
    with torch.no_grad():
        assert not noisy.of(ROWS, attention_mask=MASK).any()
    noisy.noise.remove()
    assert not noisy.of(ROWS, attention_mask=MASK).any()


def test_gradients_are_those_of_the_noisy_embeddings(noisy):
    """The noise is a constant: the gradient of the embedding is that of the same model whose
    embeddings are moved by hand."""
    noise = noisy.of(ROWS[:1])
    noisy.model(input_ids=ROWS[:1], labels=ROWS[:1]).loss.backward()
    plain = tiny_llama().train()
    embeddings = plain.get_input_embeddings()(ROWS[:1]) + noise
    plain(inputs_embeds=embeddings, labels=ROWS[:1]).loss.backward()
    ours, theirs = noisy.model.get_input_embeddings().weight.grad, embeddings
    torch.testing.assert_close(ours, plain.get_input_embeddings().weight.grad)
    assert theirs.requires_grad


def test_a_failed_forward_leaves_nothing_behind(noisy):
    with pytest.raises(Exception):  # noqa: B017
        noisy.model(input_ids=ROWS, attention_mask="no mask")
    noisy.seen.clear()
    out = noisy.model.get_input_embeddings()(ROWS)
    assert torch.equal(out, nn.functional.embedding(ROWS, noisy.weight))


def test_an_embedding_of_part_of_the_sequence_is_refused(noisy):
    embedding = noisy.model.get_input_embeddings()
    forward = embedding.forward
    embedding.forward = lambda ids: forward(ids)[:, :4]
    with pytest.raises(ValueError, match=r"--neftune_alpha: .* \(3, 4, 64\) for \(3, 9\) tokens"):
        noisy.model(input_ids=ROWS, attention_mask=MASK)


def test_ids_may_come_by_position(noisy):
    noisy.model(ROWS)
    by_position = noisy.seen.pop()
    noisy.model(input_ids=ROWS)
    assert torch.equal(by_position, noisy.seen.pop())
    assert not torch.equal(by_position, nn.functional.embedding(ROWS, noisy.weight))
