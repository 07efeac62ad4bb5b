"""What the decoder keeps of each row's tokens is what it would compute from them anew."""

import pytest
import torch

from coati.models.generation.history import ROOM, History
from coati.models.generation.rotary_table import RotaryTable


class Reference:
    """The same, row by row, as lists."""

    def __init__(self, rows):
        self.rows = [list(row) for row in rows]
        self.columns = max(map(len, rows))

    def check(self, history):
        padding = [self.columns - len(row) for row in self.rows]
        pairs = list(zip(padding, self.rows, strict=True))
        assert history.ids.tolist() == [[0] * count + row for count, row in pairs]
        assert history.mask.tolist() == [[0] * count + [1] * len(row) for count, row in pairs]
        assert history.last.tolist() == [row[-1] for row in self.rows]
        assert history.positions.tolist() == [len(row) - 1 for row in self.rows]
        assert history.padded == any(padding) and history.padding() == min(padding)
        blocked = history.blocked()
        if any(padding):
            wanted = torch.zeros(history.mask.shape).masked_fill(history.mask == 0, -torch.inf)
            assert torch.equal(blocked, wanted)
        else:
            assert blocked is None


def history_of(*rows):
    columns = max(map(len, rows))
    ids = torch.tensor([[0] * (columns - len(row)) + list(row) for row in rows])
    return History(ids, (ids > 0).long()), Reference(rows)


def extended(history, reference, *tokens):
    history.append(torch.tensor(tokens))
    for row, token in zip(reference.rows, tokens, strict=True):
        row.append(token)
    reference.columns += 1
    reference.check(history)


def test_rows_grow_leave_and_join_and_padding_is_dropped():
    history, reference = history_of([5, 6, 7, 8], [9], [3, 4])
    reference.check(history)
    for token in range(10, 14):
        extended(history, reference, token, token + 10, token + 20)
    history.keep(torch.tensor([2, 1]))  # the longest has ended
    reference.rows = [reference.rows[2], reference.rows[1]]
    reference.check(history)
    assert history.padding() == 2
    history.drop(2)
    reference.columns -= 2
    reference.check(history)
    extended(history, reference, 41, 42)
    other, another = history_of([1] * 9, [2] * 3)
    extended(other, another, 50, 51)
    history.join(other)
    reference.rows += another.rows
    reference.columns = 10
    reference.check(history)
    extended(history, reference, 61, 62, 63, 64)
    history.keep(torch.tensor([2]))  # no padding is left
    reference.rows = [reference.rows[2]]
    reference.check(history)
    extended(history, reference, 71)


def test_buffers_grow_by_a_share_of_what_they_hold_and_the_prompts_tensor_is_not_written():
    ids = torch.ones(2, 3, dtype=torch.long)
    history = History(ids, torch.ones_like(ids))
    pointers = set()
    for token in range(4 * ROOM):
        history.append(torch.tensor([token, token]))
        pointers.add(history.ids.data_ptr())
    assert len(pointers) <= 4
    assert history.ids[0].tolist() == [1, 1, 1, *range(4 * ROOM)]
    assert ids.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_angles_are_computed_once_however_long_the_text():
    asked = []

    class Rotary(torch.nn.Module):
        rope_type = "default"

        def forward(self, hidden, positions):
            asked.extend(positions.flatten().tolist())
            angles = positions[..., None].float().repeat(1, 1, 4)
            return angles.cos(), angles.sin()

    table = RotaryTable(Rotary())
    for place in (3, 5000, 40, 5300):
        cos, _ = table(torch.tensor([place]), torch.zeros(1, 8))
        assert cos[0, 0, 0] == torch.tensor(float(place)).cos()
    assert asked == list(range(len(asked))) and len(asked) > 5300


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
)
def test_angles_are_those_of_the_models_rotary_embedding(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=64)
    if scaling["rope_type"] != "default":
        config.rope_scaling = dict(scaling, rope_theta=10000.0)
    rotary = LlamaRotaryEmbedding(config)
    table = RotaryTable(rotary)
    hidden = torch.zeros(2, 32)
    for positions in ([3, 0], [700, 5], [63, 1500]):  # within a chunk, beyond it, farther beyond
        given = torch.tensor(positions)
        cos, sin = table(given, hidden)
        wanted = rotary(hidden, given[:, None])
        torch.testing.assert_close(cos, wanted[0], atol=1e-6, rtol=0)
        sign = torch.tensor([-1.0] * 8 + [1.0] * 8)
        torch.testing.assert_close(sin, wanted[1] * sign, atol=1e-6, rtol=0)
