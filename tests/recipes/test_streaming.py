"""Runs with --streaming, from the command line: nothing prepared, gone on with exactly, other files
refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from coati.dataset.stream import row_stream, source_order
from coati.recipes.prepared import is_raw
from tests.dataset.stream.streams import talk, write_files, write_lines
from tests.end_to_end.inputs import metrics, weights, write_model
from tests.end_to_end.malformed import ended


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch, tmp_path):
    monkeypatch.setattr(row_stream, "WINDOW", 15)
    monkeypatch.setattr(source_order, "CHUNK_ROWS", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def words(model, tmp_path):
    """``words(rows, save_dir, more...)``: 9 steps of 4 rows, a checkpoint every 3; of 32 rows."""
    write_files(tmp_path / "rows", 13, 1, 21, bad=(2, 14, 30))

    def words(save_dir: str, *more: str, rows: str = "rows") -> list[str]:
        given = {
            "pretrain": model,
            "dataset": str(tmp_path / rows),
            "plugin": "ddp",
            "mixed_precision": "fp32",
            "batch_size": "2",
            "accumulation_steps": "2",
            "max_length": "128",
            "lr": "1e-3",
            "max_steps": "9",
            "save_interval": "3",
            "max_bad_ratio": "0.1",
            "shuffle_buffer": "8",
            "stream_workers": "0",
            "save_dir": str(tmp_path / save_dir),
        }
        asked = [word for name, value in given.items() for word in (f"--{name}", value)]
        return [*asked, "--streaming", *more]

    return words


@pytest.fixture
def whole(words, tmp_path):
    """The directory of a run to its end."""
    assert ended("sft", words("whole"))[0] == 0
    return tmp_path / "whole"


def checkpoint(folder: Path, step: int) -> str:
    return str(next(folder.glob(f"epoch-*_step-{step}")))


def test_a_run_goes_on_from_its_checkpoints_to_the_bit_and_prepares_nothing(whole, words, tmp_path):
    for step in (3, 6):
        more = ["--checkpoint_path", checkpoint(whole, step), "--stream_workers", "1"]
        assert ended("sft", words(f"from-{step}", *more))[0] == 0
        assert weights(tmp_path / f"from-{step}") == weights(whole) != {}
        rest = [line for line in metrics(whole) if line["step"] > step]
        assert metrics(tmp_path / f"from-{step}") == rest
    assert [line["epoch"] for line in metrics(whole) if "epoch" in line] == [0] * 7 + [1, 1]
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_files_that_were_moved_are_the_same(whole, words, tmp_path):
    shutil.move(tmp_path / "rows", tmp_path / "elsewhere")
    more = ["--checkpoint_path", checkpoint(whole, 6)]
    assert ended("sft", words("moved", *more, rows="elsewhere"))[0] == 0
    assert weights(tmp_path / "moved") == weights(whole)


@pytest.mark.parametrize(
    "change, said",
    [
        ("edit", "part-2.jsonl holds other bytes than it did"),
        ("add", "it read 3 files, now there are 4 (new: "),
        ("remove", "it read 3 files, now there are 2 (gone: "),
        ("buffer", "--shuffle_buffer 8 -> 9: must be the same"),
        ("seed", "--seed 42 -> 43: must be the same"),
        ("prepared", "--streaming true -> false: must be the same"),
    ],
)
def test_another_stream_is_refused_by_name(whole, words, tmp_path, change, said):
    more = ["--checkpoint_path", checkpoint(whole, 3)]
    given = words("other", *more)
    file = tmp_path / "rows" / "part-2.jsonl"
    if change == "edit":
        file.write_text(file.read_text().replace("row 33", "row 34"))
    elif change == "add":
        write_lines(tmp_path / "rows" / "part-3.jsonl", [talk("new")])
    elif change == "remove":
        file.unlink()
    elif change == "prepared":
        for flag in ("--streaming", "--shuffle_buffer", "8", "--stream_workers", "0"):
            given.remove(flag)
    else:
        given += {"buffer": ["--shuffle_buffer", "9"], "seed": ["--seed", "43"]}[change]
    code, error = ended("sft", given)
    assert code == 1 and said in error


def test_an_evaluation_comes_with_the_end_of_each_epoch(words, tmp_path):
    write_lines(tmp_path / "eval.jsonl", [talk(f"held {number}") for number in range(4)])
    more = ["--eval_dataset", str(tmp_path / "eval.jsonl"), "--max_steps", "17"]
    assert ended("sft", words("run", *more, "--save_interval", "0"))[0] == 0
    steps = [line["step"] for line in metrics(tmp_path / "run") if "eval/loss" in line]
    assert steps == [0, 8, 16, 17]


@pytest.mark.parametrize(
    "more",
    [
        ["--packing"],
        ["--dry_run"],
        ["--disable_loss_mask", "--shuffle_buffer", "0"],
    ],
)
def test_other_ways_to_run(words, tmp_path, more):
    code, error = ended("sft", words("run", *more))
    assert code == 0, error
    if "--dry_run" in more:
        assert "rows of a stream, as many as 9 steps take" in error
        assert "Nothing was kept" in error and not list((tmp_path / "run").glob("epoch*"))


def test_several_streams_by_weight(words, tmp_path):
    write_files(tmp_path / "more", 9)
    both = [str(tmp_path / "rows"), str(tmp_path / "more"), "--dataset_weights", "1", "1"]
    given = words("run")
    place = given.index("--dataset")
    code, error = ended("sft", [*given[:place], "--dataset", *both, *given[place + 2 :]])
    assert code == 0, error
    state = json.loads((Path(checkpoint(tmp_path / "run", 9)) / "running_states.json").read_text())[
        "trainer"
    ]["stream"]
    read = [epoch * size + row for (epoch, _, row), size in zip(state["at"], (35, 9), strict=True)]
    assert abs(read[0] - read[1]) < 15 and sum(read) == state["drawn"]


def asked(number: int) -> list[dict]:
    return [{"role": "user", "content": f"question {number}"}]


@pytest.mark.parametrize("verb", ["rm", "dpo", "orpo", "kto"])
def test_preferences(words, tmp_path, verb):
    pairs = [
        {
            "prompt": asked(number),
            "chosen": [{"role": "assistant", "content": f"good {number}"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
        for number in range(20)
    ]
    judged = [
        {"prompt": asked(number), "completion": f"so {number}", "label": number % 2 == 0}
        for number in range(20)
    ]
    write_lines(tmp_path / "pairs.jsonl", judged if verb == "kto" else pairs)
    code, error = ended(verb, words("run", "--save_interval", "4", rows="pairs.jsonl"))
    assert code == 0, error
    more = ["--checkpoint_path", checkpoint(tmp_path / "run", 4)]
    assert ended(verb, words("again", *more, rows="pairs.jsonl"))[0] == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "run") != {}
    if verb == "kto":
        assert "10 are desirable and" in error or "desirable" in error


def test_distillation(words, model, tmp_path):
    """Which rows the student answers, and how, follows from the position in the stream."""
    teacher = write_model(tmp_path / "teacher", intermediate_size=48)
    more = ["--teacher", teacher, "--max_new_tokens", "9"]
    code, error = ended("gkd", words("run", *more))
    assert code == 0, error
    more += ["--checkpoint_path", checkpoint(tmp_path / "run", 6)]
    assert ended("gkd", words("again", *more))[0] == 0
    assert weights(tmp_path / "again") == weights(tmp_path / "run") != {}


def test_prepared_rows_and_rows_that_cannot_be_used_are_refused(words, tmp_path):
    (tmp_path / "made" / "part-00000").mkdir(parents=True)
    code, error = ended("sft", words("run", rows="made"))
    assert code == 1 and "--streaming reads raw rows" in error and "made is prepared" in error
    write_lines(tmp_path / "bad.jsonl", ["{"] * 30)
    code, error = ended("sft", words("run", rows="bad.jsonl"))
    assert code == 1 and "30 of the first 30 rows are malformed" in error
    assert "allow more with --max_bad_ratio\n" in f"{error.strip()}\n"  # a flag of this command


def test_a_folder_of_files_named_like_parts_is_raw(tmp_path):
    write_lines(tmp_path / "spark" / "part-00000.jsonl", [talk("row")])
    (tmp_path / "made" / "part-00000").mkdir(parents=True)
    assert is_raw(str(tmp_path / "spark")) and not is_raw(str(tmp_path / "made"))


def test_documents_and_conversations_mixed_by_weight(words, tmp_path):
    text = "\n".join(f"line {number} of a text without end" for number in range(200))
    (tmp_path / "book.txt").write_text(text)
    both = [str(tmp_path / "book.txt"), str(tmp_path / "rows"), "--dataset_weights", "1", "9"]
    given = words("run", "--max_length", "64")
    place = given.index("--dataset")
    given = [*given[:place], "--dataset", *both, *given[place + 2 :]]
    for more in (["--packing"], ["--packing", "false"]):
        again = [*given, *more, "--save_dir", str(tmp_path / more[-1])]
        code, error = ended("pretrain", again)
        assert code == 0, error
        rest = [*again, "--checkpoint_path", checkpoint(tmp_path / more[-1], 6)]
        assert ended("pretrain", [*rest, "--save_dir", str(tmp_path / "rest" / more[-1])])[0] == 0
        ours = weights(tmp_path / "rest" / more[-1])
        assert ours == weights(tmp_path / more[-1]) != {}
