"""GRPO on responses that rows bring with their scores, on rewards by source, and pass@k of its
evaluations; what of such rows is refused, with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.online_inputs import metrics, of_episode
from tests.end_to_end.test_online_resume import launched
from tests.end_to_end.worker import Run

pytestmark = pytest.mark.matrix


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Eight prompts with four judged responses each, of two sources in turn."""
    return [
        {
            "prompt": f"say {number}",
            "responses": [f"a {number}", "b b", "c", "d d d"],
            "scores": [3.0, 1.0, 2.0, 2.0],
            "gt_answer": str(number),
            "source": ("math", "chat")[number % 2],
            **changes,
        }
        for number in range(8)
    ]


def write(path: Path, made: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


@pytest.fixture(scope="module")
def ended(tmp_path_factory, online_words):
    """(folder, {name: the run}), in one process."""
    folder = tmp_path_factory.mktemp("judged")
    good = write(folder / "good.jsonl", rows())
    bare = write(folder / "bare.jsonl", rows(responses=None, scores=None))
    short = write(folder / "short.jsonl", rows(responses=["a", "b"], scores=[1, 2]))
    other = rows()
    other[5] |= {"source": "law"}
    law = write(folder / "law.jsonl", other)
    nowhere = rows()
    del nowhere[2]["source"]
    unsaid = write(folder / "unsaid.jsonl", nowhere)
    offline = ("--offline_groups",)
    sources = ("--source_rewards", "math=gsm8k,length@0.5", "chat=length")
    evaluated = ("--eval_prompt_dataset", good, "--eval_pass_at", "1", "2")
    runs = {
        "offline": (good, *offline, "--num_generations", "4"),
        "bare": (bare, *offline),
        "short": (short, *offline),
        "sources": (good, *sources, *evaluated, "--eval_generations", "3"),
        "law": (law, *sources),
        "unsaid": (unsaid, *sources),
        "others": (unsaid, *sources, "*=length"),
    }
    made = {}
    for name, words in runs.items():
        given = online_words(
            "grpo", folder / name, "--num_episodes", "1", "--prompt_dataset", *words
        )
        drop = given.index("--reward_functions")
        made[name] = Run(given[:drop] + given[drop + 2 :], script="train_grpo.py")
    found = launched(1, made)
    return folder, {name: ranks[0] for name, ranks in found.items()}


def test_judged_responses_are_trained_on_without_sampling(ended):
    folder, runs = ended
    assert runs["offline"].code == 0, runs["offline"].err
    said = runs["offline"].err.replace("\n", " ")
    assert "nothing corrects for it: importance ratios begin at 1" in said
    found = of_episode(metrics(folder / "offline"), 1)
    assert found["reward"] == found["reward/rows"] == 2.0  # (3 + 1 + 2 + 2) / 4
    assert found["reward_std"] == pytest.approx((4 / 7) ** 0.5)  # of two groups
    assert found["equal_groups"] == 0 and found["approx_kl"] == pytest.approx(0, abs=1e-5)


def test_each_source_has_its_rewards_and_evaluations_pass_at_k(ended):
    folder, runs = ended
    assert runs["sources"].code == 0, runs["sources"].err
    lines = metrics(folder / "sources")
    found = of_episode(lines, 1)
    assert {"reward/gsm8k", "reward/length"} <= found.keys()
    assert -1 <= found["reward/length"] < 0
    first = of_episode(lines, 0, "eval")
    assert first["pass_at_1"] <= first["pass_at_2"] <= 1 and first["pass_at_2_high"] <= 1
    assert runs["others"].code == 0, runs["others"].err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bare", "--offline_groups: row 0 of --prompt_dataset has no list of responses"),
        ("short", "2 responses with scores, --num_generations is 4"),
        ("law", "law.jsonl:6: source 'law'; name rewards for it in --source_rewards"),
        ("unsaid", "unsaid.jsonl:3: no source; name rewards for it in --source_rewards"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_at_the_start(ended, name, said):
    folder, runs = ended
    assert runs[name].code == 1
    assert said in " ".join(runs[name].err.split()), runs[name].err
    assert not (folder / name / "metrics.jsonl").exists()
