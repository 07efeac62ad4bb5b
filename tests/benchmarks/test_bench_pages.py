"""The table of benchmarks/: every program is in it, with a command whose flags it takes."""

import re

import pytest

from coati.cli.bench_programs import programs
from tools.bench_pages import bench_tables
from tools.flag_pages import ROOT


def test_every_program_is_listed_with_flags_that_it_takes():
    table, _, _ = bench_tables().partition("What they share")
    commands = re.findall(r"^\| `python benchmarks/(\w+\.py) ?([^`]*)`", table, re.MULTILINE)
    listed = dict(commands)
    expected = {path.name for path in programs().values()} | {"profile_step.py", "decode_floor.py"}
    assert set(listed) == expected
    for name, words in commands:
        text = (ROOT / "benchmarks" / name).read_text(encoding="utf-8")
        for flag in re.findall(r"--\w+", words):
            assert f'"{flag}"' in text, (name, flag)


def test_a_command_ends_before_the_next_one_and_goes_on_over_lines(tmp_path):
    about = '"""Speed.\n\n    python benchmarks/bench_x.py [--rows 8]\n    [--output F]\n'
    (tmp_path / "bench_x.py").write_text(f'{about}    python benchmarks/bench_x.py --all\n"""\n')
    (tmp_path / "parts.py").write_text('"""What is shared. More of it."""\n')
    table = bench_tables(tmp_path)
    assert "| `python benchmarks/bench_x.py [--rows 8] [--output F]` | Speed |" in table
    assert table.endswith("| `parts.py` | What is shared |")


def test_a_program_that_does_not_say_how_it_is_started_is_refused(tmp_path):
    (tmp_path / "bench_x.py").write_text('"""Speed."""\n')
    with pytest.raises(ValueError, match="has no line with `python benchmarks"):
        bench_tables(tmp_path)
