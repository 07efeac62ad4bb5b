"""docs/models.md says what the library does: the page is that of the stored results, refusals are
today's, and some cells are tried anew, others each day."""

import datetime
import random

import pytest

from coati.parallel.families import NOT_CHAT, check_family
from coati.parallel.plugins import ParallelOptions
from coati.utils.transformers_compat import transformers_major
from tests.models_table.cells import BY_TITLE, COLUMNS, refusal
from tests.models_table.families import BY_TYPE, FAMILIES
from tests.models_table.page import PAGE, name_of, page, stored
from tests.models_table.run import FAILED, NO, possible, run_cells

ROTATING = 40
TODAY = transformers_major() >= 5


def config_of(**values):
    return type("Config", (), values)()


@pytest.mark.parametrize("family", NOT_CHAT)
def test_models_that_do_not_chat_are_refused_by_every_plugin(family):
    config = config_of(model_type=family)
    for plugin in ("ddp", "zero2", "gemini", "3d"):
        with pytest.raises(ValueError, match=f"{family} is"):
            check_family(config, ParallelOptions(plugin=plugin, precision="bf16"))


if TODAY:
    CELLS = [
        (family.type, column.title) for family in FAMILIES for column in COLUMNS if possible(family)
    ]

    def test_the_page_is_that_of_the_stored_results():
        assert PAGE.read_text(encoding="utf-8") == page(), "run make models-table"

    def test_every_cell_was_tried_and_none_fails():
        cells = stored()["cells"]
        assert set(cells) == {name_of(*cell) for cell in CELLS}
        assert not [name for name, (kind, _) in cells.items() if kind == FAILED]
        assert len({family for family, _ in CELLS}) >= 35

    @pytest.mark.parametrize("family", sorted({family for family, _ in CELLS}))
    def test_refusals_are_todays(family):
        cells = stored()["cells"]
        for column in COLUMNS:
            kind, text = cells[name_of(family, column.title)]
            if said := refusal(BY_TYPE[family], column):
                assert (kind, text) == (NO, said), column.title

    @pytest.mark.matrix
    def test_forty_other_cells_each_day_do_what_the_page_says(tmp_path):
        day = datetime.date.today()
        chosen = random.Random(day.toordinal()).sample(CELLS, ROTATING)
        print(f"the cells of {day}: {chosen}")
        known = stored()["cells"]
        found = {name_of(*cell): list(result) for cell, result in run_cells(chosen, tmp_path)}
        assert found == {name: known[name] for name in found}

    @pytest.mark.parametrize(
        "family, column, part",
        [
            ("gemma3n_text", "3d --pp 2", "--pp is not possible with gemma3n_text"),
            ("lfm2", "3d all_to_all", "--sp_mode all_to_all is not possible with lfm2"),
            ("gpt_oss", "gemini", "--plugin gemini is not possible with gpt_oss"),
            ("llama4_text", "packing", "--packing is not possible with llama4_text"),
        ],
    )
    def test_refusals_name_the_flag_and_the_family(family, column, part):
        said = refusal(BY_TYPE[family], BY_TITLE[column])
        assert part in said and ("use " in said or "drop " in said)

    def test_a_family_without_a_plan_is_refused_by_name():
        config = config_of(model_type="xlstm")
        with pytest.raises(ValueError, match="--tp is not possible with xlstm .* use --plugin"):
            check_family(config, ParallelOptions(plugin="3d", tp=2))
        check_family(config, ParallelOptions(plugin="zero2"))

    def test_falcon_with_one_key_head_or_alibi_is_not_split_over_processes():
        options = ParallelOptions(plugin="3d", tp=2)
        for changes, part in (
            ({"alibi": True, "new_decoder_architecture": True}, "alibi"),
            ({"multi_query": True, "new_decoder_architecture": False}, "multi_query"),
        ):
            with pytest.raises(ValueError, match=part):
                check_family(config_of(model_type="falcon", **changes), options)

else:

    @pytest.mark.parametrize(
        "family, options, part",
        [
            ("chatglm", {"tp": 2}, "--tp is not possible with chatglm"),
            (
                "gpt2",
                {"tp": 2, "enable_sequence_parallelism": True, "sp_mode": "ring"},
                "--sp_mode ring is not possible with gpt2",
            ),
            ("qwen3", {}, "qwen3"),
            ("phi", {"plugin": "gemini", "precision": "bf16", "tp": 2}, "--tp 2"),
        ],
    )
    def test_refusals_name_the_flag_and_the_family(family, options, part):
        with pytest.raises(ValueError, match=f"{part}.*use "):
            check_family(
                config_of(model_type=family), ParallelOptions(**({"plugin": "3d"} | options))
            )

    def test_the_first_reason_given_does_not_depend_on_chance():
        """Sets of strings have another order in every process."""
        options = ParallelOptions(
            plugin="3d", tp=2, enable_sequence_parallelism=True, sp_mode="split_gather"
        )
        with pytest.raises(ValueError, match="^--tp is not possible"):
            check_family(config_of(model_type="chatglm"), options)

    def test_opt_with_an_output_embedding_of_its_own_is_not_split_over_processes():
        untied = config_of(model_type="opt", tie_word_embeddings=False)
        with pytest.raises(ValueError, match="OPT models whose output embedding"):
            check_family(untied, ParallelOptions(plugin="3d", tp=2))
        check_family(untied, ParallelOptions(plugin="zero2"))
        untied.tie_word_embeddings = True
        check_family(untied, ParallelOptions(plugin="3d", tp=2))

    @pytest.mark.matrix
    def test_some_cells(tmp_path):
        """ChatGLM's code, which is ColossalAI's copy, is for transformers 4."""
        wanted = [
            ("qwen2", "3d --tp 2"),
            ("gpt2", "3d --pp 2"),
            ("bloom", "3d --tp 2"),
            ("falcon", "gemini"),
            ("chatglm", "zero2 with LoRA"),
        ]
        found = dict(run_cells(wanted, tmp_path))
        assert {kind for kind, _ in found.values()} == {"yes"}, found
