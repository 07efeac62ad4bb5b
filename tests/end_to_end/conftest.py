import pytest

from tests.end_to_end.inputs import prepare, short_lines, write_model

ROWS = {"train": (0, 48), "eval": (60, 6)}  # first line and number of lines; some are longer than a row may be


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """{"train": 31 rows, "eval": some}, prepared."""
    folder = tmp_path_factory.mktemp("data")
    return {name: prepare(folder / name, short_lines(*rows)) for name, rows in ROWS.items()}
