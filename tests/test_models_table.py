"""docs/models.md says what the library does: every cell is refused or not as it says, and some are
tried anew."""

import pytest

from coati.parallel.families import NOT_CHAT, check_family
from coati.parallel.plugins import ParallelOptions
from tests.models_table import COLUMNS, FAMILIES, PAGE, TRAINS, page, try_cell

BY_TYPE = {family.type: family for family in FAMILIES}
BY_TITLE = {column.title: column for column in COLUMNS}


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.models_table"


@pytest.mark.matrix
@pytest.mark.parametrize(
    "family, column",
    [
        ("qwen2", "3d --tp 2"),
        ("gpt2", "3d --tp 2"),
        ("gpt2", "3d --pp 2"),
        ("opt", "3d --pp 2"),
        ("bloom", "3d --tp 2"),
        ("falcon", "gemini"),
        ("chatglm", "zero2 with LoRA"),
    ],
)
def test_some_cells_anew(family, column):
    assert try_cell(BY_TYPE[family], BY_TITLE[column]) == TRAINS


@pytest.mark.parametrize(
    "family, column, part",
    [
        ("chatglm", "3d --tp 2", "--tp is not possible with chatglm"),
        ("gpt2", "3d ring", "--sp_mode ring is not possible with gpt2"),
        ("qwen3", "3d", "qwen3"),
        ("phi", "gemini --tp 2", "--tp 2"),
    ],
)
def test_refusals_name_the_flag_and_the_family(family, column, part):
    said = try_cell(BY_TYPE[family], BY_TITLE[column])
    assert part in said and "use " in said


@pytest.mark.parametrize("family", NOT_CHAT)
def test_models_that_do_not_chat_are_refused_by_every_plugin(family):
    config = type("Config", (), {"model_type": family})()
    for plugin in ("ddp", "zero2", "gemini", "3d"):
        with pytest.raises(ValueError, match=f"{family} is"):
            check_family(config, ParallelOptions(plugin=plugin, precision="bf16"))


def test_the_first_reason_given_does_not_depend_on_chance():
    """Sets of strings have another order in every process."""
    options = ParallelOptions(
        plugin="3d", tp=2, enable_sequence_parallelism=True, sp_mode="split_gather"
    )
    with pytest.raises(ValueError, match="^--tp is not possible"):
        check_family(type("Config", (), {"model_type": "chatglm"})(), options)


def test_opt_with_an_output_embedding_of_its_own_is_not_split_over_processes():
    untied = type("Config", (), {"model_type": "opt", "tie_word_embeddings": False})()
    with pytest.raises(
        ValueError, match="--tp is not possible with OPT models whose output embedding"
    ):
        check_family(untied, ParallelOptions(plugin="3d", tp=2))
    check_family(untied, ParallelOptions(plugin="zero2"))
    untied.tie_word_embeddings = True
    check_family(untied, ParallelOptions(plugin="3d", tp=2))
