"""What a run is, through all its starts: ``run.json`` in its directory."""

from pathlib import Path
from typing import Any

from coati.utils.json_io import load_json

RECORD = "run.json"


def record_of(save_dir: str | Path) -> dict[str, Any]:
    """``id`` of the run in ``save_dir``, and ``weights`` or ``checkpoint`` that it began from if
    that was not --pretrain; {} in a directory of an earlier release."""
    file = Path(save_dir) / RECORD
    return load_json(file) if file.is_file() else {}
