"""Rows, rollouts and samples longer than the model has positions: refused by name before weights
are read where a table of positions ends, told once where rotary embeddings go on."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from coati.models import loading
from coati.recipes import defaults
from coati.utils.logging import forget_warnings
from coati.utils.transformers_compat import masks_packs_itself
from tests.end_to_end.malformed import Place, ended, good_words
from tests.tiny import tiny_llama, tiny_tokenizer

POSITIONS = 64
TRAINERS = (
    *("sft", "pretrain", "rm", "dpo", "orpo", "kto", "gkd", "ilql"),
    *("ppo", "grpo", "online-dpo"),
)


def said(role: str, text: str) -> dict:
    return {"from": role, "content": text}


def rows_of(kind: str, words: int, rows: int = 8) -> str:
    """``rows`` rows of about ``words`` words."""
    text = "word " * words
    made = []
    for number in range(rows):
        asked = [said("user", f"q{number}")]
        made.append(
            {
                "sft": {"messages": [*asked, said("assistant", text)]},
                "pairs": {
                    "context": asked,
                    "chosen": [said("assistant", text)],
                    "rejected": [said("assistant", "no")],
                },
                "prompts": {"messages": [said("user", f"q{number} {text}")]},
                "kto": {"prompt": f"q{number}", "completion": text, "label": number % 2 == 0},
            }[kind]
        )
    return "".join(json.dumps(row) + "\n" for row in made)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    config = GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        vocab_size=384,
        bos_token_id=2,
        eos_token_id=2,
    )
    for name, model in {"gpt2": GPT2LMHeadModel(config), "llama": tiny_llama()}.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in ("gpt2", "llama")}


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """``run(verb, model, words per row, more...)``: exit code and standard error. A word None takes
    a flag and its value away."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    forget_warnings()

    def start(verb: str, model: str, words: int, *more: str, without: tuple[str, ...] = ()):
        files = {}
        for kind in ("sft", "pairs", "prompts", "kto"):
            files[kind] = tmp_path / f"{kind}.jsonl"
            files[kind].write_text(rows_of(kind, words))
        none = Path("unused")
        place = Place(tmp_path, models[model], models["llama"], none, none, none, files)
        given = good_words(verb, place, str(models[model]), None)
        for flag in without:
            del given[given.index(flag) : given.index(flag) + 2]
        return ended(verb, [*given, *more])

    return start


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever reads weights fails the test."""

    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "_load", read)


@pytest.mark.parametrize("verb", TRAINERS)
def test_every_trainer_refuses_rows_beyond_a_table_before_weights_are_read(run, no_weights, verb):
    code, error = run(verb, "gpt2", 20, "--max_length", "256")
    assert code == 1 and "Traceback" not in error
    line = error[error.rindex("error: ") :]
    assert f"this gpt2 model has {POSITIONS} positions; use --max_length {POSITIONS}" in line
    if verb in ("ppo", "grpo", "online-dpo"):
        assert "--prompt_dataset: the longest prompt has " in line and "--max_seq_len" in line
    else:
        assert "--dataset: the longest row has " in line


@pytest.mark.parametrize("more", [["--dry_run"], ["--packing"], ["--eval_dataset", "sft.jsonl"]])
def test_in_trials_packs_and_evaluations_too(run, no_weights, tmp_path, more):
    short = tmp_path / "short.jsonl"
    short.write_text(rows_of("sft", 2))
    if "--eval_dataset" in more:
        more = [*more, "--dataset", str(short)]
    code, error = run("sft", "gpt2", 20, "--max_length", "256", *more)
    assert code == 1 and f"has {POSITIONS} positions" in error
    assert ("--eval_dataset: the longest row" in error) == ("--eval_dataset" in more)


def test_a_length_that_is_written_stands_also_if_it_is_the_default(run):
    """The script's own case: --max_length 512 and rows of 100 tokens and more."""
    code, error = run("sft", "gpt2", 20, "--max_length", "512")
    assert code == 1 and "the longest row has 1" in error


def test_the_default_follows_the_model_and_is_said_once(run, tmp_path):
    code, error = run("sft", "gpt2", 2, without=("--max_length",))
    assert code == 0, error
    assert error.count("--max_length is 64 by default here: this gpt2 model has 64 positions") == 1
    assert json.loads((tmp_path / "out" / "arguments.json").read_text())["max_length"] == 64


def test_a_default_that_leaves_no_room_for_a_response(run, no_weights):
    code, error = run("grpo", "gpt2", 2, "--max_seq_len", "64", without=("--max_length",))
    assert code == 1
    assert "--max_seq_len 64: this gpt2 model has 64 positions for prompt and response" in error


def test_rotary_embeddings_go_on_and_it_is_told_once(run, tmp_path):
    code, error = run("sft", "llama", 140, "--max_length", "2048")
    assert code == 0, error
    told = [line for line in error.splitlines() if "this llama model 512 positions" in line]
    assert len(told) == 1 and "beyond what its base has seen" in told[0]
    assert "use --max_length 512" in told[0]


def test_rollouts_stay_within_the_positions_of_any_model(run, no_weights):
    code, error = run("grpo", "llama", 20, "--max_length", "2048", "--max_seq_len", "450")
    assert code == 1
    assert "its response up to 450 (--max_seq_len), this llama model has 512 positions" in error


def test_a_teacher_with_fewer_positions_than_a_row_has_tokens(run, models, no_weights):
    teacher = ("--teacher", str(models["gpt2"]))
    code, error = run("gkd", "llama", 20, "--max_length", "256", *teacher)
    assert code == 1 and f"--teacher {models['gpt2']}: the longest row of --dataset has " in error
    assert f"this gpt2 model has {POSITIONS} positions; lower --max_length" in error


@pytest.mark.parametrize("fewer", ["student", "teacher"])
def test_responses_of_a_student_stay_within_both_models(run, models, fewer):
    """Prompts of 20 tokens and more, 64 positions, responses of up to 100 tokens."""
    student, teacher = ("gpt2", "llama") if fewer == "student" else ("llama", "gpt2")
    more = ("--max_length", "256", "--teacher", str(models[teacher]), "--gkd_lambda", "1")
    code, error = run("gkd", student, 2, *more, "--max_new_tokens", "100")
    assert code == 0, error


def test_a_reader_of_the_rollouts_with_fewer_positions(run, models, no_weights):
    for flag in ("--rm_pretrain", "--critic_pretrain"):
        code, error = run("ppo", "llama", 20, "--max_length", "256", flag, str(models["gpt2"]))
        assert code == 1
        assert f"{flag} {models['gpt2']}: a prompt with its response has " in error
        assert "this gpt2 model has 64 positions" in error


def test_a_prompt_with_another_row_s_response(run, no_weights, tmp_path):
    """KTO reads every prompt with the response of another row, too: 40 and 40 words."""
    file = tmp_path / "apart.jsonl"
    rows = [
        {"prompt": "a " * 22, "completion": "b", "label": True},
        {"prompt": "a", "completion": "b " * 22, "label": False},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    words = ["--dataset", str(file), "--max_length", "256"]
    code, error = run("kto", "gpt2", 2, *words)
    assert code == 1 and "with the response of another row (KTO's KL term) has " in error


def test_packs_are_longer_than_positions_since_those_begin_anew(run):
    code, error = run("sft", "gpt2", 2, "--max_length", "256", "--packing", "--batch_size", "1")
    if masks_packs_itself():
        assert code == 0, error
    else:  # transformers 4 has no mask for packs of this family
        assert code == 1 and "does not keep the rows of a pack apart" in error


def test_samples_at_evaluations_fit_into_the_positions(run):
    code, error = run(
        "sft",
        "gpt2",
        6,
        "--max_length",
        "64",
        "--eval_dataset",
        "sft.jsonl",
        "--eval_interval",
        "1",
    )
    assert code == 0, error


def test_inference_stays_within_them(run):
    for verb in ("chat", "compare"):
        code, error = run(verb, "gpt2", 2)
        assert code == 0, error
    code, error = run("compare", "gpt2", 30)
    assert code == 1 and "too_long" in error
    code, error = run("chat", "gpt2", 2, "--prompt", "word " * 30)
    assert code == 1 and "more than the 64 of --model_max_length or of the model" in error


def test_preparing_for_a_model(run, tmp_path):
    code, error = run("prepare", "gpt2", 2)
    assert code == 0, error
    assert "--max_length is 64 by default here: the positions of this gpt2 model" in error
    report = json.loads((tmp_path / "out-jsonl_output" / "report.json").read_text())
    assert report["max_length"] == 64


def test_preparing_longer_rows_is_told(run, tmp_path):
    code, error = run("prepare", "gpt2", 2, "--max_length", "128")
    assert code == 0, error
    assert "--max_length 128 is more than the positions of this gpt2 model, 64" in error


def test_settings_without_a_smaller_model_are_left_alone(models):
    from coati.cli.arguments import parse_sft

    words = ["--pretrain", str(models["llama"]), "--dataset", "x.jsonl", "--plugin", "ddp"]
    Path("x.jsonl").exists()
    words[3] = str(models["llama"] / "config.json")
    settings = parse_sft(words)
    assert defaults.within_model(settings) is settings  # 512 positions, 512 by default
