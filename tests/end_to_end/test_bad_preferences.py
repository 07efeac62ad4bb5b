"""What a user of the preference scripts meets who gives them something wrong: rows, reward models,
references.

Each case is a real run of the script: one sentence, exit code not 0, nothing that looks whole. The
cases of a number of processes share a launch. What needs no more than flags is in tests/cli, other
cases are in test_preferences.py.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from coati.parallel.checkpoint import checkpoints
from tests.distributed.spawn import run
from tests.end_to_end.inputs import ROOT, prepare, short_lines, write_model
from tests.end_to_end.worker import Ended, Run

pytestmark = pytest.mark.matrix

SAMPLE = ROOT / "examples" / "data" / "preference.jsonl"
MAX_LENGTH = 160


@dataclass
class Place:
    """A folder of the case's own, the good model, prepared pairs with stored log-probs, and a
    finished reward model."""

    folder: Path
    model: str
    pairs: Path
    rewards: Path

    def raw(self, same: int = 0, most: int = 12) -> str:
        """A file of ``most`` pairs, in the first ``same`` of which chosen is rejected too."""
        rows = [json.loads(line) for line in short_lines(0, most, SAMPLE).splitlines()]
        for row in rows[:same]:
            row["rejected"] = row["chosen"]
        path = self.folder / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def judged(self) -> str:
        return str(self.pairs.parent / "kto" / "arrow")

    def other_model(self, **changes) -> str:
        return write_model(self.folder / "other", **changes)

    def reward_model(self, kind: str = "RewardModel", width: int | None = None) -> str:
        """A directory with a scalar head on the good model; ``width``: the head is one of states of
        this width."""
        import torch
        from safetensors.torch import load_file, save_file

        from coati import models
        from coati.models.loading import load_causal_lm

        folder = self.folder / kind
        shutil.copytree(self.model, folder)
        scalar = getattr(models, kind)(backbone=load_causal_lm(self.model, dtype="fp32"))
        scalar.config.save_pretrained(folder)
        head = {f"score.{name}": tensor for name, tensor in scalar.score.state_dict().items()}
        state = load_file(folder / "model.safetensors") | head
        if width:
            state["score.weight"] = torch.zeros(1, width)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    def of_another_family(self) -> str:
        from transformers import GPT2Config, GPT2LMHeadModel

        from coati.models import RewardModel

        backbone = GPT2LMHeadModel(
            GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=384, n_positions=256)
        )
        backbone.save_pretrained(self.folder / "gpt2")
        RewardModel(backbone=backbone).config.save_pretrained(self.folder / "gpt2")
        return str(self.folder / "gpt2")

    def stored(self) -> Path:
        """A copy of the pairs, and of the log-probs that are stored beside them."""
        shutil.copytree(self.pairs, self.folder / "pairs")
        return self.folder / "pairs"

    def cut_off(self) -> str:
        """The same with half of the file of log-probs."""
        file = next((self.stored() / "reference").glob("*.npy"))
        os.truncate(file, file.stat().st_size // 2)
        return str(self.folder / "pairs")


@dataclass(frozen=True)
class Case:
    """``words`` beside the good ones; ``said``: what standard error must hold, all of it; ``code``:
    the exit code."""

    script: str
    words: Callable[[Place], list[str]]
    said: tuple[str, ...]
    code: int = 1


ONE = {
    "the same answer twice in most pairs": Case(
        "train_dpo.py",
        lambda p: ["--dataset", p.raw(same=9)],
        (
            "of the first 12 pairs have the same response as chosen and as rejected",
            "a share of 0.5",
            "pairs.jsonl:1",
            "column",
            "--max_bad_ratio",
        ),
    ),
    "prompts longer than max_length": Case(
        "train_dpo.py",
        lambda p: ["--dataset", p.raw(), "--max_length", "12"],
        ("nothing left", "12 rows", "does not fit into max_length", "raise max_length"),
    ),
    "a reward checkpoint of another width": Case(
        "train_rm.py",
        lambda p: [
            "--pretrain",
            p.other_model(hidden_size=32),
            "--checkpoint_path",
            str(checkpoints(p.rewards)[-1]),
        ],
        (
            "--checkpoint_path",
            "--pretrain",
            "must be the same as in the checkpoint",
        ),
    ),
    "a reward model of another architecture": Case(
        "train_rm.py",
        lambda p: ["--checkpoint_path", p.of_another_family()],
        (
            "--checkpoint_path",
            "of another model than --pretrain",
            "model_type is gpt2 there and llama here",
        ),
    ),
    "a head of another width": Case(
        "train_rm.py",
        lambda p: ["--pretrain", p.reward_model(width=32)],
        ("its head is (1, 32), the backbone has states of width 64", "another model's"),
    ),
    "a critic as a reward model": Case(
        "train_rm.py",
        lambda p: ["--pretrain", p.reward_model("Critic")],
        ("is a critic", "not the scores of responses"),
    ),
    "a reference of another vocabulary": Case(
        "train_dpo.py",
        lambda p: ["--checkpoint_path", p.other_model(vocab_size=448)],
        ("vocab_size is 448 there and 384 here",),
    ),
    "a reference of another vocabulary for KTO": Case(
        "train_kto.py",
        lambda p: ["--checkpoint_path", p.other_model(vocab_size=448), "--dataset", p.judged()],
        ("vocab_size is 448 there and 384 here",),
    ),
    "stored log-probs cut off": Case(
        "train_dpo.py",
        lambda p: ["--dataset", p.cut_off(), "--precompute_ref"],
        (".npy: not readable as stored log-probs", "remove it, it is made anew"),
    ),
}

TWO = {
    f"an odd micro-batch for {algorithm}": Case(
        f"train_{algorithm}.py",
        lambda p: ["--plugin", "3d", "--pp", "2", "--batch_size", "3", "--microbatch_size", "3"],
        ("--microbatch_size 3 would split a pair", "an even number"),
        code=2,
    )
    for algorithm in ("dpo", "orpo")
} | {"stored log-probs cut off": ONE["stored log-probs cut off"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory, model):
    """``place(name)``: the Place of a case."""
    folder = tmp_path_factory.mktemp("bad")
    pairs = Path(
        prepare(folder / "preference", short_lines(0, 30, SAMPLE), MAX_LENGTH, "preference")
    )
    shutil.move(pairs, folder / "pairs")
    prepare(folder / "kto", short_lines(0, 30, SAMPLE.with_name("kto.jsonl")), MAX_LENGTH, "kto")

    def place(name: str) -> Place:
        mine = folder / name.replace(" ", "-")
        mine.mkdir()
        return Place(mine, model, folder / "pairs", folder / "rewards")

    return place


def good_words(place: Place, save_dir: Path) -> list[str]:
    return [
        "--pretrain",
        place.model,
        "--dataset",
        str(place.pairs),
        "--plugin",
        "zero2",
        "--mixed_precision",
        "fp32",
        "--batch_size",
        "2",
        "--accumulation_steps",
        "1",
        "--max_length",
        str(MAX_LENGTH),
        "--max_steps",
        "1",
        "--save_dir",
        str(save_dir),
    ]


def launched(nproc: int, runs: dict[str, Run], folder: Path) -> dict[str, list[Ended]]:
    env = {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(folder / "cache")}
    ranks = run(nproc, "tests.end_to_end.worker:train_each", runs, env=env, timeout=300)
    return {name: [rank[name] for rank in ranks] for name in runs}


@pytest.fixture(scope="module")
def finished(place):
    """Runs that end well: a reward model with a checkpoint; log-probs stored beside the pairs, and
    other data after that; pairs of which one has the same answer twice."""
    here = place("finished")
    rows, first, other = here.raw(same=1), here.folder / "first", here.folder / "pairs"
    runs = {
        "rewards": Run(
            [*good_words(here, here.rewards), "--save_interval", "1"], script="train_rm.py"
        ),
        "same": Run(
            [*good_words(here, here.folder / "same"), "--dataset", rows], script="train_dpo.py"
        ),
        "stored": Run([*good_words(here, first), "--precompute_ref"], script="train_dpo.py"),
    }
    ended = launched(1, runs, here.folder)
    prepared = Path(
        prepare(here.folder / "more", short_lines(30, 20, SAMPLE), MAX_LENGTH, "preference")
    )
    shutil.move(prepared, other)
    shutil.copytree(here.pairs / "reference", other / "reference")
    changed = Run(
        [*good_words(here, here.folder / "out"), "--dataset", str(other), "--precompute_ref"]
    )
    ended |= launched(1, {"changed": Run(changed.words, script="train_dpo.py")}, here.folder)
    return here, ended


def ends(nproc: int, cases: dict[str, Case], place) -> dict[str, tuple[Place, list[Ended]]]:
    places = {name: place(f"{nproc} {name}") for name in cases}
    runs = {
        name: Run(
            [*good_words(places[name], places[name].folder / "out"), *case.words(places[name])],
            script=case.script,
        )
        for name, case in cases.items()
    }
    ended = launched(nproc, runs, next(iter(places.values())).folder)
    return {name: (places[name], ended[name]) for name in cases}


@pytest.fixture(scope="module")
def alone(finished, place):
    return ends(1, ONE, place)


@pytest.fixture(scope="module")
def together(finished, place):
    return ends(2, TWO, place)


def check(case: Case, place: Place, ranks: list[Ended]) -> None:
    assert [rank.code for rank in ranks] == [case.code] * len(ranks), ranks[0].err
    text = ranks[0].err[ranks[0].err.index(f"{case.script}: error: ") :]
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


def test_a_few_pairs_with_the_same_answer_twice_are_dropped_and_counted(finished):
    place, ended = finished
    assert ended["same"][0].code == 0
    report = json.loads(next((place.folder / "cache").rglob("preparation.json")).read_text())[
        "report"
    ]
    assert report["dropped"]["same_answers"]["rows"] == 1
    assert "pairs.jsonl:1" in report["dropped"]["same_answers"]["first"][0]
    assert report["rows_written"] == 12 - sum(entry["rows"] for entry in report["dropped"].values())


def test_log_probs_of_other_rows_are_not_used(finished):
    place, ended = finished
    assert ended["stored"][0].code == ended["changed"][0].code == 0
    assert ".npy does not fit: other rows. Log-probs are computed anew" in ended["changed"][0].err
    assert len(list((place.folder / "pairs" / "reference").glob("*.npy"))) == 2
