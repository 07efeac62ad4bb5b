"""Fused layers give what the families' own give: outputs and gradients; what they keep, and what
they leave alone."""

import copy

import pytest
import torch
from torch.testing import assert_close

from coati.models.fused_layers import (
    FusedRMSNorm,
    FusedRotary,
    FusedSwiGLU,
    fuse_layers,
    original_layers,
)
from coati.models.lora.lora import LoraConfig, apply_lora
from coati.utils.transformers_compat import transformers_major
from tests.tiny import tiny_llama

FAMILIES = ["llama", "qwen2", "mistral"]
if transformers_major() >= 5:
    FAMILIES += ["qwen3", "gemma3_text", "gpt_oss", "qwen3_moe"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradients_by_differences():
    """In fp64, where gradcheck is exact."""
    x, weight = drawn(2, 3, 5).requires_grad_(), drawn(5, seed=1).requires_grad_()
    for offset in (0.0, 1.0):
        assert torch.autograd.gradcheck(
            lambda x, w, o=offset: FusedRMSNorm.apply(x, w, 1e-3, o), (x, weight)
        )
    query, key = drawn(1, 2, 3, 4).requires_grad_(), drawn(1, 1, 3, 4, seed=1).requires_grad_()
    # Halves that differ, as no model has them: each is used where it belongs.
    cos, sin = drawn(1, 1, 3, 4, seed=2), drawn(1, 1, 3, 4, seed=3)
    assert torch.autograd.gradcheck(lambda q, k: FusedRotary.apply(q, k, cos, sin), (query, key))
    gate, up = drawn(2, 5).requires_grad_(), drawn(2, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(FusedSwiGLU.apply, (gate, up))


def test_by_hand():
    x = torch.tensor([[3.0, 4.0]])  # root mean square sqrt(12.5)
    normed = FusedRMSNorm.apply(x, torch.tensor([1.0, 2.0]), 0.0, 0.0)
    assert_close(normed, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
    turned, _ = FusedRotary.apply(
        torch.tensor([[[[1.0, 2.0]]]]), x[None, None], torch.zeros(1, 2), torch.ones(1, 2)
    )
    assert turned.flatten().tolist() == [-2.0, 1.0]  # a quarter turn


def model_of(family: str):
    if family == "llama":
        return tiny_llama()
    from tests.models_table.families import BY_TYPE, tiny_model

    torch.manual_seed(0)
    return tiny_model(BY_TYPE[family])


def outcome(model, ids: torch.Tensor):
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_it_did(family):
    model = model_of(family).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.3, 0.5)
    ids = torch.randint(3, 384, (3, 17), generator=torch.Generator().manual_seed(2))
    fused = fuse_layers(model)
    assert "RMSNorm" in fused and fuse_layers(model) == fused  # twice is once
    with original_layers():
        logits, gradients = outcome(model, ids)
    found, others = outcome(model, ids)
    assert_close(found, logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n} {m}")


def test_the_llama_family_is_fused_whole_and_keeps_less():
    model = tiny_llama()
    assert fuse_layers(model) == ["RMSNorm", "rotary embedding", "SwiGLU"]
    ids = torch.randint(3, 384, (2, 64), generator=torch.Generator().manual_seed(0))

    def kept() -> int:
        sizes: dict[int, int] = {}
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, use_cache=False).logits.sum()
        assert loss.requires_grad
        return sum(sizes.values())

    with original_layers():
        before = kept()
    assert kept() < before


def test_half_precision_and_autocast_are_the_families_own():
    model = tiny_llama()
    fuse_layers(model)
    ids = torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(0))
    half = copy.deepcopy(model).to(torch.bfloat16)
    for each, context in ((half, torch.no_grad()), (model, torch.autocast("cpu", torch.bfloat16))):
        with context:
            found = each(input_ids=ids).logits
            with original_layers():
                assert torch.equal(each(input_ids=ids).logits, found)


def test_adapters_and_recomputed_layers():
    torch.manual_seed(0)
    config = LoraConfig(r=4, linear_lora_dropout=0.0)
    model = apply_lora(tiny_llama(), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    fuse_layers(model.get_base_model())
    ids = torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(0))
    with original_layers():
        logits, gradients = outcome(model, ids)
    found, others = outcome(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    again, recomputed = outcome(model, ids)
    assert_close(found, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, again)
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
        assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


def test_random_numbers_are_as_if_nothing_was_probed():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fuse_layers(tiny_like_nothing())
    assert torch.equal(torch.rand(3), expected)


def tiny_like_nothing() -> torch.nn.Module:
    """A gated block whose code adds something: it stays as it is."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = (torch.nn.Identity() for _ in range(3))
            self.gate_proj, self.up_proj, self.down_proj = layers
            self.act_fn = torch.nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + 1

    block = Block()
    assert fuse_layers(block) == []
    assert float(block(torch.zeros(1))) == 1.0
    return block


class Clamped(torch.nn.Module):
    """As in DeepSeek-V4: cut off beyond what usual inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(4, 4) for _ in range(3))
        self.act_fn = torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x).clamp(max=10.0)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x).clamp(-10.0, 10.0))


class Scaled(Clamped):
    """A factor that is 1 before training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ScaledFirstRMSNorm(torch.nn.Module):
    """Norm of x (1 + weight), which at weight 0 is that of x, times 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x * (1 + self.weight), (4,), eps=self.eps)


class BiasedRMSNorm(ScaledFirstRMSNorm):
    """A bias that is 0 before training."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = torch.nn.functional.rms_norm(x, (4,), eps=self.eps)
        return normed * (1 + self.weight) + self.bias


@pytest.mark.parametrize("kind", [Clamped, Scaled, ScaledFirstRMSNorm, BiasedRMSNorm])
def test_what_usual_inputs_and_fresh_weights_would_hide(kind):
    """Layers whose own code differs only for large inputs, or once it is trained."""
    layer = kind()
    assert fuse_layers(layer) == []
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "proj" not in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    x = 100 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), kind.forward(layer, x))


def test_a_layer_of_the_same_class_that_computes_something_else_keeps_its_own_code():
    model = tiny_llama()
    norms = [each for each in model.modules() if type(each).__name__ == "LlamaRMSNorm"]
    del norms[0].weight
    gates = [each for each in model.modules() if type(each).__name__ == "LlamaMLP"]
    gates[0].act_fn = torch.nn.ReLU()
    assert set(fuse_layers(model)) == {"RMSNorm", "rotary embedding", "SwiGLU"}
    x = torch.randn(1, 2, 64, requires_grad=True)
    with pytest.raises(AttributeError, match="no attribute 'weight'"):  # as without fused layers
        norms[0](x)
    assert type(norms[1](x).grad_fn).__name__ == "FusedRMSNormBackward"
    gated = gates[0].down_proj(torch.relu(gates[0].gate_proj(x)) * gates[0].up_proj(x))
    assert_close(gates[0](x), gated)


class GatedRMSNorm(torch.nn.Module):
    """Takes a gate, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x if gate is None else x * gate
        return torch.nn.functional.rms_norm(x, (4,), self.weight, self.eps)


class WantedRMSNorm(GatedRMSNorm):
    """Always takes a gate."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(x, gate)


def test_norms_of_other_forms():
    assert fuse_layers(torch.nn.RMSNorm(4)) == [] == fuse_layers(WantedRMSNorm())
    gated = GatedRMSNorm()
    assert fuse_layers(gated) == ["RMSNorm"]
    x, gate = drawn(2, 3, 4).float(), drawn(4, seed=1).float()
    wanted = torch.nn.functional.rms_norm(x * gate, (4,), gated.weight, gated.eps)
    assert torch.equal(gated(x, gate), wanted) and torch.equal(gated(x, gate=gate), wanted)


class OptionalRMSNorm(torch.nn.Module):
    """With weights or without, as those of Gemma 4."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.eps = 1e-6
        self.scaled = scaled
        if scaled:
            self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (4,), self.weight if self.scaled else None, self.eps)


def test_a_norm_without_weights_beside_one_of_its_class_that_has_them():
    norms = torch.nn.Sequential(OptionalRMSNorm(True), OptionalRMSNorm(False))
    assert fuse_layers(norms) == ["RMSNorm"]
    x = drawn(2, 3, 4).float()
    assert torch.equal(norms[1](x), torch.nn.functional.rms_norm(x, (4,), None, 1e-6))
    assert type(norms[0](x).grad_fn).__name__ == "FusedRMSNormBackward"
