"""Sampling whose noise belongs to the row: who is drawn beside it, and where, changes nothing;
log-probs are exact."""

import pytest
import torch

from coati.models.generation.loop import generate
from coati.models.generation.response_table import left_pad
from coati.models.generation.row_noise import draw, row_noise
from tests.models.families import tiny_gpt2, tiny_opt
from tests.models.generation.test_loop import PROMPTS, Scripted, Watched
from tests.tiny import tiny_llama

STEPS = 10


def sample(model, rows, prompts=PROMPTS, extra_padding=0, steps=STEPS, **options):
    """Answers to ``prompts[row]`` for each global row index of ``rows``; padding of the batch as
    asked."""
    ids, mask = left_pad([prompts[row % len(prompts)] for row in rows], pad=2)
    ids = torch.cat([torch.full((len(rows), extra_padding), 9), ids], dim=1)
    mask = torch.cat([torch.zeros(len(rows), extra_padding, dtype=mask.dtype), mask], dim=1)
    noise = row_noise(3, 1, rows, steps)
    options = {"temperature": 1.3, "stop_sequences": [], **options}
    return generate(
        model, ids, mask, noise=noise, max_new_tokens=steps, return_logprobs=True, **options
    )


def test_noise_is_a_function_of_seed_episode_row_and_step():
    whole = row_noise(7, 2, range(6), 20)
    assert whole.dtype == torch.float64 and 0 <= whole.min() and whole.max() < 1
    assert torch.equal(row_noise(7, 2, [4, 1], 5), whole[[4, 1], :5])
    others = [
        row_noise(8, 2, range(6), 20),
        row_noise(7, 3, range(6), 20),
        row_noise(7, 2, range(1, 7), 20),
    ]
    assert not any((other == whole).any() for other in others)
    assert row_noise(7, 2, [], 5).shape == (0, 5)
    assert abs(row_noise(0, 0, range(100), 1000).mean() - 0.5) < 0.005


def test_a_number_picks_the_token_in_whose_share_it_falls():
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]])
    for number, token in [
        (0.0, 0),
        (0.2499, 0),
        (0.25, 2),
        (0.7499, 2),
        (0.75, 3),
        (1 - 2**-53, 3),
    ]:
        assert draw(probabilities, torch.tensor([number], dtype=torch.float64)).tolist() == [token]


def test_no_number_picks_an_impossible_token_when_the_sum_is_not_1():
    probabilities = torch.tensor([[0.0, 0.1, 0.2, 0.69999, 0.0]])
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.repeat(2, 1), ends).tolist() == [1, 3]


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_a_token_of_many_is_found_as_if_they_were_added_up_one_by_one(size):
    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(64, size, generator=generator) * (
        torch.rand(64, size, generator=generator) < 0.5
    )
    weights[:, size // 2] = 0.1  # at least one of each row; some blocks have little else
    weights[::2, : min(size - 1, 300)] = 0.0
    weights[::2, -1] = 0.2
    numbers = torch.rand(64, dtype=torch.float64, generator=generator)
    ends = weights.double().cumsum(dim=1)
    expected = torch.searchsorted(ends, (numbers * ends[:, -1])[:, None], right=True)[:, 0]
    assert torch.equal(draw(weights, numbers), expected)


def test_drawn_frequencies_are_the_probabilities():
    probabilities = torch.tensor([0.1, 0.6, 0.05, 0.25])
    numbers = row_noise(0, 0, [0], 40000)[0]
    counts = draw(probabilities.expand(40000, 4), numbers).bincount(minlength=4)
    assert torch.allclose(counts / 40000, probabilities, atol=0.01)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt])
def test_batch_mates_padding_and_how_rows_are_split_change_no_sample(make):
    model = make()
    together = sample(model, range(6))
    answers = together.responses()
    assert (
        len({tuple(answer) for answer in answers}) == 6
    )  # same prompts, other rows: other answers
    for rows, padding in [([2], 0), ([4, 0], 0), ([5, 3, 1], 7), ([0, 1, 2], 3), ([3, 4, 5], 0)]:
        part = sample(model, rows, extra_padding=padding)
        assert part.responses() == [answers[row] for row in rows]
        assert torch.allclose(part.logprobs, together.logprobs[list(rows)], atol=1e-5)


def test_how_long_an_answer_may_be_does_not_change_how_it_begins():
    model = tiny_llama()
    short, long = (
        sample(model, range(3), steps=4).responses(),
        sample(model, range(3), steps=9).responses(),
    )
    assert short == [answer[:4] for answer in long]


def test_another_seed_or_episode_gives_other_answers():
    model, ids = tiny_llama(), torch.tensor([PROMPTS[0]])
    drawn = [
        generate(
            model, ids, stop_sequences=[], max_new_tokens=8, noise=row_noise(*key, [0], 8)
        ).responses()
        for key in [(0, 0), (0, 0), (0, 1), (1, 0)]
    ]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] != drawn[3] != drawn[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.4},
        {"do_sample": False, "temperature": 1.0},
    ],
)
def test_logprobs_are_those_of_a_full_forward_without_top_k_top_p_and_penalty(options):
    model = tiny_llama()
    result = sample(model, range(3), **options)
    temperature = options.get("temperature", 1.3)
    for row, answer in enumerate(result.responses()):
        prompt = PROMPTS[row]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[
                0, len(prompt) - 1 : -1
            ]
        full = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert torch.allclose(result.logprobs[row], full, atol=1e-4)


def test_logprobs_are_zero_after_an_answers_end_and_cover_its_stop_sequence():
    model = Scripted([[9, 7, 8], [3, 3, 3, 3, 7, 8]], 1)
    result = generate(
        model,
        torch.tensor([[1], [2]]),
        stop_sequences=[[7, 8]],
        max_new_tokens=6,
        do_sample=False,
        return_logprobs=True,
    )
    assert result.lengths.tolist() == [3, 6]
    assert (
        (result.logprobs[0, :3] < 0).all()
        and (result.logprobs[0, 3:] == 0).all()
        and (result.logprobs[1] < 0).all()
    )


def test_logprobs_are_only_made_when_asked_for():
    assert (
        generate(tiny_llama(), torch.tensor([[5, 6]]), stop_sequences=[], max_new_tokens=2).logprobs
        is None
    )


def test_noise_leaves_the_feeding_of_the_cache_alone():
    model = Watched(tiny_llama())
    sample(model, range(3), steps=4)
    assert model.fed == [6, 1, 1, 1]


# Stop sequences: alternatives of several tokens, completed by one token at a time.


@pytest.mark.parametrize(
    ("script", "stops", "answer"),
    [
        (
            [7, 7, 7, 8, 1],
            [[7, 7, 8]],
            [7, 7, 7, 8],
        ),  # the first attempt fails, a later one overlaps it
        (
            [5, 6, 5, 6, 7],
            [[5, 6, 7], [6, 5, 9]],
            [5, 6, 5, 6, 7],
        ),  # two alternatives under way at once
        ([4, 5, 6, 7], [[5, 6, 7], [6]], [4, 5, 6]),  # the one that is complete first ends the row
        ([4, 5, 6, 7], [[6, 7], [4, 5, 6, 7]], [4, 5, 6, 7]),  # two that are complete together
        ([3, 4, 4, 4, 4, 4, 4], [[9], [3, 3]], [3, 4, 4, 4, 4, 4]),  # none
    ],
)
def test_stop_alternatives(script, stops, answer):
    result = generate(
        Scripted([script], 1),
        torch.tensor([[1]]),
        stop_sequences=stops,
        max_new_tokens=6,
        do_sample=False,
    )
    assert result.responses() == [answer]
    assert result.stopped.tolist() == [answer[-1] in {stop[-1] for stop in stops}]


@pytest.mark.parametrize("shape", [(2, STEPS), (1, STEPS - 1), (STEPS,)])
def test_noise_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"noise must have the shape \(1, 10 or more\), not \("):
        generate(
            tiny_llama(layers=1),
            torch.tensor([[1, 2]]),
            stop_sequences=[],
            max_new_tokens=STEPS,
            noise=torch.zeros(shape),
        )
