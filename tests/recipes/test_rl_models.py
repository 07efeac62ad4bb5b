"""The models of PPO and GRPO: where each starts, what it is refused for, and that the plugins
change nothing."""

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from coati.cli.online_settings import CriticSettings, PPOSettings
from coati.cli.rollouts import parse_ppo
from coati.parallel.plugins import ParallelOptions
from coati.recipes.resume import Resume
from coati.recipes.rl_models import critic_start, reward_start
from coati.recipes.run import Run
from tests.cli.rl_cases import IDS, MASK
from tests.distributed.spawn import run
from tests.tiny import tiny_llama, tiny_tokenizer

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
REAL = MASK.bool()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """A language model; a reward model of other weights; its weights as ColossalChat saved them; an
    adapter with head on the language model; prompts that exist."""
    from coati.models import LoraConfig, RewardModel, apply_lora, save_lora

    folder = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(folder / "lm")
    tiny_tokenizer().save_pretrained(folder / "lm")
    torch.manual_seed(1)
    reward = RewardModel(backbone=tiny_llama(seed=3))
    with torch.no_grad():
        reward.score.bias.fill_(0.25)
    tensors = {name: tensor.detach().contiguous() for name, tensor in reward.state_dict().items()}
    for name in ("rm", "bare/modeling"):
        (folder / name).mkdir(parents=True)
    save_file(tensors, folder / "rm" / "model.safetensors")
    reward.config.save_pretrained(folder / "rm")
    renamed = {name.replace("score.", "value_head."): tensor for name, tensor in tensors.items()}
    torch.save(renamed, folder / "bare" / "modeling" / "pytorch_model.bin")
    base = RewardModel(str(folder / "lm"))
    adapted = apply_lora(base, LoraConfig(r=4, linear_lora_dropout=0.0))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "score" in name:
                parameter.normal_(std=0.1)
    save_lora(adapted, folder / "adapter")
    (folder / "prompts").mkdir()
    return {name: str(folder / name) for name in ("lm", "rm", "bare", "adapter", "prompts")}


@pytest.fixture(scope="module")
def words(places):
    def call(*more: str) -> list[str]:
        flags = [
            "--pretrain",
            places["lm"],
            "--prompt_dataset",
            places["prompts"],
            "--mixed_precision",
            "fp32",
        ]
        flags += ["--plugin", "zero2", "--lr", "1e-3", "--critic_lr", "1e-2", "--warmup_steps", "0"]
        return [*flags, *(places.get(word.removeprefix("$"), word) for word in more)]

    return call


def says(path: str, kind: str) -> torch.Tensor:
    """What the model of a directory says of BATCH, in plain transformers."""
    from coati.models import RewardModel, load_scalar_model
    from coati.models.loading import load_causal_lm

    with torch.no_grad():
        if kind == "scores":
            return load_scalar_model(RewardModel, path).eval()(IDS, MASK)
        if kind == "values":
            model = load_scalar_model(RewardModel, path).eval()
            return model.score(model.backbone(input_ids=IDS, attention_mask=MASK)[0])[REAL]
        logps = (
            load_causal_lm(path)
            .eval()(input_ids=IDS, attention_mask=MASK)
            .logits[:, :-1]
            .log_softmax(-1)
        )
        return logps.gather(2, IDS[:, 1:, None])[..., 0][REAL[:, 1:]]


def test_the_critic_starts_from_the_reward_model_and_the_reference_stays(places, words, tmp_path):
    (report,) = run(
        1, "tests.cli.rl_cases:start_and_train", words("--rm_pretrain", "$rm"), str(tmp_path)
    )
    start, trained = report["start"], report["trained"]
    assert_close(start["reward"], says(places["rm"], "scores"), **CLOSE)
    assert_close(start["critic"], says(places["rm"], "values"), **CLOSE)
    assert_close(start["actor"], says(places["lm"], "logps"), **CLOSE)
    assert torch.equal(start["actor"], start["reference"])
    for name in ("reward", "reference"):
        for moment in ("trained", "resumed", "resumed_on"):
            assert torch.equal(report[moment][name], start[name]), (name, moment)
    for name in ("actor", "critic"):
        assert not torch.allclose(trained[name], start[name], atol=1e-3)
        assert torch.equal(report["resumed"][name], trained[name])
        assert torch.equal(
            report["resumed_on"][name], report["on"][name]
        )  # optimizers and schedules too
    assert report["rates"] == [1e-3] and report["critic_rates"] == [1e-2]
    assert report["shared"] == {"critic": 0.0, "reward": 0.0}


def test_without_a_reward_model_the_critics_head_is_0(places, words):
    (report,) = run(
        1,
        "tests.cli.rl_cases:start_and_train",
        words("--reward_functions", "length", "--kl_coef", "0"),
    )
    assert set(report["start"]) == {
        "actor",
        "critic",
    }  # no reward model; no reference where KL counts for nothing
    assert not report["start"]["critic"].any() and report["trained"]["critic"].any()


def test_rm_pretrain_is_an_architecture_beside_weights_without_configuration(places, words):
    flags = words(
        "--rm_pretrain", "$lm", "--rm_checkpoint_path", "$bare", "--offload_inference_models"
    )
    (report,) = run(1, "tests.cli.rl_cases:start_and_train", flags)
    assert_close(report["start"]["reward"], says(places["rm"], "scores"), **CLOSE)
    assert_close(report["start"]["critic"], says(places["rm"], "values"), **CLOSE)


def test_adapters_of_train_rm_are_reward_models(places, words):
    flags = words("--rm_pretrain", "$adapter", "--lora_rank", "8")
    (report,) = run(1, "tests.cli.rl_cases:start_and_train", flags)
    start, trained = report["start"], report["trained"]
    assert_close(start["reward"], says(places["adapter"], "scores"), **CLOSE)
    assert_close(start["critic"], says(places["adapter"], "values"), **CLOSE)
    # The reference is the actor without its adapters.
    assert_close(trained["reference"], says(places["lm"], "logps"), **CLOSE)
    assert not torch.allclose(trained["actor"], trained["reference"], atol=1e-3)


def test_one_base_for_all_four(places, words, tmp_path):
    """The same numbers as with four copies; critic and reward model own their adapters and heads
    alone."""
    flags = words("--rm_pretrain", "$adapter", "--lora_rank", "4")
    (apart,) = run(1, "tests.cli.rl_cases:start_and_train", flags)
    (report,) = run(
        1, "tests.cli.rl_cases:start_and_train", [*flags, "--shared_base"], str(tmp_path)
    )
    for name in ("actor", "critic", "reward", "reference"):
        assert_close(report["start"][name], apart["start"][name], **CLOSE)
    assert_close(report["trained"]["actor"], apart["trained"]["actor"], **CLOSE)
    assert torch.equal(report["trained"]["reward"], report["start"]["reward"])
    assert not torch.allclose(report["trained"]["critic"], report["start"]["critic"], atol=1e-3)
    assert min(report["shared"].values()) > 0.8 and max(apart["shared"].values()) == 0
    for name in ("actor", "critic", "reference"):
        assert torch.equal(report["resumed_on"][name], report["on"][name])


@cache
def alone(flags: tuple[str, ...]) -> dict:
    return run(1, "tests.cli.rl_cases:start_and_train", list(flags))[0]


@pytest.mark.matrix
@pytest.mark.parametrize(
    "plugin",
    [["--plugin", "zero2"], ["--plugin", "3d", "--tp", "2"], ["--plugin", "ddp"]],
    ids=lambda p: p[1],
)
def test_two_processes_hold_the_same_models(words, plugin):
    flags = words("--rm_pretrain", "$rm")
    expected = alone(tuple(flags))
    for report in run(2, "tests.cli.rl_cases:start_and_train", [*flags, *plugin]):
        for moment in ("start", "trained"):
            for name in ("actor", "critic", "reward", "reference"):
                assert_close(report[moment][name], expected[moment][name], **CLOSE)


@pytest.mark.matrix
def test_gemini_holds_the_same_models(words):
    flags = words("--rm_pretrain", "$rm", "--ptx_coef", "0.1", "--ptx_dataset", "$prompts")
    expected = alone(tuple(words("--rm_pretrain", "$rm")))
    flags += ["--plugin", "gemini", "--mixed_precision", "bf16"]
    for report in run(2, "tests.cli.rl_cases:start_and_train", flags):
        for name in ("actor", "critic", "reward", "reference"):
            assert_close(report["start"][name], expected["start"][name], atol=5e-2, rtol=2e-2)


@pytest.mark.matrix
def test_one_base_in_two_processes(words):
    flags = words("--rm_pretrain", "$adapter", "--lora_rank", "4", "--shared_base")
    expected = alone(tuple(flags))
    for report in run(2, "tests.cli.rl_cases:start_and_train", flags):
        for name in ("actor", "critic", "reward", "reference"):
            assert_close(report["trained"][name], expected["trained"][name], **CLOSE)
        assert min(report["shared"].values()) > 0.8


@pytest.mark.matrix
def test_one_base_in_half_precision_with_recomputation(words):
    flags = words("--rm_pretrain", "$adapter", "--lora_rank", "4", "--shared_base")
    expected = alone(tuple(flags))
    (report,) = run(
        1,
        "tests.cli.rl_cases:start_and_train",
        [*flags, "--mixed_precision", "bf16", "--grad_checkpoint"],
    )
    assert min(report["shared"].values()) > 0.8
    for name in ("actor", "critic", "reward", "reference"):
        assert_close(report["start"][name], expected["start"][name], atol=5e-2, rtol=2e-2)
    for name in ("reward", "reference"):
        assert torch.equal(report["trained"][name], report["start"][name])
    for name in ("actor", "critic"):
        assert not torch.allclose(report["trained"][name], report["start"][name], atol=1e-2)


# Where models start, without loading any


@pytest.fixture
def settings(places):
    """``settings(rm_pretrain=..., ...)``: those of a run whose start they name."""
    words = ["--pretrain", "lm", "--prompt_dataset", places["prompts"]]
    given = parse_ppo([*words, "--reward_functions", "length"])

    def call(critic_pretrain=None, critic_checkpoint_path=None, **reward) -> PPOSettings:
        critic = CriticSettings(critic_pretrain, critic_checkpoint_path)
        return replace(given, critic=critic, reward=replace(given.reward, **reward))

    return call


def test_the_order_in_which_the_critics_start_is_looked_for(places, settings, tmp_path):
    (tmp_path / "epoch-0_step-5" / "actor" / "modeling").mkdir(parents=True)
    actor = str(tmp_path / "epoch-0_step-5" / "actor" / "modeling")
    assert critic_start(settings()).path == "lm"
    assert critic_start(settings(), actor).path == "lm"  # of GRPO, or another trainer
    assert critic_start(settings(rm_pretrain="some/rm")).path == "some/rm"
    assert not critic_start(settings(rm_pretrain="some/rm")).new_head
    assert critic_start(settings(rm_pretrain="some/rm", no_neural_reward_model=True)).new_head
    assert critic_start(settings(rm_pretrain="some/rm", critic_pretrain="c")).path == "c"
    given = settings(rm_pretrain="some/rm", critic_checkpoint_path=places["rm"])
    assert critic_start(given).path == places["rm"]
    (tmp_path / "epoch-0_step-5" / "critic" / "modeling").mkdir(parents=True)
    start = critic_start(given, actor)
    assert start.trained and start.path == str(tmp_path / "epoch-0_step-5" / "critic" / "modeling")


def test_a_training_directory_stands_for_its_model(places, settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "modeling").symlink_to(places["rm"])
    for flag in ("rm_pretrain", "rm_checkpoint_path"):
        start = reward_start(settings(**{flag: str(tmp_path / "run")}).reward)
        assert start.path == str(tmp_path / "run" / "modeling")


# What cannot be a critic or a reward model


def with_tokens(folder: Path, change) -> str:
    """The reward model with a tokenizer beside it, whose vocabulary ``change`` has altered."""
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content["model"]["vocab"])
    file.write_text(json.dumps(content))
    return str(folder)


def swapped(vocabulary: dict[str, int]) -> None:
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.fixture
def load(words):
    """Loads the reward model of a command line, in this process."""

    def call(*more: str, tokenizer=None):
        from coati.models import RewardModel
        from coati.recipes.rl_models import load_scalar

        settings = parse_ppo(words(*more))
        tp = settings.parallel.tp
        options = ParallelOptions(tp=tp, plugin="3d" if tp > 1 else "zero2")
        run = Run(settings, options, Resume(), tokenizer or tiny_tokenizer(), None)
        return load_scalar(run, RewardModel, reward_start(settings.reward), vocabulary=0)

    return call


def test_what_cannot_score(load, places, tmp_path, monkeypatch):
    """Each in one sentence that begins with the flag."""
    from transformers import AutoConfig

    other = tmp_path / "other"
    for name in ("other", "wide", "torn"):
        (tmp_path / name).mkdir()
    for file in Path(places["rm"]).iterdir():
        (other / file.name).symlink_to(file)
    with_tokens(other, swapped)
    AutoConfig.from_pretrained(places["lm"], hidden_size=128).save_pretrained(tmp_path / "wide")
    save_file({"value_head.weight": torch.zeros(1, 64)}, tmp_path / "torn" / "model.safetensors")
    for more, said in (
        (["--rm_pretrain", "$lm"], f"--rm_pretrain: {places['lm']} has no scalar head"),
        (
            ["--rm_pretrain", str(other)],
            "--rm_pretrain: .*was trained with another tokenizer: 2 of",
        ),
        (
            ["--rm_pretrain", str(tmp_path / "wide"), "--rm_checkpoint_path", "$rm"],
            "--rm_checkpoint_path: .*another architecture than --rm_pretrain .*: hidden_size is "
            "64 there and 128 here",
        ),
        (
            ["--rm_pretrain", str(tmp_path / "wide"), "--rm_checkpoint_path", "$bare"],
            "--rm_checkpoint_path: .*: not the weights of",
        ),
        (
            ["--rm_pretrain", "$lm", "--rm_checkpoint_path", str(tmp_path / "torn")],
            "not the weights of",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            load(*more)
    big = copy.deepcopy(tiny_tokenizer())
    big.add_tokens([f"<{number}>" for number in range(384)])
    with pytest.raises(
        ValueError,
        match="--rm_pretrain: the tokenizer has .* tokens .*, the model's vocabulary 384",
    ):
        load("--rm_pretrain", "$rm", tokenizer=big)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--rm_pretrain: --tp 3: this model's 4 attention heads"):
        load("--rm_pretrain", "$rm", "--tp", "3", "--plugin", "3d")


def test_a_tokenizer_that_only_lacks_the_padding_is_the_same(load, places, tmp_path):
    (tmp_path / "rm").mkdir()
    for file in Path(places["rm"]).iterdir():
        (tmp_path / "rm" / file.name).symlink_to(file)
    with_tokens(tmp_path / "rm", lambda vocabulary: None)
    tokenizer = tiny_tokenizer()
    loaded = load("--rm_pretrain", str(tmp_path / "rm"), tokenizer=tokenizer)
    assert loaded.config.pad_token_id == tokenizer.pad_token_id


def test_gemini_offloads_by_itself(words):
    from coati.recipes.rl_models import load_actor

    settings = parse_ppo(words("--rm_pretrain", "$rm", "--offload_inference_models"))
    run = Run(settings, ParallelOptions(plugin="gemini"), Resume(), tiny_tokenizer(), None)
    with pytest.raises(
        ValueError, match="--offload_inference_models: --plugin gemini itself decides"
    ):
        load_actor(run, total_steps=1)


def test_a_base_can_be_shared_only_with_adapters_on_it(words, places):
    from coati.models import RewardModel
    from coati.models.base import without_head
    from coati.recipes.rl_models import adapter_on_base

    settings = parse_ppo(words("--rm_pretrain", "$rm", "--lora_rank", "4", "--shared_base"))
    run = Run(settings, ParallelOptions(lora=True), Resume(), tiny_tokenizer(), None)
    base = without_head(tiny_llama())
    with pytest.raises(
        ValueError, match="--shared_base: --rm_pretrain .*is no LoRA adapter on --pretrain"
    ):
        adapter_on_base(run, base, RewardModel, reward_start(settings.reward))
