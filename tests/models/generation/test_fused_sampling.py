"""One pass over the logits gives what the passes one by one give."""

import pytest
import torch

from coati.models.generation.row_noise import BLOCK
from coati.models.generation.sampling import Sampling, choose
from coati.utils.errors import RunFailed

SIZES = [7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5]


def logits(size, seed=0, spread=4.0):
    return spread * torch.randn(5, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_greedy_takes_the_first_of_the_largest(size):
    scores = logits(size)
    scores[1] = 0.25  # all equal
    scores[2, [size - 1, size // 2]] = 100.0
    scores[3, :-1] = -torch.inf
    token, logps = choose(scores, Sampling(False), return_logprobs=True)
    assert token[1] == 0 and token[2] == min(size - 1, size // 2) and token[3] == size - 1
    assert torch.equal(scores.gather(1, token[:, None])[:, 0], scores.amax(dim=1))
    wanted = scores.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_a_sampled_token_is_the_quantile_of_the_distribution(size, temperature):
    scores = logits(size, 1)
    shares = (scores.double() / temperature).softmax(-1)
    sums = shares.cumsum(-1)
    for number in (0.0, 0.1, 0.5, 0.9, 1 - 1e-9):
        uniform = torch.full((5,), number, dtype=torch.float64)
        token, logps = choose(scores, Sampling(True, temperature), uniform, return_logprobs=True)
        after = sums.gather(1, token[:, None])[:, 0]
        own = shares.gather(1, token[:, None])[:, 0]
        assert ((after - own - 1e-6 <= number) & (number <= after + 1e-6)).all()
        torch.testing.assert_close(logps.double(), own.log(), atol=1e-6, rtol=1e-6)


def test_a_penalized_choice_that_is_next_to_impossible_has_a_finite_logprob():
    """The share of the second token is e^-200, which fp32 does not hold."""
    scores = torch.tensor([[200.0, 0.0]])
    seen = torch.tensor([[0]]), torch.tensor([[1]])
    for sampling in (Sampling(False, repetition_penalty=1e5), Sampling(False, 2.0, None, 1.0, 1e5)):
        scores[0, 1] = 1.0 if sampling.temperature == 2 else 0.01
        token, logps = choose(scores, sampling, None, seen, return_logprobs=True)
        gap = float(scores[0, 1] - scores[0, 0]) / sampling.temperature
        assert token.item() == 1 and logps.item() == pytest.approx(gap, rel=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampled", [False, True])
def test_scores_that_are_not_finite_end_the_run(bad, sampled):
    scores = logits(3 * BLOCK + 5)
    scores[4, -1] = bad
    with pytest.raises(RunFailed, match="not finite"):
        choose(scores, Sampling(sampled), torch.rand(5, dtype=torch.float64))
