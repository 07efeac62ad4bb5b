"""ColossalAI on a machine without an accelerator trains as plain PyTorch does, on two gloo
processes."""

import pytest
import torch
from torch.testing import assert_close

from coati.parallel.compat.cpu.adam import TorchCpuAdam
from coati.parallel.compat.cpu.attention import sdpa_attention
from tests.distributed.spawn import run
from tests.parallel.cases import train_alone

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what a machine without an accelerator needs"
)

SHARDED = {
    "min_chunk_size_m": 0.02,
    "search_range_m": 0.05,
    "hidden_dim": 64,
}  # else a tiny model is never sharded
RING = {"tp_size": 2, "enable_sequence_parallelism": True, "sequence_parallelism_mode": "ring"}
ALL_TO_ALL = {
    "sp_size": 2,
    "enable_sequence_parallelism": True,
    "sequence_parallelism_mode": "all_to_all",
}


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], list[float]]:
    return train_alone()


@pytest.mark.parametrize(
    "plugin, precision, options, micro_batches",
    [
        ("zero2", "fp32", {}, 2),
        ("zero2", "bf16", {}, 1),
        ("gemini", "bf16", {}, 1),
        ("gemini", "bf16", {"enable_gradient_accumulation": True}, 2),
        ("gemini", "bf16", SHARDED | {"enable_gradient_accumulation": True}, 2),
        ("gemini", "bf16", SHARDED | {"placement_policy": "auto"}, 1),
        ("gemini", "bf16", {"tp_size": 2}, 1),
        ("3d", "fp32", {"tp_size": 2}, 1),
        ("3d", "fp32", {"tp_size": 2, "enable_flash_attention": True}, 1),
        ("3d", "fp32", {"pp_size": 2, "num_microbatches": 2}, 1),
        ("3d", "fp32", RING, 1),
        ("3d", "fp32", ALL_TO_ALL, 1),
    ],
)
@pytest.mark.matrix
def test_two_processes_train_as_plain_pytorch_does(
    plugin, precision, options, micro_batches, reference
):
    """Losses of four steps, clipped, and the gradient norms by which they were clipped."""
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for losses, norms in run(
        2, "tests.parallel.cases:train", plugin, precision, options, micro_batches
    ):
        assert_close(losses, reference[0], rtol=tolerance, atol=0.0)
        assert_close(norms, reference[1], rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adam_kernel_is_torchs_adam(decoupled, dtype):
    """Ten steps of gradients in either precision, divided by a clipping factor of 2."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2))
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        [theirs], lr=0.01, weight_decay=0.1
    )
    kernel = TorchCpuAdam(0.01, 0.9, 0.999, 1e-8, 0.1, decoupled)
    exp_avg, exp_avg_sq = torch.zeros(1000), torch.zeros(1000)
    for step in range(1, 11):
        grad = torch.randn(1000).to(dtype)
        theirs.grad = grad.float() / 2
        optimizer.step()
        kernel.step(
            step, 0.01, 0.9, 0.999, 1e-8, 0.1, True, ours.data, grad, exp_avg, exp_avg_sq, 2.0
        )
    assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_adam_kernel_without_bias_correction():
    """First step from zero moments: the average is 0.1 of the gradient, its square 0.001, so lr *
    0.2 / 0.0632."""
    param, exp_avg, exp_avg_sq = torch.ones(1), torch.zeros(1), torch.zeros(1)
    TorchCpuAdam(0.1, 0.9, 0.999, 0.0, 0.0, True).step(
        1, 0.1, 0.9, 0.999, 0.0, 0.0, False, param, torch.tensor([2.0]), exp_avg, exp_avg_sq
    )
    assert_close(exp_avg, torch.tensor([0.2]))
    assert_close(param, torch.tensor([1 - 0.1 * 0.2 / 0.004**0.5]))


def test_causal_attention_without_padding_needs_no_mask():
    q, k, v = torch.randn(3, 2, 4, 8, 16).unbind(0)
    mask = (
        torch.zeros(8, 8)
        .masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf"))
        .expand(2, 1, 8, 8)
    )
    with_mask = sdpa_attention(q, k, v, attention_mask=mask)
    assert_close(sdpa_attention(q, k, v, attention_mask=mask, is_causal=True), with_mask)


def test_collectives_that_gloo_may_lack():
    assert run(2, "tests.parallel.probes:emulated_collectives") == [True, True]
