"""What a user of PPO and GRPO meets when something is wrong, and the dry run that finds it out
beforehand.

What needs no more than flags is in tests/cli.
"""

import json
import time
from pathlib import Path

import pytest

from tests.distributed.spawn import run
from tests.end_to_end.inputs import write_model
from tests.end_to_end.online_inputs import MAX_LENGTH, NEW
from tests.end_to_end.worker import Ended, Run

CPU = {"CUDA_VISIBLE_DEVICES": ""}


def launched(nproc: int, runs: dict[str, Run]) -> dict[str, list[Ended]]:
    ranks = run(nproc, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=200)
    return {name: [rank[name] for rank in ranks] for name in runs}


# Reward functions of which one rank's fails: standard error of that rank, of the other

FAILURES = {
    "raises": (
        "raised RuntimeError: no judge today",
        "functions.py:",
        "response 0 of the batch: prompt '",
    ),
    "is_nan": (
        "returned nan (float) for response 2 of the batch: prompt '",
        "expected a finite number",
    ),
    "too_few": ("returned 7 values", "expected a list of 8 numbers, one per response"),
}


@pytest.fixture(scope="module")
def failed(online_words, online_places, tmp_path_factory):
    """Two ranks of a run for each function, one after the other: none leaves the other behind."""
    folder = tmp_path_factory.mktemp("failed")
    runs = {}
    for name in FAILURES:
        more = ("--reward_functions", f"{online_places['functions']}:{name}", "--kl_coef", "0")
        runs[name] = Run(online_words("grpo", folder / name, *more), script="train_grpo.py")
    started = time.monotonic()
    return folder, launched(2, runs), time.monotonic() - started


@pytest.mark.parametrize("name", FAILURES)
def test_a_reward_function_that_fails_on_one_rank_ends_all(failed, name):
    folder, ended, seconds = failed
    zero, one = ended[name]
    assert zero.code == one.code == 1 and seconds < 60 * len(FAILURES)
    for part in (f"train_grpo.py: error: rank 1: reward {name}", *FAILURES[name]):
        assert part in zero.err, zero.err
    assert f"reward {name}" in one.err and "Traceback" not in zero.err + one.err
    assert not (folder / name / "actor").exists()


# Flags and data, one process


@pytest.fixture(scope="module")
def cases(online_words, online_places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    other = write_model(folder / "other", vocab_size=320)
    few = ("--num_collect_steps", "8", "--experience_batch_size", "8")
    given = {
        "few prompts": (
            "ppo",
            few,
            (
                "--prompt_dataset holds 24 prompts, an episode takes 64",
                "--num_collect_steps 8",
                "--experience_batch_size 8",
            ),
        ),
        "few conversations": (
            "ppo",
            ("--ptx_dataset", "$ptx", "--ptx_coef", "0.1", "--ptx_batch_size", "40"),
            ("--ptx_dataset holds ", "--ptx_batch_size 40"),
        ),
        "long prompts": (
            "grpo",
            ("--max_length", "20"),
            ("--prompt_dataset", "--max_length 20 less --max_seq_len 10"),
        ),
        "no reward model": (
            "ppo",
            ("--rm_pretrain", "$model"),
            ("--rm_pretrain", "has no scalar head"),
        ),
        "another vocabulary": (
            "ppo",
            ("--critic_pretrain", other),
            ("--critic_pretrain: the policy", "ids up to 383", "a vocabulary of 320"),
        ),
        "rows of another kind": (
            "grpo",
            ("--prompt_dataset", "$ptx"),
            ("--prompt_dataset", "--type prompt"),
        ),
        "no such function": (
            "grpo",
            ("--reward_functions", f"{online_places['functions']}:vowel"),
            ("functions.py has no vowel; it defines vowels", "is_nan"),
        ),
        "no answers to compare": (
            "grpo",
            ("--reward_functions", "gsm8k", "--prompt_dataset", "$untrue"),
            ("--prompt_dataset", "gt_answer", "gsm8k"),
        ),
    }
    return folder, given


@pytest.fixture(scope="module")
def wrong(cases, online_words):
    folder, given = cases
    runs = {
        name: Run(online_words(script, folder / name / "out", *more), script=f"train_{script}.py")
        for name, (script, more, _) in given.items()
    }
    return folder, {name: ranks[0] for name, ranks in launched(1, runs).items()}


def test_what_is_wrong_is_said_in_one_sentence(cases, wrong):
    folder, ended = wrong
    for name, (script, _, said) in cases[1].items():
        assert ended[name].code in (1, 2), (name, ended[name].err)
        text = ended[name].err[ended[name].err.index(f"train_{script}.py: error: ") :]
        for part in said:
            assert part in text, (name, text)
        assert "Traceback" not in ended[name].err and not (folder / name / "out" / "actor").exists()


# The dry run


@pytest.fixture(scope="module")
def rehearsed(online_words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    more = ("--dry_run", "--num_episodes", "30")
    sft = (
        "--ptx_dataset",
        "$ptx",
        "--ptx_coef",
        "0.1",
        "--ptx_batch_size",
        "2",
        "--experience_batch_size",
        "2",
        "--accumulation_steps",
        "1",
    )
    runs = {
        "ppo": Run(online_words("ppo", folder / "ppo", *more, *sft), script="train_ppo.py"),
        "grpo": Run(
            online_words("grpo", folder / "grpo", *more, "--experience_batch_size", "1"),
            script="train_grpo.py",
        ),
    }
    return folder, launched(2, runs)


def test_a_dry_run_says_what_the_run_would_be_and_keeps_nothing(rehearsed):
    folder, ended = rehearsed
    ppo, grpo = (ended[name][0].err for name in ("ppo", "grpo"))
    for name in ("ppo", "grpo"):
        assert [rank.code for rank in ended[name]] == [0, 0], ended[name][0].err
        assert "saved and loaded again. Nothing was kept." in ended[name][0].err
    assert "prompts 24, tokens " in ppo
    assert (
        f"episodes 30, each of 8 prompts x 1 responses of up to {NEW} tokens; every prompt 10 times"
        in ppo
    )
    assert "optimizer steps 120 (2 passes x 2 global batches an episode), each of 4" in ppo
    assert (
        "episodes 30, each of 2 prompts x 4 responses" in grpo
        and "optimizer steps 60 (2 passes x 1 global batches" in grpo
    )
    for each in (ppo, grpo):
        assert "memory per process, estimated: " in each and "optimizer " in each
        assert "memory per process, measured: " in each
    assert (
        "SFT rows " in ppo
        and "value_loss" in ppo
        and "ptx_loss" in ppo
        and "critic" not in grpo.split("--")[0]
    )
    assert f"--max_length {MAX_LENGTH}" in ppo and "--kl_coef 0.05" in grpo
    assert sorted(path.name for path in Path(folder).rglob("*")) == []
    assert json.dumps(ended["ppo"][1].err).count("dry run:") == 0  # once, by rank 0
