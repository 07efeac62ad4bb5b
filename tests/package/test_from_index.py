"""The wheel as a user gets it: everything from the package index, in an environment that is really
empty. Minutes long, some GB, and the one test that needs a network."""

import pytest

from coati.utils.packages import INSTALL_COLOSSALAI
from tests.package import environments


@pytest.mark.slow
def test_the_wheel_and_the_one_command_that_it_prints_install_what_trains(built, model, tmp_path):
    environment = environments.create(tmp_path)
    wheel = built[0]
    environment.run("pip", "install", "--quiet", f"{wheel}[serve,quantize,cleaning]")
    words = ["coati", "sft", "--pretrain", "any", "--dataset", "."]
    said = environment.run(*words, code=2).stderr.strip()
    assert said.endswith(f"run: {INSTALL_COLOSSALAI}")
    environment.run(*said.rpartition("run: ")[2].split())
    assert (environments.train(environment, model) / "modeling" / "config.json").is_file()
    resolved = environment.run("pip", "install", "--dry-run", f"{wheel}[dev]").stdout
    assert "Would install" in resolved and "pytest" in resolved
