"""What is made of the moments that a started run notes."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_start  # noqa: E402


def start(*moments: float) -> dict:
    names = ("Python is there", "loading the model", "taking the first step")
    return {"moments": list(zip(names, moments, strict=True)), "modules": 3}


def test_figures_are_medians_of_every_moment():
    found = bench_start.figures([start(1, 4, 9), start(2, 3, 7), start(3, 5, 8)])
    assert found["seconds"] == 8 and found["spread"] == [7, 9]
    assert list(found["moments"].values()) == [2, 4, 8]


def test_the_table_has_what_each_phase_took(capsys):
    bench_start.show(bench_start.figures([start(1, 4, 9)]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2:4] for line in lines[:3]] == [
        ["+", "1.00"],
        ["+", "3.00"],
        ["+", "5.00"],
    ]
    assert lines[3].startswith("9.0 s to the end of the first step (9.0 to 9.0), 3 modules")


def test_imports_are_read_as_python_writes_them():
    text = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       100 |        100 |     torch._C\n"
        "import time:       400 |    2000500 | torch\n"
    )
    assert bench_start.imports_of(text) == [
        (0.0001, 0.0001, 2, "torch._C"),
        (2.0005, 0.0004, 0, "torch"),
    ]


def test_the_run_is_one_step_of_one_row(tmp_path):
    words = bench_start.arguments(tmp_path / "model", tmp_path / "rows")
    flags = dict(zip(words[::2], words[1::2], strict=True))
    assert flags["--max_steps"] == flags["--batch_size"] == flags["--accumulation_steps"] == "1"
    assert not any("eval" in name for name in flags)
