"""The flags of ``coati sample`` and ``coati evaluate``: what goes with what."""

import pytest

from coati.cli.evaluate import parse_evaluate
from coati.cli.sample import parse_sample

SAMPLE = ["--model_path", "m", "--input", "f", "--output_dir", "o"]
SERVED = ["--input", "f", "--output_dir", "o", "--api_url", "http://h:1/v1", "--api_model", "n"]
EVALUATE = ["--model_path", "m", "--output_dir", "o"]
PROMPTS = [*EVALUATE, "--input", "f"]


def test_without_flags_one_response_is_greedy_and_several_are_not():
    one = parse_evaluate(PROMPTS)
    several = parse_evaluate([*PROMPTS, "--num_samples", "4"])
    assert (one.responses.temperature, one.pass_at) == (0.0, [1])
    assert (several.responses.temperature, several.pass_at) == (1.0, [1, 4])
    assert parse_sample([*SAMPLE, "--reward_functions", "length"]).write == ["best"]
    assert parse_sample(SAMPLE).write == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SAMPLE, "--rollout_url", "http://h:1", "--beta_gen", "0"], "--beta_gen belongs to"),
        ([*SAMPLE, "--rollout_url", "http://h:1", "--quant", "8bit"], "--quant belongs to"),
        ([*SERVED, "--beta_gen", "0"], "--beta_gen does nothing with --api_url"),
        ([*SERVED, "--model_path", "m"], "--model_path does nothing with --api_url"),
        ([*SAMPLE, "--api_model", "n"], "--api_model does nothing without --api_url"),
        ([*SAMPLE, "--temperature", "0"], "greedy responses are all the same"),
        ([*SAMPLE, "--write", "best"], "nothing judges the responses"),
        ([*SAMPLE, "--margin", "1"], "--margin does nothing without --write pairs"),
    ],
)
def test_what_does_nothing_in_sampling_is_refused(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        parse_sample(words)
    assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (EVALUATE, "nothing to evaluate"),
        ([*PROMPTS, "--few_shot", "0"], "--few_shot does nothing without --lm_eval"),
        ([*EVALUATE, "--perplexity", "f", "--right_from", "0"], "does nothing without --input"),
        ([*EVALUATE, "--perplexity", "f", "--beta_gen", "0"], "does nothing without --input"),
        ([*PROMPTS, "--right_from", "0"], "--right_from is a score"),
        ([*PROMPTS, "--stride", "3"], "--stride does nothing without --perplexity"),
        ([*PROMPTS, "--pass_at", "2"], "--pass_at 2 needs as many responses"),
    ],
)
def test_what_does_nothing_in_an_evaluation_is_refused(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        parse_evaluate(words)
    assert end.value.code == 2 and said in capsys.readouterr().err
