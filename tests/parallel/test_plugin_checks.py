from types import SimpleNamespace

import pytest

from coati.parallel.plugin_checks import check_heads
from coati.parallel.plugins import ParallelOptions


def model(heads: int, key_value_heads: int) -> SimpleNamespace:
    return SimpleNamespace(num_attention_heads=heads, num_key_value_heads=key_value_heads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # 9 query and 3 key/value heads: only 3 (or 1) processes can share them.
        (
            {"tp": 2},
            "--tp 2: this model's 9 attention heads cannot be divided by 2; possible values: 1, "
            "3, 9",
        ),
        (
            {"tp": 9},
            "--tp 9: this model's 3 key/value heads cannot be divided by 9; possible values: 1, 3,",
        ),
        (
            {"sp": 2, "sp_mode": "all_to_all"},
            "--sp 2: this model's 9 attention heads cannot be divided by 2",
        ),
        # all_to_all hands out the heads that tp has left to each process.
        (
            {"tp": 3, "sp": 3, "sp_mode": "all_to_all"},
            "--tp 3 x --sp 3: this model's 3 key/value heads cannot be",
        ),
    ],
)
def test_heads_that_cannot_be_divided_are_refused_with_what_can(options, message):
    with pytest.raises(ValueError) as error:
        check_heads(model(9, 3), ParallelOptions(plugin="3d", **options))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options", [{}, {"tp": 3}, {"tp": 3, "sp": 2}, {"sp": 3, "sp_mode": "all_to_all"}]
)
def test_heads_that_can_be_divided_pass(options):
    check_heads(model(9, 3), ParallelOptions(plugin="3d", **options))
