"""GRPO with an environment on several processes: the whole model is cut into parts, or the run is
killed and gone on with."""

from pathlib import Path

import pytest

from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.online_inputs import metrics, of_episode, weights
from tests.end_to_end.test_online_plugins import (
    assert_same_first_episode,
    assert_same_weights,
    launched,
    shares,
)
from tests.end_to_end.worker import Fault, Run

pytestmark = pytest.mark.matrix

CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def words(online_words, online_places, tmp_path):
    """``words(name, more...)``: GRPO on dialogues of three turns."""
    every = ("--max_seq_len", "60", "--max_length", "144", "--prompt_dataset", "$rows")
    every += ("--max_turns", "3", "--environment", f"{online_places['echo']}:Echo")

    def words(name: str, *more: str) -> list[str]:
        return online_words("grpo", tmp_path / name, *every, *more)

    return words


def test_tensor_parallelism_changes_no_dialogue(words, online_places, tmp_path):
    launched(1, {"grpo": words("alone")})
    launched(2, {"grpo": words("tp", *shares("grpo", 1), "--plugin", "3d", "--tp", "2")})
    expected = of_episode(metrics(tmp_path / "alone"), 1)
    found = of_episode(metrics(tmp_path / "tp"), 1)
    assert expected["environment/turns"] > 1
    assert_same_first_episode(found, expected, True)
    for metric in ("environment/turns", "environment/cut", "reward/environment"):
        assert found[metric] == pytest.approx(expected[metric], rel=1e-6), metric
    assert_same_weights(tmp_path / "tp", tmp_path / "alone", Path(online_places["model"]))


def test_gemini_trains_on_dialogues_whose_turns_differ_between_ranks(words, tmp_path):
    """Each forward holds collectives, and a rank may have room for more tokens than the other."""
    more = (*shares("grpo", 2), "--plugin", "gemini", "--mixed_precision", "bf16")
    launched(2, {"grpo": words("gemini", *more)}, timeout=100)
    of = of_episode(metrics(tmp_path / "gemini"), 1)
    assert of["environment/turns"] > 1 and of["response_length"] > 0


@pytest.mark.parametrize("ahead", [(), ("--rollouts_ahead", "1")], ids=["in step", "ahead"])
def test_a_killed_run_goes_on_to_the_bit(words, ahead, tmp_path):
    more = (*shares("grpo", 2), "--num_episodes", "3", "--save_interval", "1", *ahead)
    launched(2, {"grpo whole": words("whole", *more)})
    killed = Run(
        words("killed", *more), Fault("update", 2, "after", rank=1), script="train_grpo.py"
    )
    with pytest.raises(WorkerFailed):
        run(2, "tests.end_to_end.worker:train", killed, env=CPU, timeout=100)
    launched(2, {"grpo again": words("killed", *more, "--checkpoint_path", "auto")})
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    for episode in (1, 2, 3):
        found = of_episode(metrics(tmp_path / "killed"), episode)
        assert found == of_episode(metrics(tmp_path / "whole"), episode)
