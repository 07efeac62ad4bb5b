"""Where a run starts: what ``--checkpoint_path auto`` finds, and what it will not write over."""

import json
from pathlib import Path

import pytest

from coati.cli.settings import OutputSettings
from coati.recipes.resume import Resume, find_resume
from coati.recipes.run_dir import record_run, refuse_shorter
from coati.utils.run_identity import record_of


def arguments(save_dir, **values) -> OutputSettings:
    return OutputSettings(str(save_dir), checkpoint_path="auto", **values)


def test_auto_with_nothing_there_starts_and_says_so(tmp_path, capsys):
    assert find_resume(arguments(tmp_path / "new")) == Resume(goes_on=True)
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
    assert find_resume(arguments(tmp_path, dry_run=True)) == Resume(goes_on=True)


def test_a_finished_model_alone_is_nothing_to_go_on_from(tmp_path):
    (tmp_path / "modeling").mkdir()
    with pytest.raises(ValueError, match="holds a finished model .*no checkpoint to go on from"):
        find_resume(OutputSettings(str(tmp_path)))


def checkpoint(save_dir: Path, step: int) -> Path:
    """A whole checkpoint, as far as its files say."""
    folder = save_dir / f"epoch-0_step-{step}"
    (folder / "modeling").mkdir(parents=True)
    (folder / "modeling" / "config.json").write_text("{}")
    state = {"epoch": 0, "step": step, "layout": {"plugin": "ddp"}}
    (folder / "running_states.json").write_text(json.dumps(state))
    return folder


def files(folder: Path) -> dict[str, float]:
    return {str(f.relative_to(folder)): f.stat().st_mtime for f in sorted(folder.rglob("*"))}


def output(save_dir: Path, path: Path | str, weights_only: bool = False, **more) -> OutputSettings:
    return OutputSettings(str(save_dir), str(path), weights_only, **more)


def test_weights_alone_never_begin_a_run_in_the_directory_of_another(tmp_path):
    """Neither by the flag nor by a modeling directory, of that run or of a third one."""
    other = checkpoint(tmp_path / "other", 5)
    mine = checkpoint(tmp_path / "run", 20)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    before = files(tmp_path)
    for path, alone in (
        (mine, True),
        (mine / "modeling", False),
        (other, True),
        (other / "modeling", False),
    ):
        with pytest.raises(ValueError) as error:
            find_resume(output(tmp_path / "run", path, alone))
        for part in ("--save_dir", "already holds epoch-0_step-20", "choose another --save_dir"):
            assert part in str(error.value)
        assert "--checkpoint_path auto alone" in str(error.value) and str(path) in str(error.value)
    assert files(tmp_path) == before
    find_resume(output(tmp_path / "run", mine, True, dry_run=True))  # writes nothing there


def test_a_checkpoint_of_another_directory_never_begins_a_run_there_either(tmp_path):
    other = checkpoint(tmp_path / "other", 5)
    checkpoint(tmp_path / "run", 20)
    with pytest.raises(ValueError, match="holds epoch-0_step-20 of another run than"):
        find_resume(output(tmp_path / "run", other))
    fresh = find_resume(output(tmp_path / "new", other))
    assert fresh.folder == other and not fresh.goes_on
    assert fresh.began == {"checkpoint": str(other)}


def test_a_finished_model_is_not_replaced_by_one_that_begins_from_weights(tmp_path):
    other = checkpoint(tmp_path / "other", 5)
    (tmp_path / "run" / "modeling").mkdir(parents=True)
    for path in (other, other / "modeling"):
        with pytest.raises(ValueError, match="holds a finished model"):
            find_resume(output(tmp_path / "run", path, path is other))


def test_a_run_from_weights_goes_on_by_the_command_that_began_it_and_by_auto(tmp_path):
    other = checkpoint(tmp_path / "other", 5)
    run = tmp_path / "run"
    began = find_resume(output(run, other, True))
    assert began.weights == str(other / "modeling") and began.folder is None
    record_run(output(run, other, True), began.began, began.goes_on)
    assert record_of(run)["weights"] == str(other / "modeling")
    # Interrupted before its first checkpoint, perhaps with a best model.
    (run / "best").mkdir()
    for again in (output(run, other, True), arguments(run)):
        found = find_resume(again)
        assert found.weights == str(other / "modeling") and found.folder is None
        assert found.goes_on
    saved = checkpoint(run, 2)
    same = (output(run, other, True), output(run, other / "modeling"), arguments(run))
    for again in same:
        found = find_resume(again)
        assert found.folder == saved and found.goes_on
    with pytest.raises(ValueError, match="already holds epoch-0_step-2 of another run"):
        find_resume(output(run, saved, True))


def test_a_run_from_another_directorys_checkpoint_goes_on_likewise(tmp_path):
    other = checkpoint(tmp_path / "other", 5)
    run = tmp_path / "run"
    began = find_resume(output(run, other))
    record_run(output(run, other), began.began, began.goes_on)
    assert find_resume(arguments(run)).folder == other  # before its first checkpoint
    saved = checkpoint(run, 7)
    for again in (output(run, other), arguments(run)):
        assert find_resume(again).folder == saved


def test_a_run_keeps_its_id_and_another_one_gets_another(tmp_path):
    settings = arguments(tmp_path)
    record_run(settings, {}, goes_on=True)
    first = record_of(tmp_path)
    record_run(settings, {}, goes_on=True)
    assert record_of(tmp_path) == first and len(first["id"]) == 12
    record_run(settings, {}, goes_on=False)
    assert record_of(tmp_path)["id"] != first["id"]


def test_going_back_is_refused_while_later_checkpoints_are_there(tmp_path):
    earlier = checkpoint(tmp_path, 2)
    later = checkpoint(tmp_path, 4)
    with pytest.raises(ValueError) as error:
        find_resume(output(tmp_path, earlier))
    for part in ("also holds epoch-0_step-4", "another --save_dir", "remove"):
        assert part in str(error.value)
    assert find_resume(output(tmp_path, later)).folder == later
    (later / "running_states.json").write_text('{"files": {"gone": 3}}')  # not whole
    assert find_resume(output(tmp_path, earlier)).folder == earlier


def test_a_dry_run_leaves_the_directory_of_a_run_that_is_going_on_alone(tmp_path):
    (tmp_path / ".epoch-0_step-4.tmp").mkdir()  # a save in progress
    find_resume(arguments(tmp_path, dry_run=True))
    assert (tmp_path / ".epoch-0_step-4.tmp").is_dir()


def test_the_best_model_of_a_run_without_a_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "best").mkdir()
    with pytest.raises(ValueError, match="already holds best; go on with --checkpoint_path auto"):
        find_resume(OutputSettings(str(tmp_path)))
    assert find_resume(arguments(tmp_path)) == Resume(goes_on=True)


def finished(save_dir: Path, *steps: int, name: str = "modeling") -> OutputSettings:
    """A run whose starts ended at ``steps``, with a final model."""
    (save_dir / name).mkdir(parents=True, exist_ok=True)
    events = [{"event": "started", "step": 0}, {"event": "stopped", "step": 99}]
    events += [{"event": "finished", "step": step} for step in steps]
    (save_dir / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    return arguments(save_dir)


@pytest.mark.parametrize(
    "name, unit, flag",
    [("modeling", "step", "--max_steps"), ("actor/modeling", "episode", "--num_")],
)
def test_a_shorter_run_does_not_replace_the_model_of_a_longer_one(tmp_path, name, unit, flag):
    output = finished(tmp_path, 4, 10, name=name)
    with pytest.raises(ValueError) as refused:
        refuse_shorter(output, 6, unit)
    said = str(refused.value)
    assert f"final model of {unit} 10" in said and f"end with {unit} 6" in said
    assert flag in said and str(tmp_path) in said


def test_a_run_as_long_or_longer_goes_on_and_one_without_a_model_too(tmp_path):
    output = finished(tmp_path, 10)
    refuse_shorter(output, 10)
    refuse_shorter(output, 12)
    refuse_shorter(arguments(tmp_path, dry_run=True), 6)
    refuse_shorter(finished(tmp_path, 10, 4), 6)  # replaced since, by an earlier release
    refuse_shorter(arguments(tmp_path / "new"), 6)
    (tmp_path / "modeling").rmdir()
    refuse_shorter(output, 6)
