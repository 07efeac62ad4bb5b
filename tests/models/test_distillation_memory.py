"""What the heads hold in distillation, by PyTorch's own count of allocations."""

import pytest

from benchmarks.bench_distill_memory import compare
from coati.models import logprobs

MIB = 2**20


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_peak_beside_full_logits_of_both_models(frozen, monkeypatch):
    """S 1024, vocabulary 20,000, 8 MiB of logits at a time: at most 40% of the two matrices of
    logits, of which the textbook way makes several, and the same gradients."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 16 * MIB)  # of one model, half of it of each
    found = compare(16, frozen, positions=1024, vocabulary=20_000)
    assert found["both_logits"] == 2 * 4 * 1024 * 20_000
    assert found["full_logits"] > 2 * found["both_logits"]
    weight_gradient = 0 if frozen else 16 * 20_000 * 4
    assert found["head"] <= 0.4 * found["both_logits"]
    # Three chunks, some blocks of 2 MiB, and gradients of chunks that are added up.
    assert found["head"] <= 3 * 8 * MIB + 3 * weight_gradient + 24 * MIB
    assert found["gradient_difference"] <= 1e-5
