"""Tries cells and writes docs/models.md: ``python -m tests.models_table [--families a,b] [--columns
"3d --tp 2,ddp"] [--again]``."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.models_table.cells import BY_TITLE, COLUMNS
from tests.models_table.families import BY_TYPE
from tests.models_table.run import FAILED, possible, run_cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(BY_TYPE))
    parser.add_argument("--columns", default=",".join(column.title for column in COLUMNS))
    args = parser.parse_args()
    asked = [
        (name, title)
        for title in args.columns.split(",")
        for name in args.families.split(",")
        if possible(BY_TYPE[name], BY_TITLE[title])
    ]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for (name, title), (kind, text) in run_cells(asked, Path(folder)):
            print(f"{name:18} {title:20} {kind} {text}", flush=True)
            failed |= kind == FAILED
    sys.exit(failed)


if __name__ == "__main__":
    main()
