"""GRPO with dynamic sampling and each of the other policy losses on two processes: stopped inside a
refill or an update and gone on with, to the bit."""

import pytest

from tests.end_to_end.online_inputs import metrics, of_episode
from tests.end_to_end.test_online_resume import AUTO, assert_same_run, launched
from tests.end_to_end.worker import Fault, Run

pytestmark = pytest.mark.matrix

COARSE = '''
def coarse(responses):
    """Often the same for all responses to a prompt."""
    return [float("e" in text) for text in responses]
'''
LENGTH = ("--num_episodes", "3", "--save_interval", "1", "--experience_batch_size", "3")
LOSSES = {
    "gspo": ("--policy_loss", "gspo", "--accumulation_steps", "3"),
    "cispo": ("--policy_loss", "cispo", "--entropy_coef", "0.01", "--accumulation_steps", "3"),
    "sapo": ("--policy_loss", "sapo", "--sapo_tau", "1.1", "1.2", "--accumulation_steps", "3"),
}
STOPS = {
    "refill": Fault("rollout", 2, "before", what="term", rank=1),
    "update": Fault("update", 6, "after", what="term"),
}


@pytest.fixture(scope="module")
def words(online_words, tmp_path_factory):
    functions = tmp_path_factory.mktemp("functions") / "coarse.py"
    functions.write_text(COARSE)

    def words(loss: str, save_dir, *more: str) -> list[str]:
        given = (*LENGTH, *LOSSES[loss], "--dynamic_sampling", "2")
        given += ("--reward_functions", f"{functions}:coarse")
        return online_words("grpo", save_dir, *given, *more)

    return words


@pytest.fixture(scope="module")
def first(tmp_path_factory, words):
    """(folder, {name: its ranks})"""
    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for loss in LOSSES:
        for name, fault in {"plain": None, **STOPS}.items():
            given = words(loss, folder / f"{loss}-{name}")
            runs[f"{loss}-{name}"] = Run(given, fault, script="train_grpo.py")
    return folder, launched(2, runs)


@pytest.fixture(scope="module")
def second(first, words):
    """The stopped ones gone on with, in fresh processes."""
    folder, _ = first
    runs = {
        f"{loss}-{name}": Run(words(loss, folder / f"{loss}-{name}", *AUTO), script="train_grpo.py")
        for loss in LOSSES
        for name in STOPS
    }
    return launched(2, runs)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", STOPS)
def test_asked_to_stop_the_run_goes_on_where_it_stood(first, second, loss, name):
    folder, ended = first
    place = f"{loss}-{name}"
    assert [rank.code for rank in ended[place]] == [0, 0], ended[place][0].err
    assert "everything is saved. To go on:" in ended[place][0].err
    assert [rank.code for rank in second[place]] == [0, 0], second[place][0].err
    assert_same_run(folder / place, folder / f"{loss}-plain")


def test_groups_were_replaced(first):
    folder, ended = first
    assert [rank.code for rank in ended["gspo-plain"]] == [0, 0]
    lines = metrics(folder / "gspo-plain")
    drawn = [of_episode(lines, episode) for episode in (1, 2, 3)]
    assert all(0 <= one["refill_left"] <= 6 and one["refill_rounds"] <= 2 for one in drawn)
    assert sum(one["refill_prompts"] for one in drawn) > 0
    entropy = of_episode(metrics(folder / "cispo-plain"), 1)["policy_entropy"]
    assert 4 < entropy < 8  # near that of all tokens alike
