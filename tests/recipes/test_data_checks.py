"""Prompts and the conversations beside them: what is left out and counted, what is refused before a
model is loaded."""

import json
from dataclasses import replace

import pytest

from coati.cli.rollouts import parse_ppo
from coati.dataset.chat.conversation import setup_conversation_template
from coati.dataset.load.collator import DataCollatorForPromptDataset
from coati.parallel.plugins import ParallelOptions
from coati.recipes.data import epoch_order, evaluation_rows, ptx_rows, training_rows
from coati.recipes.data_checks import check_prompts
from coati.recipes.resume import Resume
from coati.recipes.reward_sets import check_rewarded
from coati.recipes.run import Run
from coati.rewards.scorer import Rewards
from tests.end_to_end.inputs import prepare
from tests.tiny import tiny_tokenizer


def line(question: str, *turns: str, **more) -> dict:
    said = [{"from": "human", "content": question}]
    said += [
        {"from": ("assistant", "human")[i % 2], "content": text} for i, text in enumerate(turns)
    ]
    return {"messages": said} | more


ROWS = [
    line("1 + 1?", gt_answer="2"),
    line("2 + 2?", "4", gt_answer="4"),
    line("Hi", "Hello!", "How are you?", "Fine.", gt_answer="-"),
    line("tell me " * 60, gt_answer="7"),
]


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(rows=ROWS, name="prompts.jsonl"):
        text = (
            "".join(json.dumps(row) + "\n" for row in rows)
            if name.endswith("l")
            else json.dumps(rows)
        )
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def rows():
    """``rows(path, words)``: the run and the rows of ``--prompt_dataset``."""

    def read(path, *words):
        settings = parse_ppo(
            ["--pretrain", "m", "--prompt_dataset", path, "--reward_functions", "length", *words]
        )
        tokenizer = tiny_tokenizer()
        template = setup_conversation_template(tokenizer, {})
        run = Run(settings, ParallelOptions(), Resume(), tokenizer, template)
        return run, training_rows(run, "prompt", "prompt_dataset")

    return read


SHORT = ["--max_length", "100", "--max_seq_len", "20"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json"])
def test_raw_prompts_lose_a_last_answer_and_long_ones_are_left_out_both_counted(
    raw, rows, capsys, name
):
    _, prompts = rows(raw(name=name), *SHORT)
    found = prompts.rows
    assert found["gt_answer"] == ["2", "4", "-"] and max(found["seq_length"]) <= 80
    texts = found["inputs_decode"]
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts)
    assert "4<|im_end|>" not in texts[1]
    assert "Hello!" in texts[2] and "How are you?" in texts[2] and "Fine." not in texts[2]
    told = "".join(capsys.readouterr())
    assert "2 of 3 prompts ended with a response, which was left out" in told
    assert "too_long" in told


def test_a_run_that_compares_with_no_ground_truth_does_not_speak_of_any(raw, rows, capsys):
    """Some rows have one, which a reward model or a length has no use for."""
    some = [line(f"{i} + 1?", **({"gt_answer": "2"} if i % 2 else {})) for i in range(60)]
    path = raw(some)
    rows(path, *SHORT)
    first = "".join(capsys.readouterr())
    rows(path, *SHORT)  # from the cache
    told = first + "".join(capsys.readouterr())
    assert "training rows written 60" in told
    assert not any(word in told for word in ("gt_answer", "ground truth", "verifiable"))


def test_where_the_room_of_a_prompt_comes_from(raw, rows, capsys):
    rows(raw(), *SHORT)
    told = capsys.readouterr().err
    assert "prompts may have 80 tokens: --max_length 100 less --max_seq_len 20" in told


def test_rows_of_another_type_name_the_commands_that_read_them(raw, rows):
    with pytest.raises(ValueError) as refused:
        rows(raw([{"source": "a", "Target": "b"}] * 4), *SHORT)
    said = str(refused.value)
    assert "source_target rows, for --type sft or text, not prompt" in said
    assert "sft: coati sft; preference: coati rm, dpo and orpo" in said
    assert "--max_bad_ratio of coati prepare" in said  # no flag of a trainer
    with pytest.raises(ValueError) as refused:
        rows(raw([{"nonsense": 1}] * 4, "other.jsonl"), *SHORT)
    assert "coati orpo" not in str(refused.value)


def test_what_leaves_a_last_answer_out_is_in_the_report(raw, rows, tmp_path):
    rows(raw(), *SHORT)
    (report,) = (tmp_path / "cache").rglob("report.json")
    assert json.loads(report.read_text())["traits"]["answer left out"] == 2


def test_prepared_prompts_that_leave_no_room_are_left_out_and_counted(rows, tmp_path, capsys):
    path = prepare(
        tmp_path / "p",
        "".join(json.dumps(row) + "\n" for row in ROWS),
        max_length=400,
        type="prompt",
    )
    _, whole = rows(path)
    assert len(whole) == 4 and "longer than" not in capsys.readouterr().err
    _, found = rows(path, *SHORT)
    assert len(found) == 3 and found.sizes == [3]
    said = capsys.readouterr().err
    assert (
        "--prompt_dataset: 1 of 4 rows are longer than 80 tokens (--max_length 100 less "
        "--max_seq_len 20)" in said
    )
    batch = DataCollatorForPromptDataset(tiny_tokenizer(), 80)([*found.rows])
    assert batch["input_ids"].shape[1] <= 80 and batch["gt_answer"] == ["2", "4", "-"]
    with pytest.raises(
        ValueError, match="longer than 5 tokens .*nothing is left; raise --max_length"
    ):
        rows(path, "--max_length", "25", "--max_seq_len", "20")


def test_rows_of_another_type_are_refused(rows, tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS[1:3])
    answers, prompts = (
        prepare(tmp_path / name, text, max_length=400, type=name) for name in ("sft", "prompt")
    )
    with pytest.raises(
        ValueError,
        match="--prompt_dataset .* is prepared for sft .*coati prepare --type prompt",
    ):
        rows(answers)
    run, _ = rows(prompts, "--ptx_dataset", prompts, "--ptx_coef", "0.1")
    with pytest.raises(
        ValueError, match="--ptx_dataset .* has no labels: prepared for prompt.*--type sft"
    ):
        ptx_rows(run)


def test_conversations_beside_them_are_not_cut_to_the_prompts_number(rows, tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS[1:3])
    answers, prompts = (
        prepare(tmp_path / name, text, max_length=400, type=name) for name in ("sft", "prompt")
    )
    run, found = rows(prompts, "--ptx_dataset", answers, "--ptx_coef", "0.1", "--max_samples", "1")
    assert len(found) == 1 and len(ptx_rows(run)) == 2
    assert found.folders == [prompts] and ptx_rows(run).folders == [answers]
    run, _ = rows(prompts, "--ptx_dataset", answers)
    assert ptx_rows(run) is None  # --ptx_coef is 0


def test_a_mixture_counts_only_the_rows_that_are_not_too_long(rows, tmp_path):
    """Of the four rows in each directory the last is too long: sets of three and three."""
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    paths = [prepare(tmp_path / name, text, max_length=400, type="prompt") for name in ("a", "b")]
    run, found = rows("", "--prompt_dataset", *paths, "--dataset_weights", "1", "2", *SHORT)
    assert found.sizes == [3, 3] and len(found) == 6
    mixture = epoch_order(run, found).mixture
    assert mixture.counts() == [2, 4]
    assert sorted(number >= 3 for number in mixture.rows(42, 0)) == [False] * 2 + [True] * 4


def test_evaluation_prompts_are_prompts(raw, rows, tmp_path):
    path = prepare(
        tmp_path / "p",
        "".join(json.dumps(row) + "\n" for row in ROWS),
        max_length=400,
        type="prompt",
    )
    run, _ = rows(path, *SHORT, "--eval_prompt_dataset", path)
    found = evaluation_rows(run, "prompt")
    assert len(found) == 3 and "gt_answer" in found.rows.column_names


def test_too_few_prompts_for_an_episode(rows, tmp_path, monkeypatch):
    path = prepare(
        tmp_path / "p",
        "".join(json.dumps(row) + "\n" for row in ROWS),
        max_length=400,
        type="prompt",
    )
    small = ["--num_collect_steps", "2", "--train_batch_size", "1", "--accumulation_steps", "2"]
    check_prompts(*rows(path, *small, "--experience_batch_size", "2"))
    run, found = rows(path, *small, "--experience_batch_size", "3")
    with pytest.raises(
        ValueError,
        match="holds 4 prompts, an episode takes 6 .*x --experience_batch_size 3 x 1 data",
    ):
        check_prompts(run, found)
    run, found = rows(path, *small, "--experience_batch_size", "2", "--ptx_batch_size", "3")
    with pytest.raises(ValueError, match="--ptx_dataset holds 4 rows, one step takes 6"):
        check_prompts(run, found, ptx=found)


def test_ground_truths_that_are_missing(raw, rows):
    _, found = rows(raw([*ROWS[:2], line("And now?")]))
    check_rewarded(found, None)
    check_rewarded(None, Rewards(["gsm8k"]))
    check_rewarded(found, Rewards(["length"]))
    check_rewarded(replace(found, rows=found.rows.select([0, 1])), Rewards(["gsm8k"]))
    with pytest.raises(
        ValueError, match="1 of 3 prompts have no gt_answer .*the first: row 2.*gsm8k, length"
    ):
        check_rewarded(found, Rewards(["gsm8k", "length"]))
    with pytest.raises(
        ValueError, match="--eval_prompt_dataset has no gt_answer, which --reward_functions gsm8k"
    ):
        without = replace(found, rows=found.rows.remove_columns("gt_answer"))
        check_rewarded(without, Rewards(["gsm8k"]), "eval_prompt_dataset")
