"""Prepared rows with weights of their tokens beside rows without: the missing ones weigh 1, in
every way to run."""

import json
from pathlib import Path

import pytest

from coati.dataset.load.loader import load_tokenized_dataset
from tests.end_to_end.inputs import metrics, prepare, weights, write_model
from tests.end_to_end.malformed import ended

HALF = {"weight": 0.5}


def talks(first: int, rows: int, **more) -> str:
    """Conversations of two rounds, the second response with ``more``."""
    lines = []
    for number in range(first, first + rows):
        said = [f"q{number}", f"a{number}", "again", f"b{number} and so on"]
        roles = ("user", "assistant", "user", "assistant")
        turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        turns[-1] |= more
        lines.append(json.dumps({"messages": turns}) + "\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """``plain`` and ``weighted`` rows; ``ones`` are the plain ones with weights of 1."""
    folder = tmp_path_factory.mktemp("mixed")
    plain = prepare(folder / "plain", talks(0, 11))
    rows = load_tokenized_dataset([plain])
    ones = [[1.0] * length for length in rows["seq_length"]]
    weighted = prepare(folder / "weighted", talks(11, 9, **HALF))
    kind = load_tokenized_dataset([weighted]).features["loss_weights"]
    told = rows.add_column("loss_weights", ones).cast_column("loss_weights", kind)
    told.save_to_disk(str(folder / "ones" / "part-00000"))
    for name, text in (("plain", talks(0, 11)), ("weighted", talks(11, 9, **HALF))):
        (folder / f"{name}.jsonl").write_text(text)
    return {
        "model": write_model(folder / "model"),
        "plain": plain,
        "ones": str(folder / "ones"),
        "weighted": weighted,
        "raw plain": str(folder / "plain.jsonl"),
        "raw weighted": str(folder / "weighted.jsonl"),
    }


def test_the_column_is_there_only_where_a_weight_is(places):
    has = {
        name: "loss_weights" in load_tokenized_dataset([places[name]]).column_names
        for name in ("plain", "ones", "weighted")
    }
    assert has == {"plain": False, "ones": True, "weighted": True}
    mixed = load_tokenized_dataset([places["plain"], places["weighted"]])
    assert mixed[0]["loss_weights"] is None and 0.5 in mixed[len(mixed) - 1]["loss_weights"]


def run(places, save_dir: Path, first: str, *more: str) -> Path:
    words = ["--pretrain", places["model"], "--max_length", "128", "--batch_size", "2"]
    words += ["--accumulation_steps", "2", "--lr", "1e-3", "--mixed_precision", "fp32"]
    words += ["--dataset", places[first], places["weighted"], "--plugin", "ddp"]
    # "plain" among the words is the kind of rows without weights that this run has.
    given = [
        places[first if word == "$plain" else word[1:]] if word[0] == "$" else word for word in more
    ]
    code, said = ended("sft", [*words, "--save_dir", str(save_dir), *given])
    assert code == 0, said
    return save_dir


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--packing", "--batch_size", "1", "--accumulation_steps", "1"),
        ("--dataset_weights", "1", "2"),
        ("--eval_dataset", "$plain", "$weighted", "--eval_interval", "1", "--max_steps", "2"),
        ("--eval_ratio", "0.3", "--max_steps", "2"),
        ("--max_samples", "14"),
        ("--disable_loss_mask", "--max_steps", "2"),
    ],
    ids=lambda more: " ".join(more[:1]),
)
def test_rows_without_weights_weigh_one(places, tmp_path, more):
    mixed = run(places, tmp_path / "mixed", "plain", *more)
    told = run(places, tmp_path / "told", "ones", *more)
    assert metrics(mixed) == metrics(told) != []
    assert weights(mixed) == weights(told) != {}


def test_the_weights_of_the_others_reach_the_loss(places, tmp_path):
    mixed = metrics(run(places, tmp_path / "a", "plain", "--max_steps", "1"))
    heavy = prepare(tmp_path / "heavy", talks(11, 9, weight=1))
    other = metrics(run(places | {"weighted": heavy}, tmp_path / "b", "plain", "--max_steps", "1"))
    assert mixed[0]["train/loss"] != other[0]["train/loss"]


def test_a_run_goes_on_exactly(places, tmp_path):
    steps = ("--max_steps", "6", "--save_interval", "2", "--keep_last_k", "9")
    whole = run(places, tmp_path / "whole", "plain", *steps)
    folder = next(whole.glob("epoch-*_step-2"))
    rest = run(places, tmp_path / "rest", "plain", *steps, "--checkpoint_path", str(folder))
    assert weights(rest) == weights(whole) != {}


def test_streams_of_both(places, tmp_path):
    """In the order of the files: the steps are those of prepared rows that are not shuffled."""
    more = ["--streaming", "--stream_workers", "0", "--shuffle_buffer", "0", "--max_steps", "5"]
    raw = {"plain": places["raw plain"], "weighted": places["raw weighted"]}
    first = run(places | raw, tmp_path / "a", "plain", *more)
    packed = run(places | raw, tmp_path / "b", "plain", *more, "--packing", "--batch_size", "1")
    assert weights(first) != weights(packed)
    losses = [line["train/loss"] for line in metrics(first) if "train/loss" in line]
    # One file that holds the rows of both gives the same steps.
    text = Path(places["raw plain"]).read_text() + Path(places["raw weighted"]).read_text()
    (tmp_path / "one.jsonl").write_text(text)
    one = {"plain": str(tmp_path / "one.jsonl"), "weighted": places["raw plain"]}
    again = metrics(run(places | one, tmp_path / "c", "plain", *more))
    assert [line["train/loss"] for line in again if "train/loss" in line][:5] == losses[:5]
