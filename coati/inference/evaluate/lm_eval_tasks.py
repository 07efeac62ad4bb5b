"""Tasks of lm-evaluation-harness on a model as this library loads it: adapters, quantized weights
and checkpoints too. The harness is an extra; its tasks, numbers and metrics are its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from coati.inference.evaluate.measure_table import SHARE, Measure, measure
from coati.inference.model_loading import Loaded
from coati.models.generation.value_guidance import unguided
from coati.utils.phases import phase

INSTALL = "pip install lm-eval (or pip install coati[eval])"
SCORE = "score"
Z = 1.96


def harness() -> Any:
    """The package. Raises ValueError with the command that installs it."""
    try:
        return import_module("lm_eval")
    except ImportError as error:
        raise ValueError(
            f"--lm_eval needs lm-evaluation-harness, which is not here ({error}): {INSTALL}"
        ) from error


@phase("evaluating tasks of lm-eval")
def task_measures(
    loaded: Loaded,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    chat: bool = False,
    batch_size: int = 16,
    max_length: int | None = None,
    seed: int = 0,
) -> tuple[list[Measure], dict[str, Any]]:
    """A measure ``TASK/METRIC`` for each metric that is a mean over documents, and the harness's
    own table of results.

    ``folder``: of YAML files of tasks, beside the harness's own. ``limit``: the first documents of
    each task. ``few_shot``: examples before each question; None: as the task says. ``chat``:
    questions in the model's chat template. Of ILQL's models the policy is measured. Raises
    ValueError for a task that is not there, and for data that cannot be had without a network.
    """
    package = harness()
    models = import_module("lm_eval.models.huggingface")
    manager = import_module("lm_eval.tasks").TaskManager(include_path=folder)
    known = set(manager.all_tasks)
    unknown = [name for name in tasks if name not in known]
    if unknown:
        where = f" nor in --lm_eval_path {folder}" if folder else ""
        raise ValueError(
            f"--lm_eval {unknown[0]}: no such task, group or tag in lm-eval{where}; `lm-eval ls "
            "tasks` lists them (a folder of your own: --lm_eval_path)"
        )
    model = models.HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=batch_size,
        max_length=max_length,
    )
    try:
        with unguided(loaded.model):
            found = package.simple_evaluate(
                model=model,
                tasks=list(tasks),
                num_fewshot=few_shot,
                limit=limit,
                task_manager=manager,
                apply_chat_template=chat,
                log_samples=True,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"--lm_eval {' '.join(tasks)}: the data of a task is not here ({error}); run it once "
            "with a network, or name local files in a task of your own (--lm_eval_path)"
        ) from error
    return measures_of(found), {"results": found["results"], "versions": found.get("versions", {})}


def measures_of(found: Mapping[str, Any]) -> list[Measure]:
    """The metrics of a result of ``simple_evaluate``: those that are means over documents with
    their values on each and this library's intervals, others with the harness's standard error."""
    measures = []
    for task, results in found["results"].items():
        samples = found.get("samples", {}).get(task, [])
        directions = found.get("higher_is_better", {}).get(task) or {}
        for name, value in results.items():
            metric, _, filtering = name.partition(",")
            if not isinstance(value, float | int) or not filtering or metric.endswith("_stderr"):
                continue
            label = f"{task}/{metric}" + ("" if filtering == "none" else f",{filtering}")
            rows = _rows(samples, metric, filtering)
            binary = set(rows.values()) <= {0.0, 1.0}
            mean = math.fsum(rows.values()) / len(rows) if rows else math.nan
            if math.isclose(mean, value, abs_tol=1e-9):
                made = measure(label, rows, SHARE if binary else SCORE)
                higher = directions.get(metric) is not False
                measures.append(replace(made, higher_is_better=higher))
                continue
            error = results.get(f"{metric}_stderr,{filtering}")
            half = Z * error if isinstance(error, float | int) else math.inf
            bounds = float(value) - half, float(value) + half
            measures.append(Measure(label, float(value), *bounds, SCORE, "lm-eval's", {}))
    return measures


def _rows(samples: Sequence[Mapping[str, Any]], metric: str, filtering: str) -> dict[str, float]:
    """The metric on each document, by its number in the task."""
    found = {}
    for one in samples:
        value = one.get(metric)
        if one.get("filter", "none") == filtering and isinstance(value, float | int):
            found[str(one["doc_id"])] = float(value)
    return found
