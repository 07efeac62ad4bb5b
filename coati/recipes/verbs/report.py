"""Write the report of a run, or of several side by side."""

from pathlib import Path

from coati.cli.program_settings import ReportSettings
from coati.cli.run_report import parse_report, report_parser
from coati.cli.verb import Verb

VERB = Verb(
    "models",
    report_parser,
    parse_report,
    "coati.recipes.verbs.report:main",
    subject="--run_dir",
)


def main(settings: ReportSettings) -> None:
    """Write the page and say where it is. Raises ValueError for a directory that holds no run."""
    from coati.trainer.run_report.run_files import open_run
    from coati.trainer.run_report.run_page import run_page
    from coati.trainer.run_report.run_record import PAGE
    from coati.trainer.run_report.side_by_side import side_by_side
    from coati.utils.json_io import save_text

    folders = [Path(folder) for folder in settings.run_dir]
    runs = [open_run(folder) for folder in folders]
    for run in runs:
        if run.holds_no_metric():
            raise ValueError(
                f"--run_dir {run.folder}: metrics.jsonl holds lines, and no metric in any of them "
                '({"step": 1, "train/loss": 2.5}); is it of another program, or damaged?'
            )
    own_place = folders[0] / PAGE if len(runs) == 1 else Path(PAGE)
    output = own_place if settings.output is None else Path(settings.output)
    save_text(run_page(runs[0]) if len(runs) == 1 else side_by_side(runs), output)
    for run in runs:
        for remark in run.remarks():
            print(f"{run.folder}/{remark}")
    print(f"the report is in {output}")
