"""Arranged weights give the layers' own products, are used where they should be, and leave nothing
behind."""

import pytest
import torch
from torch import nn

from coati.inference.serve.inference_engine import SamplingParams
from coati.models.generation import mkl_prepack as prepack
from coati.models.generation.decoder import Decoder
from coati.models.generation.loop import generate
from coati.models.generation.mkl_prepack import MklPrepacked
from coati.models.head import Head
from tests.inference.serving import GREEDY, engine_of, until
from tests.tiny import tiny_llama

pytestmark = pytest.mark.skipif(not prepack.available(), reason="this PyTorch comes without MKL")


@pytest.fixture
def products(monkeypatch):
    """The row counts of the products that arranged weights are asked for."""
    asked, call = [], torch.ops.mkl._mkl_linear

    class Counting:
        _mkl_reorder_linear_weight = torch.ops.mkl._mkl_reorder_linear_weight

        @staticmethod
        def _mkl_linear(rows, *others):
            asked.append(len(rows))
            return call(rows, *others)

    monkeypatch.setattr(torch.ops, "mkl", Counting)
    return asked


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6, 16), (5, 1, 16), (2, 2, 16)])
def test_products_are_those_of_the_layer(products, shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 40, bias=bias), torch.randn(shape)
    with torch.no_grad(), MklPrepacked(layer) as prepacked:
        wanted = layer(x)
        prepacked.use(6)
        torch.testing.assert_close(layer(x), wanted)
    assert products == [6]  # fewer rows are filled up


@pytest.mark.parametrize("count", [1, 3, 7, 300])
def test_other_numbers_of_rows_take_the_layers_own_way(products, count):
    layer, x = nn.Linear(16, 40), torch.randn(count, 16)
    with torch.no_grad(), MklPrepacked(layer) as prepacked:
        prepacked.use(6)
        torch.testing.assert_close(
            layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
        )
    assert products == []


def test_a_gradient_takes_the_layers_own_way(products):
    layer = nn.Linear(16, 40)
    with MklPrepacked(layer) as prepacked:
        prepacked.use(6)
        layer(torch.randn(6, 16)).sum().backward()
    assert layer.weight.grad is not None and products == []


def test_autocast_takes_the_layers_own_way(products):
    layer = nn.Linear(16, 40)
    with torch.no_grad(), MklPrepacked(layer) as prepacked, torch.autocast("cpu", torch.bfloat16):
        prepacked.use(6)
        assert layer(torch.randn(6, 16)).dtype == torch.bfloat16 and products == []


def test_weights_are_arranged_anew_when_half_of_the_rows_have_ended(products):
    layer = nn.Linear(16, 40)
    with torch.no_grad(), MklPrepacked(layer) as prepacked:
        for rows in (8, 7, 5, 4, 3, 2, 1):
            prepacked.use(rows)
            layer(torch.randn(rows, 16))
    assert products == [8, 8, 8, 4, 4]  # two rows and one need no arranging


def test_patience_waits_for_a_number_that_stays(products):
    layer = nn.Linear(16, 40)
    with torch.no_grad(), MklPrepacked(layer, patience=2) as prepacked:
        for _ in range(4):
            prepacked.use(8)
            layer(torch.randn(8, 16))
    assert products == [8, 8]


class Other(nn.Linear):
    """A layer with a product of its own."""


def test_only_plain_layers_are_touched():
    foreign, half, replaced = Other(16, 16), nn.Linear(16, 16).bfloat16(), nn.Linear(16, 16)
    replaced.forward = lambda x: x
    own = replaced.forward
    with MklPrepacked(nn.ModuleList([foreign, half, replaced])) as prepacked:
        prepacked.use(8)
        assert (
            "forward" not in foreign.__dict__
            and "forward" not in half.__dict__
            and replaced.forward is own
        )


def test_too_many_weights_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(prepack, "LIMIT_BYTES", 4 * 16 * 16 - 1)
    layer = nn.Linear(16, 16, bias=False)
    with MklPrepacked(layer) as prepacked:
        prepacked.use(8)
        assert "forward" not in layer.__dict__


def sample(model, rows=6, **keywords):
    torch.manual_seed(0)
    return generate(
        model,
        torch.randint(1, 30, (rows, 5)),
        stop_sequences=[[0]],
        max_new_tokens=24,
        generator=torch.Generator().manual_seed(1),
        return_logprobs=True,
        **keywords,
    )


def test_sampling_uses_them_and_changes_no_token(products, monkeypatch):
    model = tiny_llama()
    found = sample(model)
    assert set(products) >= {6}
    assert not any("forward" in layer.__dict__ for layer in model.modules())
    monkeypatch.setattr(prepack, "available", lambda: False)
    plain = sample(model)
    assert torch.equal(found.sequences, plain.sequences)
    torch.testing.assert_close(found.logprobs, plain.logprobs)


def test_weights_that_were_trained_since_are_the_ones_used(products):
    model = tiny_llama()
    sample(model, do_sample=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    found = sample(model, do_sample=False)
    logits = model(found.sequences).logits[:, 4:-1]
    new = found.sequences[:, 5:]
    inside = torch.arange(new.shape[1]) < found.lengths[:, None]
    assert torch.equal(logits.argmax(-1)[inside], new[inside]) and products


def test_the_vocabulary_head_is_given_back():
    model = tiny_llama()
    head = Head.install(model)
    sample(model)
    assert model.lm_head.forward.__self__ is head


def test_an_error_while_sampling_gives_the_layers_back(monkeypatch):
    model, stopped = tiny_llama(), Decoder._stopped

    def fails(decoder):
        if decoder.num_generated[0] == 3:
            assert "forward" in model.lm_head.__dict__
            raise RuntimeError("the third token")
        return stopped(decoder)

    monkeypatch.setattr(Decoder, "_stopped", fails)
    with pytest.raises(RuntimeError, match="the third token"):
        sample(model)
    assert not any("forward" in layer.__dict__ for layer in model.modules())


def test_memory_that_runs_out_while_arranging_leaves_the_layers_as_they_were(monkeypatch):
    layers, made = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)), prepack._Product

    def fails(layer, rows):
        if layer is layers[1]:
            raise MemoryError
        return made(layer, rows)

    monkeypatch.setattr(prepack, "_Product", fails)
    with pytest.raises(MemoryError), MklPrepacked(layers) as prepacked:
        prepacked.use(8)
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_the_server_uses_them_while_rows_are_there(products):
    with engine_of(endless=True, pause=0.01) as engine:
        asked = [
            engine.submit([1, 2, 3, 4 + n], SamplingParams(GREEDY, 40), lambda chunk: None)
            for n in range(4)
        ]
        assert until(lambda: all(len(request.tokens) == 40 for request in asked))
        assert until(lambda: engine.running == 0)
        model = engine.loaded.model
        assert not any("forward" in layer.__dict__ for layer in model.modules())
    assert set(products) == {4}
