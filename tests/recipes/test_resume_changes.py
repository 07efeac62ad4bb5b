"""What is said, refused and dropped when a run goes on with other flags."""

import json
import shutil
from pathlib import Path

import pytest

from coati.parallel.checkpoint import RunningState
from coati.recipes.resume_changes import apply_changes, digests


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"12345678")
    return folder


def state(**given) -> RunningState:
    return RunningState(step=3, **given)


def test_a_model_is_known_by_its_content_wherever_it_lies(model, tmp_path):
    before = digests({"pretrain": str(model), "tokenizer_dir": None})
    assert set(before) == {"pretrain", "tokenizer_dir"}
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    # Written again by another release.
    config = {"hidden_size": 8, "model_type": "llama", "dtype": "float32"}
    (moved / "config.json").write_text(json.dumps(config))
    (moved / "README.md").write_text("about")
    assert digests({"pretrain": str(moved), "tokenizer_dir": None}) == before
    (moved / "model.safetensors").write_bytes(b"123456789")
    after = digests({"pretrain": str(moved), "tokenizer_dir": None})
    assert after["pretrain"] != before["pretrain"]
    assert after["tokenizer_dir"] == before["tokenizer_dir"]


def test_names_of_the_hub_have_no_digest(tmp_path):
    assert digests({"pretrain": "owner/name", "lora_config": None}) == {}


def test_rows_in_files_and_folders_count_by_content(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    before = digests({"ptx_dataset": [str(file)]})
    file.write_text('{"a": 1}\n')
    assert digests({"ptx_dataset": [str(file)]}) != before
    assert digests({"ptx_dataset": []}) == {}


def test_what_takes_effect_is_one_line(capsys):
    before = {"lr": 1e-3, "weight_decay": 0.1, "save_interval": 5, "loss_type": ["dpo_loss"]}
    now = {"lr": 1e-4, "weight_decay": 0.1, "save_interval": 9, "loss_type": ["hinge_loss"]}
    apply_changes(Path("out/epoch-0_step-3"), state(flags=before), now, {})
    assert capsys.readouterr().err == (
        "coati: flags that differ from out/epoch-0_step-3: --lr 0.001 -> 0.0001, --loss_type "
        "dpo_loss -> hinge_loss, from step 4 on\n"
    )


def test_nothing_is_said_of_the_same_flags(capsys):
    flags = {"lr": 1e-3, "dataset_weights": (1.0, 2.0)}
    apply_changes(Path("out"), state(flags={"lr": 1e-3, "dataset_weights": [1.0, 2.0]}), flags, {})
    assert capsys.readouterr().err == ""


def test_what_must_be_the_same_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^--checkpoint_path out: --lora_rank 8 -> 4: must be"):
        apply_changes(Path("out"), state(flags={"lora_rank": 8}), {"lora_rank": 4}, {})


def test_earlier_checkpoints_have_their_flags_beside_them(tmp_path, capsys):
    (tmp_path / "arguments.json").write_text(json.dumps({"lr": 1e-3}))
    apply_changes(tmp_path / "epoch-0_step-3", state(), {"lr": 1e-4}, {})
    assert "--lr 0.001 -> 0.0001" in capsys.readouterr().err
    apply_changes(tmp_path / "elsewhere" / "epoch-0_step-3", state(), {"lr": 1e-4}, {})
    assert capsys.readouterr().err == ""


def test_the_best_model_is_forgotten_when_it_is_measured_otherwise(capsys):
    trainer = {"best": {"value": 1.0, "step": 2}, "early_stopping": {"best": 1.0, "count": 2}}
    others = {
        "eval_dataset": (["a"], ["b"]),
        "metric_for_best": (None, "acc"),
        "reward_weights": ([1.0], [2.0]),
        "loss_type": ("dpo_loss", "hinge_loss"),
        "disable_loss_mask": (False, True),
    }
    for flag, values in others.items():
        resumed = state(flags={flag: values[0]}, trainer=dict(trainer))
        apply_changes(Path("out"), resumed, {flag: values[1]}, {})
        assert resumed.trainer == {}
        assert "the best one so far starts anew" in capsys.readouterr().err
    # Neither the rate nor, where rewards are measured, the loss.
    for before, now in (
        ({"lr": 1.0}, {"lr": 2.0}),
        ({"gamma": 1.0, "num_episodes": 3}, {"gamma": 0.9, "num_episodes": 3}),
    ):
        resumed = state(flags=before, trainer=dict(trainer))
        apply_changes(Path("out"), resumed, now, {})
        assert resumed.trainer == trainer


def test_other_rewards_are_normalized_by_moments_of_their_own(capsys):
    moments = {"count": 8.0, "mean": 100.0, "squares": 50.0}
    for flag, expected in (("reward_functions", 0.0), ("reward_clip", 8.0)):
        maker = {"kl": {"kl_coef": 0.1}, "normalization": dict(moments)}
        resumed = state(flags={flag: 1}, trainer={"maker": maker})
        apply_changes(Path("out"), resumed, {flag: 2}, {})
        assert resumed.trainer["maker"]["normalization"]["count"] == expected
        assert ("start anew" in capsys.readouterr().err) == (expected == 0)


def test_an_adapted_kl_coefficient_gives_way_to_a_new_one_alone():
    for now, expected in ((0.1, 0.037), (0.2, 0.2)):
        resumed = state(flags={"kl_coef": 0.1}, trainer={"maker": {"kl": {"kl_coef": 0.037}}})
        apply_changes(Path("out"), resumed, {"kl_coef": now}, {})
        assert resumed.trainer["maker"]["kl"]["kl_coef"] == expected
