"""The layout of an experience: what belongs to which action, and that padding is nothing."""

import math

import pytest
import torch
from torch.testing import assert_close

from coati.experience_maker.experience import (
    Experience,
    at_actions,
    concatenate,
    logprobs_at_actions,
    make_experience_batch,
    masks,
    sample_indices,
    split_experience_batch,
)
from coati.models.critic import Critic
from coati.models.logprobs import logprobs_from_logits, scatter_token_logprobs
from tests.tiny import tiny_llama

PROMPTS, ANSWERS = [[11, 12, 13], [21], [31, 32]], [[14, 15], [22, 23, 24], [33]]


def experience(prompts=PROMPTS, answers=ANSWERS, left=0, right=0, junk=0.0, first=0):
    """Rows as given; padding besides, with ``junk`` in the cells that must not matter. Numbers name
    row and action."""
    width, actions = max(map(len, prompts)) + left, max(map(len, answers)) + right
    rows = [
        [9] * (width - len(prompt)) + prompt + answer + [9] * (actions - len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    prompt_mask = (
        torch.arange(width) >= width - torch.tensor([len(prompt) for prompt in prompts])[:, None]
    )
    attention_mask, action_mask = masks(
        prompt_mask, torch.tensor([len(answer) for answer in answers]), actions
    )
    index = torch.arange(first, first + len(rows))
    numbers = (10.0 * index[:, None] + torch.arange(actions)).masked_fill(~action_mask, junk)
    return Experience(
        torch.tensor(rows),
        attention_mask,
        action_mask,
        -numbers,
        index.float(),
        index,
        kl=numbers + 1,
        values=numbers + 2,
        advantages=numbers + 3,
        returns=numbers + 4,
        reference_log_probs=numbers + 5,
    )


def assert_same(one: Experience, other: Experience) -> None:
    assert one.tensors().keys() == other.tensors().keys()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_masks_come_from_lengths():
    made = experience()
    assert made.attention_mask.int().tolist() == [
        [1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
        [0, 1, 1, 1, 0, 0],
    ]
    assert made.action_mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert made.lengths().tolist() == [5, 4, 3] and made.response_lengths().tolist() == [2, 3, 1]


def test_labels_are_the_tokens_of_the_actions():
    no = -100
    assert experience().labels().tolist() == [
        [no, no, no, 14, 15, no],
        [no, no, no, 22, 23, 24],
        [no, no, no, 33, no, no],
    ]


def test_position_j_is_read_at_the_token_before_token_j():
    """Each position says its own token id, as a critic would the state after it; log-probs say the
    token scored."""
    made = experience()
    assert at_actions(made.sequences, 3).tolist() == [[13, 14, 15], [21, 22, 23], [32, 33, 9]]
    assert logprobs_at_actions(made.sequences[:, 1:], 3).tolist() == made.sequences[:, 3:].tolist()


def test_critic_and_policy_read_the_same_states_whatever_the_padding():
    policy, critic = tiny_llama().eval(), Critic(backbone=tiny_llama(seed=1)).eval()
    torch.nn.init.normal_(critic.score.weight)
    for padding in ({}, {"left": 4, "right": 3}):
        made = experience(**padding)
        mask, actions = made.attention_mask, made.num_actions
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            values = at_actions(critic(made.sequences, mask), actions)
            logits = policy(
                input_ids=made.sequences, attention_mask=mask.long(), position_ids=positions
            ).logits
            labels = made.labels()
            flat = logprobs_from_logits(logits, labels)
            logprobs = logprobs_at_actions(scatter_token_logprobs(flat, labels), actions)
            for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
                for j, token in enumerate(answer):
                    before = torch.tensor([prompt + answer[:j]])
                    assert_close(values[row, j], critic(before)[0, -1], atol=1e-5, rtol=0)
                    expected = policy(input_ids=before).logits[0, -1].log_softmax(-1)[token]
                    assert_close(logprobs[row, j], expected, atol=1e-5, rtol=0)
        assert logprobs[~made.action_mask].eq(0).all()


def test_trimming_takes_away_padding_and_nothing_else():
    assert_same(experience(left=5, right=2).trimmed(), experience())
    assert_same(experience().trimmed(), experience())
    assert experience().select([]).trimmed().sequences.shape == (0, 6)


def test_an_empty_response_keeps_one_column():
    made = experience([[1, 2]], [[]], right=2).trimmed()
    assert made.num_actions == 1 and made.sequences.shape == (1, 3) and not made.action_mask.any()


def test_split_and_merge_are_inverse():
    items = split_experience_batch(experience(left=2, right=1, junk=math.nan))
    assert [tuple(item.sequences.shape) for item in items] == [(1, 5), (1, 4), (1, 3)]
    assert_same_rows(make_experience_batch(items), experience())


def assert_same_rows(one: Experience, other: Experience) -> None:
    """The same shapes, masks and cells; what padding holds is nobody's business."""
    for name, tensor in one.tensors().items():
        expected = other.tensors()[name]
        assert tensor.shape == expected.shape, name
        cells = {one.num_actions: one.action_mask, one.sequences.shape[1]: one.attention_mask}
        chosen = (
            slice(None)
            if tensor.dim() == 1 or tensor.dtype == torch.bool
            else cells[tensor.shape[1]]
        )
        assert torch.equal(tensor[chosen], expected[chosen]), name


def test_rows_of_different_widths_are_joined():
    parts = [
        experience(PROMPTS[:1], ANSWERS[:1]),
        experience(PROMPTS[1:], ANSWERS[1:], left=3, first=1),
    ]
    assert_same_rows(concatenate(parts).trimmed(), experience())
    assert concatenate(parts).labels()[:, 2:].tolist() == experience().labels().tolist()


def test_optional_fields_are_all_there_or_none():
    without = experience()
    without.values = None
    with pytest.raises(ValueError, match="only some of the experiences hold values"):
        concatenate([experience(), without])
    with pytest.raises(ValueError, match="no experience"):
        concatenate([])
    assert "values" not in concatenate([without, without]).tensors()


@pytest.mark.parametrize(
    ("field", "shape", "message"),
    [
        ("values", (3, 2), r"values has shape \(3, 2\), expected \(3, 3\)"),
        ("reward", (3, 3), r"reward has shape \(3, 3\), expected \(3,\)"),
        ("attention_mask", (3, 5), r"attention_mask has shape \(3, 5\), expected \(3, 6\)"),
        ("action_mask", (3, 6), "6 tokens leave no prompt before 6 actions"),
    ],
)
def test_shapes_that_do_not_fit_are_named(field, shape, message):
    with pytest.raises(ValueError, match=message):
        Experience(**(experience().tensors() | {field: torch.zeros(shape)}))


def test_indices_of_an_episode_do_not_depend_on_who_collects():
    """2 steps of 4 responses: by one process, or by two of 2 each."""
    one = [sample_indices(step, 2, 0, 4) for step in range(2)]
    two = [[sample_indices(step, 2, 2 * rank, 2) for rank in range(2)] for step in range(2)]
    assert one == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [sum(step, []) for step in two] == one


def test_devices_and_selection():
    made = experience().to_device("cpu").select(torch.tensor([2, 0]))
    assert made.sample_index.tolist() == [2, 0] and len(made) == 2 and made.returns.shape == (2, 3)
