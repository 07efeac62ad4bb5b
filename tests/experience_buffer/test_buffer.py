"""The buffer: every response once a pass, the same global batches for any number of processes,
exact after a resume."""

import io

import pytest
import torch

from coati.experience_buffer.buffer import NaiveExperienceBuffer
from coati.experience_maker.experience import Experience, masks, sample_indices


def collected(rows, longest=5):
    """An experience of the responses ``rows``; length and ids follow from the row, so that it is
    known again."""
    lengths = torch.tensor([1 + (row * 7) % longest for row in rows])
    attention_mask, action_mask = masks(torch.ones(len(rows), 2), lengths, longest)
    index = torch.tensor(rows)
    sequences = (index[:, None] * 10 + torch.arange(2 + longest)).masked_fill(~attention_mask, 0)
    numbers = (index[:, None] + torch.arange(longest) / 10).masked_fill(~action_mask, 0.0)
    return Experience(
        sequences,
        attention_mask,
        action_mask,
        numbers,
        index.float(),
        index,
        advantages=numbers + 1,
    )


def filled(steps, per_step, first=0, batch=2, **options):
    buffer = NaiveExperienceBuffer(batch, **options)
    for step in range(steps):
        buffer.append(collected(sample_indices(step, steps, first, per_step)))
    return buffer


def rows_of(windows):
    return [
        sorted(int(row) for batch in window for row in batch.sample_index) for window in windows
    ]


def test_a_pass_trains_on_every_response_once():
    buffer = filled(3, 4)
    windows = list(buffer.global_batches(3, seed=0, episode=0))
    assert [sum(len(batch) for batch in window) for window in windows] == [4, 4, 4]
    assert sorted(sum(rows_of(windows), [])) == list(range(12))


@pytest.mark.parametrize(
    ("steps", "per_step", "windows"),
    [(4, 4, 1), (4, 4, 2), (4, 4, 4), (1, 8, 4), (3, 4, 6), (2, 8, 8)],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_global_batches_of_all_ranks_hold_what_one_process_would_have(
    steps, per_step, windows, processes
):
    whole = rows_of(filled(steps, per_step).global_batches(windows, seed=3, episode=5))
    share = per_step // processes
    ranks = [
        rows_of(filled(steps, share, first=rank * share).global_batches(windows, seed=3, episode=5))
        for rank in range(processes)
    ]
    assert [sorted(sum(window, [])) for window in zip(*ranks, strict=True)] == whole
    assert {len(window) for rank in ranks for window in rank} == {steps * share // windows}


def test_order_follows_seed_episode_and_update_pass():
    def batches(**key):
        return rows_of(filled(4, 8).global_batches(4, **{"seed": 0, "episode": 0, **key}))

    base = batches()
    assert batches() == base
    assert all(batches(**key) != base for key in ({"seed": 1}, {"episode": 1}, {"update": 1}))


def test_the_order_of_arrival_does_not_matter():
    buffer = filled(2, 4)
    expected = rows_of(buffer.global_batches(2, seed=0, episode=0))
    buffer.items.reverse()
    assert rows_of(buffer.global_batches(2, seed=0, episode=0)) == expected


def test_micro_batches_are_cut_to_size_and_hold_their_own_padding_only():
    [window] = filled(2, 5, batch=4).global_batches(1, seed=0, episode=0)
    assert [len(batch) for batch in window] == [4, 4, 2]
    for batch in window:
        assert int(batch.response_lengths().max()) == batch.num_actions
        numbers = batch.sample_index[:, None] + torch.arange(batch.num_actions) / 10
        assert torch.equal(batch.action_log_probs[batch.action_mask], numbers[batch.action_mask])
    assert sum(batch.action_mask.numel() for batch in window) < 10 * 5


def test_rows_of_one_prompt_stay_together_where_they_share_it():
    """Row 3i + j is response j to prompt i, whatever its length; the global batches hold what they
    held."""

    def buffer(by_prompt: bool) -> NaiveExperienceBuffer:
        made = collected(list(range(12)))
        made.sequences[:, :2] = (made.sample_index // 3)[:, None]
        buffer = NaiveExperienceBuffer(3)
        buffer.append(made)
        buffer.by_prompt = by_prompt
        return buffer

    def prompts(buffer) -> list[list[int]]:
        [window] = buffer.global_batches(1, seed=0, episode=0)
        return [(batch.sample_index // 3).tolist() for batch in window]

    assert sorted(prompts(buffer(True))) == [[prompt] * 3 for prompt in range(4)]
    assert all(len(set(batch)) > 1 for batch in prompts(buffer(False)))
    for count in (2, 4):
        key = {"seed": 0, "episode": 0}
        assert rows_of(buffer(True).global_batches(count, **key)) == rows_of(
            buffer(False).global_batches(count, **key)
        )


def test_a_pass_goes_on_from_any_window():
    buffer = filled(4, 4)
    whole = list(buffer.global_batches(4, seed=1, episode=2))
    for start in range(5):
        assert (
            rows_of(buffer.global_batches(4, seed=1, episode=2, start=start))
            == rows_of(whole)[start:]
        )


def test_a_saved_buffer_gives_bitwise_the_same_global_batches():
    buffer, file = filled(3, 4), io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    other = NaiveExperienceBuffer(2)
    other.load_state_dict(torch.load(file, weights_only=True))
    for one, two in zip(
        buffer.global_batches(3, seed=0, episode=1),
        other.global_batches(3, seed=0, episode=1),
        strict=True,
    ):
        for mine, theirs in zip(one, two, strict=True):
            assert mine.tensors().keys() == theirs.tensors().keys()
            assert all(
                torch.equal(tensor, theirs.tensors()[name])
                for name, tensor in mine.tensors().items()
            )


def test_a_buffer_saved_by_an_older_release():
    """It called the sample index "rows"."""
    state = filled(3, 4).state_dict()
    other = NaiveExperienceBuffer(2)
    other.load_state_dict(
        {("rows" if name == "sample_index" else name): state[name] for name in state}
    )
    expected = rows_of(filled(3, 4).global_batches(3, seed=0, episode=1))
    assert rows_of(other.global_batches(3, seed=0, episode=1)) == expected


def test_an_empty_buffer_is_saved_and_restored():
    buffer = filled(1, 2)
    buffer.load_state_dict(NaiveExperienceBuffer(2).state_dict())
    assert len(buffer) == 0


def test_clear_and_limit(capsys):
    buffer = filled(2, 4, limit=6)
    assert len(buffer) == 6 and [int(item.sample_index) for item in buffer.items] == [
        4,
        6,
        1,
        3,
        5,
        7,
    ]
    assert "holds 6 responses: the oldest of 8 are dropped" in capsys.readouterr().err
    buffer.clear()
    assert len(buffer) == 0


def test_what_a_limit_has_left_makes_whole_global_batches():
    buffer = filled(2, 4, limit=6)  # rows 0 and 2 are gone
    windows = rows_of(buffer.global_batches(3, seed=0, episode=0))
    assert [len(window) for window in windows] == [2, 2, 2] and sorted(sum(windows, [])) == [
        1,
        3,
        4,
        5,
        6,
        7,
    ]
    # Another rank, whose rows have other numbers, takes as many in each.
    other = rows_of(filled(2, 4, first=4, limit=6).global_batches(3, seed=0, episode=0))
    assert [len(window) for window in other] == [2, 2, 2]


@pytest.mark.parametrize("count", [0, 3, 5, 16])
def test_unequal_global_batches_are_refused(count):
    with pytest.raises(
        ValueError, match=f"8 responses in the buffer cannot be divided into {count} global batches"
    ):
        list(filled(2, 4).global_batches(count, seed=0, episode=0))


def test_a_response_twice_is_refused():
    buffer = filled(1, 2)
    buffer.append(collected([0, 1]))
    with pytest.raises(ValueError, match="expected every response once"):
        list(buffer.global_batches(2, seed=0, episode=0))


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="sample_batch_size 0 must be at least 1"):
        NaiveExperienceBuffer(0)
