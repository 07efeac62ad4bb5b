"""Rescued weights of each layout are a model that transformers reads."""

from pathlib import Path

import pytest
import torch

from tests.distributed.spawn import run
from tests.parallel.engine_cases import Case, _engine, _join, build_model

CASES = [
    Case("stages", {"plugin": "3d", "pp": 2, "precision": "fp32", "microbatch_size": 2}),
    Case(
        "tied",
        {"plugin": "3d", "pp": 2, "precision": "fp32", "microbatch_size": 2},
        family="qwen2",
        tied=True,
    ),
    Case("split", {"plugin": "3d", "tp": 2, "precision": "fp32"}),
]


def rescue_each(folder: str) -> list[str]:
    """What is said of a final save that failed, by layout."""
    _join()
    from coati.parallel.atomic_dirs import SaveFailed
    from coati.parallel.save_rescue import rescue
    from coati.parallel.weights import ModelAssets

    told = []
    for case in CASES:
        model = build_model(case)
        assets = ModelAssets.of(model)
        final = Path(folder) / case.name / "modeling"
        told.append(str(rescue(SaveFailed("no"), final, {"": (_engine(case, model), assets)})))
    return told


@pytest.fixture(scope="module")
def rescued(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rescued")
    return folder, run(2, f"{__name__}:rescue_each", str(folder))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_rescued_weights_are_a_model(rescued, number):
    from transformers import AutoModelForCausalLM

    folder, told = rescued
    case = CASES[number]
    place = folder / case.name / "modeling.rescued"
    assert all(f"The trained weights are in {place}" in each[number] for each in told)
    model = AutoModelForCausalLM.from_pretrained(place)
    wanted = build_model(case).state_dict()
    assert all(torch.equal(each, wanted[name]) for name, each in model.state_dict().items())
