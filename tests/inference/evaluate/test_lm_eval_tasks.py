"""Tasks of lm-evaluation-harness: which of its figures are measures, and, where the package is
installed, a task of local files."""

import json
import math

import pytest
import torch

from coati.inference.evaluate.lm_eval_tasks import measures_of, task_measures
from coati.inference.evaluate.measure_table import Measure, comparisons
from coati.inference.model_loading import load
from coati.models.generation.value_guidance import ValueGuidance
from coati.models.ilql_heads import ILQLHeads
from coati.utils.statistics import wilson_interval
from tests.tiny import tiny_llama, tiny_tokenizer

TASK = """
task: colors
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"question": f"hello {number}", "choices": ["there", "today"], "label": number % 2}
    for number in range(6)
]


def test_a_mean_over_documents_has_this_library_s_interval_and_others_the_harness_s():
    found = {
        "results": {
            "colors": {
                "alias": "colors",
                "acc,none": 0.5,
                "acc_stderr,none": 0.3,
                "f1,none": 0.4,
                "f1_stderr,none": 0.1,
                "exact_match,strict": 1.0,
                "exact_match_stderr,strict": "N/A",
            }
        },
        "samples": {
            "colors": [
                {"doc_id": 0, "filter": "none", "acc": 1.0, "f1": (1, 1)},
                {"doc_id": 1, "filter": "none", "acc": 0.0, "f1": (0, 1)},
                {"doc_id": 0, "filter": "strict", "exact_match": 1.0},
            ]
        },
    }
    acc, f1, match = measures_of(found)
    assert (acc.name, acc.rows) == ("colors/acc", {"0": 1.0, "1": 0.0})
    assert (acc.low, acc.high) == wilson_interval(1, 2) and acc.interval == "Wilson"
    assert (f1.name, f1.value) == ("colors/f1", 0.4)
    assert (f1.low, f1.high) == pytest.approx((0.204, 0.596))
    assert f1.interval == "lm-eval's" and not f1.rows
    assert (match.name, match.rows) == ("colors/exact_match,strict", {"0": 1.0})


def test_a_metric_of_which_less_is_better_is_compared_so():
    def found(value):
        samples = [{"doc_id": n, "filter": "none", "score": value} for n in range(9)]
        return measures_of(
            {
                "results": {"toxic": {"score,none": value}},
                "samples": {"toxic": samples},
                "higher_is_better": {"toxic": {"score": False}},
            }
        )

    (compared,) = comparisons(found(0.0), found(1.0))
    assert (compared.better, compared.worse, compared.verdict) == (0, 9, "worse")
    read = Measure.from_dict(found(0.0)[0].as_dict())
    assert read.lower_is_better


def test_a_figure_without_a_standard_error_has_no_bounds():
    found = {"results": {"colors": {"f1,none": 0.4, "f1_stderr,none": "N/A"}}, "samples": {}}
    [f1] = measures_of(found)
    assert (f1.low, f1.high) == (-math.inf, math.inf)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> str:
    """A folder with one task, of a file beside it."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colors.yaml").write_text(TASK.format(file=file))
    return str(folder)


def chosen(model, tokenizer, question: str, choices: list[str]) -> int:
    """The choice whose tokens are likelier after the question, by a forward pass of its own."""
    scores = []
    for choice in choices:
        asked = tokenizer(question)["input_ids"]
        ids = tokenizer(f"{question} {choice}")["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        places = range(len(asked), len(ids))
        scores.append(sum(float(logps[place - 1, ids[place]]) for place in places))
    return max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.slow  # the harness reads its thousands of tasks
def test_a_task_of_a_local_file_is_measured_on_each_document(model_path, tasks):
    loaded = load(model_path, device="cpu")
    [acc], table = task_measures(loaded, ["colors"], folder=tasks, batch_size=4)
    wanted = {
        str(number): float(
            chosen(loaded.model, loaded.tokenizer, row["question"], row["choices"]) == row["label"]
        )
        for number, row in enumerate(QUESTIONS)
    }
    assert (acc.name, acc.unit, acc.interval) == ("colors/acc", "share", "Wilson")
    assert acc.rows == wanted and 0 < acc.value < 1
    assert table["results"]["colors"]["acc,none"] == pytest.approx(acc.value)
    [first], _ = task_measures(loaded, ["colors"], folder=tasks, limit=2)
    assert first.rows == {key: wanted[key] for key in ("0", "1")}


@pytest.mark.slow  # the harness reads its thousands of tasks
def test_of_a_model_that_decodes_by_values_the_policy_is_measured(model_path, tasks):
    """Outside the best tokens guided scores are -inf: no choice would have a log-prob."""
    loaded = load(model_path, device="cpu")
    [plain], _ = task_measures(loaded, ["colors"], folder=tasks)
    guidance = ValueGuidance(loaded.model, ILQLHeads(64, 384), 5.0, top_k=2)
    guidance.install()
    [found], _ = task_measures(loaded, ["colors"], folder=tasks)
    assert found == plain
    assert loaded.model.lm_head.forward.__self__ is guidance


@pytest.mark.slow  # the harness reads its thousands of tasks
def test_a_task_that_is_not_there_is_named(model_path, tasks):
    with pytest.raises(ValueError, match="--lm_eval shapes: no such task.* --lm_eval_path"):
        task_measures(load(model_path, device="cpu"), ["shapes"], folder=tasks)


@pytest.mark.slow  # the harness reads its thousands of tasks
def test_data_that_is_not_there_is_said(model_path, tasks, tmp_path):
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(ValueError, match="--lm_eval colors: the data of a task is not here"):
        task_measures(load(model_path, device="cpu"), ["colors"], folder=tasks)
