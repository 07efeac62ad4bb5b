"""compare.py: win rates by hand, responses that do not depend on their batch, judges, and errors
that name the flag."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from coati.cli.compare import parse_compare
from coati.inference.evaluate.generate_responses import (
    Prompt,
    Response,
    SamplingConfig,
    generate_responses,
    read_prompts,
    skipped_summary,
)
from coati.inference.evaluate.score_rows import load_reward_model, rows_to_score, score
from coati.inference.evaluate.win_rate import (
    Judge,
    PairResult,
    compare,
    extremes,
    summary,
    win_rate,
)
from coati.inference.model_loading import load
from coati.models import RewardModel
from coati.models.generation.sampling import Sampling
from coati.models.lora.adapter_files import save_lora
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.rewards import Rewards
from coati.utils.statistics import wilson_interval
from coati.utils.text_table import places
from tests.tiny import tiny_llama, tiny_tokenizer

SCRIPT = Path(__file__).parents[3] / "examples" / "inference" / "compare.py"
SHAPES = [
    {"messages": [{"from": "human", "content": "hello there"}], "gt_answer": "7"},
    {"instruction": "how are you today?"},
    {
        "prompt": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "and today?"},
        ]
    },
    {"prompt": "system"},
    {
        "messages": [
            {"role": "user", "content": "you"},
            {"role": "assistant", "content": "left out"},
        ]
    },
]


def write(folder: Path, model) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """start, trained (other weights), adapter (of start) and judge, each a directory."""
    root = tmp_path_factory.mktemp("models")
    found = {
        name: write(root / name, tiny_llama(seed, layers=1))
        for seed, name in enumerate(("start", "trained"))
    }
    wrapped = apply_lora(AutoModelForCausalLM.from_pretrained(found["start"]), LoraConfig(r=4))
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(wrapped, root / "adapter")
    torch.manual_seed(3)
    judge = RewardModel(backbone=tiny_llama(3, layers=1))
    folder = root / "judge"
    judge.config.save_pretrained(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in judge.state_dict().items()},
        folder / "model.safetensors",
    )
    tiny_tokenizer().save_pretrained(folder)
    return found | {"adapter": str(root / "adapter"), "judge": str(folder)}


@pytest.fixture
def rows(tmp_path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in SHAPES))
    return str(file)


def made(
    reference: float, policy: float, texts=("a", "b"), question: str = "q", margin: float = 0.0
) -> PairResult:
    prompt = Prompt("f:1", 0, [{"role": "user", "content": question}])
    responses = tuple(Response("q", text, [1, 2, 3], True) for text in texts)
    return PairResult(
        prompt, responses, (reference, policy), ({"a": reference}, {"a": policy}), margin
    )


def test_a_win_a_loss_and_ties():
    assert made(1.0, 2.0).result == "win" and made(2.0, 1.0).result == "loss"
    assert (
        made(1.0, 1.0).result
        == made(1.0, 1.0 + 1e-8).result
        == made(1e4, 1e4 + 1e-3).result
        == "tie"
    )
    assert made(1.0, 1.5, margin=0.5).result == "tie" and made(1.0, 1.6, margin=0.5).result == "win"
    assert (
        made(1.0, 2.0, texts=("a", "a")).result == "tie"
    )  # whatever arithmetic made of the same response


def test_the_rate_counts_ties_half_and_has_wilsons_interval():
    rows = [made(0, 1)] * 6 + [made(1, 0)] * 2 + [made(1, 1)] * 2
    rate, low, high = win_rate(rows)
    assert rate == 0.7 and (low, high) == wilson_interval(7, 10)
    assert win_rate([]) == (0.0, 0.0, 1.0)


def test_the_summary_by_hand():
    rows = [made(0, 1)] * 60 + [made(1, 0)] * 20 + [made(1, 1)] * 20
    lines = summary(rows)
    assert lines[0] == (
        "win rate 0.700 on 100 prompts (95% 0.604 to 0.781; 60 wins, 20 losses, 20 ties): better "
        "than the reference"
    )
    deviation = math.sqrt((60 * 0.6**2 + 20 * 1.4**2 + 20 * 0.4**2) / 99)
    assert lines[1] == f"score 0.4 -> 0.8, difference +0.4 (95% +-{1.96 * deviation / 10:.2g})"
    assert lines[2:] == ["tokens 3 -> 3", "stop_rate 1 -> 1", "distinct_2 0.01 -> 0.01"]
    assert summary([made(1, 0)] * 100)[0].endswith("worse than the reference")
    assert "no significant difference" in summary([made(0, 1)])[0]


@pytest.mark.parametrize("width", [24, 60, 100, 200])
def test_the_largest_wins_and_losses_are_shown(width):
    rows = [made(0, size, question=f"ask {size}") for size in (3, -1, 2, -5, 0, 9)]
    text = extremes(rows, 2, width)
    assert all(places(line) <= width for line in text.splitlines())
    shown = [text.index(f"ask {size}") for size in (9, 3, -5, -1)]
    assert shown == sorted(shown)
    assert "ask 2" not in text and "ask 0" not in text
    assert extremes([made(1, 1)], 3) == "" and "losses" not in extremes(rows[:1], 3)


def test_prompts_of_every_shape_are_read_and_the_others_named(rows):
    with open(rows, "a") as file:
        file.write('{"nothing": 1}\n')
    prompts, skipped = read_prompts([rows])
    assert [prompt.question for prompt in prompts] == [
        "hello there",
        "how are you today?",
        "and today?",
        "system",
        "you",
    ]
    assert prompts[0].gt_answer == "7" and [prompt.place for prompt in prompts][:2] == [
        f"{rows}:1",
        f"{rows}:2",
    ]
    assert skipped[0][0] == f"{rows}:6" and skipped[0][1].startswith("wrong_keys")
    drawn = [
        [prompt.number for prompt in read_prompts([rows], 3, seed)[0]] for seed in (1, 1, 2, 3, 4)
    ]
    assert (
        drawn[0] == drawn[1] == sorted(drawn[0])
        and len(drawn[0]) == 3
        and any(one != drawn[0] for one in drawn)
    )


@pytest.mark.parametrize(
    "sampling", [Sampling(do_sample=False), Sampling(top_k=50, temperature=1.3)]
)
def test_a_response_does_not_depend_on_its_batch(models, rows, sampling):
    loaded, (prompts, _) = load(models["start"]), read_prompts([rows])
    one, many = (
        generate_responses(loaded, prompts, SamplingConfig(sampling, 12, 200, size))[0]
        for size in (1, 5)
    )
    assert one == many and len(one) == 5
    fewer = generate_responses(loaded, prompts[3:], SamplingConfig(sampling, 12, 200))[0]
    assert fewer == {number: one[number] for number in (3, 4)}
    other = generate_responses(loaded, prompts, SamplingConfig(sampling, 12, 200, seed=7))[0]
    assert (other == one) is (not sampling.do_sample)


def test_a_prompt_without_room_is_skipped_and_named(models, rows):
    prompts, _ = read_prompts([rows])
    found, skipped = generate_responses(
        load(models["start"]), prompts, SamplingConfig(max_new_tokens=10, max_length=30)
    )
    assert 0 < len(found) < 5 and len(found) + len(skipped) == 5
    assert all(
        reason.startswith("too_long: ") and reason.endswith("room for 20") for _, reason in skipped
    )


def test_what_is_skipped_is_reported_in_a_line_for_each_reason():
    rows = [
        ("f:1", "too_long: 9"),
        ("f:2", "wrong_keys: x"),
        ("f:3", "too_long: 8"),
        ("f:4", "too_long: 7"),
        ("f:1", "too_long: 9"),
    ]
    assert skipped_summary(rows) == [
        "left out: 3 (f:1: too_long: 9; f:3: too_long: 8; ...)",
        "left out: 1 (f:2: wrong_keys: x)",
    ]
    assert skipped_summary([]) == []


def test_judges_add_up(models, tmp_path):
    prompts = [Prompt("f:1", 0, [{"role": "user", "content": "hello"}], "4")]
    responses = [Response("hello", "the answer is 4", [5, 6], True)]
    own = tmp_path / "own.py"
    own.write_text(
        "def score(responses, lengths): return [len(r) + n / 10 for r, n in zip(responses, "
        "lengths)]\n"
    )
    functions = Rewards(["gsm8k", f"{own}:score"], [1.0, 2.0])
    [(alone, parts)] = Judge(rewards=functions)(prompts, responses, 8)
    assert alone == pytest.approx(10 + 2 * 15.2) and parts == {"gsm8k": 10.0, "score": 15.2}
    model = load_reward_model(models["judge"])
    [(by_model, only)] = Judge(model)(prompts, responses, 8)
    [(both, all_parts)] = Judge(model, functions)(prompts, responses, 8)
    assert only == {"reward_model": by_model} and both == pytest.approx(alone + by_model)
    assert all_parts == parts | only
    with pytest.raises(ValueError, match="nothing to judge by"):
        Judge()


def test_the_reward_model_reads_the_whole_conversation(models, tmp_path):
    """As score.py reads it: the same number for the same row."""
    messages = [{"role": "user", "content": "hello"}]
    responses = [Response("", text, [1], True) for text in ("hi there", "how are you?")]
    found = Judge(load_reward_model(models["judge"]))(
        [Prompt("f:1", 0, messages)] * 2, responses, 8
    )
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(
            json.dumps({"messages": [*messages, {"role": "assistant", "content": one.text}]}) + "\n"
            for one in responses
        )
    )
    model, tokenizer, conversation = load_reward_model(models["judge"])
    rows = list(rows_to_score([str(file)], conversation, 200))
    score(model, rows, tokenizer.pad_token_id)
    assert [value for value, _ in found] == [pytest.approx(row.scores[0], abs=1e-5) for row in rows]
    assert abs(found[0][0] - found[1][0]) > 1e-3


def test_what_only_one_model_has_responded_to_is_not_compared():
    prompts = [Prompt(f"f:{n}", n, [{"role": "user", "content": "q"}]) for n in range(3)]
    short, long = Response("q", "a", [1], True), Response("q", "b", [1, 2], True)
    judge = Judge(rewards=Rewards(["length"]))
    found, skipped = compare(prompts, {0: short, 1: long, 2: long}, {0: long, 2: short}, judge, 10)
    assert [(row.prompt.number, row.result) for row in found] == [
        (0, "loss"),
        (2, "win"),
    ] and not skipped


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("coati.recipes.verbs.compare")


@pytest.fixture
def run(script, models, rows, capsys):
    """Run the script's main in this process: (what it printed, standard error)."""

    def run(*argv, trained="trained", start=("--start_path", models["start"])):
        argv = [
            "--model_path",
            models.get(trained, trained),
            *start,
            "--input",
            rows,
            "--max_new_tokens",
            "8",
            *argv,
        ]
        script.main(parse_compare(argv))
        return capsys.readouterr()

    return run


def test_the_script_compares_and_writes_every_prompt(run, models, tmp_path):
    output = tmp_path / "out.jsonl"
    shown = run(
        "--rm_path",
        models["judge"],
        "--output",
        str(output),
        "--temperature",
        "1",
        "--top_p",
        "0.9",
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 5 and "on 5 prompts" in shown.out
    for line in lines:
        assert line["start"]["parts"] == {"reward_model": line["start"]["score"]}
        assert line["difference"] == line["trained"]["score"] - line["start"]["score"]
        expected = {True: "win", False: "loss"}[line["difference"] > 0]
        same = line["start"]["response"] == line["trained"]["response"]
        assert line["result"] == ("tie" if same else expected) and line["start"]["tokens"] <= 8
    wins = sum(line["result"] == "win" for line in lines)
    assert f"{wins} wins" in shown.out and shown.out.splitlines()[-1].startswith("distinct_2 ")


def test_a_model_against_itself_ties_everywhere(run, models):
    shown = run("--reward_functions", "length", "--temperature", "1", trained="start")
    assert "win rate 0.500 on 5 prompts" in shown.out and "0 wins, 0 losses, 5 ties" in shown.out
    assert "largest" not in shown.out


def test_an_adapter_is_compared_with_its_base(run, models):
    given, found = (
        run("--rm_path", models["judge"], trained="adapter", **start)
        for start in ({}, {"start": ()})
    )
    assert given.out == found.out and "5 ties" not in found.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"trained": "/nowhere"}, "--model_path /nowhere: no such directory"),
        ({"start": ("--start_path", "/nowhere")}, "--start_path /nowhere: no such directory"),
        ({"start": ()}, "--start_path is required"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_its_flag(run, words, message):
    with pytest.raises(ValueError, match=message):
        run("--reward_functions", "length", **words)


def test_other_errors_name_their_flag_too(run, models, rows):
    with pytest.raises(ValueError, match="--rm_path .*no scalar head"):
        run("--rm_path", models["start"])
    with pytest.raises(
        ValueError, match="reward gsm8k raised ValueError: the row has no gt_answer"
    ):
        run("--reward_functions", "gsm8k")
    with pytest.raises(ValueError, match="no prompt could be compared"):
        run("--reward_functions", "length", "--max_length", "9")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model_path is required"),
        (["--model_path", "m"], "--input is required"),
        (["--model_path", "m", "--input", "f"], "nothing judges the responses"),
        (
            ["--model_path", "m", "--input", "f", "--reward_functions", "gsm9k"],
            "did you mean gsm8k",
        ),
        (
            [
                "--model_path",
                "m",
                "--input",
                "f",
                "--reward_functions",
                "length",
                "--reward_weights",
                "1",
                "2",
            ],
            "--reward_weights has 2 values",
        ),
        (
            [
                "--model_path",
                "m",
                "--input",
                "f",
                "--rm_path",
                "r",
                "--max_new_tokens",
                "99",
                "--max_length",
                "99",
            ],
            "leaves no room",
        ),
    ],
)
def test_bad_flags_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_compare(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_script_is_short():
    assert SCRIPT.read_text().count("\n") <= 40


def test_nothing_is_left_of_the_scripts_errors_but_a_line(models, rows):
    import os
    import subprocess

    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    where = ["--start_path", models["start"], "--model_path", "/nowhere", "--input", rows]
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            *where,
            "--reward_functions",
            "length",
            "--max_new_tokens",
            "2",
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "compare.py: error: --model_path /nowhere"
    )
    assert "Traceback" not in done.stderr
