"""Permissions of what is written."""

import os

import pytest
import torch
from safetensors.torch import save_file

from coati.utils.output_paths import open_like_folder


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_of_safetensors_is_as_open_as_its_folder(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        (tmp_path / "model").mkdir()
    finally:
        os.umask(before)
    file = tmp_path / "model" / "model.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    open_like_folder(file)
    assert file.stat().st_mode & 0o777 == mode
    open_like_folder(tmp_path / "nowhere" / "file")  # as where permissions cannot be set
