"""Tries the cells of docs/models.md that are not yet known for the installed releases, and writes
the page::

    python -m tests.models_table [--families a,b] [--columns "3d --tp 2,ddp"] [--again]

Results are stored after each column, so a run that was stopped goes on where it was.
"""

import argparse
import datetime
import sys
import tempfile
from pathlib import Path

from tests.models_table.cells import COLUMNS
from tests.models_table.families import BY_TYPE
from tests.models_table.page import PAGE, name_of, page, store, stored, versions
from tests.models_table.run import FAILED, possible, run_cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=",".join(BY_TYPE))
    parser.add_argument("--columns", default=",".join(column.title for column in COLUMNS))
    parser.add_argument("--again", action="store_true", help="known cells, too")
    args = parser.parse_args()
    results = stored()
    if results["versions"] != versions():
        results = {"date": "", "versions": versions(), "cells": {}}
    asked = [
        (name, title)
        for title in args.columns.split(",")
        for name in args.families.split(",")
        if possible(BY_TYPE[name]) and (args.again or name_of(name, title) not in results["cells"])
    ]
    with tempfile.TemporaryDirectory() as folder:
        for (name, title), (kind, text) in run_cells(asked, Path(folder)):
            print(f"{name:18} {title:20} {kind} {text}", flush=True)
            results["cells"][name_of(name, title)] = [kind, text]
            results["date"] = datetime.date.today().isoformat()
            store(results)
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(any(kind == FAILED for kind, _ in results["cells"].values()))


if __name__ == "__main__":
    main()
