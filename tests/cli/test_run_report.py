"""``coati report``: one run beside itself, several on one page, and what is no run."""

import pytest

from coati.cli.run_report import parse_report
from coati.recipes.verbs.report import main
from tests.trainer.run_report.made_runs import made_run


def test_the_page_of_one_run_stands_in_its_directory(tmp_path, capsys):
    made_run(tmp_path / "run")
    main(parse_report(["--run_dir", str(tmp_path / "run")]))
    assert "SFT of small-135m" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"the report is in {tmp_path}/run/report.html\n"


def test_several_are_one_page_in_the_working_directory(tmp_path, monkeypatch):
    for name in ("a", "b"):
        made_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    main(parse_report(["--run_dir", "a", "b"]))
    assert "2 runs side by side" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "a/report.html").exists()


def test_output_says_where(tmp_path):
    made_run(tmp_path / "run")
    main(parse_report(["--run_dir", str(tmp_path / "run"), "--output", f"{tmp_path}/new/x.html"]))
    assert (tmp_path / "new/x.html").exists() and not (tmp_path / "run/report.html").exists()


def test_a_half_written_file_is_said(tmp_path, capsys):
    with open(made_run(tmp_path / "run") / "metrics.jsonl", "a") as file:
        file.write('{"step": 99')
    main(parse_report(["--run_dir", str(tmp_path / "run")]))
    assert "run/metrics.jsonl: the last line is cut off" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"holds metrics\.jsonl; found an empty directory"):
        main(parse_report(["--run_dir", str(tmp_path)]))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        parse_report([])
    assert "--run_dir is required" in capsys.readouterr().err
