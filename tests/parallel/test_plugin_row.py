"""A new plugin costs one row: zero1 is added to the table, is offered by the parsers, trains as
plain PyTorch does, saves, and resumes to the bit."""

import re
from pathlib import Path

import pytest

from coati.parallel.options import PRECISIONS
from coati.parallel.plugins import PLUGINS, Plugin, low_level_zero
from tests.distributed.spawn import run
from tests.parallel.engine_cases import Case
from tests.parallel.test_matrix import check_against_plain, check_reload, check_resume

ROOT = Path(__file__).parents[2]

ZERO_1 = Plugin(
    upstream="LowLevelZeroPlugin",
    shards="optimizer states over the data-parallel processes",
    keywords=lambda options: low_level_zero(options, stage=1),
    precisions=PRECISIONS,
    best_for="models whose gradients fit; accumulation without an exchange per micro-batch",
    cannot="be combined with a pipeline",
    zero_stages=(1,),
    offload_plugin="zero2_cpu",
    shards_optimizer=True,
)
CASES = [
    Case("plain", options={"plugin": "zero1"}),
    Case("bf16", options={"plugin": "zero1", "precision": "bf16"}),
    Case("accumulation", options={"plugin": "zero1"}, accumulation=2),
    Case("lora", options={"plugin": "zero1"}, lora=True),
]


def with_the_row(work: str, folder: str) -> list[dict]:
    from tests.parallel import engine_cases

    PLUGINS["zero1"] = ZERO_1
    return getattr(engine_cases, work)(CASES, folder)


def test_a_row_is_all_that_a_plugin_needs(tmp_path):
    place = "tests.parallel.test_plugin_row:with_the_row"
    first = run(2, place, "train_and_save", str(tmp_path), timeout=300)
    second = run(2, place, "resume", str(tmp_path), timeout=300)
    for index, case in enumerate(CASES):
        assert first[0][index] == first[1][index], f"{case.name}: ranks disagree"
        check_against_plain(case, first[0][index]["steps"])
        check_resume(case, first[0][index], second[0][index], tmp_path / case.name)
        check_reload(case, first[0][index], tmp_path / case.name)


def test_parsers_checks_and_tables_read_the_row(monkeypatch):
    from coati.cli.arguments import sft_parser
    from coati.parallel.plugin_checks import check_options, resolve_options
    from coati.parallel.plugins import ParallelOptions
    from tools.write_docs import plugin_tables

    monkeypatch.setitem(PLUGINS, "zero1", ZERO_1)
    assert sft_parser().parse_args(["--plugin", "zero1"]).plugin == "zero1"
    check_options("zero1", precision="fp32", zero_stage=1, lora=True, accumulation_steps=2)
    with pytest.raises(ValueError, match="--pp 2 needs --plugin 3d; --plugin zero1"):
        check_options("zero1", precision="bf16", pp=2)
    became = {"tp": "3d", "zero_cpu_offload": "zero2_cpu"}
    for flag, name in became.items():
        options = ParallelOptions(plugin="zero1", **{flag: 2})
        assert resolve_options(options)[0].plugin == name
    row = "| `zero1` | yes | yes | yes | yes | yes | becomes `3d` | no | no | yes | yes |"
    assert row in plugin_tables()


def test_nothing_but_the_table_tests_a_plugins_name():
    """Comparisons only: a default is a value, a text is a text."""
    names = "|".join(PLUGINS)
    comparison = re.compile(
        rf"plugin[\w.()\[\]]*\)? *(?:[=!]=|not in|in) *\(?[^#\n]*[\"'](?:{names})[\"']"
        rf"|[\"'](?:{names})[\"'] *(?:[=!]=|in) *[\w.]*plugin|plugin[\w.()]*\.startswith"
    )
    places = [
        path
        for folder in ("coati", "benchmarks", "examples", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in places
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if comparison.search(line)
    ]
    assert found == []
