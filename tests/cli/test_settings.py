"""Settings from flags: groups are filled by the names of their fields."""

import re
from dataclasses import FrozenInstanceError, dataclass

import pytest

from coati.cli.arguments import parse_sft
from coati.cli.checks import tokens_of
from coati.cli.preferences import parse_dpo
from coati.cli.pretraining import parse_pretrain
from coati.cli.rollouts import parse_grpo, parse_ppo
from coati.cli.settings import TokenLoss, filled
from coati.parallel.optimizer import OptimizerSettings, build_optimizer
from coati.parallel.options import ParallelOptions


@dataclass(frozen=True)
class Inner:
    lr: float
    beta: float = 0.5


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str


def test_groups_are_filled_by_the_names_of_their_fields():
    flags = {"lr": 0.1, "name": "n", "another": 3}
    assert filled(Outer, flags) == Outer(Inner(0.1, 0.5), "n")
    assert filled(Outer, flags, name="given").name == "given"
    assert filled(Outer, flags, inner=Inner(2.0)).inner.lr == 2.0


def test_a_field_with_neither_flag_nor_default_is_an_error():
    with pytest.raises(TypeError, match="name"):
        filled(Outer, {"lr": 0.1})


def test_settings_do_not_change(data):
    settings = parse_sft(["--pretrain", "m", "--dataset", data["dataset"]])
    with pytest.raises(FrozenInstanceError):
        settings.model.pretrain = "other"


def test_the_flags_of_the_optimizer_reach_it(data):
    from tests.tiny import tiny_llama

    words = ["--pretrain", "m", "--dataset", data["dataset"]]
    assert parse_sft(words).optimizer == OptimizerSettings()
    settings = parse_sft([*words, "--adam_beta2", "0.98", "--lr", "3e-4", "--weight_decay", "0"])
    assert settings.optimizer == OptimizerSettings(lr=3e-4, weight_decay=0.0, adam_beta2=0.98)
    (group,) = build_optimizer(
        tiny_llama(), ParallelOptions(plugin="ddp"), settings.optimizer
    ).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.9, 0.98), 0.0)


def test_a_pair_is_two_rows_of_the_model(data):
    words = ["--pretrain", "m", "--dataset", data["dataset"], "--batch_size", "4"]
    assert parse_sft(words).parallel.batch_size == 4
    assert parse_dpo(words).parallel.batch_size == 8


def test_what_follows_the_machine_is_left_open(data):
    words = ["--pretrain", "m", "--dataset", data["dataset"]]
    settings = parse_sft(words)
    assert settings.plugin is None and settings.parallel.precision is None
    settings = parse_sft([*words, "--plugin", "zero2", "--mixed_precision", "bf16"])
    assert settings.plugin == settings.parallel.plugin == "zero2"
    assert settings.parallel.precision == "bf16"


def test_the_trainers_with_rollouts_share_their_groups(data):
    words = ["--pretrain", "m", "--prompt_dataset", data["dataset"], "--reward_functions", "length"]
    ppo, grpo = parse_ppo([*words, "--temperature", "0.7"]), parse_grpo(words)
    assert (ppo.sampling.initial_temperature, ppo.sampling.final_temperature) == (0.7, 0.7)
    assert (grpo.sampling.initial_temperature, grpo.sampling.final_temperature) == (1.0, 0.9)
    assert (ppo.advantage.algo, grpo.advantage.algo) == (None, "grpo")
    assert (ppo.rollout.num_generations, grpo.rollout.num_generations) == (1, 8)
    assert ppo.critic.critic_lr == 9e-6 and not hasattr(grpo, "critic")


def test_tokens_may_stand_in_a_file(tmp_path):
    """In the flags, and so in arguments.json and on resume, are the tokens themselves."""
    (tmp_path / "new.txt").write_text("\ufeff<one>\n\n two words\n<three>\n", encoding="utf-8")
    words = ["--pretrain", "m", "--dataset", str(tmp_path), "--add_tokens"]
    found = parse_sft([*words, "<zero>", str(tmp_path / "new.txt")])
    assert list(found.model.add_tokens) == ["<zero>", "<one>", " two words", "<three>"]
    assert found.flags["add_tokens"] == found.model.add_tokens
    assert parse_sft([*words, *found.model.add_tokens]).model == found.model
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name, said in {
        "absent.txt": "No such file or directory; expected a file of tokens, one a line",
        "none.txt": "holds no token",
        "latin.txt": "not UTF-8 text (byte 0)",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            tokens_of([str(tmp_path / name)])


def test_texts_are_packed_where_that_is_possible(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--pretrain", "m", "--dataset", str(tmp_path)]
    split = ["--plugin", "3d", "--sp", "2", "--enable_sequence_parallelism"]
    split += ["--sp_mode", "all_to_all"]
    assert parse_pretrain(words).data.packing and parse_pretrain(words).parallel.packing
    assert not parse_pretrain([*words, "--packing", "false"]).data.packing
    found = parse_pretrain([*words, *split])
    assert not found.data.packing and not found.parallel.packing
    assert not parse_pretrain([*words, "--plugin", "3d", "--use_flash_attn"]).data.packing
    assert parse_pretrain([*words, "--use_flash_attn"]).data.packing  # the plugin is not known yet
    assert parse_pretrain([*words, "--plugin", "zero2", "--use_flash_attn"]).data.packing
    with pytest.raises(SystemExit):
        parse_pretrain([*words, *split, "--packing"])
    assert "--packing cannot be combined with" in capsys.readouterr().err


def test_a_unit_of_documents_needs_a_file_of_texts(tmp_path, capsys):
    words = ["--pretrain", "m", "--documents", "line", "--dataset"]
    for name in ("rows.jsonl", "a.txt", "b.txt.gz", "d.txt.zst", "folder/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("a.txt", "b.txt.gz", "d.txt.zst", "a.txt#5", "folder"):
        assert parse_pretrain([*words, str(tmp_path / name)]).data.documents == "line"
    with pytest.raises(SystemExit):
        parse_pretrain([*words, str(tmp_path / "rows.jsonl")])
    assert "--documents line says what of a .txt file is a document" in capsys.readouterr().err


def test_the_loss_of_a_token_and_the_trackers_reach_the_settings(data):
    words = ["--pretrain", "m", "--dataset", data["dataset"], "--save_dir", "o"]
    plain = parse_sft(words)
    assert plain.loss == TokenLoss() and plain.optimizer.optim == "adamw"
    settings = parse_sft([*words, "--sft_loss", "dft", "--neftune_alpha", "5", "--optim", "lion"])
    assert settings.loss == TokenLoss("dft", 5.0) and settings.optimizer.optim == "lion"
    found = parse_sft([*words, "--report_to", "tensorboard"]).output.trackers
    expected = {"log_dir": "o/runs", "use_wandb": False, "report_to": ["tensorboard"]}
    assert found == expected
