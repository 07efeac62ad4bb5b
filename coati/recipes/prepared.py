"""What a path of rows is: a prepared directory, raw rows, or a data set with splits."""

from pathlib import Path

from coati.dataset.rows.dataset_info import NAME as DATASET_INFO
from coati.dataset.rows.dataset_info import is_list_of_inputs
from coati.dataset.rows.input_files import find_files
from coati.dataset.rows.input_names import parse_input
from coati.dataset.rows.readers import kind_of

# In the order in which a split of that name becomes the evaluation set.
HELD_OUT = ("validation", "test")


def is_raw(path: str) -> bool:
    """Whether ``path`` is a file or folder of rows that still have to be prepared, or the name of a
    data set."""
    folder = Path(path)
    if folder.is_file() or not folder.exists():
        return True
    parts = (child.is_dir() for child in folder.glob("part-*"))  # files of that name are Spark's
    if (folder / "preparation.json").exists() or any(parts):
        return False
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return not _holds_tokens(folder)
    return any(kind_of(file) for file in folder.rglob("*"))


def _holds_tokens(folder: Path) -> bool:
    text = "".join(info.read_text(encoding="utf-8") for info in folder.rglob("dataset_info.json"))
    return any(
        f'"{name}"' in text for name in ("input_ids", "chosen_input_ids", "completion_decode")
    )


def held_out_split(path: str) -> str | None:
    """The split of ``path`` to evaluate on, None where it has none."""
    return next((split for split in HELD_OUT if _has_split(path, split)), None)


def train_split(path: str) -> str | None:
    """ "train" where ``path`` has that split beside one to evaluate on; else None: all rows."""
    return "train" if held_out_split(path) and _has_split(path, "train") else None


def _has_split(path: str, split: str) -> bool:
    name = parse_input(path)
    base = Path(name.base)
    # One split is named, or each data set of a list has its own.
    if name.split is not None or base.is_file() or is_list_of_inputs(base / DATASET_INFO):
        return False
    try:
        return bool(find_files([path], split))
    except ValueError:
        return False
