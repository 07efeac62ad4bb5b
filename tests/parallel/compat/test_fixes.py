"""Each change to ColossalAI is still needed, is made once, and does what it says."""

import pytest
import torch

from coati.parallel.compat.cpu import CPU_PATCHES
from coati.parallel.compat.fixes import FIXES
from tests.distributed.spawn import run

GLOO = {
    "gloo reduce_scatter",
    "gloo reduce_scatter_tensor",
    "gloo all_to_all",
    "gloo average",
}  # torch's, and fixed in its newer versions


@pytest.fixture(scope="module")
def needed() -> dict[str, bool]:
    return run(1, "tests.parallel.probes:still_needed")[0]


@pytest.mark.parametrize("name", [fix.name for fix in FIXES])
def test_upstream_still_needs_the_fix(name, needed):
    assert needed[name], f"ColossalAI no longer has the fault behind the fix '{name}': delete it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="these patches are for machines without CUDA")
@pytest.mark.parametrize("name", [patch.name for patch in CPU_PATCHES if patch.name not in GLOO])
def test_upstream_still_needs_the_cpu_patch(name, needed):
    assert needed[name], f"ColossalAI runs on a CPU without the patch '{name}': delete it"


def test_applying_twice_changes_nothing_the_second_time():
    first, second = run(1, "tests.parallel.probes:applied_twice")[0]
    on_cpu = [] if torch.cuda.is_available() else [patch.name for patch in CPU_PATCHES]
    assert first == [fix.name for fix in FIXES] + on_cpu
    assert second == []


def test_bf16_gradients_are_clipped():
    """Half of the gradient 1 goes into the moment at weight 1 - 0.5."""
    assert run(1, "tests.parallel.probes:clipped_bf16_moment") == [0.25]
