"""train_online_dpo.py: whole runs on two processes and one, killed and gone on with, under every
kind of plugin."""

import json

import pytest

from coati.parallel.checkpoint import checkpoints, read_checkpoint
from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.online_inputs import metrics, of_episode, weights
from tests.end_to_end.worker import Fault, Run

pytestmark = pytest.mark.matrix

CPU = {"CUDA_VISIBLE_DEVICES": ""}
AUTO = ("--checkpoint_path", "auto")
SCRIPT = "train_online_dpo.py"
# What a run carries from episode to episode: a beta that changes, supervised rows, means that are
# not logged yet; log-probs of another temperature than the responses'.
CARRIED = (
    *("--num_generations", "3", "--beta", "0.3", "0.2", "0.1", "--temperature", "0.8"),
    *("--ptx_dataset", "$ptx", "--ptx_coef", "0.2", "--ptx_batch_size", "2"),
    *("--missing_eos_penalty", "0.5", "--num_episodes", "3", "--save_interval", "1"),
    *("--log_interval", "2", "--eval_prompt_dataset", "$eval", "--eval_interval", "2"),
    *("--eval_pass_at", "1", "2", "--eval_right", "1"),
)
# 2 collect steps of 4 prompts of two processes are 2 steps of 4 pairs, twice.
TWO = ("--experience_batch_size", "2", "--accumulation_steps", "1")
ONE = ("--experience_batch_size", "4", "--accumulation_steps", "2")
AHEAD = ("--rollouts_ahead", "1")
LORA = ("--lora_rank", "4")
PLUGINS = {
    "gemini": (2, ("--plugin", "gemini", "--mixed_precision", "bf16")),
    "tp": (2, ("--plugin", "3d", "--tp", "2", *ONE)),
    "zero2_cpu": (1, ("--plugin", "zero2_cpu")),
    "ddp": (1, ("--plugin", "ddp")),
    "lora": (1, LORA),
}
SHORT = ("--num_episodes", "1", "--beta", "0.3", "--ptx_coef", "0", "--eval_interval", "0")


@pytest.fixture(scope="module")
def words(online_words):
    def words(save_dir, *more: str) -> list[str]:
        return online_words("online_dpo", save_dir, *CARRIED, *more)

    return words


def launched(nproc: int, runs: dict[str, Run]) -> dict[str, list]:
    ranks = run(nproc, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=400)
    return {name: [rank[name] for rank in ranks] for name in runs}


@pytest.fixture(scope="module")
def first(tmp_path_factory, words):
    """(folder, {name: its ranks}) of two processes, and "alone" and others of one."""
    folder = tmp_path_factory.mktemp("runs")
    faults = {
        "plain": ((), None),
        "ahead": (AHEAD, None),
        "pass": ((), Fault("update", 5, "after", what="term", rank=1)),
        "ahead-pass": (AHEAD, Fault("update", 5, "after", what="term", rank=1)),
    }
    two = {
        name: Run(words(folder / name, *TWO, *more), fault, script=SCRIPT)
        for name, (more, fault) in faults.items()
    }
    two |= {
        name: Run(words(folder / name, *TWO, *SHORT, *more), script=SCRIPT)
        for name, (nproc, more) in PLUGINS.items()
        if nproc == 2
    }
    one = {"alone": Run(words(folder / "alone"), script=SCRIPT)}
    one |= {
        name: Run(words(folder / name, *SHORT, *more), script=SCRIPT)
        for name, (nproc, more) in PLUGINS.items()
        if nproc == 1
    }
    one["short"] = Run(words(folder / "short", *SHORT), script=SCRIPT)
    one["dry"] = Run(
        words(folder / "dry", "--dry_run", "--source_rewards", "*=length"), script=SCRIPT
    )
    return folder, launched(2, two) | launched(1, one)


def test_every_run_ends_well(first):
    for name, ranks in first[1].items():
        assert {rank.code for rank in ranks} == {0}, (name, ranks[0].err)


def test_what_is_logged(first):
    folder, _ = first
    lines = metrics(folder / "plain")
    assert [line["step"] for line in lines if "train/reward" in line] == [2]
    assert [line["step"] for line in lines if "eval/reward" in line] == [0, 2, 3]
    at_start = of_episode(lines, 0, "eval")
    assert 0 <= at_start["pass_at_1"] <= at_start["pass_at_2"] <= 1
    found = of_episode(lines, 2)
    assert found["beta"] == 0.2 and 0 <= found["ties"] < 1 and found["win_margin"] > 0
    assert 0 <= found["accuracy"] <= 1 and found["approx_kl"] != 0 and found["policy_loss"] > 0
    assert found["chosen_rewards"] - found["rejected_rewards"] == pytest.approx(found["margin"])
    assert found["rollout_gap"] < 1e-4, "log-probs are of temperature 1 on both sides"
    assert {"chosen_length", "rejected_length", "response_length", "ptx_loss"} <= set(found)
    assert not {"ratio_max", "clip_fraction", "kl_coef"} & set(found)
    assert not any(name.startswith("_") for name in found)
    assert (folder / "plain" / "report.html").exists()
    page = (folder / "plain" / "report.html").read_text()
    assert "nline direct preference optimization (online DPO)" in page
    assert "Pairs that are ties" in page
    assert of_episode(metrics(folder / "ahead"), 2)["staleness"] > 0


def test_the_number_of_processes_changes_nothing_but_rounding(first):
    folder, _ = first
    ours, alone = (of_episode(metrics(folder / name), 2) for name in ("plain", "alone"))
    assert ours.keys() == alone.keys()
    for name, value in alone.items():
        # So early a margin may be as small as rounding: one of 64 pairs may count either way.
        least = 1.01 / 64 if name == "accuracy" else 2e-4
        assert ours[name] == pytest.approx(value, rel=2e-3, abs=least), name


@pytest.mark.parametrize("name", ["tp", "zero2_cpu", "ddp"])
def test_a_plugin_changes_nothing_but_rounding(first, name):
    folder, _ = first
    arguments = json.loads((folder / name / "arguments.json").read_text())
    assert arguments["plugin"] == PLUGINS[name][1][1]
    found = weights(folder / name)
    assert found.keys() == weights(folder / "short").keys()
    assert_close(folder / name, folder / "short")


def assert_close(place, other) -> None:
    from safetensors.torch import load_file

    file = "actor/modeling/model.safetensors"
    ours, theirs = load_file(place / file), load_file(other / file)
    for name, tensor in theirs.items():
        assert (ours[name].float() - tensor.float()).abs().max() < 3e-4, name


def test_adapters_have_their_base_as_reference(first):
    folder, _ = first
    assert (folder / "lora" / "actor" / "modeling" / "adapter_config.json").exists()


@pytest.mark.parametrize("name", ["pass", "ahead-pass"])
def test_asked_to_stop_the_run_goes_on_where_it_stood(first, words, name):
    folder, before = first
    more = AHEAD if "ahead" in name else ()
    assert "everything is saved. To go on:" in before[name][0].err
    given = Run(words(folder / name, *TWO, *more, *AUTO), script=SCRIPT)
    ended = launched(2, {"on": given})["on"]
    assert [rank.code for rank in ended] == [0, 0]
    assert "asked for again" not in ended[0].err and "starts over" not in ended[0].err
    assert_same_run(
        folder / name, folder / name.replace("pass", "plain").replace("ahead-plain", "ahead")
    )


def assert_same_run(place, reference) -> None:
    assert metrics(place) == metrics(reference), place
    assert weights(place) == weights(reference) and weights(place), place


def test_killed_again_and_again_the_run_is_the_uninterrupted_one(first, words, tmp_path):
    """Inside an update, while pairs are collected, inside a save, and in the next update."""
    for fault in (
        Fault("update", 3, "after"),
        Fault("rollout", 4, "before", rank=1),
        Fault("file", 3, "half"),
        Fault("update", 6, "before", rank=1),
    ):
        with pytest.raises(WorkerFailed, match=rf"--- rank {fault.rank} \(exit code -9\) ---"):
            given = Run(words(tmp_path, *TWO, *AUTO), fault, script=SCRIPT)
            run(2, "tests.end_to_end.worker:train", given, env=CPU, timeout=100)
        for checkpoint in checkpoints(tmp_path):
            read_checkpoint(checkpoint)
    ended = launched(2, {"last": Run(words(tmp_path, *TWO, *AUTO), script=SCRIPT)})["last"]
    assert [rank.code for rank in ended] == [0, 0] and "going on from" in ended[0].err
    assert_same_run(tmp_path, first[0] / "plain")
