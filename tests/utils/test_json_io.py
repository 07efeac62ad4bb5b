"""JSON files are whole or absent, and errors name the place."""

import pytest

from coati.utils.json_io import load_json, save_json


def test_what_is_written_is_read_again(tmp_path):
    value = {"name": "naïve 中文 🙂", "numbers": [0.1, 1e-300, 3], "none": None}
    save_json(value, tmp_path / "made" / "on the way" / "file.json")
    assert load_json(tmp_path / "made" / "on the way" / "file.json") == value
    assert "中文" in (tmp_path / "made" / "on the way" / "file.json").read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "file.json"
    save_json([1], file)
    with pytest.raises(TypeError):
        save_json([2, object()], file)
    assert load_json(file) == [1] and [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_an_error_names_file_line_and_column(tmp_path):
    file = tmp_path / "file.json"
    file.write_text('{"a": 1,\n "b": }\n')
    with pytest.raises(ValueError, match=r"file\.json:2:7: not valid JSON"):
        load_json(file)
