"""coati ppo and coati grpo with an environment, from their flags to their metrics."""

from pathlib import Path

import pytest

from tests.distributed.spawn import run
from tests.end_to_end.online_inputs import metrics, of_episode, weights
from tests.end_to_end.worker import Run

CPU = {"CUDA_VISIBLE_DEVICES": ""}
LENGTH = ("--max_seq_len", "60", "--max_length", "144")
ECHO = (*LENGTH, "--prompt_dataset", "$rows", "--max_turns", "3", "--environment")


@pytest.fixture(scope="module")
def ended(online_words, online_places, tmp_path_factory):
    """Runs by name, each with its directory; one process each, one after the other."""
    folder = tmp_path_factory.mktemp("environments")
    echo = f"{online_places['echo']}:Echo"
    own = {
        "ppo": ("ppo", (*ECHO, echo)),
        "grpo": ("grpo", (*ECHO, echo)),
        "ahead": ("grpo", (*ECHO, echo, "--rollouts_ahead", "1")),
        "fails": ("grpo", (*ECHO, f"{online_places['echo']}:Fails")),
        "prepared": ("grpo", (*LENGTH, "--environment", echo)),
        "no tools": ("grpo", (*LENGTH, "--prompt_dataset", "$rows", "--environment", "calculator")),
    }
    runs = {
        name: Run(online_words(verb, folder / name, *more), script=f"train_{verb}.py")
        for name, (verb, more) in own.items()
    }
    (found,) = run(1, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=400)
    return folder, found


@pytest.mark.parametrize("name", ["ppo", "grpo", "ahead"])
def test_a_run_with_an_environment(ended, name):
    folder, found = ended
    assert found[name].code == 0, found[name].err
    lines = metrics(folder / name)
    for episode in (1, 2):
        of = of_episode(lines, episode)
        assert 1 < of["environment/turns"] <= 3 and of["environment/cut"] == 1
        assert of["stop_rate"] == 0  # it never ends by itself
        assert of["reward/environment"] > 0 and of["environment/unreadable_calls"] == 0
        assert 0 < of["response_length"] < 60
        if name == "grpo":  # what the policy sampled is what it computes: nothing is shifted
            assert of["rollout_gap"] < 1e-4
    assert weights(folder / name)


def test_rewards_are_added_up(ended):
    folder, _ = ended
    of = of_episode(metrics(folder / "grpo"), 1)
    assert of["reward"] == pytest.approx(of["reward/environment"] + of["reward/vowels"], rel=1e-5)


def test_what_is_refused(ended):
    folder, found = ended
    said = {name: " ".join(one.err.split()) for name, one in found.items()}
    assert {found[name].code for name in ("fails", "prepared", "no tools")} <= {1, 2}
    assert "echo.py:Fails: step raised RuntimeError: no more" in said["fails"]
    assert "the row whose last message is '" in said["fails"]
    assert "prepared prompts hold no messages for an environment to begin with" in said["prepared"]
    assert "the chat template cannot be used with them: it writes no tools" in said["no tools"]
    assert not list(Path(folder / "fails").glob("*/modeling"))
