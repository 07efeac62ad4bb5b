"""The buffer equation: what fits, and what is said about what does not."""

import re

import pytest

from coati.experience_buffer.batch_sizes import optimizer_steps_per_pass


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ((1, 8, 8, 1), 1),
        ((2, 16, 8, 4), 1),
        ((2, 16, 8, 2), 2),
        ((4, 8, 8, 1), 4),
        ((1, 4, 8, 2, 8), 2),
    ],
)
def test_whole_multiples_are_that_many_optimizer_steps(settings, windows):
    assert optimizer_steps_per_pass(*settings) == windows


def test_what_does_not_fit_is_said_with_what_would():
    with pytest.raises(ValueError) as caught:
        optimizer_steps_per_pass(2, 16, 16, 8)
    assert str(caught.value) == (
        "an episode collects --num_collect_steps 2 x --experience_batch_size 16 = 32 responses per "
        "process, not a multiple of the 128 that one optimizer step takes "
        "(--train_batch_size 16 x --accumulation_steps 8); --accumulation_steps 2, or "
        "--num_collect_steps 8, would fit"
    )


def test_generations_count_as_responses():
    with pytest.raises(ValueError, match=r"4 x --num_generations 3 = 12 responses"):
        optimizer_steps_per_pass(1, 4, 8, 1, num_generations=3)


@pytest.mark.parametrize("train", range(1, 9))
@pytest.mark.parametrize("accumulation", [1, 2, 3, 8])
def test_both_remedies_fit(train, accumulation):
    """Over a grid of settings, what the message proposes is accepted."""
    flags = (
        "num_collect_steps",
        "experience_batch_size",
        "train_batch_size",
        "accumulation_steps",
        "num_generations",
    )
    for collect, batch, generations in [(1, 1, 1), (1, 5, 1), (2, 16, 1), (3, 7, 2), (6, 4, 3)]:
        settings = dict(zip(flags, (collect, batch, train, accumulation, generations), strict=True))
        try:
            assert (
                optimizer_steps_per_pass(**settings) * train * accumulation
                == collect * batch * generations
            )
            continue
        except ValueError as error:
            remedies = str(error).partition("); ")[2].split(", or ")
        assert len(remedies) == 2
        for remedy in remedies:
            change = {flag: int(value) for flag, value in re.findall(r"--(\w+) (\d+)", remedy)}
            assert change and optimizer_steps_per_pass(**(settings | change)) >= 1


@pytest.mark.parametrize("position", range(5))
def test_nothing_is_refused(position):
    settings = [1, 1, 1, 1, 1]
    settings[position] = 0
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        optimizer_steps_per_pass(*settings)
