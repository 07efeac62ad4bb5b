"""Killed with -9 and gone on with, to the bit: what a preference run has beside its weights and its
position.

That is KTO's partners, whose answers decide z, log-probs of the reference that were stored and are
lost, and the responses of a student that is distilled. The plain resumption of every trainer is in
test_preferences.py.
"""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from coati.parallel.checkpoint import checkpoints
from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.inputs import ROOT, metrics, prepare, short_lines, weights, write_model
from tests.end_to_end.worker import Fault, Run

pytestmark = pytest.mark.matrix

CPU = {"CUDA_VISIBLE_DEVICES": ""}
SAMPLES = ROOT / "examples" / "data"
STEPS, SAVED = 6, 2  # three steps an epoch; a checkpoint every second step
AUTO = ("--checkpoint_path", "auto")


@dataclass(frozen=True)
class Case:
    """A script and its words; ``type`` of its rows; ``forget``: its stored reference is lost with
    the kill."""

    script: str
    words: tuple[str, ...] = ()
    type: str = "preference"
    forget: bool = False


CASES = {
    "dpo on stored log-probs": Case("train_dpo.py", ("--precompute_ref",), forget=True),
    "kto": Case("train_kto.py", ("--auto_weight",), type="kto"),
    "gkd": Case("train_gkd.py", ("--teacher", "TEACHER", "--max_new_tokens", "12"), type="sft"),
}


def fault_of(name: str) -> Fault:
    """A moment after the first checkpoint and before the last step is done."""
    generator = random.Random(f"4 {name}")
    at, moment = generator.choice(
        [("update", "before"), ("update", "after"), ("step", "before"), ("step", "after")]
    )
    return Fault(at, generator.randint(SAVED + 1, STEPS - 1), moment, rank=generator.randrange(2))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """{type: (rows to train on, rows to evaluate on)}, prepared."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        type: tuple(
            prepare(
                folder / f"{type}{first}",
                short_lines(first, count, SAMPLES / f"{type}.jsonl"),
                160,
                type,
            )
            for first, count in ((0, 44), (60, 9))
        )
        for type in ("preference", "kto", "sft")
    }


@pytest.fixture(scope="module")
def words(model, rows, tmp_path_factory):
    teacher = write_model(tmp_path_factory.mktemp("teacher"), intermediate_size=48)

    """``words(name, save_dir)``: those of a case, which has a copy of the rows to itself in
    ``save_dir``."""

    def words(name: str, save_dir: Path) -> list[str]:
        case, own = CASES[name], save_dir.with_name(f"{save_dir.name} rows")
        if not own.exists():
            shutil.copytree(rows[case.type][0], own)
        return [
            "--pretrain",
            model,
            "--dataset",
            str(own),
            "--eval_dataset",
            rows[case.type][1],
            "--plugin",
            "zero2",
            "--mixed_precision",
            "fp32",
            "--max_epochs",
            "3",
            "--max_steps",
            str(STEPS),
            "--lr",
            "1e-3",
            "--batch_size",
            "2",
            "--accumulation_steps",
            "2",
            "--max_length",
            "160",
            "--log_interval",
            "3",
            "--eval_interval",
            "3",
            "--save_interval",
            str(SAVED),
            "--save_dir",
            str(save_dir),
            *(teacher if word == "TEACHER" else word for word in case.words),
        ]

    return words


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """What the uninterrupted runs did: (their folder, {name: Ended of rank 0})."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {
        name: Run(words(name, folder / name), script=case.script) for name, case in CASES.items()
    }
    return folder, run(2, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=300)[0]


@pytest.fixture(scope="module")
def resumed(words, tmp_path_factory):
    """The same runs, each killed and gone on with in fresh processes."""
    folder = tmp_path_factory.mktemp("killed")
    for name, case in CASES.items():
        fault = fault_of(name)
        with pytest.raises(WorkerFailed, match=rf"--- rank {fault.rank} \(exit code -9\) ---"):
            killed = Run(words(name, folder / name), fault, script=case.script)
            run(2, "tests.end_to_end.worker:train", killed, env=CPU, timeout=200)
        if case.forget:
            shutil.rmtree(folder / f"{name} rows" / "reference")
    runs = {
        name: Run([*words(name, folder / name), *AUTO], script=case.script)
        for name, case in CASES.items()
    }
    return folder, run(2, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=300)[0]


@pytest.mark.parametrize("name", CASES)
def test_killed_and_gone_on_with_it_is_the_uninterrupted_run(whole, resumed, name):
    (reference, plain), (place, after) = whole, resumed
    assert plain[name].code == after[name].code == 0, after[name].err
    left = len(after[name].rows)
    assert 0 < left < STEPS and f"_step-{STEPS - left}\n" in after[name].err
    assert after[name].rows == plain[name].rows[-left:]
    assert metrics(place / name) == metrics(reference / name)
    assert weights(place / name) == weights(reference / name) and weights(place / name)
    assert [p.name for p in checkpoints(place / name)] == [
        p.name for p in checkpoints(reference / name)
    ]


def test_partners_mattered(whole):
    """z of a window is clamped at 0, and where that happens nobody's partner counts."""
    folder, _ = whole
    assert any(line.get("train/kl", 0) > 0 for line in metrics(folder / "kto"))


def test_the_student_answered_some_rows(whole):
    folder, _ = whole
    shares = [line["train/on_policy"] for line in metrics(folder / "gkd") if "train/loss" in line]
    assert shares and all(0 < share < 1 for share in shares)


def test_stored_log_probs_that_were_lost_are_computed_from_the_model_that_the_run_began_with(
    whole, resumed
):
    name = "dpo on stored log-probs"
    assert "reference log-probs of" in resumed[1][name].err and "stored in" in resumed[1][name].err
    stored = [
        next((place / f"{name} rows" / "reference").glob("*.npy"))
        for place in (whole[0], resumed[0])
    ]
    assert stored[0].name == stored[1].name and stored[0].read_bytes() == stored[1].read_bytes()
