"""Packed weights give the layers' own products, are used where they should be, and leave nothing
behind."""

import json

import pytest
import torch
from torch import nn

from coati.inference.serve.inference_engine import SamplingParams
from coati.models.generation import layout_choice
from coati.models.generation import prepacked_linear as prepack
from coati.models.generation.decoder import Decoder
from coati.models.generation.loop import generate, generate_streaming
from coati.models.generation.prepacked_linear import LAYOUTS, Prepacked
from coati.models.head import Head
from coati.utils.logging import forget_warnings
from tests.inference.serving import GREEDY, engine_of, until
from tests.tiny import tiny_llama

AVAILABLE = [name for name, layout in LAYOUTS.items() if layout.available()]
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this PyTorch packs no weights")
needs_mkl = pytest.mark.skipif("mkl" not in AVAILABLE, reason="this PyTorch comes without MKL")
needs_onednn = pytest.mark.skipif("onednn" not in AVAILABLE, reason="this PyTorch has no oneDNN")


@pytest.fixture
def chosen(monkeypatch):
    """Says which layout is the fastest, whatever the machine."""

    def choose(name):
        monkeypatch.setattr(Prepacked, "_fastest", lambda self, rows: name)

    choose(AVAILABLE[0])
    return choose


@pytest.fixture
def products(monkeypatch, chosen):
    """The row counts of the products that packed weights are asked for, by layers one by one."""
    asked = []
    monkeypatch.setattr(prepack, "decodes_like_llama", lambda model, plain: False)
    for name, layout in LAYOUTS.items():

        def counting(rows, *others, product=layout.product):
            asked.append(len(rows))
            return product(rows, *others)

        counted = prepack.Layout(
            layout.available, layout.rows, layout.pack, counting, layout.serves
        )
        monkeypatch.setitem(LAYOUTS, name, counted)
    return asked


@pytest.mark.parametrize("layout", AVAILABLE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6, 16), (5, 1, 16), (2, 2, 16)])
def test_products_are_those_of_the_layer(products, chosen, shape, bias, layout):
    chosen(layout)
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 40, bias=bias), torch.randn(shape)
    with torch.no_grad(), Prepacked(layer) as prepacked:
        wanted = layer(x)
        prepacked.use(6)
        torch.testing.assert_close(layer(x), wanted)
    assert products == [len(x.flatten(0, -2))]


@needs_mkl
@pytest.mark.parametrize("count", [1, 3, 7, 300])
def test_other_numbers_of_rows_take_the_layers_own_way(products, chosen, count):
    chosen("mkl")
    layer, x = nn.Linear(16, 40), torch.randn(count, 16)
    with torch.no_grad(), Prepacked(layer) as prepacked:
        prepacked.use(6)
        torch.testing.assert_close(
            layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
        )
    assert products == []


def test_a_gradient_takes_the_layers_own_way(products):
    layer = nn.Linear(16, 40)
    with Prepacked(layer) as prepacked:
        prepacked.use(6)
        layer(torch.randn(6, 16)).sum().backward()
    assert layer.weight.grad is not None and products == []


def test_autocast_takes_the_layers_own_way(products):
    layer = nn.Linear(16, 40)
    with torch.no_grad(), Prepacked(layer) as prepacked, torch.autocast("cpu", torch.bfloat16):
        prepacked.use(6)
        assert layer(torch.randn(6, 16)).dtype == torch.bfloat16 and products == []


@needs_mkl
def test_mkl_packs_anew_when_half_of_the_rows_have_ended(products, chosen, monkeypatch):
    chosen("mkl")
    packed, layer = [], nn.Linear(16, 40)
    pack = Prepacked._pack
    monkeypatch.setattr(
        Prepacked,
        "_pack",
        lambda self, layout, rows: (packed.append(rows), pack(self, layout, rows)),
    )
    with torch.no_grad(), Prepacked(layer) as prepacked:
        for rows in (8, 7, 5, 4, 3):
            prepacked.use(rows)
            layer(torch.randn(rows, 16))
    assert packed == [8, 4] and products == [8, 7, 5, 4, 3]


@needs_onednn
def test_onednn_packs_once_for_every_number_of_rows(products, chosen, monkeypatch):
    chosen("onednn")
    packed, layer = [], nn.Linear(16, 40)
    pack = Prepacked._pack
    monkeypatch.setattr(
        Prepacked,
        "_pack",
        lambda self, layout, rows: (packed.append(rows), pack(self, layout, rows)),
    )
    with torch.no_grad(), Prepacked(layer) as prepacked:
        for rows in (3, 8, 16, 1):
            prepacked.use(rows)
            layer(torch.randn(rows, 16))
        layer(torch.randn(prepack.MOST_ROWS + 1, 16))  # a prompt
    assert packed == [3] and products == [3, 8, 16, 1]


def test_patience_waits_for_a_number_that_stays(products):
    layer = nn.Linear(16, 40)
    with torch.no_grad(), Prepacked(layer, patience=2) as prepacked:
        for _ in range(4):
            prepacked.use(8)
            layer(torch.randn(8, 16))
    assert products == [8, 8]


class Other(nn.Linear):
    """A layer with a product of its own."""


def test_only_plain_layers_are_touched(chosen):
    foreign, half, replaced = Other(16, 16), nn.Linear(16, 16).bfloat16(), nn.Linear(16, 16)
    replaced.forward = lambda x: x
    own = replaced.forward
    with Prepacked(nn.ModuleList([foreign, half, replaced])) as prepacked:
        prepacked.use(8)
        assert (
            "forward" not in foreign.__dict__
            and "forward" not in half.__dict__
            and replaced.forward is own
        )


def test_too_many_weights_stay_as_they_are(monkeypatch, chosen):
    monkeypatch.setattr(prepack, "LIMIT_BYTES", 4 * 16 * 16 - 1)
    layer = nn.Linear(16, 16, bias=False)
    with Prepacked(layer) as prepacked:
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
    monkeypatch.setattr(Prepacked, "_fastest", lambda self, rows: None)
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


def test_an_error_while_sampling_gives_the_layers_back(monkeypatch, chosen):
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


def test_memory_that_runs_out_while_packing_leaves_the_layers_as_they_were(monkeypatch, chosen):
    layers, made = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)), prepack._Product

    def fails(layer, *others):
        if layer is layers[1]:
            raise MemoryError
        return made(layer, *others)

    monkeypatch.setattr(prepack, "_Product", fails)
    with pytest.raises(MemoryError), Prepacked(layers) as prepacked:
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
    assert set(products) >= {4}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The measurements that are taken; nothing is known before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(layout_choice, "_known", {})
    seen = []

    def times(layer, rows, layouts):
        seen.append(rows)
        return {"layers": 3.0, "slow": 4.0, "fast": 1.0}

    monkeypatch.setattr(layout_choice, "_of_shape", times)
    return seen


def _layouts():
    layout = LAYOUTS[AVAILABLE[0]]
    return {"slow": layout, "fast": layout}


def test_what_was_measured_once_is_what_every_later_process_takes(measured, monkeypatch, tmp_path):
    layers = [nn.Linear(16, 40), nn.Linear(16, 40)]
    assert layout_choice.fastest(layers, 7, _layouts()) == "fast"
    assert layout_choice.fastest(layers, 8, _layouts()) == "fast" and measured == [8]
    layout_choice._known.clear()  # another process, on which the clock falls otherwise
    monkeypatch.setattr(
        layout_choice, "_of_shape", lambda *a: {"layers": 1.0, "slow": 2.0, "fast": 2}
    )
    assert layout_choice.fastest(layers, 8, _layouts()) == "fast"
    assert layout_choice.fastest(layers, 9, _layouts()) is None  # other numbers of rows: measured
    kept = [
        json.loads(file.read_text())["fastest"] for file in (tmp_path / "coati/layouts").iterdir()
    ]
    assert sorted(kept) == ["fast", "layers"]


def test_a_broken_file_is_replaced_and_a_folder_that_cannot_be_written_is_said(
    measured, monkeypatch, tmp_path, capfd
):
    layers = [nn.Linear(16, 40)]
    layout_choice.fastest(layers, 8, _layouts())
    (file,) = (tmp_path / "coati/layouts").iterdir()
    for text in ("{", '{"fastest": null}', '{"fastest": ["fast"]}', '{"fastest": "of later"}'):
        file.write_text(text)
        layout_choice._known.clear()
        assert layout_choice.fastest(layers, 8, _layouts()) == "fast"
        assert json.loads(file.read_text())["fastest"] == "fast"
    assert list(file.parent.iterdir()) == [file]
    file.unlink()
    file.mkdir()  # which nothing can be put in the place of
    (tmp_path / "a file").write_text("")
    for place in (tmp_path, tmp_path / "a file"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        layout_choice._known.clear()
        forget_warnings()
        capfd.readouterr()
        assert layout_choice.fastest(layers, 8, _layouts()) == "fast"
        assert "a resumed run measures again" in capfd.readouterr().err


def test_a_layout_that_gives_something_else_is_never_taken():
    layout = LAYOUTS[AVAILABLE[0]]
    wrong = prepack.Layout(
        layout.available, layout.rows, layout.pack, lambda x, *_: x.new_zeros(8, 40), layout.serves
    )
    with torch.no_grad():
        times = layout_choice._of_shape(nn.Linear(16, 40), 8, {"wrong": wrong, "right": layout})
    assert times["wrong"] == float("inf") and times["right"] < 1


@pytest.mark.parametrize("frozen", [False, True])
def test_streaming_packs_only_weights_that_stay_as_they_are(products, frozen):
    model = tiny_llama()
    asked = {"stop_sequences": [[0]], "max_new_tokens": 20, "do_sample": False}
    ids = torch.tensor([[5, 9, 17]])
    tokens = list(generate_streaming(model, ids, frozen=frozen, **asked))
    assert tokens == generate(model, ids, **asked).responses()[0]
    stream = generate_streaming(model, ids, frozen=frozen, **asked)
    products.clear()
    for _ in range(12):
        next(stream)
    assert bool(products) == frozen
    stream.close()  # a reader that has had enough
    assert not any("forward" in layer.__dict__ for layer in model.modules())
