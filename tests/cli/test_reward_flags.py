"""Flags of rewards that take their time: what they become, what is refused, and what a resumed run
makes of a change."""

import pytest

from coati.cli.compare import parse_compare
from coati.cli.resume_flags import APPLIED, CLASS_OF, FREE, REWARDS, changes
from coati.cli.reward_flags import OF_JUDGE, OF_TESTS, SlowRewardSettings
from coati.recipes.command import load
from coati.rewards.reward_options import JUDGE_PATTERN, JUDGE_PROMPT, RewardOptions

JUDGE = ("--judge_url", "http://h:1/v1", "--judge_model", "m")


@pytest.fixture
def words(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    return ["--pretrain", str(tmp_path), "--prompt_dataset", str(prompts)]


def parsed(words, *more):
    return load("grpo").parse([*words, "--reward_functions", *more]).slow_rewards.options()


def refused(capsys, words, *more):
    with pytest.raises(SystemExit) as error:
        parsed(words, *more)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_without_flags_there_is_no_judge(words):
    assert parsed(words, "length") == RewardOptions() == SlowRewardSettings().options()


def test_the_judge(words, tmp_path):
    prompt = tmp_path / "judge.txt"
    prompt.write_text("Rate {response} for {prompt}", encoding="utf-8-sig")
    judge = parsed(words, "judge", *JUDGE).judge
    assert (judge.prompt, judge.pattern, judge.failed) == (JUDGE_PROMPT, JUDGE_PATTERN, None)
    more = ("--judge_prompt", str(prompt), "--judge_pattern", r"(\d)", "--judge_failed", "-1")
    judge = parsed(words, "judge", *JUDGE, *more).judge
    assert (judge.prompt, judge.pattern, judge.failed) == (
        "Rate {response} for {prompt}",
        r"(\d)",
        -1,
    )


def test_limits_of_programs(words):
    more = ("--test_timeout", "2.5", "--test_memory", "128", "--reward_concurrency", "3")
    options = parsed(words, "python_tests", *more)
    assert (options.test_timeout, options.test_memory, options.concurrency) == (2.5, 128, 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("judge",), "--judge_url is missing: --reward_functions judge asks a model of an OpenAI"),
        (("judge", *JUDGE[:2]), "--judge_model is missing"),
        (("length", *JUDGE), "--judge_url does nothing without --reward_functions judge"),
        (("length", "--judge_failed", "0"), "--judge_failed does nothing without"),
        (("length", "--test_timeout", "1"), "--test_timeout does nothing without --reward_funct"),
        (("length", "--test_memory", "99"), "--test_memory does nothing without"),
        (("python_tests", "--test_timeout", "0"), "--test_timeout"),
        (("python_tests", "--test_memory", "1"), "--test_memory"),
        (("judge", *JUDGE, "--judge_prompt", "none.txt"), "--judge_prompt none.txt cannot be read"),
        (("judge", *JUDGE, "--judge_pattern", "x"), "--judge_pattern 'x' has no group"),
        (("judge", *JUDGE, "--judge_pattern", "("), "--judge_pattern '(' is no pattern"),
        (("judge", *JUDGE[2:], "--judge_url", "h/v1"), "--judge_url h/v1: expected a URL"),
        (("http://u:pw@h/score",), "what is in a URL ends up in logs"),
        (("http:///",), "reward http:///: expected a URL"),
        (("http",), "unknown reward 'http'"),
    ],
)
def test_what_is_refused(words, capsys, more, message):
    said = refused(capsys, words, *more)
    assert message in said and "pw" not in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rate it", "the text has no {response}"),
        (b" \n", "is empty"),
        (b"\xff{response}", "is no UTF-8 text"),
    ],
)
def test_a_prompt_file_that_is_none(words, capsys, tmp_path, content, message):
    file = tmp_path / "judge.txt"
    file.write_bytes(content)
    said = refused(capsys, words, "judge", *JUDGE, "--judge_prompt", str(file))
    assert "--judge_prompt" in said and message in said


def test_coati_compare_has_them_too(tmp_path):
    words = ("--model_path", "m", "--input", "rows", "--reward_functions", "judge", *JUDGE)
    assert parse_compare(words).slow_rewards.options().judge.model == "m"
    with pytest.raises(SystemExit):
        parse_compare(words[:6])


def test_on_resume_another_judge_takes_effect_and_starts_the_best_model_anew():
    assert {CLASS_OF[flag] for flag in (*OF_JUDGE, *OF_TESTS)} == {APPLIED}
    assert set(OF_JUDGE) <= set(REWARDS) and CLASS_OF["reward_concurrency"] == FREE
    before = {"judge_prompt": "a.txt", "judge_model": "m", "test_timeout": 10.0}
    now = {"judge_prompt": "b.txt", "judge_model": "n", "test_timeout": 5.0}
    same = {"judge_prompt": "digest"}
    found = {one.flag for one in changes(before, now, same, same)}
    assert found == {"judge_model", "test_timeout"}  # the text is the same, wherever it lies
    [change] = changes({"judge_prompt": "a"}, {"judge_prompt": "a"}, same, {"judge_prompt": "x"})
    assert change.content
