"""PPO and GRPO whose responses are asked for one and two episodes ahead, on two processes: stopped
or killed and gone on with, to the bit."""

from pathlib import Path

import pytest

from coati.parallel.checkpoint import checkpoints
from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.online_inputs import metrics, of_episode
from tests.end_to_end.test_online_resume import (
    AUTO,
    CARRIED,
    CPU,
    UPDATES,
    assert_same_run,
    launched,
)
from tests.end_to_end.worker import Fault, Run

pytestmark = pytest.mark.matrix

LENGTH = ("--num_episodes", "4", "--save_interval", "1", "--log_interval", "2")
EVALUATED = ("--eval_prompt_dataset", "$eval", "--eval_interval", "2")
KINDS = [(script, ahead) for script in ("ppo", "grpo") for ahead in (1, 2)]
STOPS = ("rollout", "pass")


@pytest.fixture(scope="module")
def words(online_words):
    def words(script: str, save_dir, ahead: int, *more: str) -> list[str]:
        given = (*CARRIED[script], *LENGTH, *EVALUATED, "--rollouts_ahead", str(ahead))
        return online_words(script, save_dir, *given, *more)

    return words


def name_of(script: str, ahead: int, what: str) -> str:
    return f"{script}-{ahead}-{what}"


@pytest.fixture(scope="module")
def first(tmp_path_factory, words):
    """(folder, {name: its ranks}): runs that end by themselves or are asked to."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    for script, ahead in KINDS:
        faults = {
            "plain": None,
            # while the second episode is collected, and inside its update
            "rollout": Fault("rollout", 3, "before", what="term", rank=1),
            "pass": Fault("update", 5 * UPDATES[script], "after", what="term", rank=1),
        }
        for what, fault in faults.items():
            name = name_of(script, ahead, what)
            given = words(script, folder / name, ahead)
            runs[name] = Run(given, fault, script=f"train_{script}.py")
    runs["ppo-fewer"] = Run(
        words("ppo", folder / "ppo-fewer", 1),
        Fault("update", 5 * UPDATES["ppo"], "after", what="term"),
        script="train_ppo.py",
    )
    return folder, launched(2, runs)


@pytest.fixture(scope="module")
def second(first, words):
    """The stopped ones gone on with, in fresh processes."""
    folder, _ = first
    runs = {}
    for script, ahead in KINDS:
        for what in STOPS:
            name = name_of(script, ahead, what)
            given = words(script, folder / name, ahead, *AUTO)
            runs[name] = Run(given, script=f"train_{script}.py")
    return launched(2, runs)


@pytest.mark.parametrize("what", STOPS)
@pytest.mark.parametrize("script, ahead", KINDS)
def test_asked_to_stop_the_run_goes_on_where_it_stood(first, second, script, ahead, what):
    folder, ended = first
    name = name_of(script, ahead, what)
    assert [rank.code for rank in ended[name]] == [0, 0]
    assert "everything is saved. To go on:" in ended[name][0].err
    assert [rank.code for rank in second[name]] == [0, 0]
    assert "asked for again" not in second[name][0].err
    assert_same_run(folder / name, folder / name_of(script, ahead, "plain"))


@pytest.mark.parametrize("script, ahead", [("ppo", 2), ("grpo", 1)])
def test_killed_after_a_save_the_run_is_the_uninterrupted_one(
    first, words, tmp_path, script, ahead
):
    """In the second episode, inside an update; and while the fourth is collected."""
    updates = UPDATES[script]
    for fault in (
        Fault("update", 6 * updates, "before", rank=1),
        Fault("rollout", 5, "before"),
    ):
        with pytest.raises(WorkerFailed, match=rf"--- rank {fault.rank} \(exit code -9\) ---"):
            given = Run(words(script, tmp_path, ahead, *AUTO), fault, script=f"train_{script}.py")
            run(2, "tests.end_to_end.worker:train", given, env=CPU, timeout=100)
    newest = checkpoints(tmp_path)[-1]
    assert sorted(file.name for file in (newest / "rollouts").iterdir()) == [
        "rank-00000.pt",
        "rank-00001.pt",
    ]
    last = Run(words(script, tmp_path, ahead, *AUTO), script=f"train_{script}.py")
    ended = launched(2, {"last": last})["last"]
    assert [rank.code for rank in ended] == [0, 0]
    assert_same_run(tmp_path, first[0] / name_of(script, ahead, "plain"))


@pytest.mark.parametrize("script, ahead", KINDS)
def test_what_an_uninterrupted_run_says(first, script, ahead):
    """Four optimizer steps an episode: the first is of the weights of then, later ones are 4 and 8
    steps old."""
    folder, ended = first
    place: Path = folder / name_of(script, ahead, "plain")
    assert [rank.code for rank in ended[place.name]] == [0, 0]
    found = metrics(place)
    staleness = [of_episode(found, episode)["staleness"] for episode in (2, 4)]
    # Episodes 1 and 2, 3 and 4; the first has none.
    assert staleness == {1: [4, 4], 2: [4, 8]}[ahead]
    last = of_episode(found, 4)
    assert 0 < last["staleness_gap"] <= last["rollout_gap_max"]
    assert 0 < last["rollout_is_ess"] <= 1 and 0 <= last["rollout_is_truncated"] < 1
    assert last["rollout_is_masked"] == 0 and "rollout_gap" not in last


def test_other_processes_ask_again(first, words):
    folder, before = first
    assert [rank.code for rank in before["ppo-fewer"]] == [0, 0]
    given = Run(words("ppo", folder / "ppo-fewer", 1, *AUTO), script="train_ppo.py")
    (ended,) = launched(1, {"it": given})["it"]
    said = ended.err.replace("\n", " ")
    assert ended.code == 0
    assert "responses that were asked for ahead under another layout (world_size 2 -> 1)" in said
