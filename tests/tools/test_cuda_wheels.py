"""What is gathered for a machine without a registry is what requirements.txt and the wheels ask
for."""

import re
import zipfile
from pathlib import Path

import pytest

from tools import cuda_wheels


def wheel(folder: Path, name: str, required: list[str]) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", *(f"Requires-Dist: {r}" for r in required)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n\nText")
    return path


def test_a_range_is_read_from_the_wheel_and_not_from_its_extras(tmp_path):
    needs = [
        'tokenizers-x; extra == "all"',
        'tokenizers>9; extra == "dev"',
        "tokenizers<0.24,>=0.23",
    ]
    path = wheel(tmp_path, "transformers", needs)
    assert cuda_wheels.range_in(path, "tokenizers") == "tokenizers<0.24,>=0.23"
    with pytest.raises(SystemExit, match="requires no dill; mend NEEDED"):
        cuda_wheels.range_in(path, "dill")


def test_releases_are_those_of_the_requirements(tmp_path, monkeypatch):
    asked: list[tuple[str, ...]] = []

    def pip(*words: str) -> None:
        asked.append(words)
        if words[0] == "download":
            for name, needed in cuda_wheels.NEEDED.items():
                wheel(tmp_path, name, list(needed))

    monkeypatch.setattr(cuda_wheels, "pip", pip)
    cuda_wheels.gather(tmp_path, "3.13", bitsandbytes=True)
    lines = (cuda_wheels.ROOT / "requirements.txt").read_text().splitlines()
    first = asked[0]
    assert "--python-version=3.13" in first
    names = [word for word in first if word in lines]
    assert [re.match(r"[\w-]+", name)[0] for name in names] == [
        *cuda_wheels.OF_REQUIREMENTS,
        "bitsandbytes",
    ]
    assert asked[-1][0] == "wheel" and cuda_wheels.COLOSSALAI in asked[-1]
    assert cuda_wheels.COLOSSALAI in (cuda_wheels.ROOT / "tools" / "venv.py").read_text()


def test_wheels_of_two_sets_are_not_mixed(tmp_path, monkeypatch, capsys):
    wheel(tmp_path, "peft", [])
    monkeypatch.setattr("sys.argv", ["cuda_wheels.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        cuda_wheels.main()
    assert "holds wheels already" in capsys.readouterr().err
