"""Today's families split over processes, killed with -9 and gone on with: to the bit.

Each layout (tensor, pipeline, both) meets each family once, under SFT and DPO in turn; with
``-m slow`` the other pairs, too. PPO, which cannot be split into stages, under --tp.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from coati.utils.transformers_compat import transformers_major
from tests.distributed.spawn import WorkerFailed, run
from tests.end_to_end import inputs, online_inputs
from tests.end_to_end.inputs import ROOT, prepare, short_lines, write_family
from tests.end_to_end.worker import Fault, Run

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(
        transformers_major() < 5, reason="ColossalAI's own policies know none of these families"
    ),
]

CPU = {"CUDA_VISIBLE_DEVICES": ""}
PREFERENCE = ROOT / "examples" / "data" / "preference.jsonl"
AUTO = ("--checkpoint_path", "auto")
STEPS, SAVED = 4, 2
FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt_oss")
PIPELINE = ("--pp", "2", "--microbatch_size", "2")
LAYOUTS = {
    "tp": (2, ("--plugin", "3d", "--tp", "2")),
    "pp": (2, ("--plugin", "3d", *PIPELINE)),
    "tp x pp": (4, ("--plugin", "3d", "--tp", "2", *PIPELINE)),
}


@dataclass(frozen=True)
class Case:
    """A family under a layout and a script; ``fault``: where it is killed."""

    family: str
    layout: str
    script: str
    fault: Fault

    def __str__(self) -> str:
        return f"{self.script} {self.family} {self.layout}"


def _cases() -> list:
    """Every family, layout and script; the moments and ranks of the kills go around."""
    moments = [("update", "before"), ("update", "after"), ("step", "before"), ("step", "after")]
    found = []
    for place, (layout, (nproc, _)) in enumerate(LAYOUTS.items()):
        for index, family in enumerate(FAMILIES):
            for turn, script in enumerate(("sft", "dpo")):
                at, moment = moments[(index + place) % 4]
                fault = Fault(at, SAVED + 1, moment, rank=(index + turn) % nproc)
                slow = (index + place + turn) % 2
                marks = [pytest.mark.slow] if slow else []
                case = Case(family, layout, script, fault)
                found.append(pytest.param(case, id=str(case), marks=marks))
    for index, family in enumerate(FAMILIES):
        # Actor and critic are updated in turn; an episode is saved after its four steps.
        fault = Fault("update", 11 + index % 2, "after", rank=index % 2)
        case = Case(family, "tp", "ppo", fault)
        found.append(pytest.param(case, id=str(case)))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("families")
    return {family: write_family(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    return {
        "sft": prepare(folder / "sft", short_lines(0, 32)),
        "dpo": prepare(folder / "dpo", short_lines(0, 44, PREFERENCE), type="preference"),
    }


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("judges")
    return {
        family: online_inputs.write_reward_model(folder / family, family=family)
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def words(models, rows, judges, online_words):
    """``words(case, save_dir, more...)``"""

    def words(case: Case, save_dir: Path, *more: str) -> list[str]:
        _, layout = LAYOUTS[case.layout]
        if case.script == "ppo":
            own = ("--pretrain", models[case.family], "--rm_pretrain", judges[case.family])
            saved = ("--save_interval", "1", "--log_interval", "2")
            return online_words("ppo", save_dir, *layout, *own, *saved, *more)
        values = {
            "--pretrain": models[case.family],
            "--dataset": rows[case.script],
            "--mixed_precision": "fp32",
            "--max_epochs": 3,
            "--max_steps": STEPS,
            "--lr": "1e-3",
            "--batch_size": 4,
            "--accumulation_steps": 1 if "--pp" in layout else 2,
            "--max_length": 96,
            "--log_interval": 1,
            "--save_interval": SAVED,
            "--save_dir": save_dir,
        }
        return [*(str(word) for pair in values.items() for word in pair), *layout, *more]

    return words


@pytest.mark.parametrize("case", _cases())
def test_killed_and_gone_on_with_it_is_the_uninterrupted_run(case, words, tmp_path):
    nproc, _ = LAYOUTS[case.layout]
    script = f"train_{case.script}.py"
    whole, place = tmp_path / "whole", tmp_path / "killed"
    with pytest.raises(WorkerFailed, match=rf"--- rank {case.fault.rank} \(exit code -9\) ---"):
        killed = Run(words(case, place), case.fault, script=script)
        (ended, *_) = run(nproc, "tests.end_to_end.worker:train", killed, env=CPU, timeout=200)
        pytest.fail(f"it ended by itself: {ended.err}")
    assert not (place / "modeling").exists()
    runs = {
        "whole": Run(words(case, whole), script=script),
        "resumed": Run(words(case, place, *AUTO), script=script),
    }
    ended = run(nproc, "tests.end_to_end.worker:train_each", runs, env=CPU, timeout=200)
    assert [end.code for rank in ended for end in rank.values()] == [0] * 2 * nproc
    assert "going on from" in ended[0]["resumed"].err
    kind = online_inputs if case.script == "ppo" else inputs
    assert kind.metrics(place) == kind.metrics(whole) != []
    assert kind.weights(place) == kind.weights(whole) != {}
