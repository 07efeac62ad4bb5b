"""The inputs of checkpointed layers kept as copies: the same gradients, and nothing else moved."""

import logging

import pytest
import torch

from coati.models.lora.lora import LoraConfig, apply_lora
from coati.parallel import offload_activations
from coati.parallel.offload_activations import HostCopies, install
from coati.parallel.options import ParallelOptions
from coati.parallel.plugin_checks import check_options
from tests.tiny import tiny_llama

CHECKPOINTING = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
LAYERS = 3


def model_of(lora: bool = False, **fields):
    model = tiny_llama(layers=LAYERS, **fields)
    if lora:
        model = apply_lora(model, LoraConfig(r=4, linear_lora_dropout=0.0))
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(**CHECKPOINTING)
    return model.train()


def gradients(model, rows: int = 4, length: int = 64) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(3)
    ids = torch.randint(3, 384, (rows, length))
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    return float(loss), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("fields", [{}, {"lora": True}, {"tie": True}])
def test_gradients_are_the_same_to_the_bit(fields):
    """4 x 64 x 64 fp32 numbers of a layer's input are 64 KiB: moved, once a layer."""
    loss, plain = gradients(model_of(**fields))
    model = model_of(**fields)
    copies = install(model, HostCopies(everywhere=True))
    again, moved = gradients(model)
    assert copies.moved == LAYERS
    assert again == loss and len(moved) == len(plain)
    assert all(torch.equal(one, other) for one, other in zip(plain, moved, strict=True))


def test_what_was_copied_is_what_the_backward_pass_reads():
    """A copy that is changed in between changes the gradients: they do not read the original."""

    class Wrong(HostCopies):
        def unpack(self, packed):
            return super().unpack(packed) + 1

    _, plain = gradients(model_of())
    model = model_of()
    install(model, Wrong(everywhere=True))
    _, wrong = gradients(model)
    assert not all(torch.equal(one, other) for one, other in zip(plain, wrong, strict=True))


def test_evaluation_moves_nothing():
    model = model_of().eval()
    copies = install(model, HostCopies(everywhere=True))
    with torch.no_grad():
        gradients_free = model(torch.ones(4, 64, dtype=torch.long))
    assert copies.moved == 0 and gradients_free.logits.shape == (4, 64, 384)


def test_small_inputs_stay_and_that_nothing_moved_is_said_once(caplog):
    model = model_of()
    copies = install(model, HostCopies(everywhere=True))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            gradients(model, rows=1, length=8)
    assert copies.moved == 0
    assert caplog.text.count("--offload_activations moved nothing") == 1


def test_on_a_cpu_nothing_is_installed_and_that_is_said(caplog, monkeypatch):
    from coati.parallel import boost

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(offload_activations, "install", lambda model: pytest.fail("installed"))
    options = ParallelOptions(plugin="ddp", grad_checkpoint=True, offload_activations=True)
    with caplog.at_level(logging.WARNING):
        boost._prepare_model(tiny_llama(), options)
    assert "activations are in host memory already" in caplog.text


def test_it_needs_checkpointing():
    with pytest.raises(ValueError, match="--offload_activations .* needs --grad_checkpoint"):
        check_options("ddp", offload_activations=True)
    check_options("ddp", offload_activations=True, grad_checkpoint=True)
