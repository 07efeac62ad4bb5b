"""train_rm.py, train_dpo.py, train_orpo.py and train_kto.py from their words on: what they write,
say and refuse; exact resume after kills; stored reference log-probs; the older documents' reward
model.

Runs that share nothing but a process group share a launch.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.documented import documented_commands
from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end.inputs import ROOT, metrics, prepare, short_lines, weights
from tests.end_to_end.worker import Ended, Fault, Run

pytestmark = pytest.mark.matrix

SAMPLES = ROOT / "examples" / "data"
MAX_LENGTH, STEPS, SAVED_AT = 160, 6, 2
TRAIN = "tests.end_to_end.worker:train_each"
# script and flags of each run that is interrupted and resumed: the adapters' by SIGTERM, the others
# by kill -9
KINDS = {
    "rm": ("train_rm.py", ["--head_lr", "1e-3", "--metric_for_best", "acc"]),
    "dpo": ("train_dpo.py", ["--metric_for_best", "loss"]),
    "dpo_lora": ("train_dpo.py", ["--lora_rank", "4"]),
    "rm_lora": ("train_rm.py", ["--lora_rank", "4", "--center_coef", "0.01"]),
    "orpo": ("train_orpo.py", []),
    "kto": ("train_kto.py", ["--auto_weight"]),
}
LORA = ("dpo_lora", "rm_lora")


def prepared(folder: Path, type: str, parts: dict[str, tuple[int, int]]) -> list[str]:
    """Arrow directories of lines (first, number) of the sample of ``type``."""
    file = SAMPLES / f"{type}.jsonl"
    return [
        prepare(folder / name, short_lines(*lines, file), MAX_LENGTH, type)
        for name, lines in parts.items()
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return prepared(folder, "preference", {"train": (0, 60), "eval": (100, 10)})


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    return prepared(folder, "kto", {"train": (0, 60), "eval": (60, 10)})


@pytest.fixture(scope="module")
def words(model, pairs, judged):
    """``words(kind, save_dir, more...)``"""

    def words(kind: str, save_dir, *more: str) -> list[str]:
        train, evaluation = judged if kind == "kto" else pairs
        return [
            "--pretrain",
            model,
            "--dataset",
            train,
            "--eval_dataset",
            evaluation,
            "--plugin",
            "zero2",
            "--mixed_precision",
            "fp32",
            "--lr",
            "1e-3",
            "--batch_size",
            "2",
            "--accumulation_steps",
            "2",
            "--max_length",
            str(MAX_LENGTH),
            "--max_steps",
            str(STEPS),
            "--eval_interval",
            "3",
            "--save_interval",
            str(SAVED_AT),
            "--log_interval",
            "2",
            "--save_dir",
            str(save_dir),
            *KINDS.get(kind, ("", []))[1],
            *more,
        ]

    return words


def environment(folder: Path) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(folder / "cache")}


@pytest.fixture(scope="module")
def first(tmp_path_factory, words) -> tuple[Path, dict[str, list[Ended]]]:
    """Each kind without interruption, and the runs with stored log-probs: {name: [Ended of rank 0,
    of rank 1]}."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        kind: Run(words(kind, folder / kind), script=script) for kind, (script, _) in KINDS.items()
    }
    for kind in LORA:
        term = Fault("step", STEPS - SAVED_AT, "after", what="term")
        runs[f"{kind}_ended"] = Run(
            words(kind, folder / f"{kind}_interrupted"), term, script=KINDS[kind][0]
        )
    for name in ("stored", "stored_again"):
        runs[name] = Run(words("dpo", folder / name, "--precompute_ref"), script="train_dpo.py")
    ranks = run(2, TRAIN, runs, env=environment(folder), timeout=500)
    return folder, {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_well_and_logs_what_it_should(first, kind):
    folder, ended = first
    assert [rank.code for rank in ended[kind]] == [0, 0], ended[kind][0].err
    logged = set().union(*(line.keys() for line in metrics(folder / kind)))
    shared = {"train/loss", "train/lr", "train/grad_norm", "eval/loss", "eval/count"}
    own = {
        "rm": {"acc", "reward_chosen", "reward_rejected", "dist"},
        "dpo": {
            "chosen_rewards",
            "rejected_rewards",
            "margin",
            "accuracy",
            "lp_chosen",
            "lp_rejected",
        },
        "orpo": {"chosen_rewards", "rejected_rewards", "margin", "accuracy", "log_odds_ratio"},
        "kto": {"chosen_rewards", "rejected_rewards", "margin", "accuracy", "kl"},
    }[kind.removesuffix("_lora")]
    assert logged >= shared | {f"{part}/{name}" for part in ("train", "eval") for name in own}
    assert not any("/_" in name for name in logged)
    assert "warning: " not in ended[kind][0].err


def test_the_first_loss_of_dpo_is_ln_2(first):
    folder, _ = first
    for kind in ("dpo", "dpo_lora", "stored"):
        start = next(line for line in metrics(folder / kind) if "eval/loss" in line)
        assert start["eval/loss"] == pytest.approx(np.log(2), rel=1e-4), kind
        assert start["eval/accuracy"] == pytest.approx(0.5, abs=0.2 if kind == "stored" else 1e-9)


def test_the_reward_model_ends_with_a_verdict_and_a_directory_with_its_head(first):
    from coati.models import RewardModel, load_scalar_model

    folder, ended = first
    text = ended["rm"][0].err
    assert "it is taken as the base, and a new head is drawn" in text and "coati score" in text
    assert (
        "verdict: PPO" in text
        and "standard deviations apart" in text
        and "scores are positive" in text
    )
    model = load_scalar_model(RewardModel, folder / "rm" / "modeling").eval()
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).isfinite().all()
    assert float(model.score.bias) == 0  # nothing moves it: it cancels in every pair
    best = json.loads((folder / "rm" / "best" / "best.json").read_text())
    values = {
        line["step"]: line["eval/acc"] for line in metrics(folder / "rm") if line.get("eval/acc")
    }
    assert (
        best["value"]
        == max(value for step, value in values.items() if step)
        == values[best["step"]]
    )
    load_scalar_model(RewardModel, folder / "rm" / "best")
    load_scalar_model(RewardModel, folder / "rm_lora" / "modeling")


@pytest.fixture(scope="module")
def resumed(first, words) -> dict[str, list[Ended]]:
    """Each kind killed in its fourth step, or asked to end after it, then all gone on with in fresh
    processes."""
    folder, _ = first
    for kind, (script, _) in KINDS.items():
        if kind in LORA:
            continue
        fault = Fault("update", SAVED_AT + 2, rank=1)
        killed = Run(words(kind, folder / f"{kind}_interrupted"), fault, script=script)
        with pytest.raises(WorkerFailed, match=r"--- rank 1 \(exit code -9\) ---"):
            run(2, "tests.end_to_end.worker:train", killed, env=environment(folder), timeout=400)
    runs = {
        kind: Run(
            words(kind, folder / f"{kind}_interrupted", "--checkpoint_path", "auto"), script=script
        )
        for kind, (script, _) in KINDS.items()
    }
    ranks = run(2, TRAIN, runs, env=environment(folder), timeout=500)
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_to_the_bit(first, resumed, kind):
    folder, _ = first
    assert [rank.code for rank in resumed[kind]] == [0, 0], resumed[kind][0].err
    # Steps in the checkpoint that it goes on from: SIGTERM after the fourth step lets the fifth be
    # finished.
    done = STEPS - SAVED_AT + 1 if kind in LORA else SAVED_AT
    assert len(resumed[kind][0].rows) == STEPS - done
    assert metrics(folder / f"{kind}_interrupted") == metrics(folder / kind)
    assert weights(folder / f"{kind}_interrupted") == weights(folder / kind) and weights(
        folder / kind
    )


def test_stored_log_probs_give_the_run_of_a_live_reference(first):
    folder, ended = first
    text, again = ended["stored"][0].err, ended["stored_again"][0].err
    assert text.count("stored in") == 2 and "no reference model is loaded" not in text
    assert again.count("no reference model is loaded") == 2
    live, stored, second = (metrics(folder / name) for name in ("dpo", "stored", "stored_again"))
    assert stored == second
    for mine, theirs in zip(live, stored, strict=True):
        # So early a pair's margin may be as small as the rounding of batches of other rows.
        share = mine.pop("train/accuracy", 0.0)
        assert share == pytest.approx(theirs.pop("train/accuracy", 0.0), abs=1 / 16)
        assert mine == pytest.approx(theirs, rel=1e-3, abs=2e-4)


@pytest.fixture(scope="module")
def refused(first, words, pairs, judged, model, tmp_path_factory) -> dict[str, Ended]:
    """Runs that must not go on, in one process."""
    folder = tmp_path_factory.mktemp("refused")
    good = [
        row
        for row in map(json.loads, (SAMPLES / "kto.jsonl").read_text().splitlines())
        if row["label"]
    ][:30]
    one_kind = prepare(
        folder / "good", "".join(json.dumps(row) + "\n" for row in good), MAX_LENGTH, "kto"
    )
    broken = folder / "broken"
    shutil.copytree(Path(pairs[0]).parent, broken)
    shutil.rmtree(broken / "arrow" / "reference")
    runs = {
        "rows of another type": Run(
            words("dpo", folder / "1", "--dataset", judged[0]), script="train_dpo.py"
        ),
        "one label": Run(words("kto", folder / "2", "--dataset", one_kind), script="train_kto.py"),
        "everything too long": Run(
            words("dpo", folder / "3", "--max_length", "8"), script="train_dpo.py"
        ),
        "unknown metric": Run(
            words("dpo", folder / "4", "--metric_for_best", "bleu"), script="train_dpo.py"
        ),
        "other data": Run(
            words("dpo", folder / "5", "--dataset", str(broken / "arrow"), "--precompute_ref"),
            script="train_dpo.py",
        ),
        "another reward head": Run(
            words("rm", folder / "6", "--pretrain", _with_two_labels(folder / "two", model)),
            script="train_rm.py",
        ),
    }
    for file in (Path(pairs[0]) / "reference").glob("*.npy"):
        (broken / "arrow" / "reference").mkdir()
        np.save(broken / "arrow" / "reference" / file.name, np.zeros((3, 2), np.float32))
    return run(1, TRAIN, runs, env=environment(folder), timeout=300)[0]


def _with_two_labels(folder: Path, model: str) -> str:
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(model, num_labels=2).save_pretrained(folder)
    for file in Path(model).glob("*token*"):
        shutil.copy(file, folder)
    return str(folder)


SAID = {
    "rows of another type": ["has no chosen_input_ids: prepared for kto", "--type preference"],
    "one label": ["desirable responses only", "label false", "coati sft"],
    "everything too long": ["rows are longer than --max_length 8", "nothing is left"],
    "unknown metric": ["--metric_for_best bleu", "accuracy"],
    "other data": ["no longer fits", "Remove it"],
    "another reward head": ["a classifier of 2 labels; expected 1"],
}


@pytest.mark.parametrize("name", SAID)
def test_bad_input_is_one_line_of_its_own(refused, name):
    ended = refused[name]
    errors = [line for line in ended.err.splitlines() if "error: " in line]
    assert ended.code == 1 and len(errors) == 1, ended.err
    for part in SAID[name]:
        assert part in errors[0]
    assert "Traceback" not in ended.err


RM_COMMANDS = {f"{number} {c.source}": c for number, c in enumerate(documented_commands("rm"))}


@pytest.fixture(scope="module")
def documented(model, tmp_path_factory) -> tuple[Path, dict[str, list[Ended]]]:
    """The older documents' reward models: raw rows with a test split beside them, ``.pt`` to save
    into."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "rows").mkdir()
    for name, (first, rows) in {"train": (0, 40), "test": (100, 6)}.items():
        (folder / "rows" / f"{name}.jsonl").write_text(
            short_lines(first, rows, SAMPLES / "preference.jsonl")
        )
    runs = {}
    for name, command in RM_COMMANDS.items():
        variables = {
            "SFT_MODEL_PATH": model,
            "REWARD_MODEL_PATH": str(folder / name[0] / "rm.pt"),
            "PREFERENCE_DATASET": str(folder / "rows"),
        }
        flags = command.words(variables)
        script = next(
            index for index, word in enumerate(flags) if word.endswith("train_reward_model.py")
        )
        more = ["--max_steps", "1", "--accumulation_steps", "1", "--subset", "harmless-base"]
        runs[name] = Run([*flags[script + 1 :], *more], script="train_reward_model.py")
    ranks = run(2, TRAIN, runs, env=environment(folder), timeout=300)
    return folder, {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.mark.parametrize("name", RM_COMMANDS)
def test_documented_reward_models_train_a_step_and_leave_a_model(documented, name):
    from coati.models import RewardModel, load_scalar_model

    folder, found = documented
    ended = found[name][0]
    assert ended.code == 0, ended.err
    for said in ("is now train_rm.py", "not a .pt file", "test split becomes the evaluation set"):
        assert said in ended.err
    # Said once by a process, and the commands share theirs.
    assert sum("--max_samples 100" in ranks[0].err for ranks in found.values()) == 1
    assert "verdict:" in ended.err
    load_scalar_model(RewardModel, folder / name[0] / "rm" / "modeling")
