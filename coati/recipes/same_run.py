"""What every rank of a run is told and reads, as facts that the ranks compare before anything is
loaded: flags, and the files that they name, by content.

Weights are compared by samples of their bytes, which takes seconds for any size; rows once they are
loaded (:func:`rows_facts`).
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coati.cli.settings import TrainingSettings
from coati.dataset.data_types import TOKEN_COLUMNS
from coati.dataset.load.loader import row_lengths
from coati.parallel.agreement import UNKNOWN, local_leader
from coati.parallel.options import ParallelOptions
from coati.recipes.prepared import is_raw
from coati.utils.file_samples import sampled_hash
from coati.utils.redaction import HIDDEN, is_secret
from coati.utils.resources import template_path

# Of the launcher, or of rank 0 alone; --save_dir is tried out instead.
MAY_DIFFER = (
    "nproc",
    "hostfile",
    "master_addr",
    "master_port",
    "no_preflight",
    "save_dir",
    "log_dir",
    "config_file",
    "config",
)
MODELS = ("pretrain", "tokenizer_dir", "rm_pretrain", "critic_pretrain", "teacher")
# Of a directory, what no run reads.
NOT_READ = (".md", ".html", ".log", ".png", ".jpg", ".pdf", ".lock", ".tmp", ".pt", ".pth")
WRITTEN_BESIDE = ("training_args.bin", "trainer_state.json", "arguments.json", "environment.json")
FILES = 64  # of a directory with more, all are one fact
SAME_ROWS = "give all hosts the same rows, in the same order, and prepare them there once more"
# Beside token ids, what decides how a row is trained on.
LEARNED = ("labels", "loss_weights", "weight", "label", "gt_answer")
ROWS = 2048  # whose tokens are compared, of a data set; their lengths are of all


def run_facts(settings: TrainingSettings, options: ParallelOptions) -> dict[str, Any]:
    """Flag -> its value, or what the files it names hold. None for files that another rank of this
    host looks at."""
    resolved = {"plugin": options.plugin, "mixed_precision": options.precision}
    facts: dict[str, Any] = {}
    for name, value in {**settings.flags, **resolved}.items():
        if name not in MAY_DIFFER:
            facts |= _flag_facts(name, value)
    return facts


def _flag_facts(name: str, value: Any) -> dict[str, Any]:
    values = value if isinstance(value, list) else [value]
    paths = [_place_of(name, one) for one in values]
    if not any(paths):
        shown = HIDDEN if is_secret(name) else " ".join(map(str, values))
        return {f"--{name}": shown} | (_revision(name, value) if name in MODELS else {})
    facts: dict[str, Any] = {}
    for index, (one, path) in enumerate(zip(values, paths, strict=True)):
        flag = f"--{name}" if len(values) == 1 else f"--{name}[{index}]"
        facts |= {flag: str(one)} if path is None else _path_facts(flag, path, "dataset" in name)
    return facts


def _revision(name: str, value: Any) -> dict[str, Any]:
    """Of a model of the hub: the commit that its cache holds; unknown where it is still to come."""
    if not isinstance(value, str) or "/" not in value:
        return {}
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(value, "config.json")
    found = Path(file).parent.name[:12] if isinstance(file, str) else UNKNOWN
    return {f"--{name} (its commit)": found}


def _place_of(name: str, value: Any) -> Path | None:
    """The file or directory that ``value`` names; a model of the hub is in its cache."""
    if not isinstance(value, str) or not value:
        return None
    if name == "conversation_template_config":
        try:
            return template_path(value)
        except ValueError:
            return None
    file = value.partition(".py:")[0] + ".py" if ".py:" in value else value
    try:
        return Path(file) if Path(file).exists() else None
    except OSError:  # a text too long for a name
        return None


def _path_facts(flag: str, path: Path, rows: bool) -> dict[str, Any]:
    if not local_leader():
        return {}
    if path.is_file():
        return {flag: _file_fact(path)}
    if rows and not is_raw(str(path)):
        return {flag: "prepared rows"}  # compared once they are loaded
    files = list(_read_files(path))
    if len(files) <= FILES:
        facts = {f"{flag}/{file.relative_to(path)}": _file_fact(file) for file in files}
        return {flag: f"a directory of {len(files)} files"} | facts
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)} {_file_fact(file)}\n".encode())
    return {flag: f"a directory of {len(files)} files (hash {digest.hexdigest()[:12]})"}


def _read_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or file.suffix in NOT_READ or file.name in WRITTEN_BESIDE:
            continue
        if file.is_file():
            yield file


def _file_fact(file: Path) -> str:
    return f"{file.stat().st_size} bytes (hash {sampled_hash(file)})"


def rows_facts(**sets: Any) -> dict[str, Any]:
    """Name -> number, lengths and sampled tokens of its rows; None stands for no such rows."""
    return {name: _rows_fact(rows) for name, rows in sets.items() if rows is not None}


def _rows_fact(rows: Any) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(row_lengths(rows)).tobytes())
    spread = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), ROWS)).astype(int))
    names = [
        name
        for name in rows.column_names
        if name in TOKEN_COLUMNS or name.endswith("_loss_mask") or name in LEARNED
    ]
    sample: Mapping[str, Any] = rows.select(spread).select_columns(names)[:]
    for name in names:
        digest.update(repr(sample[name]).encode())
    return f"{len(rows)} rows (hash {digest.hexdigest()[:12]})"
