"""What a user meets who gives train_sft.py something wrong: one sentence, exit code not 0, nothing
that looks whole.

Each case is a real run of the script; the cases of a number of processes share a launch.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from coati.parallel.checkpoint import checkpoints
from coati.recipes.defaults import check_precision
from tests.distributed.spawn import run
from tests.end_to_end.inputs import write_model
from tests.end_to_end.worker import Ended, Fault, Run

CPU = {"CUDA_VISIBLE_DEVICES": ""}


@dataclass
class Place:
    """Where a case may put things: a folder of its own, the good model, the good data, a finished
    run's directory."""

    folder: Path
    model: str
    data: str
    finished: Path

    def file(self, name: str, content: object) -> str:
        path = self.folder / name
        path.write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )
        return str(path)

    def empty(self) -> str:
        (self.folder / "empty").mkdir()
        return str(self.folder / "empty")

    def other_model(self, **changes) -> str:
        return write_model(self.folder / "other", **changes)

    def broken_tokenizer(self, **changes) -> str:
        folder = self.folder / "tokenizer"
        shutil.copytree(self.model, folder)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes, indent=2))
        return str(folder)

    def remote_code(self) -> str:
        folder = self.folder / "remote"
        shutil.copytree(self.model, folder)
        config = json.loads((folder / "config.json").read_text())
        auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        (folder / "config.json").write_text(
            json.dumps(config | {"model_type": "unheard_of", "auto_map": auto_map})
        )
        (folder / "code.py").write_text("raise SystemExit('ran')")
        return str(folder)

    def cut(self, pattern: str, name: str = "epoch-0_step-2") -> str:
        """A copy of the finished run whose checkpoint ``name`` has half of its first file of that
        pattern."""
        shutil.copytree(self.finished, self.folder / "run")
        file = next((self.folder / "run" / name).rglob(pattern))
        os.truncate(file, file.stat().st_size // 2)
        return str(self.folder / "run" / name)


@dataclass(frozen=True)
class Case:
    """``words`` beside the good ones; ``said``: what standard error must hold, all of it; ``code``:
    the exit code."""

    words: Callable[[Place], list[str]]
    said: tuple[str, ...]
    code: int = 1


ONE = {
    "an empty directory as data": Case(
        lambda p: ["--dataset", p.empty()],
        ("--dataset", "no prepared rows found", "part-*", "run coati prepare"),
    ),
    "nothing left of a raw file": Case(
        lambda p: ["--dataset", p.file("raw.jsonl", '{"text": 1}\n{"messages": []}\n')],
        ("raw.jsonl", "raw.jsonl:1", "raw.jsonl:2"),
    ),
    "an output directory with a run in it": Case(
        lambda p: ["--save_dir", str(p.finished)],
        ("--save_dir", "already holds", "--checkpoint_path auto", "another directory"),
    ),
    "a tokenizer larger than the model's vocabulary": Case(
        lambda p: ["--pretrain", p.other_model(vocab_size=200), "--tokenizer_dir", p.model],
        ("the tokenizer has", "the model's vocabulary 200", "--tokenizer_dir"),
    ),
    "fewer rows than a step needs": Case(
        lambda p: ["--batch_size", "16", "--accumulation_steps", "2"],
        (
            "--dataset holds 31 rows, one step needs 32",
            "--batch_size 16",
            "--accumulation_steps 2",
            "lower one",
        ),
    ),
    "an unknown keyword of the plugin": Case(
        lambda p: ["--plugin_args", p.file("plugin.json", {"overlap_comunication": True})],
        (
            "--plugin_args",
            "zero2",
            "'overlap_comunication'",
            "did you mean 'overlap_communication'",
        ),
    ),
    "a checkpoint with truncated weights": Case(
        lambda p: ["--checkpoint_path", p.cut("model.safetensors")],
        (
            "--checkpoint_path",
            "epoch-0_step-2: modeling/model.safetensors has",
            "bytes",
            "Resume from an earlier one",
        ),
    ),
    "a checkpoint with a truncated optimizer": Case(
        lambda p: ["--checkpoint_path", p.cut("rank-00000.pt")],
        ("optimizer/rank-00000.pt has", "truncated or changed", "Resume from an earlier one"),
    ),
    "a checkpoint with a truncated state": Case(
        lambda p: ["--checkpoint_path", p.cut("running_states.json")],
        ("running_states.json:", "not valid JSON"),
    ),
    "no checkpoint at all": Case(
        lambda p: ["--checkpoint_path", str(p.folder)],
        ("--checkpoint_path", "no running_states.json; expected an epoch-E_step-S directory"),
    ),
    "a checkpoint of another model": Case(
        lambda p: [
            "--pretrain",
            p.other_model(hidden_size=32),
            "--checkpoint_path",
            str(p.finished / "epoch-0_step-2"),
        ],
        (
            "--checkpoint_path",
            "--pretrain",
            "must be the same as in the checkpoint",
            "--checkpoint_weights_only",
        ),
    ),
    "a checkpoint of other data": Case(
        lambda p: ["--max_samples", "20", "--checkpoint_path", str(p.finished / "epoch-0_step-2")],
        (
            "--checkpoint_path",
            "--max_samples default -> 20",
            "must be the same as in the checkpoint",
            "--checkpoint_weights_only",
        ),
    ),
    "a tokenizer class that transformers does not know": Case(
        lambda p: ["--tokenizer_dir", p.broken_tokenizer(tokenizer_class="LLaMATokenizer")],
        ("tokenizer_config.json:", "LLaMATokenizer", 'write "LlamaTokenizer"'),
    ),
    "a model with code of its own": Case(
        lambda p: ["--pretrain", p.remote_code(), "--tokenizer_dir", p.model],
        ("remote", "Python code of its own", "--trust_remote_code"),
    ),
    "a precision that the plugin lacks": Case(
        lambda p: ["--plugin", "gemini", "--mixed_precision", "fp32"],
        ("--plugin gemini has no fp32", "--mixed_precision", "--plugin zero2"),
        code=2,
    ),
    "a misspelled flag": Case(
        lambda p: ["--acumulation_steps", "2"], ("--acumulation_steps", "--accumulation_steps"), 2
    ),
}

THREE_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}
TWO = {
    "processes that tp, pp and sp do not divide": Case(
        lambda p: ["--plugin", "3d", "--tp", "2", "--pp", "2"],
        ("2 processes cannot be divided by --tp 2 x --pp 2 x --sp 1 = 4", "--nproc_per_node"),
        code=2,
    ),
    "heads that tp does not divide": Case(
        lambda p: ["--pretrain", p.other_model(**THREE_HEADS), "--plugin", "3d", "--tp", "2"],
        ("--tp 2", "3 attention heads cannot be divided by 2", "--plugin zero2"),
    ),
    "nothing left of a raw file": ONE["nothing left of a raw file"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, model, data):
    """``place(name)``: the Place of a case; all share one finished run of two steps and a
    checkpoint each."""
    folder = tmp_path_factory.mktemp("bad")
    finished = folder / "finished"

    def place(name: str) -> Place:
        mine = folder / name.replace(" ", "-")
        (mine / "out").mkdir(parents=True)
        return Place(mine, model, data["train"], finished)

    return place


def good_words(place: Place, save_dir: Path) -> list[str]:
    return [
        "--pretrain",
        place.model,
        "--dataset",
        place.data,
        "--plugin",
        "zero2",
        "--mixed_precision",
        "fp32",
        "--batch_size",
        "2",
        "--accumulation_steps",
        "2",
        "--max_length",
        "96",
        "--max_steps",
        "4",
        "--lr",
        "1e-3",
        "--save_interval",
        "1",
        "--save_dir",
        str(save_dir),
    ]


def launched(nproc: int, runs: dict[str, Run], folder: Path) -> dict[str, list[Ended]]:
    env = CPU | {"XDG_CACHE_HOME": str(folder)}
    ranks = run(nproc, "tests.end_to_end.worker:train_each", runs, env=env, timeout=200)
    return {name: [rank[name] for rank in ranks] for name in runs}


@pytest.fixture(scope="module")
def finished(place):
    """Runs in which something goes wrong on the way: (their place, name -> the ranks' ends)."""
    here = place("on the way")
    runs = {
        "finished": Run([*good_words(here, here.finished), "--max_steps", "2"]),
        "nan": Run(good_words(here, here.folder / "nan"), Fault("loss", 5, what="nan", rank=1)),
    }
    return here, launched(2, runs, here.folder)


def ends(nproc: int, cases: dict[str, Case], place) -> dict[str, tuple[Place, list[Ended]]]:
    places = {name: place(f"{nproc} {name}") for name in cases}
    runs = {
        name: Run(
            [*good_words(places[name], places[name].folder / "out"), *case.words(places[name])]
        )
        for name, case in cases.items()
    }
    ended = launched(nproc, runs, next(iter(places.values())).folder)
    return {name: (places[name], ended[name]) for name in cases}


@pytest.fixture(scope="module")
def alone(finished, place):
    return ends(1, ONE, place)


@pytest.fixture(scope="module")
def together(place, finished):
    return ends(2, TWO, place)


def check(case: Case, place: Place, ranks: list[Ended]) -> None:
    assert [rank.code for rank in ranks] == [case.code] * len(ranks), ranks[0].err
    line = next(
        line for line in ranks[0].err.splitlines() if line.startswith("train_sft.py: error: ")
    )
    text = ranks[0].err[ranks[0].err.index(line) :]
    for part in case.said:
        assert part in text, text
    assert "Traceback" not in text and not ranks[0].rows
    assert not list((place.folder / "out").glob("modeling")) and not checkpoints(
        place.folder / "out"
    )


@pytest.mark.parametrize("name", ONE)
def test_one_process(alone, name):
    check(ONE[name], *alone[name])


@pytest.mark.parametrize("name", TWO)
def test_two_processes(together, name):
    check(TWO[name], *together[name])


def test_a_refused_run_leaves_the_earlier_one_as_it_was(alone, finished):
    place, _ = finished
    assert [path.name for path in checkpoints(place.finished)] == [
        "epoch-0_step-1",
        "epoch-0_step-2",
    ]
    assert json.loads((place.finished / "arguments.json").read_text())["max_steps"] == 2
    assert len((place.finished / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_loss_that_is_not_a_number_stops_all_and_keeps_the_last_checkpoint(finished):
    place, ended = finished
    save_dir = place.folder / "nan"
    for rank in ended["nan"]:
        assert rank.code == 1 and "Traceback" not in rank.err
        assert "the loss of this step is nan (step 3, epoch 0, rows " in rank.err
        for row in rank.rows[2]:
            assert f" {row}" in rank.err[rank.err.index("rows ") :]
        assert "is untouched" in rank.err and "lower --lr" in rank.err
    assert [path.name for path in checkpoints(save_dir)] == ["epoch-0_step-1", "epoch-0_step-2"]
    assert not (save_dir / "modeling").exists()


def test_auto_passes_over_a_truncated_checkpoint_and_says_so(finished, tmp_path):
    place, _ = finished
    mine = Place(tmp_path, place.model, place.data, place.finished)
    mine.cut("rank-00001.pt")
    words = [*good_words(mine, tmp_path / "run"), "--checkpoint_path", "auto"]
    ended = launched(2, {"auto": Run(words)}, tmp_path)["auto"]
    assert [rank.code for rank in ended] == [0, 0] and len(ended[0].rows) == 3
    assert (
        "skipped: " in ended[0].err
        and "epoch-0_step-2: optimizer/rank-00001.pt has" in ended[0].err
    )
    assert "going on from" in ended[0].err and "epoch-0_step-1" in ended[0].err


def meet(seconds: float) -> str:
    """In a worker: what is said when the others do not come."""
    from coati.parallel.launch import LaunchFailed, launch

    try:
        launch(handshake_s=seconds)
    except LaunchFailed as error:
        return str(error)
    return "all met"


@pytest.mark.parametrize("there, missing", [("0", "rank 1, 2 of 3"), ("1", "rank 1 on ")])
def test_a_rank_that_does_not_appear_is_named(there, missing):
    env = CPU | {"WORLD_SIZE": "3", "RANK": there}
    said = run(1, "tests.end_to_end.test_bad_input:meet", 2.0, env=env, timeout=60)[0]
    assert missing in said and "2 s" in said


def test_bf16_on_a_card_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old Card")
    with pytest.raises(
        ValueError, match="--mixed_precision bf16: Old Card has no bf16; use --mixed_precision fp16"
    ):
        check_precision("bf16")
    check_precision("fp16")
