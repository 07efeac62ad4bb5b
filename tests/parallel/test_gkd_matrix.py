"""Distillation on every plugin that has it: the losses and gradient norms of plain PyTorch in one
process with full logits, whatever part of the rows the student answers itself."""

import math
from functools import cache

import pytest
from torch.testing import assert_close

from tests.distributed.spawn import run
from tests.parallel.gkd_cases import SHARE, STEPS, Case, plain_run

pytestmark = pytest.mark.matrix

BF16 = {"precision": "bf16"}


def cases(plugin: str, shared: dict, **variants: dict) -> list[Case]:
    """Off-policy and on-policy, and ``variants``."""
    own = {"plugin": plugin, **shared}
    found = [Case("rows", own), Case("own responses", own, SHARE)]
    for name, options in variants.items():
        found.append(Case(name, own | options, SHARE))
    return found


GROUPS: dict[str, tuple[int, list[Case]]] = {
    "ddp": (2, cases("ddp", {}, lora={"lora": True})),
    "one_process": (
        1,
        [*cases("zero2", {}), Case("accumulated", {"plugin": "zero2"}, SHARE, accumulation=4)],
    ),
    "zero2": (2, cases("zero2", {}, lora={"lora": True})),
    "zero2_bf16": (2, cases("zero2", BF16)),
    "zero2_cpu": (2, cases("zero2_cpu", {})),
    "gemini": (2, cases("gemini", BF16)),
    "gemini_tp": (2, cases("gemini", {"tp": 2, **BF16})),
    "3d_tp": (2, cases("3d", {"tp": 2}, lora={"lora": True})),
    "3d_zero1": (2, cases("3d", {"zero_stage": 1, **BF16})),
}


@cache
def plain(share: float, lora: bool):
    return plain_run(share, lora)


@pytest.mark.parametrize("group", GROUPS)
def test_trains_as_plain_pytorch_does(group):
    nproc, members = GROUPS[group]
    ranks = run(nproc, "tests.parallel.gkd_cases:run_cases", members, timeout=400)
    for index, case in enumerate(members):
        found = ranks[0][index]
        for rank in range(nproc):
            assert ranks[rank][index] == found, f"{case.name}: ranks disagree"
        losses, norms, tokens = plain(case.share, case.options.get("lora", False))
        exact = case.options.get("precision", "fp32") == "fp32"
        if not exact and case.share:  # rounding changes what the student says
            assert all(math.isfinite(loss) and norm > 0 for loss, norm in found["steps"])
            continue
        assert found["tokens"] == tokens
        for which, (expected, tight) in enumerate(((losses, 2e-5), (norms, 1e-4))):
            tolerance = {"rtol": tight if exact else 3e-2, "atol": 0.0}
            values = [step[which] for step in found["steps"]]
            assert_close(values, expected, **tolerance, msg=f"{case.name}: {values}, {expected}")
        # Seven rows in batches over any number of ranks: each token counted once.
        assert set(found["samples"].values()) == {found["after"][1]}


def test_some_rows_are_the_students_and_some_are_not():
    _, _, tokens = plain(SHARE, False)
    assert len(tokens) == STEPS and tokens != plain(0.0, False)[2]
