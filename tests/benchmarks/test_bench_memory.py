"""The 31 configurations of bench_memory.py, and what was measured of them."""

import json

import pytest
import torch

from benchmarks.bench_memory import CASES, ENDS, MODELS, ROOT, Case, estimate_of, write_rows
from tests.tiny import tiny_tokenizer

MEASURED = {
    row["case"]: row
    for row in json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
}


def test_every_configuration_was_measured_and_is_within_15_percent():
    assert list(MEASURED) == [case.name for case in CASES] and len(MEASURED) == 31
    methods = {case.method for case in CASES}
    assert methods == {"sft", "dpo", "rm", "gkd", "ilql", "grpo", "ppo"}
    off = {name: row["ratio"] for name, row in MEASURED.items() if abs(row["ratio"] - 1) > 0.15}
    assert not off


def test_the_page_has_the_measured_figures():
    page = (ROOT / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8")
    for name, row in MEASURED.items():
        figures = (row["estimate_mib"], row["measured_mib"], row["ratio"])
        assert f"| {name} | {' | '.join(map(str, figures))} |" in page


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_estimate_is_still_the_one_that_was_compared(case: Case, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as where it was measured
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODELS[case.model] | ENDS))
    tiny_tokenizer().save_pretrained(folder)
    write_rows(tmp_path / "rows.jsonl", case)
    peak = estimate_of(case, tmp_path).peak / 2**20
    assert peak == pytest.approx(MEASURED[case.name]["estimate_mib"], rel=0.01)
