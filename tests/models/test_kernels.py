"""--kernels: Liger where it can be, an error where it was asked for and cannot, else what is there;
with a module in Liger's place."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from coati.models import kernels
from coati.models.kernels import choose_kernels
from coati.parallel.boost import apply_kernels
from coati.parallel.options import ParallelOptions
from coati.utils.logging import forget_warnings
from tests.tiny import tiny_llama


@pytest.fixture
def liger(monkeypatch):
    """A package of that name; the list of what its functions were called with."""
    calls: list[dict] = []

    def to_llama(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model=None,
    ) -> None:
        given = {"rope": rope, "rms_norm": rms_norm, "swiglu": swiglu, "model": model}
        losses = {"cross_entropy": cross_entropy}
        losses["fused_linear_cross_entropy"] = fused_linear_cross_entropy
        calls.append(given | losses)

    def to_mixtral(
        rope: bool = False, fused_linear_cross_entropy: bool = True, swiglu: bool = True, model=None
    ) -> None:
        calls.append({"rope": rope, "loss": fused_linear_cross_entropy, "swiglu": swiglu})

    def to_qwen2(model=None, rms_norm: bool = True) -> None:
        raise ImportError("cannot import name Qwen2Model")

    patch = ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {
        "llama": to_llama,
        "mixtral": to_mixtral,
        "qwen2": to_qwen2,
    }
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    found = kernels.importlib.util.find_spec
    monkeypatch.setattr(
        kernels.importlib.util,
        "find_spec",
        lambda name: SimpleNamespace() if name == "liger_kernel" else found(name),
    )
    return calls


@pytest.fixture
def said(caplog):
    forget_warnings()
    logging.getLogger("coati").propagate = True
    with caplog.at_level(logging.INFO, logger="coati"):
        yield lambda: [record.getMessage() for record in caplog.records]
    logging.getLogger("coati").propagate = False


def model_of(kind: str, **config):
    return SimpleNamespace(config=SimpleNamespace(model_type=kind, **config))


@pytest.mark.parametrize("asked", ["auto", "liger"])
def test_liger_without_its_cross_entropy_said_once(liger, said, asked):
    model = model_of("llama")
    choose_kernels(model, asked, "cuda")
    choose_kernels(model, asked, "cuda")
    assert liger[0] == {
        "rope": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
        "rms_norm": True,
        "swiglu": True,
        "model": model,
    }
    expected = "--kernels: rotary embedding, RMSNorm, SwiGLU of llama run as Liger's kernels"
    assert said() == [expected]


def test_adapters_and_scalar_heads_are_looked_through(liger):
    model = model_of("llama")
    scalar = SimpleNamespace(backbone=model, config=model.config)
    choose_kernels(SimpleNamespace(get_base_model=lambda: scalar), "liger", "cuda")
    assert liger[0]["model"] is model


def test_of_experts_the_rest_alone(liger, said):
    """What Liger has off by default stays off."""
    choose_kernels(model_of("mixtral", num_local_experts=4), "auto", "cuda")
    (call,) = liger
    assert call == {"rope": False, "loss": False, "swiglu": False}


@pytest.mark.parametrize(
    "kind, device, own_layers, why",
    [
        ("llama", "cpu", True, "need an NVIDIA GPU"),
        ("llama", "cuda", False, "splits or shards the layers"),
        ("opt", "cuda", True, "no kernels for opt models"),
        ("qwen2", "cuda", True, "does not fit this one of transformers for qwen2 models"),
    ],
)
def test_where_it_cannot_be(liger, said, kind, device, own_layers, why):
    with pytest.raises(ValueError, match=f"--kernels liger: .*{why}.*use --kernels auto"):
        choose_kernels(model_of(kind), "liger", device, own_layers)
    if device == "cuda":
        choose_kernels(model_of(kind), "auto", device, own_layers)
        (line,) = said()
        assert why in line and "transformers' own layers are used" in line
    assert not liger


def test_the_package_is_not_there(monkeypatch, said):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'coati\[liger\]'"):
        choose_kernels(model_of("llama"), "liger", "cuda")
    choose_kernels(model_of("llama"), "auto", "cuda")
    assert "liger-kernel is not installed" in said()[0]


def test_another_word():
    with pytest.raises(ValueError, match="--kernels 'triton': choose from auto, liger, torch"):
        choose_kernels(model_of("llama"), "triton", "cuda")


def test_on_a_cpu_the_librarys_own(said):
    model = tiny_llama()
    for _ in range(2):
        apply_kernels(model, ParallelOptions(plugin="ddp"))
    assert is_fused(model)
    apply_kernels(model, ParallelOptions(plugin="ddp", kernels="torch"))
    assert not is_fused(model)
    apply_kernels(model, ParallelOptions(plugin="ddp"))
    assert is_fused(model) and said() == []
    with pytest.raises(ValueError, match="--kernels liger"):
        apply_kernels(model, ParallelOptions(plugin="ddp", kernels="liger"))


def is_fused(model) -> bool:
    found = model.model.norm(torch.randn(1, 2, 64, requires_grad=True))
    return type(found.grad_fn).__name__ == "FusedRMSNormBackward"
