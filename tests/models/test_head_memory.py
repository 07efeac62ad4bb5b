"""What the head saves, by PyTorch's own count of allocations: the same bytes on every run."""

import pytest

from benchmarks.bench_head_memory import allocator_peak, case, full_logits, head

MIB = 2**20


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_peak_beside_full_logits(frozen):
    """S 512, vocabulary 151,936: at most 40% of the peak, and the same gradients to 1e-5 of the
    largest."""
    model, states, labels = case(hidden=32, frozen=frozen)
    long_way = allocator_peak(lambda: full_logits(model, states, labels))
    parameters = [states] if frozen else [states, model.lm_head.weight]
    expected = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    short_way = allocator_peak(lambda: head(model, states, labels))
    assert long_way > 3 * 512 * 151_936 * 4  # logits, their log-softmax, its gradient
    assert short_way <= 0.4 * long_way
    weight_gradient = 0 if frozen else 32 * 151_936 * 4
    assert short_way <= weight_gradient + (128 + 32) * MIB  # one chunk of logits, and little else
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert (parameter.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_the_count_is_right():
    """10 MiB held, 20 MiB held, 10 MiB released, 5 MiB more: the peak is 20."""
    import torch

    def run():
        one = torch.empty(10 * MIB, dtype=torch.uint8)
        two = torch.empty(10 * MIB, dtype=torch.uint8)
        del one
        three = torch.empty(5 * MIB, dtype=torch.uint8)
        del two, three

    assert allocator_peak(run) == 20 * MIB
