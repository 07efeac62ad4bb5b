"""generate_prompt_dataset.py: an even, seeded sample of the prompts of any data set, which can be
prepared."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from coati.cli.prompts import parse_prompts
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.prompt_sample import sample_prompts
from tests.dataset.makers import messages

SCRIPT = (
    Path(__file__).parents[3]
    / "examples"
    / "data_preparation_scripts"
    / "generate_prompt_dataset.py"
)


def write(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path) -> Path:
    return write(
        tmp_path / "instinwild.json",
        [{"instruction": f"q{n}", "input": "", "output": "a"} for n in range(50)],
    )


def test_a_sample_keeps_the_order_and_follows_the_seed(rows):
    one, again, other = (sample_prompts([rows], 10, seed) for seed in (1, 1, 2))
    assert one == again != other and len(one) == 10
    assert [row["id"] for row in one] == sorted({row["id"] for row in one})
    assert all(row == {"instruction": f"q{row['id']}", "id": row["id"]} for row in one)
    assert [row["id"] for row in sample_prompts([rows], 99)] == list(range(50))


def test_every_row_is_drawn_equally_often(rows):
    drawn = [row["id"] for seed in range(200) for row in sample_prompts([rows], 10, seed)]
    counts = [drawn.count(number) for number in range(50)]
    # Binomial(200, 1/5): mean 40, standard deviation 5.7
    assert min(counts) > 40 - 4.5 * 5.7 and max(counts) < 40 + 4.5 * 5.7


def test_longer_dialogues_and_ground_truths_are_kept(tmp_path, capsys):
    dialogue = messages("q1", "a1", "q2", "a2")
    path = write(
        tmp_path / "a.json", [{"messages": dialogue}, {"x": 1}, {"question": "q", "gt_answer": 3}]
    )
    assert sample_prompts([path], 5) == [
        {"messages": dialogue[:3], "id": 0},
        {"instruction": "q", "id": 1, "gt_answer": "3"},
    ]
    said = capsys.readouterr().err
    assert "rows without a prompt, left out: 1" in said and "a.json:1: no known row format" in said


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match="a.json: no prompt found\n.*a.json:1: no known row format"
    ):
        sample_prompts([write(tmp_path / "a.json", [{"x": 1}])], 5)


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["generate_prompt_dataset.py", *map(str, words)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_writes_what_can_be_prepared(rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / "prompt.json"
    run(monkeypatch, "--dataset_path", rows, "--save_path", out, "--sample_size", 4)
    prompts = [read_row("prompt", row).messages for row in json.loads(out.read_text())]
    assert len(prompts) == 4 and all(
        len(turns) == 1 and turns[0]["content"][0] == "q" for turns in prompts
    )
    assert f"4 prompts are in {out}" in capsys.readouterr().out
    before = out.read_bytes()
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "--dataset_path", rows, "--save_path", out)
    assert (
        exit.value.code == 2
        and "exists already" in capsys.readouterr().err
        and out.read_bytes() == before
    )
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, "--dataset_path", tmp_path / "absent", "--save_path", tmp_path / "x.json")
    assert re.search("error: .*absent: there is no such file", capsys.readouterr().err)
    assert not (tmp_path / "x.json").exists()


def test_flags_have_the_older_documents_names_and_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = parse_prompts(["--dataset_path", "d"])
    assert (args.save_path, args.sample_size) == ("prompt.json", 16384)
    with pytest.raises(SystemExit):
        parse_prompts([])
    assert "--dataset_path is required" in capsys.readouterr().err
