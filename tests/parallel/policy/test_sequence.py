"""Sequence parallelism where the forwards of a step have other lengths than each other."""

import pytest
import torch

from coati.utils.transformers_compat import transformers_major
from tests.distributed.spawn import run
from tests.tiny import tiny_llama

MODES = {
    "split_gather": {"tp": 2, "sp_mode": "split_gather"},
    "all_to_all": {"sp": 2, "sp_mode": "all_to_all"},
}
WIDTHS = (16, 11, 13)  # the last two do not divide by 2


def loss_of(model) -> torch.Tensor:
    """One loss of three forwards; layers are computed again in its backward pass."""
    losses = []
    for width in WIDTHS:
        ids = torch.arange(width)[None] * 7 % 200
        logits = model(input_ids=ids, use_cache=False).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
    return torch.stack(losses).sum()


def gradients(mode: str) -> tuple[float, list[torch.Tensor]]:
    """In a worker: the loss, and the gradients of the norms, which every process holds whole."""
    from coati.parallel.boost import boost
    from coati.parallel.launch import launch
    from coati.parallel.options import ParallelOptions

    launch(seed=0, timeout_s=60)
    options = ParallelOptions(
        plugin="3d",
        grad_checkpoint=True,
        enable_sequence_parallelism=True,
        batch_size=1,
        **MODES[mode],
    )
    engine = boost(tiny_llama(), options, total_steps=1)
    engine.module.train()
    loss = loss_of(engine.model)
    engine.booster.backward(loss, engine.optimizer)
    grads = [p.grad.clone() for n, p in engine.module.named_parameters() if "norm" in n]
    return float(loss.detach()), grads


if transformers_major() >= 5:

    @pytest.mark.parametrize("mode", MODES)
    def test_layers_computed_again_know_the_length_of_their_forward(mode):
        model = tiny_llama().train()
        loss = loss_of(model)
        loss.backward()
        expected = [p.grad for n, p in model.named_parameters() if "norm" in n]
        for found, grads in run(2, f"{__name__}:gradients", mode):
            assert found == pytest.approx(float(loss.detach()), rel=1e-5)
            for mine, plain in zip(grads, expected, strict=True):
                torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)
