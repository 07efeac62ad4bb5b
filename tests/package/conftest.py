from pathlib import Path

import pytest

from tests.package import environments
from tests.package.environments import Environment


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """``(wheel, sdist)`` of this checkout."""
    return environments.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def outside(built, tmp_path_factory) -> Environment:
    """The wheel, installed outside the checkout."""
    return environments.installed(built[0], tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The directory of a tiny model."""
    from tests.tiny import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
