"""PPO and GRPO killed with -9 or asked to stop, anywhere in an episode or in a save, and gone on
with: to the bit.

With everything that a run carries from episode to episode: running normalization, a moving KL
coefficient, supervised rows, means that are not logged yet.
"""

from pathlib import Path

import pytest

from coati.parallel.checkpoint import checkpoints, read_checkpoint
from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.online_inputs import metrics, of_episode, weights
from tests.end_to_end.worker import Fault, Run

pytestmark = pytest.mark.matrix

CPU = {"CUDA_VISIBLE_DEVICES": ""}
AUTO = ("--checkpoint_path", "auto")
SCRIPTS = ("ppo", "grpo")
# Two collect steps and 2 x 2 optimizer steps an episode, on each of two processes.
CARRIED = {
    "ppo": (
        "--experience_batch_size",
        "2",
        "--accumulation_steps",
        "1",
        "--kl_target",
        "0.5",
        "--kl_horizon",
        "200",
        "--reward_normalization",
        "running",
        "--ptx_dataset",
        "$ptx",
        "--ptx_coef",
        "0.2",
        "--ptx_batch_size",
        "2",
    ),
    "grpo": (
        "--num_collect_steps",
        "2",
        "--experience_batch_size",
        "1",
        "--final_temperature",
        "0.5",
    ),
}
EVERY = (
    "--num_episodes",
    "3",
    "--save_interval",
    "1",
    "--keep_last_k",
    "2",
    "--log_interval",
    "2",
    "--eval_prompt_dataset",
    "$eval",
    "--eval_interval",
    "2",
)
UPDATES = {"ppo": 2, "grpo": 1}  # models that are updated in a step

# One after the other, each in a run that goes on from what the one before has left; at most one
# episode each.
KILLS = {
    "ppo": [
        Fault("update", 3, "after"),
        Fault("rollout", 4, "before", rank=1),
        Fault("file", 3, "half"),
        Fault("rename", 1, "before"),
        Fault("update", 6, "before", rank=1),
    ],
    "grpo": [
        Fault("rollout", 2, "after"),
        Fault("file", 2, "half", rank=1),
        Fault("rename", 1, "after"),
        Fault("update", 2, "before"),
    ],
}
# What of a save could be left half written: (file, moment)
COPIES = {
    ("rank-00001.pt", "half"),
    ("model.safetensors", "half"),
    ("running_states.json", "half"),
    ("epoch-0_step-8", "before"),
    ("epoch-0_step-8", "after"),
}


@pytest.fixture(scope="module")
def words(online_words):
    def words(script: str, save_dir, *more: str) -> list[str]:
        return online_words(script, save_dir, *CARRIED[script], *EVERY, *more)

    return words


def launched(nproc: int, runs: dict[str, Run]) -> dict[str, list]:
    ranks = run(nproc, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=300)
    return {name: [rank[name] for rank in ranks] for name in runs}


@pytest.fixture(scope="module")
def first(tmp_path_factory, words):
    """(folder, {name: its ranks}): runs that end by themselves or are asked to."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    for script in SCRIPTS:
        updates = UPDATES[script]
        faults = {
            "plain": None,
            "rollout": Fault(
                "rollout", 3, "before", what="term", rank=1
            ),  # the first batch of the second episode
            "pass": Fault("update", 5 * updates, "after", what="term", rank=1),
            "opening": Fault("update", updates, "after", what="term"),  # in the first episode
            "fewer": Fault("update", 6 * updates, "after", what="term"),
        }
        for name, fault in faults.items():
            given = words(script, folder / f"{script}-{name}", *(AUTO if fault else ()))
            runs[f"{script}-{name}"] = Run(given, fault, script=f"train_{script}.py")
    runs["ppo-copied"] = Run(
        words("ppo", folder / "ppo-copied", "--num_episodes", "2"),
        script="train_ppo.py",
        copies=str(folder / "copies"),
    )
    return folder, launched(2, runs)


def chosen(copies: Path) -> list[Path]:
    """A copy of the disk for each of :data:`COPIES`, the last one of the second checkpoint."""
    found = {}
    for place in sorted(copies.iterdir()):
        _, _, _, moment, _, name = place.name.split(" ", 5)
        found.setdefault((name, moment), place)
    return [found[key] for key in sorted(COPIES)]


@pytest.fixture(scope="module")
def second(first, words):
    """The stopped ones gone on with, and some of the copies, in fresh processes."""
    folder, _ = first
    runs = {
        f"{script}-{name}": Run(
            words(script, folder / f"{script}-{name}", *AUTO), script=f"train_{script}.py"
        )
        for script in SCRIPTS
        for name in ("rollout", "pass", "opening")
    }
    for place in chosen(folder / "copies"):
        runs[place.name] = Run(
            words("ppo", place, "--num_episodes", "2", *AUTO), script="train_ppo.py"
        )
    return launched(2, runs)


def assert_same_run(place: Path, reference: Path) -> None:
    assert metrics(place) == metrics(reference), place
    assert weights(place) == weights(reference) and weights(place), place


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_again_and_again_the_run_is_the_uninterrupted_one(first, words, tmp_path, script):
    for fault in KILLS[script]:
        with pytest.raises(WorkerFailed, match=rf"--- rank {fault.rank} \(exit code -9\) ---"):
            given = Run(words(script, tmp_path, *AUTO), fault, script=f"train_{script}.py")
            run(2, "tests.end_to_end.worker:train", given, env=CPU, timeout=100)
        for checkpoint in checkpoints(tmp_path):
            read_checkpoint(checkpoint)
    ended = launched(2, {"last": Run(words(script, tmp_path, *AUTO), script=f"train_{script}.py")})[
        "last"
    ]
    assert [rank.code for rank in ended] == [0, 0] and "going on from" in ended[0].err
    assert_same_run(tmp_path, first[0] / f"{script}-plain")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "name, steps, held", [("rollout", 4, False), ("pass", 6, True), ("opening", 2, True)]
)
def test_asked_to_stop_the_run_goes_on_where_it_stood(first, second, script, name, steps, held):
    folder, ended = first
    before = ended[f"{script}-{name}"]
    assert [rank.code for rank in before] == [0, 0]
    assert f"stopped after step {steps}, everything is saved. To go on:" in before[0].err
    assert [rank.code for rank in second[f"{script}-{name}"]] == [0, 0]
    assert f"_step-{steps}" in second[f"{script}-{name}"][0].err
    assert_same_run(folder / f"{script}-{name}", folder / f"{script}-plain")


def test_at_moments_of_a_save_the_disk_holds_a_run_that_goes_on(first, second):
    folder, ended = first
    assert ended["ppo-copied"][0].code == 0
    for place in chosen(folder / "copies"):
        assert [rank.code for rank in second[place.name]] == [0, 0], place.name
        assert_same_run(place, folder / "ppo-copied")


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_process_goes_on_from_the_weights_of_two(first, words, script):
    """Stopped inside the second episode, whose responses other processes hold. The reference is
    still --pretrain."""
    folder, before = first
    place = folder / f"{script}-fewer"
    assert [rank.code for rank in before[f"{script}-fewer"]] == [0, 0]
    (ended,) = launched(1, {"it": Run(words(script, place, *AUTO), script=f"train_{script}.py")})[
        "it"
    ]
    assert (
        ended.code == 0
        and "inside an episode under another layout (world_size 2 -> 1)" in ended.err
    )
    assert "the optimizer state starts over" in ended.err.replace("\n", " ")
    # What has been learned before and since is far from --pretrain, as in the run that was not
    # stopped.
    kl = [
        of_episode(metrics(at), 3, "eval")["approx_kl"]
        for at in (place, folder / f"{script}-plain")
    ]
    assert min(kl) > 0.02, kl


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_uninterrupted_run(first, script):
    folder, ended = first
    assert [rank.code for rank in ended[f"{script}-plain"]] == [0, 0]
    lines = metrics(folder / f"{script}-plain")
    assert [line["step"] for line in lines if "train/reward" in line] == [2]
    assert [line["step"] for line in lines if "eval/reward" in line] == [0, 2, 3]
    assert len(checkpoints(folder / f"{script}-plain")) == 2
    assert of_episode(lines, 2)["approx_kl"] != 0 and of_episode(lines, 2)["skip_ratio"] == 0
