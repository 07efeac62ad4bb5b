"""Runs on a base of few bits by their scripts: resumed to the bit, and what they save is read."""

import json

import pytest
import torch

from coati.models.loading import load_causal_lm
from coati.models.reward_model import RewardModel
from coati.parallel.checkpoint import checkpoints
from tests.distributed.spawn import run
from tests.end_to_end.inputs import ROOT, prepare, short_lines, weights
from tests.end_to_end.worker import Run

pytestmark = pytest.mark.matrix

CPU = {"CUDA_VISIBLE_DEVICES": ""}
SAMPLES = ROOT / "examples" / "data"
NF4 = ("--lora_rank", "4", "--quantize_base", "nf4")
INT8 = ("--lora_rank", "4", "--quantize_base", "int8")
DORA = (*NF4, "--use_dora", "--use_rslora", "--lora_plus_ratio", "4", "--lora_target", "attention")
SAVED = ("--save_interval", "2", "--max_steps", "4", "--keep_last_k", "2")
EPISODES = ("--save_interval", "1", "--num_episodes", "2", "--keep_last_k", "2")


@pytest.fixture(scope="module")
def offline(model, data, tmp_path_factory):
    """``offline(kind, save_dir, more...)``: words of a run of four steps."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = prepare(
        folder / "pairs", short_lines(0, 40, SAMPLES / "preference.jsonl"), 160, "preference"
    )

    def words(kind: str, save_dir, *more: str) -> list[str]:
        rows = data["train"] if kind == "sft" else pairs
        given = ["--pretrain", model, "--dataset", rows, "--save_dir", str(save_dir)]
        given += ["--mixed_precision", "fp32", "--lr", "1e-3", "--batch_size", "2"]
        given += ["--accumulation_steps", "2", "--max_length", "160", "--plugin", "zero2"]
        return [*given, *SAVED, *more]

    return words


@pytest.fixture(scope="module")
def ended(offline, online_words, tmp_path_factory):
    """Each run once through, and from its checkpoint in the middle on: (folder, {name: Ended})."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {
        "sft": ("train_sft.py", offline, "sft", DORA),
        "merged": ("train_sft.py", offline, "sft", (*INT8, "--merge_lora_weights")),
        "dpo": ("train_dpo.py", offline, "dpo", INT8),
        "rm": ("train_rm.py", offline, "rm", NF4),
        "grpo": ("train_grpo.py", online_words, "grpo", (*NF4, *EPISODES)),
        "ppo": (
            "train_ppo.py",
            online_words,
            "ppo",
            (*NF4, "--shared_base", *EPISODES, "--rm_pretrain", str(folder / "rm" / "modeling")),
        ),
        "own": ("train_ppo.py", online_words, "ppo", (*INT8, *EPISODES)),
    }
    first = {
        name: Run(words(kind, folder / name, *more), script=script)
        for name, (script, words, kind, more) in kinds.items()
    }
    (found,) = run(1, "tests.end_to_end.worker:train_each", first, env=CPU, timeout=500)
    second = {}
    for name, (script, words, kind, more) in kinds.items():
        assert found[name].code == 0, found[name].err[-2000:]
        half = ("--checkpoint_path", str(checkpoints(folder / name)[0]))
        given = words(kind, folder / f"{name} resumed", *more, *half)
        second[f"{name} resumed"] = Run(given, script=script)
    (others,) = run(1, "tests.end_to_end.worker:train_each", second, env=CPU, timeout=500)
    return folder, found | others


NAMES = ("sft", "merged", "dpo", "rm", "grpo", "ppo", "own")


def final(folder):
    parts = [folder / part for part in ("actor", "critic") if (folder / part).is_dir()]
    return [weights(part) for part in parts or [folder]]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_as_one_without_a_stop(ended, name):
    folder, found = ended
    resumed = found[f"{name} resumed"]
    assert resumed.code == 0, resumed.err[-2000:]
    assert "the base is quantized to" in found[name].err
    assert final(folder / name) == final(folder / f"{name} resumed")
    assert all(final(folder / name))


def test_what_is_saved_says_how_its_base_was_stored(ended):
    folder, _ = ended
    for name, place, kind in (
        ("sft", "modeling", "nf4"),
        ("dpo", "modeling", "int8"),
        ("ppo", "critic/modeling", "nf4"),
    ):
        settings = json.loads((folder / name / place / "lora_config.json").read_text())
        assert settings["quantize_base"] == kind
    assert load_causal_lm(folder / "sft" / "modeling").dtype == torch.float32
    RewardModel.from_pretrained(folder / "rm" / "modeling")
    assert (folder / "merged" / "modeling" / "config.json").is_file()


def test_the_shared_base_is_stored_once(ended):
    _, found = ended
    assert found["ppo"].err.count("the base is quantized to") == 1
    # Of its own critic each has a base; the frozen reward model stays as it was saved.
    assert found["own"].err.count("the base is quantized to") == 2
