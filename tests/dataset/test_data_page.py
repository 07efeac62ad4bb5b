"""docs/data.md as a reader would follow it: its rows are read, its commands run, in the order they
stand in."""

import json
import re
import shlex
from pathlib import Path

import pytest

from coati.__main__ import main
from coati.dataset import load_tokenized_dataset
from coati.dataset.data_types import DATA_TYPES
from coati.dataset.rows.formats import read_row
from coati.dataset.rows.row_errors import REASONS
from tests.dataset.makers import chatml_tokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(coati .*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [shlex.split(block.replace("\\\n", " ")) for block in BLOCKS]


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder in which all commands of the page ran, and what each printed."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "examples").symlink_to(ROOT / "examples")
    chatml_tokenizer().save_pretrained(folder / "MODEL")
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in COMMANDS:
            if words[1] == "prepare":
                lines = []
                patch.setattr(
                    "builtins.print",
                    lambda *said, lines=lines, **_: lines.append(" ".join(map(str, said))),
                )
                main([*words[1:], "--num_proc", "1"])
                printed[shlex.join(words)] = "\n".join(lines)
    return folder, printed


def test_the_commands_run_and_leave_what_the_page_says(followed):
    folder, printed = followed
    assert len(printed) >= 6
    for name in ("out", "pairs", "clean", "few", "judged"):
        for file in (
            "jsonl/report.html",
            "jsonl/report.json",
            "arrow/report.html",
            "arrow/preparation.json",
        ):
            assert (folder / name / file).is_file(), file
        assert len(load_tokenized_dataset(str(folder / name / "arrow"))) >= 40
    assert (folder / "pairs" / "arrow" / "eval" / "report.html").is_file()
    checked = next(text for command, text in printed.items() if "--check_template" in command)
    assert "[[Probe answer number" in checked and "stop_ids [[2]]" in checked


def test_cleaning_on_the_page_cleans(followed):
    folder, _ = followed
    report = json.loads((folder / "clean" / "jsonl" / "report.json").read_text())
    assert (
        report["cleaning"]["near_duplicates"] == 0.8 and report["cleaning"]["deduplicate"] is True
    )
    assert {entry["kind"] for entry in report["dropped"].values()} <= {"cleaned", "unfit"}
    few = json.loads((folder / "few" / "jsonl" / "report.json").read_text())
    assert few["rows_read"] == 40 and few["shards"] == [20, 20]


def test_what_training_is_given_was_prepared_before(followed):
    folder, _ = followed
    [words] = [w for w in COMMANDS if w[1] == "sft" and "--streaming" not in w]
    paths = [word for word in words if "/arrow" in word]
    assert len(paths) == 3 and all((folder / path / "preparation.json").is_file() for path in paths)


def test_the_rows_on_the_page_are_read():
    rows = re.findall(r"^\| (\w+) \|.*?\| `(\{.*\})` \|$", PAGE, re.MULTILINE)
    assert [type for type, _ in rows] == list(DATA_TYPES)
    for type, row in rows:
        assert read_row(type, json.loads(row)).format in ("messages", type)


def test_every_reason_is_on_the_page():
    assert all(f"| `{reason}` | {meaning} |" in PAGE for reason, meaning in REASONS.items())


def test_the_picture_is_small():
    assert 5_000 < (ROOT / "docs" / "report.png").stat().st_size < 100_000
