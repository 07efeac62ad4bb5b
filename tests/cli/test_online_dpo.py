"""The flags of online DPO: defaults, what belongs together, and what is refused by name."""

import json
from types import SimpleNamespace

import pytest

from coati.cli.rollout_pairs import parse_online_dpo
from coati.recipes.command import load
from coati.recipes.extras import NO_EXTRAS
from coati.recipes.reward_sets import reward_functions
from coati.rewards.responses import Responses


@pytest.fixture
def words(tmp_path):
    (tmp_path / "prompts").mkdir()
    return [
        *("--pretrain", "m", "--prompt_dataset", str(tmp_path / "prompts")),
        *("--reward_functions", "length", "--save_dir", str(tmp_path / "out")),
    ]


def refused(words, capsys, *more) -> str:
    with pytest.raises(SystemExit) as end:
        parse_online_dpo([*words, *more])
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_what_is_default(words):
    settings = parse_online_dpo(words)
    loss = settings.loss
    assert (loss.loss_type, loss.beta, loss.label_smoothing) == (["dpo_loss"], [0.1], 0.0)
    assert settings.rollout.num_generations == 2 and settings.rows_per_prompt == 1
    assert settings.rollout.inference_batch_size == 32
    assert settings.rollout.logits_forward_batch_size == 16  # both rows of 8 pairs
    assert settings.parallel.batch_size == 16
    assert (settings.update.train_batch_size, settings.update.accumulation_steps) == (8, 2)
    assert settings.update.num_update_steps == 1 and settings.optimizer.lr == 5e-7
    assert settings.kl.kl_coef == 0 and settings.update.rollout_is == "none"
    assert settings.sampling.initial_temperature == settings.sampling.final_temperature == 1.0
    assert json.dumps(dict(settings.flags)) and "kl_coef" not in settings.flags


def test_each_loss_has_its_own_beta(words):
    def beta(*more):
        return parse_online_dpo([*words, "--num_episodes", "4", *more]).loss.beta

    assert beta("--loss_type", "simpo_loss") == [2.0]
    assert beta("--loss_type", "dpo_loss", "simpo_loss") is None
    assert beta("--beta", "0.3", "0.2", "0.1") == [0.3, 0.2, 0.1]
    assert beta(
        "--loss_type", "sigmoid", "bco_pair", "sft", "--loss_weights", "0.8", "0.2", "1"
    ) == [0.1]


def test_the_buffer_counts_pairs(words, capsys):
    own = ["--experience_batch_size", "3", "--num_collect_steps", "1", "--num_generations", "8"]
    said = refused(words, capsys, *own)
    assert "= 3 pairs per process, not a multiple of the 16" in said
    assert "--num_generations" not in said.partition("error: ")[2]
    parse_online_dpo([*words, *own, "--train_batch_size", "3", "--accumulation_steps", "1"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--num_generations", "1"), "a pair takes two responses to a prompt or more"),
        (("--environment", "calculator"), "DPO compares two responses to one prompt"),
        (("--beta", "0.2", "0.1"), "--beta has 2 values for --num_episodes 1"),
        (("--beta", "0"), "--beta"),
        (("--loss_type", "sft"), "has no loss over pairs"),
        (("--loss_type", "robust"), "needs --label_smoothing"),
        (("--loss_type", "simpo_loss", "--ref_tp", "2"), "there is no reference model"),
        (("--ref_tp", "2", "--plugin", "zero2"), "--ref_tp 2 belongs to --plugin 3d"),
        (("--pp", "2", "--plugin", "3d"), "split into pipeline stages"),
        (("--add_tokens", "<a>"), "have to be learned before they are sampled"),
        (("--kl_coef", "0.1"), "--kl_coef"),
        (("--reward_clip", "1"), "--reward_clip"),
        (("--precompute_ref",), "--precompute_ref"),
        (("--wpo",), "--wpo"),
        (("--num_train_epochs", "3"), "it counts passes over the prompts"),
    ],
)
def test_what_cannot_be(words, capsys, more, said):
    assert said in refused(words, capsys, *more)


JUDGE = ("--judge_url", "http://h/v1", "--judge_model", "m")
PAIRS = ("--reward_functions", "pairwise_judge")


def judge_options(settings):
    return settings.slow_rewards.options(settings.reward.reward_functions)


def test_a_judge_of_pairs(words, capsys, tmp_path):
    options = judge_options(parse_online_dpo([*words, *PAIRS, *JUDGE]))
    assert options.judge is None and "response_a" in options.pairwise_judge.places
    one = ("--reward_functions", "judge", *JUDGE)
    options = judge_options(parse_online_dpo([*words, *one]))
    assert options.pairwise_judge is None and options.judge.model == "m"
    assert "--judge_url is missing: --reward_functions pairwise_judge" in refused(
        words, capsys, *PAIRS
    )
    both = ("--reward_functions", "judge", "pairwise_judge", *JUDGE)
    assert "name one of the two" in refused(words, capsys, *both)
    failed = (*PAIRS, *JUDGE, "--judge_failed")
    assert "it is the share of a comparison" in refused(words, capsys, *failed, "-1")
    assert parse_online_dpo([*words, *failed, "0.5"]).slow_rewards.judge_failed == 0.5
    ask = tmp_path / "ask.txt"
    ask.write_text("{prompt} {response}")
    given = (*PAIRS, *JUDGE, "--judge_prompt", str(ask))
    assert "the text has no {response_a}" in refused(words, capsys, *given)
    (tmp_path / "eval").mkdir()
    for more in (("--eval_prompt_dataset", str(tmp_path / "eval")), ("--eval_ratio", "0.1")):
        said = refused(words, capsys, *PAIRS, *JUDGE, *more)
        assert f"{more[0]}: pairwise_judge compares responses of one model" in said


def test_a_judge_of_pairs_for_a_source(words, capsys):
    named = ("--source_rewards", "chat=pairwise_judge", "*=length")
    words = [word for word in words if word not in ("--reward_functions", "length")]
    assert "--judge_url is missing: --reward_functions pairwise_judge" in refused(
        words, capsys, *named
    )
    assert "--eval_ratio: pairwise_judge" in refused(
        words, capsys, *named, *JUDGE, "--eval_ratio", "0.1"
    )
    both = ("--source_rewards", "chat=pairwise_judge", "code=judge")
    assert "name one of the two" in refused(words, capsys, *both, *JUDGE)
    settings = parse_online_dpo([*words, *named, *JUDGE])
    run = SimpleNamespace(settings=settings, template=None, extras=NO_EXTRAS)
    rewards = reward_functions(run)
    pair = Responses(["q", "q"], ["a", "a"], num_generations=2, sources=["chat", "chat"])
    assert rewards(pair).total == [0.5, 0.5], "equal responses are not asked about"


def test_evaluations_pass_at_k(words):
    right = ("--eval_ratio", "0.2", "--eval_pass_at", "1", "4", "--eval_right", "-0.5")
    assert parse_online_dpo([*words, *right]).evaluation.eval_pass_at == [1, 4]


@pytest.mark.parametrize(
    ("verb", "more", "said"),
    [
        ("ppo", (), "there is one here; take judge"),
        ("grpo", ("--num_generations", "1", "--algo", "reinforce_pp"), "there is one here"),
    ],
)
def test_a_judge_of_pairs_elsewhere(words, capsys, verb, more, said):
    with pytest.raises(SystemExit):
        load(verb).parse([*words, *PAIRS, *JUDGE, *more])
    assert said in " ".join(capsys.readouterr().err.split())
    if verb == "grpo":
        assert judge_options(load(verb).parse([*words, *PAIRS, *JUDGE])).pairwise_judge


def test_two_models_are_not_compared_by_a_judge_of_pairs(words, capsys, tmp_path):
    given = ["--model_path", str(tmp_path), "--input", str(tmp_path), *PAIRS, *JUDGE]
    with pytest.raises(SystemExit):
        load("compare").parse(given)
    assert "take judge" in capsys.readouterr().err
