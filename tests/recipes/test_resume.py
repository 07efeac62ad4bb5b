"""Where a run starts: what ``--checkpoint_path auto`` finds, and what it will not write over."""

import pytest

from coati.cli.settings import OutputSettings
from coati.recipes.resume import Resume, find_resume


def arguments(save_dir, **values) -> OutputSettings:
    return OutputSettings(str(save_dir), checkpoint_path="auto", **values)


def test_auto_with_nothing_there_starts_and_says_so(tmp_path, capsys):
    assert find_resume(arguments(tmp_path / "new")) == Resume()
    assert "no checkpoint in" in capsys.readouterr().err


def test_auto_does_not_replace_a_finished_model_without_checkpoints(tmp_path):
    (tmp_path / "modeling").mkdir()
    with pytest.raises(ValueError) as error:
        find_resume(arguments(tmp_path))
    for part in (
        "holds a finished model",
        "--save_dir",
        f"--pretrain {tmp_path}/modeling",
    ):
        assert part in str(error.value)
    assert (tmp_path / "modeling").is_dir()


def test_a_dry_run_beside_a_finished_model_is_fine(tmp_path):
    (tmp_path / "modeling").mkdir()
    assert find_resume(arguments(tmp_path, dry_run=True)) == Resume()


def test_a_finished_model_alone_is_nothing_to_go_on_from(tmp_path):
    (tmp_path / "modeling").mkdir()
    with pytest.raises(ValueError, match="holds a finished model .*no checkpoint to go on from"):
        find_resume(OutputSettings(str(tmp_path)))
